"""Seeds derived from what they are for, so that nothing random needs saving."""

import numpy as np


def derive_seed(*key: int) -> int:
    """A seed for a torch generator from whole numbers ≥ 0, such as (seed, image index)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)

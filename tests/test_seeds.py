"""seeds.py: what a seed is, and how much of it torch keeps."""

import numpy as np
import pytest
import torch

from hf_ddpm.seeds import derive_seed, image_generators


@pytest.mark.parametrize("number", [-1, 1.5, 2.0, True, "1", None, [1]], ids=repr)
def test_what_is_no_seed(number):
    for use in (
        lambda: derive_seed(number),
        lambda: derive_seed(3, number),
        lambda: image_generators(number, [0]),
        lambda: image_generators(0, [number]),
    ):
        with pytest.raises(ValueError, match=r"^seed is .*; allowed: whole numbers >= 0$"):
            use()


def test_any_whole_number_is_one():
    assert derive_seed(np.int64(3), 4) == derive_seed(3, np.uint8(4)) == derive_seed(3, 4)
    assert 0 <= derive_seed(2**100) < 2**63
    assert len(image_generators(0, np.arange(3))) == 3


def test_the_cpu_keeps_32_bits_of_a_seed_as_the_page_says():
    def drawn(seed):
        return torch.randn(4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(5), drawn(5 + 2**32))
    assert not torch.equal(drawn(5), drawn(5 + 2**31))

"""Which images of a step are whose: positions in the run's one endless sequence, shared out to processes.

Step n consumes the positions n·G … n·G + G − 1, whatever the number of processes; G is fixed for a run. The
file is integers only: what stands at a position is order.py's, what is drawn there draws.py's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

EMPTY = -1


@dataclass(frozen=True)
class StepShare:
    """One process's part of every step, in micro-steps of equal size.

    Process r takes the positions n·G + r, n·G + r + W, …: every W-th, so that it reads few lanes (order.py).
    All processes have as many slots; where G doesn't divide, the last ones are empty.

    Attributes:
        per_step: images of a step over all processes, G.
        batch_size: the most that a process takes at once.
        rank: this process, 0 to W − 1.
        world_size: number of processes, W.

    Raises:
        ValueError: fewer images in a step than processes.
    """

    per_step: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.per_step < self.world_size:
            raise ValueError(
                f"{self.world_size} processes share the {self.per_step} images of a step; allowed: at most "
                f"{self.per_step} processes"
            )

    @property
    def micro_steps(self) -> int:
        """Micro-steps of each step."""
        return -(-self._slots // self.batch_size)

    @property
    def micro_batch(self) -> int:
        """Slots of each micro-step, at most `batch_size`."""
        return -(-self._slots // self.micro_steps)

    @property
    def _slots(self) -> int:
        return -(-self.per_step // self.world_size)

    def slots(self, first_step: int) -> Iterator[list[int]]:
        """The positions of each micro-step, from `first_step` on without end; `EMPTY` where there is none."""
        step = first_step
        while True:
            for micro in range(self.micro_steps):
                places = range(micro * self.micro_batch, (micro + 1) * self.micro_batch)
                offsets = [place * self.world_size + self.rank for place in places]
                yield [step * self.per_step + j if j < self.per_step else EMPTY for j in offsets]
            step += 1

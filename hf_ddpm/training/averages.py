"""Exponential moving averages of a network's weights, in float32, one for each decay.

    w̄ ← w̄ + (1 − d_n) (w − w̄),     d_n = min(decay, (1 + n) / (10 + n)) after n steps, and d_0 = 0

The file knows networks as lists of tensors; how averages are saved is said in run.py.
"""

import copy

import torch
from torch import Tensor, nn


def decay_at(decay: float, step: int) -> float:
    """d_n, the share of itself that the average keeps at the step after `step` steps."""
    return min(decay, (1 + step) / (10 + step)) if step else 0.0


def average_of(model: nn.Module) -> nn.Module:
    """A copy of the network that holds its average."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network. Buffers, such as a batch norm's statistics, are copied.

    Args:
        average: of `average_of`.
        model: the network, after its step.
        decay: the limit of d_n.
        step: steps done before this one, n.
    """
    weights: list[Tensor] = list(model.parameters())
    means: list[Tensor] = list(average.parameters())
    torch._foreach_lerp_(means, weights, 1 - decay_at(decay, step))
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)

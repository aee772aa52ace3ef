"""Exponential moving averages of a network's weights, one for each decay.

    w̄ ← w̄ + (1 − d_n) (w − w̄),     d_n = min(decay, (1 + n) / (10 + n)) after n steps, and d_0 = 0

An average is two numbers in float32 for each weight, w̄ = mean + rest, where mean is the float32 next to w̄
and rest what that leaves out. In float32 alone w̄ would stand still where the step (1 − d_n)(w − w̄) is under
half of its last digit: with decay 0.99999, where w is within 0.3 % of it. The sum is Knuth's TwoSum, which
loses nothing, so w̄ has about 48 bits.

The mean is a network, which samples and is saved with the pipeline; its rest is beside it and goes into
checkpoints. So an average takes twice the memory of the network's weights.

The file knows networks as lists of tensors; how averages are saved is said in run.py.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

REST = ".rest"  # after the decay: what a checkpoint calls the rest of an average
PIECE = 2**24  # numbers whose average is moved at once, as what is computed on the way takes memory


def decay_at(decay: float, step: int) -> float:
    """d_n, the share of itself that the average keeps at the step after `step` steps."""
    return min(decay, (1 + step) / (10 + step)) if step else 0.0


def average_of(model: nn.Module) -> nn.Module:
    """A copy of the network that holds its average; `rest_of` gives the rest, which is 0 at first."""
    average = copy.deepcopy(model).eval().requires_grad_(False)
    rest = copy.deepcopy(average)
    torch._foreach_zero_(list(rest.parameters()))
    return _keep_rest(average, rest)


def _keep_rest(average: nn.Module, rest: nn.Module) -> nn.Module:
    """Put a rest beside an average, out of its weights' list and its state; returns the average."""
    average.__dict__["_rest"] = rest
    return average


def rest_of(average: nn.Module) -> nn.Module:
    """What the weights of an average leave out of it: a network of the same form, with the same names."""
    return average.__dict__["_rest"]


def prepare_average(average: nn.Module, prepare: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The average after `prepare`, FSDP's sharing out for one, was done to it and to its rest."""
    rest = prepare(rest_of(average))
    return _keep_rest(prepare(average), rest)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network. Buffers, such as a batch norm's statistics, are copied.

    Args:
        average: of `average_of`.
        model: the network, after its step.
        decay: the limit of d_n.
        step: steps done before this one, n.
    """
    share = 1 - decay_at(decay, step)
    for means, rests, weights in _pieces(average, rest_of(average), model):
        if share == 1:
            torch._foreach_copy_(means, weights)
            torch._foreach_zero_(rests)
            continue
        # What is added to the mean: the old rest, and the share of w − mean − rest
        added = torch._foreach_sub(weights, means)
        torch._foreach_sub_(added, rests)
        torch._foreach_mul_(added, share)
        torch._foreach_add_(added, rests)
        # The sum, what it took of either number, and what of both it left out
        total = torch._foreach_add(means, added)
        of_added = torch._foreach_sub(total, means)
        of_means = torch._foreach_sub(total, of_added)
        torch._foreach_sub_(added, of_added)
        torch._foreach_sub_(means, of_means)
        torch._foreach_add_(added, means)
        torch._foreach_copy_(means, total)
        torch._foreach_copy_(rests, added)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def _pieces(*networks: nn.Module) -> Iterator[tuple[list[Tensor], ...]]:
    """The weights of networks of one form, some at a time; under FSDP this process's share of them."""
    rows: list[tuple[Tensor, ...]] = []
    for weights in zip(*(network.parameters() for network in networks), strict=True):
        row = tuple(weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights)
        if rows and sum(one[0].numel() for one in rows) + row[0].numel() > PIECE:
            yield tuple(map(list, zip(*rows, strict=True)))
            rows = []
        rows.append(row)
    if rows:
        yield tuple(map(list, zip(*rows, strict=True)))

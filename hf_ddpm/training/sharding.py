"""The state of a network and its optimizer as whole tensors by name, also where FSDP shares them out.

torch's own functions do the same for one process, DDP and FSDP, so that a checkpoint of one serves the
others. All processes call the functions here together.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SCATTER = StateDictOptions(full_state_dict=True)
# A weight that never had a gradient has no state
_SCATTER_SOME = StateDictOptions(full_state_dict=True, strict=False)


def gather_model(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name on process 0, on the CPU; empty elsewhere.

    Without FSDP they may be the network's own tensors, which its next step changes.
    """
    return get_model_state_dict(model, options=_GATHER)  # type: ignore[return-value]


def gather_optimizer(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state by the weights' names, like `gather_model`; empty before its first step."""
    # Of an optimizer without a state, torch would first make one by taking a step
    if not optimizer.state:
        return {}
    return get_optimizer_state_dict(model, optimizer, options=_GATHER)


def restore_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `gather_model` gave; each process has all of it, and keeps its share."""
    set_model_state_dict(model, dict(state), options=_SCATTER)


def restore_optimizer(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `gather_optimizer` gave; the hyperparameters stay as they are.

    Raises:
        ValueError: the state of a weight that the network doesn't have.
    """
    if not state:
        return
    weights = dict(model.named_parameters(remove_duplicate=False))
    if unknown := state["state"].keys() - weights.keys():
        raise ValueError(f"the network has no {sorted(unknown)[0]!r}")
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, dict(state), options=_SCATTER_SOME)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    saved = {weights[name] for name in state["state"]}
    for weight, moments in list(optimizer.state.items()):
        if weight not in saved:
            del optimizer.state[weight]
        elif isinstance(moments.get("step"), Tensor):
            # AdamW reads the count at each step, for which it would wait for a device
            moments["step"] = moments["step"].cpu()


def check_weights(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse weights that are none of the network's; torch would cast them, and load what is not finite.

    Raises:
        ValueError: the message names the first one.
    """
    wanted = model.state_dict()
    for name in sorted(state.keys() ^ wanted.keys()):
        raise ValueError(f"{name!r} is {'missing' if name in wanted else 'not of the network'}")
    for name, weight in state.items():
        if weight.shape != wanted[name].shape or weight.dtype != wanted[name].dtype:
            raise ValueError(
                f"{name!r} is {weight.dtype} {tuple(weight.shape)}; the network's is "
                f"{wanted[name].dtype} {tuple(wanted[name].shape)}"
            )
        if not weight.isfinite().all():
            raise ValueError(f"{name!r} is not finite")


def check_moments(state: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse an optimizer's state that is none of AdamW's for the network.

    Args:
        state: what `gather_optimizer` gave; empty before the first step.
        model: the network.

    Raises:
        ValueError: the message names the first weight of which it is not.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, moments in state["state"].items() if state else ():
        if name not in weights:
            raise ValueError(f"the network has no {name!r}")
        shapes = {"step": torch.Size(), "exp_avg": weights[name].shape, "exp_avg_sq": weights[name].shape}
        found = {key: torch.as_tensor(moments[key]) for key in shapes}
        if any(found[key].shape != shape or not found[key].isfinite().all() for key, shape in shapes.items()):
            raise ValueError(f"the optimizer's state of {name!r} has another shape or is not finite")
        if found["step"] < 0 or (found["exp_avg_sq"] < 0).any():
            raise ValueError(f"the optimizer's state of {name!r} is negative where it can't be")


def reshard(model: nn.Module) -> None:
    """Give up what a process holds of the others' shares: FSDP keeps the outermost ones after a forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that processes share out, put together on all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_finite(model: nn.Module) -> Tensor:
    """1 if this process's share of all weights is finite, else 0, on the device."""
    return torch.stack([local(weight).isfinite().all() for weight in model.parameters()]).all().float()

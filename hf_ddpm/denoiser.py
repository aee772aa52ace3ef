"""A denoiser, which is a function of (x_t, t), and how any model becomes one.

A class-conditional network of C classes is a function of (x_t, t, class_labels), with a label for each
example, 0 to C − 1, or C for "no class". guidance.py makes denoisers of it for given classes; where no class
is given, it is the denoiser of "no class".
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_ddpm.checks import described

MAX_CLASSES = 100_000  # of a network and of the names beside it; the most that is known are 21,843


class Denoiser(Protocol):
    """What sampling, training and the bound call: a network, a closed form or a model of your own."""

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The model's output at x_t.

        Args:
            x_t: noisy images, shape (B, C, H, W).
            t: zero-based step of each example, shape (B,), int64.

        Returns:
            The prediction, shape (B, C, H, W); (B, 2C, H, W) if the model learns its variances.
        """
        ...


class _Adapted:
    """A model whose answer is unwrapped to a tensor and checked for its shape."""

    def __init__(self, model: Callable[..., Any], device: torch.device | None = None):
        self.model, self.device, self.no_class = model, device, num_classes(model)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        device = x_t.device if self.device is None else self.device
        given = [x_t.to(device), t.to(device)]
        if self.no_class is not None:
            given.append(torch.full((len(x_t),), self.no_class, device=device))
        answer = self.model(*given)
        # What counts is the answer's type. The model's class says nothing: DDP and torch.compile wrap it.
        if isinstance(answer, tuple) and answer:
            output = answer[0]
        elif isinstance(answer, Mapping):
            output = answer.get("sample")
        else:
            output = getattr(answer, "sample", answer)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the model answered {type(answer).__name__}; allowed: Tensor, tuple, .sample, ['sample']"
            )
        batch, channels, *sides = x_t.shape
        if output.shape not in (x_t.shape, torch.Size((batch, 2 * channels, *sides))):
            raise ValueError(
                f"the model answered shape {tuple(output.shape)} to x_t of shape {tuple(x_t.shape)}; "
                "allowed: the same shape, or twice the channels"
            )
        return output.to(x_t.device)


def scoring_device(device: torch.device) -> torch.device:
    """Where the bound of a network on `device` is computed: there, or on the CPU, as MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def as_denoiser(model: Callable[..., Any], device: torch.device | None = None) -> Denoiser:
    """The model as a `Denoiser`; a denoiser made here is returned as it is.

    Args:
        model: module or function of (x_t, t) that answers a tensor, an object whose `.sample` is one
            (diffusers' `UNet2DModel`, bare, in DDP or compiled), a dict with one under "sample", or a tuple
            that begins with one. A class-conditional network (see `num_classes`) is told "no class".
        device: where the model is, if not where its inputs are: these go there, and the answer comes back.

    Raises:
        ValueError: the model cannot be called, or needs more than x_t, t and a class; or, at a call, the
            answer is none of the above or misshapen.
    """
    if isinstance(model, type) or not callable(model):
        raise ValueError(f"model is {described(model)}; allowed: an nn.Module or a function of (x_t, t)")
    _check_conditions(model)
    return model if isinstance(model, _Adapted) else _Adapted(model, device)


def num_classes(model: Any) -> int | None:
    """How many classes a class-conditional network knows, besides "no class"; None for any other model.

    A network of diffusers or of this package says it by its config, whose `num_class_embeds` is C + 1: the
    last row of the table is "no class". A module of one's own says it by an attribute, `num_classes = C`, and
    is called as (x_t, t, class_labels), class_labels of shape (B,), int64, 0 to C.

    Args:
        model: any; a network in DDP or of torch.compile as well.

    Returns:
        C.
    """
    network, config = _unwrapped(model)
    if config is None:
        number = getattr(network, "num_classes", None) if isinstance(network, nn.Module) else None
        return number if isinstance(number, int) and not isinstance(number, bool) else None
    rows = config.get("num_class_embeds")
    return rows - 1 if isinstance(rows, int) and config.get("class_embed_type") is None else None


def _check_conditions(model: Any) -> None:
    """Refuse a network of diffusers that is conditioned on something else than the number of a class."""
    network, config = _unwrapped(model)
    kind = None if config is None else config.get("class_embed_type")
    if kind is not None and getattr(network, "class_embedding", None) is not None:
        raise ValueError(
            f"class_embed_type of the network is {described(kind)}; allowed: None, with num_class_embeds"
        )


def _unwrapped(model: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """A model without the wrappers of torch, such as DDP and torch.compile, and its config if it has one."""
    while isinstance(model, nn.Module) and type(model).__module__.partition(".")[0] == "torch":
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):  # of torch itself, or one whose class FSDP has changed
            break
        model = inner
    config = getattr(model, "config", None)
    return model, config if isinstance(config, Mapping) else None


class Counted:
    """A denoiser that counts its calls, one per image and step, and shows them in `bar` if there is one."""

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor], bar: Any = None):
        self.denoiser, self.bar, self.count = denoiser, bar, 0

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The denoiser's answer."""
        self.count += len(x_t)
        if self.bar is not None:
            self.bar.update(len(x_t))
        return self.denoiser(x_t, t)

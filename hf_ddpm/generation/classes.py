"""Which classes a pipeline draws: what its caller names, checked before any work, and the denoiser of them.

The caller says numbers or names; what a denoiser of a class and guidance are is guidance.py's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import described
from hf_ddpm.denoiser import Denoiser, as_denoiser, num_classes
from hf_ddpm.folders.labels import label_id
from hf_ddpm.guidance import Conditioned, Guided, check_interval, check_scale
from hf_ddpm.shown import fields_line
from hf_ddpm.visited import is_whole

NUMBERS_OR_TEXT = "iuU"  # NumPy's letters for the kinds of arrays that name classes
LIST = "a class, or a list, an array or a tensor of one for each image"


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of a batch of images, and how they are guided.

    Attributes:
        labels: y of each image, (B,), int64, on the CPU, where C is no class; None without any class.
        scale: w of guidance.py.
        interval: the steps lo ≤ t < hi that are guided; None for all.
    """

    labels: Tensor | None
    scale: float
    interval: tuple[float, float] | None

    __repr__ = fields_line

    def denoiser(self, network: Callable[..., Any], start: int = 0, size: int | None = None) -> Denoiser:
        """The network for the images from `start` on, `size` of them; by default for all."""
        if self.labels is None:
            return as_denoiser(network)
        labels = self.labels[start : None if size is None else start + size]
        if self.scale == 1:
            return Conditioned(network, labels)
        return Guided(network, labels, self.scale, self.interval)

    @property
    def evaluations(self) -> int:
        """How many images the network gets for each image that is drawn, at most."""
        return 1 if self.labels is None or self.scale in (0, 1) else 2


def count_labels(class_labels: Any) -> int | None:
    """How many images a caller gives classes for; None where one class, or none, is for all."""
    if isinstance(class_labels, Tensor | np.ndarray):
        return None if class_labels.ndim == 0 else len(class_labels)
    return len(class_labels) if isinstance(class_labels, list | tuple | range) else None


def check_classes(
    network: Any,
    id2label: Mapping[int, str] | None,
    num_images: int,
    num_steps: int,
    class_labels: Any,
    guidance_scale: Any,
    guidance_interval: Any,
) -> Classes:
    """What a caller asks for, once it is known to make sense.

    Args:
        network: the pipeline's.
        id2label: the names of its classes; None if they have none.
        num_images: how many are drawn.
        num_steps: T.
        class_labels: a number or a name, or None or "none" for no class; or a list, an array or a tensor with
            one of these for each image.
        guidance_scale: w ≥ 0.
        guidance_interval: (lo, hi), 0 ≤ lo ≤ hi ≤ T; None for all steps.

    Raises:
        ValueError: no such class, more or fewer than there are images, a class for a network that has none,
            or guidance without a class.
    """
    scale = check_scale(guidance_scale, "guidance_scale")
    interval = check_interval(guidance_interval, "guidance_interval", num_steps)
    classes = num_classes(network)
    guides = (
        f"guidance_scale is {scale:g}"
        if scale != 1
        else ""
        if interval is None
        else "guidance_interval is set"
    )
    if classes is None:
        if class_labels is not None or guides:
            asked = guides if class_labels is None else f"class_labels is {described(class_labels)}"
            raise ValueError(
                f"{asked}, but the network knows no classes; allowed: a class-conditional network"
            )
        return Classes(None, 1.0, None)
    given = _listed(class_labels)
    if given is not None and len(given) != num_images:
        raise ValueError(
            f"there are {len(given)} class_labels for {num_images} images; allowed: as many, or one"
        )
    labels = [_label(label, classes, id2label) for label in ([class_labels] if given is None else given)]
    if guides and all(label == classes for label in labels):
        raise ValueError(f"{guides}, but no class is given; allowed: with a class")
    if class_labels is None:
        return Classes(None, 1.0, None)
    return Classes(torch.tensor(labels, device="cpu").expand(num_images), scale, interval)


def _listed(given: Any) -> list[Any] | None:
    """Labels that are listed, as Python's numbers and texts; None for a single one."""
    if isinstance(given, Tensor | np.ndarray):
        tensor = isinstance(given, Tensor)
        fits = is_whole(given) and not given.is_meta if tensor else given.dtype.kind in NUMBERS_OR_TEXT
        if not fits or given.ndim > 1 or (given.ndim and not len(given)):
            raise ValueError(f"class_labels is {described(given)}; allowed: {LIST}, of whole numbers")
        return given.tolist() if given.ndim else None
    if isinstance(given, list | tuple | range):
        if not len(given):
            raise ValueError(f"class_labels is an empty {type(given).__name__}; allowed: {LIST}")
        return list(given)
    return None


def _label(given: Any, classes: int, id2label: Mapping[int, str] | None) -> int:
    """The number of one class; C for none."""
    if given is None:
        return classes
    if isinstance(given, Tensor | np.ndarray) and given.ndim == 0:
        given = given.item()
    if isinstance(given, Integral) and not isinstance(given, bool):
        given = int(given)
    elif not isinstance(given, str):
        raise ValueError(
            f"class is {described(given)}; allowed: a number in 0..{classes - 1}, a name, or None"
        )
    return label_id(given, classes, id2label)

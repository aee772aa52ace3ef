"""Denoisers of a class-conditional network for given classes, and classifier-free guidance.

The network is a function of (x_t, t, y), y one of C classes or "no class". `Conditioned` fixes y; `Guided`
goes beyond that (Ho & Salimans 2022), by the predicted x_0:

    x̂_w = x̂_none + w (x̂_y − x̂_none)

w = 0 is the model without a class, w = 1 the conditional one, and w > 1 guides. (Ho & Salimans write 1 + w
for this w: theirs is 0 for the conditional model.) x̂_0 is linear in the network's output m, with coefficients
that depend on x_t and t alone, and the two weights 1 − w and w sum to 1. So it is the same to say

    m_w = m_none + w (m_y − m_none)

for the outputs, whether m is ε, x_0, v, the posterior's mean or the score, and no process is needed. That
holds as long as nothing is clipped: x̂_w is clipped once, by whoever uses m_w. It leaves [−1, 1] far more
often than either half does.

Both are plain denoisers (x_t, t) → m, for samplers and pictures. The bound is one of p(x | y) for
`Conditioned`; the bound of a `Guided` one is that of no model of the data.
"""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.checks import described
from hf_ddpm.denoiser import as_denoiser, num_classes
from hf_ddpm.tables import narrow, wide

Labels = int | Sequence[int] | np.ndarray | Tensor | None


class Conditioned:
    """A class-conditional network as the denoiser of given classes: (x_t, t) → network(x_t, t, y).

    Args:
        network: a class-conditional network, as `denoiser.num_classes` describes it.
        class_labels: y, a whole number in 0..C for all examples; C, or None, is "no class". Or one for each
            example, (B,): then it is called on B examples.

    Raises:
        ValueError: a network without classes, or labels that are not as above. Numbers in a tensor on an
            accelerator are trusted: reading them would stall the device.
    """

    def __init__(self, network: Callable[..., Any], class_labels: Labels = None):
        self.network = network
        self.classes = _classes(network)
        self.labels = _as_labels(class_labels, self.classes)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output for the classes.

        Args:
            x_t: noisy images, shape (B, C, H, W).
            t: zero-based step of each example, shape (B,), int64.

        Returns:
            m, shape (B, C, H, W), or (B, 2C, H, W) if the network learns its variances.

        Raises:
            ValueError: there are more or fewer labels than images, or what `as_denoiser` refuses.
        """
        return self._ask(x_t, t, self._labels_for(x_t))

    def _labels_for(self, x_t: Tensor) -> Tensor:
        """A label for each image, (B,), int64, where the images are."""
        if self.labels.ndim and len(self.labels) != len(x_t):
            raise ValueError(
                f"there are {len(self.labels)} class_labels for {len(x_t)} images; allowed: as many, or one"
            )
        return self.labels.to(x_t.device).expand(len(x_t))

    def _ask(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return as_denoiser(lambda x, steps: self.network(x, steps, labels))(x_t, t)


class Guided(Conditioned):
    """A class-conditional network with classifier-free guidance: m_w = m_none + w (m_y − m_none).

    w = 1 takes one call of the network, on the B images, and answers what `Conditioned` does, to the last
    bit; w = 0 as well, for "no class". Any other w takes one call on 2B images, and so twice the time and
    the memory. A learned variance is that of the class, and for w = 0 that of "no class".

    Args:
        network: a class-conditional network.
        class_labels: y, as in `Conditioned`, but not None. For an example of "no class" w changes nothing.
        scale: w ≥ 0.
        interval: (lo, hi), to guide only at steps lo ≤ t < hi of the training process, and use w = 1 at the
            others (Kynkäänniemi et al. 2024, who give the noise level σ = √((1 − ᾱ_t)/ᾱ_t) in the place of
            t). lo = hi is the conditional model. None for all steps. It is told by reading t, which stalls
            an accelerator if t is there.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        class_labels: Labels,
        scale: float,
        interval: tuple[float, float] | None = None,
    ):
        super().__init__(network, class_labels)
        self.scale, self.interval = check_scale(scale), check_interval(interval)
        if class_labels is None and self.scale != 1:
            raise ValueError(f"scale is {described(scale)}, but class_labels is None; allowed: a class, or 1")

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The guided output; as in `Conditioned`."""
        labels, rows = self._labels_for(x_t), self._guided(x_t, t)
        if self.scale == 1 or len(rows) == 0:
            return self._ask(x_t, t, labels)
        if self.scale == 0:
            return self._ask(x_t, t, labels.index_fill(0, rows, self.classes))
        steps = t.reshape(-1).to(x_t.device).expand(len(x_t))
        none = torch.full_like(rows, self.classes)
        both = torch.cat([x_t, x_t[rows]]), torch.cat([steps, steps[rows]]), torch.cat([labels, none])
        output, of_none = self._ask(*both).split([len(x_t), len(rows)])
        channels = x_t.shape[1]
        of_class, of_none = wide(output[rows, :channels]), wide(of_none[:, :channels])
        answer = output.clone()
        answer[rows, :channels] = narrow(of_none + self.scale * (of_class - of_none), output.dtype)
        return answer

    def _guided(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Which of the examples are at a step that is guided, where the images are."""
        if self.interval is None:
            return torch.arange(len(x_t), device=x_t.device)
        low, high = self.interval
        inside = ((t >= low) & (t < high)).reshape(-1).expand(len(x_t))
        return inside.nonzero().flatten().to(x_t.device)


def check_scale(scale: Any, name: str = "scale") -> float:
    """The guidance scale w as a float.

    Raises:
        ValueError: it is no finite number ≥ 0.
    """
    real = isinstance(scale, Real) and not isinstance(scale, bool)
    if not real or not 0 <= float(scale) < float("inf"):
        raise ValueError(f"{name} is {described(scale)}; allowed: finite numbers >= 0")
    return float(scale)


def check_interval(interval: Any, name: str = "interval", last: int | None = None) -> Any:
    """The steps lo ≤ t < hi that are guided, as a pair; None for all.

    Args:
        interval: lo and hi.
        name: of the argument.
        last: T, which hi may not exceed; None if it is not known.

    Raises:
        ValueError: they are no two numbers, 0 ≤ lo ≤ hi.
    """
    if interval is None:
        return None
    allowed = f"(lo, hi), two steps with 0 <= lo <= hi{'' if last is None else f' <= {last}'}"
    if not isinstance(interval, tuple | list):
        raise ValueError(f"{name} is {described(interval)}; allowed: {allowed}")
    if len(interval) != 2:
        raise ValueError(f"{name} has length {len(interval)}; allowed: {allowed}")
    for end in interval:
        if not isinstance(end, Real) or isinstance(end, bool):
            raise ValueError(f"{name} holds {described(end)}; allowed: {allowed}")
    low, high = map(float, interval)
    if not 0 <= low <= high < float("inf") or (last is not None and high > last):
        raise ValueError(f"{name} is ({low:g}, {high:g}); allowed: {allowed}")
    return low, high


def _classes(network: Any) -> int:
    """How many classes a network knows."""
    if isinstance(network, type) or not callable(network):
        raise ValueError(f"network is {described(network)}; allowed: one of (x_t, t, class_labels)")
    found = num_classes(network)
    if found is None:
        raise ValueError(
            f"network is {described(network)} without classes; allowed: one whose config has a "
            "num_class_embeds, or a module with an attribute num_classes"
        )
    return found


def _as_labels(given: Any, classes: int) -> Tensor:
    """Labels as a tensor of int64, () or (B,)."""
    allowed = f"whole numbers in 0..{classes}, where {classes} is no class: one, or one for each image"
    if given is None:
        given = classes
    if isinstance(given, Integral) and not isinstance(given, bool):
        given = int(given)
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        for label in given:
            if not isinstance(label, Integral) or isinstance(label, bool):
                raise ValueError(f"class_labels holds {described(label)}; allowed: {allowed}")
    elif not isinstance(given, Tensor | np.ndarray):
        raise ValueError(f"class_labels is {described(given)}; allowed: {allowed}")
    try:
        labels = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"class_labels is {described(given)}; allowed: {allowed}") from None
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.ndim > 1 or labels.numel() == 0:
        raise ValueError(f"class_labels is {described(given)}; allowed: {allowed}")
    if labels.device.type == "cpu":
        wrong = labels[(labels < 0) | (labels > classes)]
        if len(wrong):
            raise ValueError(f"class_labels holds {wrong[0].item()}; allowed: {allowed}")
    return labels.long()

"""What a network's output means. Each prediction type is two coefficients; the conversions follow from them.

Every output m is a sum of the clean image and the noise, with coefficients that depend on t:

    m = p x_0 + q ε,      x_t = a x_0 + s ε,      a = √ᾱ_t,  s = √(1 − ᾱ_t)

    prediction_type    output m               p               q
    epsilon            ε                      0               1
    sample             x_0                    1               0
    v_prediction       a ε − s x_0            −s              a
    mean               μ̃_t(x_t, x_0)          c0 + c_t a      c_t s
    score              ∇ log q(x_t | x_0)     0               −1/s

Solving the two equations for x_0 and ε gives

    x̂_0 = (q x_t − s m) / (q a − s p)         ε̂ = (a m − p x_t) / (q a − s p)

Where q a = s p, m is a multiple of x_t and says nothing new. In a respaced chain `mean` is still μ̃_t of the
chain that the network was trained on, with that chain's c0 and c_t. The other four depend on ᾱ_t alone, which
respacing leaves.

To add a prediction type, add its row to `PARAMETRIZATIONS`, and its name to `PredictionType`.

Sources: epsilon and mean, Ho et al. 2020, eqs. 7, 8, 11; v, Salimans & Ho 2022, app. D; score, Tweedie.
The file knows no network, no loss and no sampler.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_ddpm.checks import check_images, described
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.shown import fields_line
from hf_ddpm.tables import add_scaled, narrow, wide, wide_dtype

PredictionType = Literal["epsilon", "sample", "v_prediction", "mean", "score"]
TINY = 2.0**-60  # below it, coefficients are scaled before they become float32, which ends at 2^-126


@dataclass(frozen=True, eq=False)
class Parametrization:
    """A prediction type: the output m = p x_0 + q ε, and the tables of its conversions.

    Attributes:
        p: a function of the process that gives the coefficient of x_0 at each t, (T,) float64.
        q: the same for ε.
        in_diffusers: whether diffusers' own schedulers have a word for it.
        determinant: the same for q a − s p, where the difference of the two products would lose digits; None
            to take that difference.
    """

    p: Callable[[DiffusionProcess], Tensor]
    q: Callable[[DiffusionProcess], Tensor]
    in_diffusers: bool
    determinant: Callable[[DiffusionProcess], Tensor] | None = None

    __repr__ = fields_line

    def x0(self, process: DiffusionProcess) -> tuple[Tensor, Tensor, Tensor]:
        """Tables u, v, w of x̂_0 = (u x_t + v m) / w, each (T,) float64; where q = 0, x̂_0 = m / p."""
        q = self.q(process)
        return q, torch.where(q == 0, 1, -process.sqrt_one_minus_alphas_cumprod), self.x0_divisor(process)

    def x0_divisor(self, process: DiffusionProcess) -> Tensor:
        """The table w of `x0`, which is 0 where m says nothing about x_0."""
        return torch.where(self.q(process) == 0, self.p(process), self._determinant(process))

    def eps(self, process: DiffusionProcess) -> tuple[Tensor, Tensor, Tensor]:
        """Tables u, v, w of ε̂ = (u x_t + v m) / w, each (T,) float64; where p = 0, ε̂ = m / q."""
        p = self.p(process)
        u, v = -p, torch.where(p == 0, 1, process.sqrt_alphas_cumprod)
        w = torch.where(p == 0, self.q(process), self._determinant(process))
        # Late in a long chain all three may be too small for float32. A common power of two changes no digit.
        largest = torch.maximum(u.abs(), v)
        scale = torch.where(largest < TINY, largest.frexp().mantissa / largest, 1)
        return u * scale, v * scale, w * scale

    def output(self, process: DiffusionProcess) -> tuple[Tensor, Tensor]:
        """Tables p and q."""
        return self.p(process), self.q(process)

    def scale(self, process: DiffusionProcess) -> Tensor:
        """⟨(m_θ − m)²⟩ in units of ⟨(x̂_0 − x_0)²⟩ at one x_t, ((q a − s p) / s)², (T,) float64."""
        return _rounded_to_1(self._determinant(process) ** 2 / process.one_minus_alphas_cumprod)

    def _determinant(self, process: DiffusionProcess) -> Tensor:
        if self.determinant is not None:
            return self.determinant(process)
        a, s = process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod
        return _rounded_to_1(self.q(process) * a - s * self.p(process))


def _rounded_to_1(table: Tensor) -> Tensor:
    """The table with 1 for what rounding has left next to it, such as a² + s²."""
    return torch.where((table - 1).abs() < 1e-15, 1, table)


def _zero(process: DiffusionProcess) -> Tensor:
    return torch.zeros_like(process.betas)


def _one(process: DiffusionProcess) -> Tensor:
    return torch.ones_like(process.betas)


def _mean_p(process: DiffusionProcess) -> Tensor:
    full = process.original or process
    return full.sqrt_alphas_cumprod_prev[process.timesteps]  # c0 + c_t a


def _mean_q(process: DiffusionProcess) -> Tensor:
    full = process.original or process
    return (full.posterior_mean_coef_xt * full.sqrt_one_minus_alphas_cumprod)[process.timesteps]


def _mean_determinant(process: DiffusionProcess) -> Tensor:
    """The determinant −s c0: as a difference it would lose digits where β is far below 1 − ᾱ."""
    full = process.original or process
    return -(full.posterior_mean_coef_x0 * full.sqrt_one_minus_alphas_cumprod)[process.timesteps]


PARAMETRIZATIONS: dict[str, Parametrization] = {
    "epsilon": Parametrization(_zero, _one, in_diffusers=True),
    "sample": Parametrization(_one, _zero, in_diffusers=True),
    "v_prediction": Parametrization(
        lambda process: -process.sqrt_one_minus_alphas_cumprod,
        lambda process: process.sqrt_alphas_cumprod,
        in_diffusers=True,
    ),
    "mean": Parametrization(_mean_p, _mean_q, in_diffusers=False, determinant=_mean_determinant),
    "score": Parametrization(
        _zero, lambda process: -1 / process.sqrt_one_minus_alphas_cumprod, in_diffusers=False
    ),
}
PREDICTION_TYPES: tuple[str, ...] = tuple(PARAMETRIZATIONS)


def parametrization(prediction_type: str) -> Parametrization:
    """The prediction type of that name.

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(prediction_type, str) or prediction_type not in PARAMETRIZATIONS:
        raise ValueError(
            f"prediction_type is {described(prediction_type)}; allowed: {', '.join(PARAMETRIZATIONS)}"
        )
    return PARAMETRIZATIONS[prediction_type]


def in_diffusers(prediction_type: Any) -> bool:
    """Whether diffusers' own schedulers read the output; True for an unknown name, which they refuse too."""
    return not any(
        name == prediction_type and not kind.in_diffusers for name, kind in PARAMETRIZATIONS.items()
    )


def works_from_pure_noise(prediction_type: str) -> bool:
    """Whether the output tells x_0 even where ᾱ_t = 0, at the end of a chain with zero terminal SNR."""
    to_noise = DiffusionProcess.from_betas([0.5, 1.0])
    return parametrization(prediction_type).x0_divisor(to_noise)[-1].item() != 0


def to_x0(
    process: DiffusionProcess, prediction_type: str, output: Tensor, x_t: Tensor, t: Tensor | int
) -> Tensor:
    """The predicted x̂_0 that a network's output means.

        x̂_0 = (q x_t − s m) / (q a − s p)

    Args:
        process: the chain that t indexes.
        prediction_type: what `output` is, one of `PREDICTION_TYPES`.
        output: the network's output m, shape (B, C, H, W).
        x_t: what the network saw, shape (B, C, H, W).
        t: zero-based index into the chain, shape (B,) int64, or one int for all.

    Returns:
        x̂_0, not clipped, shape and dtype of x_t (computed in float32 or wider).

    Raises:
        ValueError: an unknown prediction type; a step where the output says nothing about x_0, as "epsilon"
            and "score" do at ᾱ_t = 0 (steps on an accelerator are trusted).
    """
    kind = parametrization(prediction_type)
    check_images("to_x0(process, prediction_type, output, x_t, t)", output=output, x_t=x_t)
    u, v, w = process.computed_at(t, x_t, kind.x0)
    if not isinstance(w, float) or w == 0:
        _require_x0(process, prediction_type, t)
    x, m = wide(x_t), wide(output)
    x_0 = _times(v, m) if _is(0, u) else add_scaled(_times(u, x), v, m)
    return narrow(x_0 if _is(1, w) else x_0 / w, x_t.dtype)


def to_eps(
    process: DiffusionProcess, prediction_type: str, output: Tensor, x_t: Tensor, t: Tensor | int
) -> Tensor:
    """The predicted noise ε̂ that a network's output means; arguments as in `to_x0`.

        ε̂ = (a m − p x_t) / (q a − s p)

    Raises:
        ValueError: an unknown prediction type.
    """
    kind = parametrization(prediction_type)
    check_images("to_eps(process, prediction_type, output, x_t, t)", output=output, x_t=x_t)
    u, v, w = process.computed_at(t, x_t, kind.eps)
    eps = _sum(u, wide(x_t), v, wide(output))
    return narrow(eps if _is(1, w) else eps / w, x_t.dtype)


def to_score(
    process: DiffusionProcess, prediction_type: str, output: Tensor, x_t: Tensor, t: Tensor | int
) -> Tensor:
    """The score ∇ log q(x_t) from a network's output, −ε̂/√(1 − ᾱ_t): Tweedie's formula solved for it.

        E[√ᾱ_t x_0 | x_t] = x_t + (1 − ᾱ_t) ∇ log q(x_t)

    A network is trained on one (x_0, ε) at a time, whose *conditional* score is ∇ log q(x_t | x_0) =
    −ε/√(1 − ᾱ_t). Its optimum is the mean of these given x_t, and that is the *marginal* score: of the
    noised data, where no x_0 is given.

    Args:
        process: the chain that t indexes.
        prediction_type: what `output` is, one of `PREDICTION_TYPES`.
        output: the network's output, shape (B, C, H, W).
        x_t: what the network saw, shape (B, C, H, W).
        t: zero-based index into the chain, shape (B,) int64, or one int for all.

    Returns:
        The score, shape and dtype of x_t (computed in float32 or wider). Every prediction type has one at
        ᾱ_t = 0 too, where x_t = ε: there it is −x_t whatever "sample", "v_prediction" and "mean" answer,
        and −m for "epsilon".

    Raises:
        ValueError: an unknown prediction type.
    """
    check_images("to_score(process, prediction_type, output, x_t, t)", output=output, x_t=x_t)
    (s,) = process.at(t, x_t, "sqrt_one_minus_alphas_cumprod")
    return narrow(-to_eps(process, prediction_type, wide(output), wide(x_t), t) / s, x_t.dtype)


def from_x0_eps(
    process: DiffusionProcess, prediction_type: str, x_0: Tensor, eps: Tensor, t: Tensor | int
) -> Tensor:
    """The output m that means (x_0, ε): a network's training target, and the inverse of `to_x0` and `to_eps`.

    Args:
        process: the chain that t indexes.
        prediction_type: what to return, one of `PREDICTION_TYPES`.
        x_0: clean images, shape (B, C, H, W).
        eps: the noise in x_t, shape (B, C, H, W).
        t: zero-based index into the chain, shape (B,) int64, or one int for all.

    Returns:
        m, shape and dtype of x_0 (computed in float32 or wider).

    Raises:
        ValueError: an unknown prediction type.
    """
    kind = parametrization(prediction_type)
    check_images("from_x0_eps(process, prediction_type, x_0, eps, t)", x_0=x_0, eps=eps)
    p, q = process.computed_at(t, x_0, kind.output)
    return narrow(_sum(p, wide(x_0), q, wide(eps)), x_0.dtype)


def output_scale(process: DiffusionProcess, prediction_type: str, t: Tensor | int, like: Tensor) -> Any:
    """⟨(m_θ − m)²⟩ in units of ⟨(x̂_0 − x_0)²⟩ at one x_t: what turns a weight on x_0 into one on the output.

        SNR_t (epsilon), 1 (sample), 1/(1 − ᾱ_t) (v_prediction), c0² (mean), ᾱ_t/(1 − ᾱ_t)² (score)

    Args:
        process: the chain that t indexes.
        prediction_type: what the output is, one of `PREDICTION_TYPES`.
        t: zero-based index into the chain, shape (B,) int64, or one int for all.
        like: images, shape (B, C, H, W).

    Returns:
        A factor that multiplies images: for an int t a float, else a tensor, float32 or wider, of shape
        (B, 1, 1, 1), or () where it is the same at every step.

    Raises:
        ValueError: as in `to_x0`.
    """
    (scale,) = process.computed_at(t, like, parametrization(prediction_type).scale)
    _require_x0(process, prediction_type, t)
    return (
        torch.as_tensor(scale, dtype=wide_dtype(like.dtype), device=like.device)
        if isinstance(t, Tensor)
        else scale
    )


def _require_x0(process: DiffusionProcess, prediction_type: str, t: Tensor | int) -> None:
    """Refuse steps where the output says nothing about x_0; steps on an accelerator are not read."""
    if (step := process.first_zero(t, PARAMETRIZATIONS[prediction_type].x0_divisor)) is not None:
        level = process.alphas_cumprod[process.index_of(step)].item()
        able = [
            repr(name)
            for name, kind in PARAMETRIZATIONS.items()
            if process.first_zero(t, kind.x0_divisor) is None
        ]
        raise ValueError(
            f"alphas_cumprod is {level:g} at step {step}, where prediction_type {prediction_type!r} says "
            f"nothing about x_0; allowed there: {', '.join(able)}"
        )


# A coefficient may be the float 0.0 or 1.0 (see `Tables.computed_at`): then the product is left out.


def _is(number: int, coefficient: Tensor | float) -> bool:
    return isinstance(coefficient, float) and coefficient == number


def _times(coefficient: Tensor | float, images: Tensor) -> Tensor:
    return images if _is(1, coefficient) else coefficient * images


def _sum(a: Tensor | float, x: Tensor, b: Tensor | float, y: Tensor) -> Tensor:
    """The sum `a·x + b·y`."""
    if _is(0, a):
        return _times(b, y)
    return _times(a, x) if _is(0, b) else _times(a, x) + _times(b, y)

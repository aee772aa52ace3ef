"""What a network's output means: epsilon, sample, v_prediction, mean and score. Conversions, nothing else.

With a = √ᾱ_t and s = √(1 − ᾱ_t), every output m is affine in the pair (x_0, ε), hence in m and x_t:

    prediction_type    output m               x̂_0                 ε̂
    epsilon            ε                      (x_t − s m) / a     m
    sample             x_0                    m                   (x_t − a m) / s
    v_prediction       a ε − s x_0            a x_t − s m         s x_t + a m
    mean               μ̃_t(x_t, x_0)          (m − c_t x_t) / c0  √(1−ᾱ)/β (x_t − √α m)
    score              ∇ log q(x_t | x_0)     (x_t + s² m) / a    −s m

In a respaced chain `mean` is still μ̃_t of the chain that the network was trained on, with that chain's β, c0
and c_t. The other four depend on ᾱ_t alone, which respacing leaves.

Sources: epsilon and mean, Ho et al. 2020, eqs. 7, 8, 11; v, Salimans & Ho 2022, app. D; score, Tweedie.
It knows no network, no loss and no sampler.
"""

from typing import Any, Literal, get_args

from torch import Tensor

from hf_ddpm.process import DiffusionProcess
from hf_ddpm.tables import add_scaled, narrow, wide

PredictionType = Literal["epsilon", "sample", "v_prediction", "mean", "score"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


def to_x0(
    process: DiffusionProcess, prediction_type: str, output: Tensor, x_t: Tensor, t: Tensor | int
) -> Tensor:
    """x̂_0 from a network's output.

    Args:
        process: the chain that t indexes.
        prediction_type: what `output` is, one of `PREDICTION_TYPES`.
        output: the network's output, shape (B, C, H, W).
        x_t: what the network saw, shape (B, C, H, W).
        t: zero-based index into the chain, shape (B,) int64, or one int for all.

    Returns:
        x̂_0, not clipped, shape and dtype of x_t (computed in float32 or wider).

    Raises:
        ValueError: an unknown prediction type; "epsilon" or "score" at ᾱ_t = 0, where they say nothing about
            x_0.
    """
    _check(prediction_type)
    if prediction_type == "epsilon":
        return process.predict_x0(x_t, output, t)
    x, m = wide(x_t), wide(output)
    a, s = process.at(t, x_t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    if prediction_type == "score":
        process.require_signal(t)
        x_0 = (x + s**2 * m) / a
    elif prediction_type == "v_prediction":
        x_0 = add_scaled(a * x, -s, m)
    elif prediction_type == "mean":
        chain, step = process.in_original(t)
        c0, ct = chain.at(step, x_t, "posterior_mean_coef_x0", "posterior_mean_coef_xt")
        x_0 = add_scaled(m, -ct, x) / c0
    else:
        x_0 = m
    return narrow(x_0, x_t.dtype)


def to_eps(
    process: DiffusionProcess, prediction_type: str, output: Tensor, x_t: Tensor, t: Tensor | int
) -> Tensor:
    """ε̂ from a network's output; arguments and errors as in `to_x0`."""
    _check(prediction_type)
    x, m = wide(x_t), wide(output)
    a, s = process.at(t, x_t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    if prediction_type == "epsilon":
        eps = m
    elif prediction_type == "score":
        eps = -s * m
    elif prediction_type == "v_prediction":
        eps = s * x + a * m
    elif prediction_type == "mean":
        chain, step = process.in_original(t)
        beta, root_alpha = chain.at(step, x_t, "betas", "sqrt_alphas")
        eps = s / beta * (x - root_alpha * m)
    else:
        eps = (x - a * m) / s
    return narrow(eps, x_t.dtype)


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
    (s,) = process.at(t, x_t, "sqrt_one_minus_alphas_cumprod")
    if prediction_type == "score":
        return narrow(wide(output), x_t.dtype)
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
    _check(prediction_type)
    x, e = wide(x_0), wide(eps)
    if prediction_type == "epsilon":
        m = e
    elif prediction_type == "sample":
        m = x
    elif prediction_type == "mean":
        chain, step = process.in_original(t)
        m = chain.q_posterior_mean(x, process.q_sample(x, e, t), step)
    else:
        a, s = process.at(t, x_0, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        m = a * e - s * x if prediction_type == "v_prediction" else -e / s
    return narrow(m, x_0.dtype)


def output_scale(process: DiffusionProcess, prediction_type: str, t: Tensor | int, like: Tensor) -> Any:
    """⟨(m_θ − m)²⟩ in units of ⟨(x̂_0 − x_0)²⟩ at one x_t: what turns a weight on x_0 into one on the output.

        SNR_t (epsilon), 1 (sample), 1/(1 − ᾱ_t) (v_prediction), c0² (mean), ᾱ_t/(1 − ᾱ_t)² (score)

    Args:
        process: the chain that t indexes.
        prediction_type: what the output is, one of `PREDICTION_TYPES`.
        t: zero-based index into the chain, shape (B,) int64, or one int for all.
        like: images, shape (B, C, H, W).

    Returns:
        A factor that multiplies images, shape (B, 1, 1, 1), float32 or wider; a float for an int t.

    Raises:
        ValueError: an unknown prediction type; "epsilon" or "score" at ᾱ_t = 0, where x̂_0 is undetermined.
    """
    _check(prediction_type)
    if prediction_type in ("epsilon", "score"):
        process.require_signal(t)
    snr, variance = process.at(t, like, "snr", "one_minus_alphas_cumprod")
    if prediction_type == "mean":
        chain, step = process.in_original(t)
        return chain.at(step, like, "posterior_mean_coef_x0")[0] ** 2
    return {
        "epsilon": snr,
        "sample": snr * 0 + 1,
        "v_prediction": 1 / variance,
        "score": snr / variance,
    }[prediction_type]


def _check(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}")

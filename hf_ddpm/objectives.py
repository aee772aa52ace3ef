"""What is minimised. Each objective is a small function of images, steps and noise, one value per example.

    simple           ⟨(m_θ − m)²⟩ of whatever the network predicts; of ε, it is eq. 14 of Ho et al. 2020
    min-snr          the same, as if min(SNR_t, γ) weighted the error of x_0 (Hang et al. 2023)
    score-matching   (1 − α_t)²/(2σ_t² α_t) ⟨(s_θ − ∇ log q(x_t | x_0))²⟩, the bound's quadratic part
    bound            L_t with its true weight, L_0 through the decoder (Ho et al. 2020, eq. 5)
    hybrid           simple + λ · bound, whose gradient trains the variance alone (Nichol & Dhariwal 2021)
    sddpm            −log p_θ(x_prev | x_t) for a drawn x_prev: the bound, before x_prev is averaged out

Those made of the bound are in bits/dim, times T, so that the mean over uniform t is the sum over all t. The
file knows the process, what outputs mean, and the bound's terms. It does not know how t and noise are drawn,
nor what is done with the gradient.

To add an objective, write its function and add its row to `OBJECTIVES`. Outside this file, pass a function or
an `Objective` to `train`, or give it a name with `register_objective`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hf_ddpm.checks import check_count, described
from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.gaussian import TANH_CLAMP, bits_per_dim, check_holds_levels, log_decoder
from hf_ddpm.likelihood.bound import check_batch, checked_options, predicted, term_nats
from hf_ddpm.parametrization import from_x0_eps, output_scale, parametrization
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.seeds import draw_noise, draw_steps
from hf_ddpm.shown import fields_line
from hf_ddpm.spelling import suggest_keywords
from hf_ddpm.tables import wide
from hf_ddpm.variances import FIXED, LEARNED, TRAINED, log_variance_at, outputs

Model = Callable[[Tensor, Tensor], Tensor]
COST_CHUNK = 2**22  # how many pixels' worth of images `cost_of_zero` makes at once
NO_LIMIT = 1e30  # above any loss, and finite, since checkpoints hold sums of it in JSON
# How far below log β̃_t a log-variance may be before a loss goes on linearly, as its gradient nears what
# float32 holds
LOG_VARIANCE_DEPTH = 40.0
# How many √β̃_t the held mean of `hybrid` may be off: there a pixel costs what it does at most in the
# published code, −log of its clamp at 1e-12, 27.6 nats
LARGEST_MISS = math.sqrt(-2 * math.log(TANH_CLAMP))


@suggest_keywords
def simple_loss(
    process: DiffusionProcess,
    model: Callable[..., Any],
    x_0: Tensor,
    t: Tensor | int | None = None,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """L_simple, Ho et al. 2020, eq. 14: the loss of algorithm 1, which the tutorials call `p_losses`.

        ⟨(ε − ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t))²⟩,      t ~ Uniform{0, …, T − 1},      ε ~ N(0, I)

    A training step of one's own is

        loss = simple_loss(process, model, x_0).mean()
        loss.backward()

    Args:
        process: the chain that t indexes, such as `DiffusionProcess.linear(1000)`.
        model: the network, a function (x_t, t) → output of the shape of x_t, as `as_denoiser` takes it.
        x_0: clean images in [−1, 1], shape (B, C, H, W).
        t: zero-based step of each example, shape (B,) int64, or one int for all; drawn here, uniformly for
            each example, if it is left out.
        noise: ε, shape of x_0; drawn here if it is left out.
        prediction_type: what the output means, one of `PREDICTION_TYPES`; for another one than "epsilon" its
            own target takes the place of ε.
        generator: of the t and then of the noise that are drawn here, by default torch's global one.

    Returns:
        Mean square over dimensions, one for each example, shape (B,), float32 or wider.

    Raises:
        ValueError: an unknown prediction type; images, steps or noise that don't go together; nothing to
            draw with the generator; or a model's answer of another shape than the images.
    """
    order = "simple_loss(process, model, x_0, t, noise)"
    drawn = {} if noise is None else {"noise": noise}
    check_batch(process, x_0, 0 if t is None else t, order, **drawn)
    if generator is not None and t is not None and noise is not None:
        raise ValueError("there are t, noise and a generator; allowed: to leave out what it is to draw")
    steps = draw_steps(len(process), x_0, generator) if t is None else _for_each(t, x_0)
    noise = draw_noise(x_0, generator) if noise is None else noise
    output = as_denoiser(model)(process.q_sample(x_0, noise, steps), process.timesteps_at(steps))
    return _square(process, output, x_0, steps, noise, prediction_type)


def min_snr_loss(
    process: DiffusionProcess,
    model: Model,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction_type: str,
    gamma: float = 5.0,
) -> Tensor:
    """Min-SNR-γ, Hang et al. 2023, eq. 9, in any parametrisation; a weighting for samples, no likelihood.

        min(SNR_t, γ) ⟨(x̂_0 − x_0)²⟩;   as a weight: min(SNR, γ)/SNR on ε, min(SNR, γ)/(SNR + 1) on v

    Arguments and errors as in `simple_loss`, and:
        gamma: γ, above 0.
    """
    check_batch(process, x_0, t, "min_snr_loss(process, model, x_0, t, noise)", noise=noise)
    t = _for_each(t, x_0)
    like = _doubles(x_0)
    weight = process.at(t, like, "snr")[0].clamp(max=gamma) / output_scale(process, prediction_type, t, like)
    return weight * simple_loss(process, model, x_0, t, noise, prediction_type)


def score_matching_loss(
    process: DiffusionProcess,
    model: Model,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction_type: str,
    variance_type: str,
) -> Tensor:
    """Denoising score matching with the bound's weights: its KLs without their constants, a square for L_0.

        T · (1 − α_t)² / (2 σ_t² α_t) ⟨(s_θ − ∇ log q(x_t | x_0))²⟩ / ln 2

    With the weight 1 − ᾱ_t in its place it would be L_simple of ε. The marginal score ∇ log q(x_t) as the
    target would have the same gradient in expectation (Vincent 2011).

    Args and errors as in `simple_loss`, and:
        variance_type: σ_t², one of `variances.FIXED`.
    """
    if variance_type not in FIXED:
        raise ValueError(f"variance_type is {described(variance_type)}; allowed: {', '.join(FIXED)}")
    check_batch(process, x_0, t, "score_matching_loss(process, model, x_0, t, noise)", noise=noise)
    t = _for_each(t, x_0)
    # As a weight on the error of x_0 it is c0² / (2σ_t²), which is finite where α_t = 0 too.
    like = _doubles(x_0)
    (c0,) = process.at(t, like, "posterior_mean_coef_x0")
    log_variance = torch.as_tensor(log_variance_at(process, variance_type, None, t, like))
    weight = c0**2 * torch.exp(-log_variance) / 2 / output_scale(process, prediction_type, t, like)
    loss = weight * simple_loss(process, model, x_0, t, noise, prediction_type)
    return len(process) * bits_per_dim(loss, 1)


def bound_loss(
    process: DiffusionProcess,
    model: Model,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction_type: str,
    variance_type: str,
) -> Tensor:
    """The variational bound, Ho et al. 2020, eq. 5, without L_T: true weights, and L_0 through the decoder.

        T · L_t / (D ln 2),   x̂_0 not clipped

    Where a learned σ_t² is below e^−40 β̃_t, the loss goes on linearly in −log σ_t² but for a logarithm, so
    that its gradient stays finite. Such a loss is above 1e17.

    Args:
        process: the chain that t indexes.
        model: a denoiser (x_t, t) → output; 2C channels for a learned variance.
        x_0: clean images on the grid u/127.5 − 1, shape (B, C, H, W), float32 or float64. That they are on
            it is not looked at, as training reads nothing back; `train`'s are, and `bound_term` looks.
        t: zero-based step of each example, shape (B,), int64.
        noise: ε ~ N(0, I), shape (B, C, H, W).
        prediction_type: what the output means, one of `PREDICTION_TYPES`.
        variance_type: σ_t², as in `bound_term`.

    Returns:
        bits/dim, shape (B,), float64.

    Raises:
        ValueError: as in `bound_term`.
    """
    check_batch(process, x_0, t, "bound_loss(process, model, x_0, t, noise)", noise=noise)
    t = _for_each(t, x_0)
    output = model(process.q_sample(x_0, noise, t), process.timesteps_at(t))
    return _bound(process, output, x_0, t, noise, prediction_type, variance_type)


def hybrid_loss(
    process: DiffusionProcess,
    model: Model,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction_type: str,
    weight: float = 1e-3,
    variance_type: str = "learned_range",
) -> Tensor:
    """L_hybrid, Nichol & Dhariwal 2021, eq. 16, for a network that answers (m, v), 2C channels.

        ⟨(m_θ − m)²⟩ + λ T L_t / (D ln 2),   log σ_t² interpolated by v, and no gradient of L_t to m_θ

    The published λ = 0.001 counts bits at T = 1000, as here, and suits a network of ε, whose x̂_0 is good at
    the first steps from the start. One that answers x_0 there ("sample", "mean") may be 135 √β̃_t off, and
    these steps would drown the others. So for it L_t is taken with a mean that is at most 7.43 √β̃_t off,
    where a pixel costs 39.9 bits, the most that the published decoder charges. As L_t trains the variance
    alone, this bounds what a bad mean does to it; a better one counts as it is.

    Arguments and errors as in `bound_loss`, but:
        weight: λ.
        variance_type: a learned one.
    """
    check_batch(process, x_0, t, "hybrid_loss(process, model, x_0, t, noise)", noise=noise)
    t = _for_each(t, x_0)
    output = model(process.q_sample(x_0, noise, t), process.timesteps_at(t))
    if not isinstance(output, Tensor):
        raise ValueError(f"the model answered {described(output)}; allowed: a tensor")
    m, v = output[:, : x_0.shape[1]], output[:, x_0.shape[1] :]
    held = torch.cat([m.detach(), v], 1)
    _, of_noise = process.computed_at(0, x_0, parametrization(prediction_type).output)
    miss = LARGEST_MISS if of_noise == 0 else None
    bound = _bound(process, held, x_0, t, noise, prediction_type, variance_type, largest_miss=miss)
    return _square(process, m, x_0, t, noise, prediction_type) + weight * bound


def sddpm_loss(
    process: DiffusionProcess,
    model: Model,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    step_noise: Tensor,
    prediction_type: str,
    variance_type: str,
) -> Tensor:
    """The direct-KL objective of "SDDPM": regress x_prev on x_t with the Gaussian kernel p_θ(x_prev | x_t).

        x_prev ~ q(x_prev | x_0),   x_t ~ q(x_t | x_prev)
        T · {‖x_prev − μ_θ(x_t)‖² / (2σ_t² D) + ½ log σ_t² − ½ log β̃_t − ½} / ln 2,   the decoder at t = 0

    The entropy of q(x_prev | x_t, x_0), in which θ has no part, is taken off, so that the mean is the
    bound's. So is the gradient's, but it has more noise: x_prev stands where the bound has its mean μ̃_t.

    Args and errors as in `bound_loss`, but:
        noise: ε of x_prev, shape (B, C, H, W); at t = 0, where x_prev is x_0, it is not used.
        step_noise: ε of the step from x_prev to x_t, shape (B, C, H, W).
    """
    order = "sddpm_loss(process, model, x_0, t, noise, step_noise)"
    check_batch(process, x_0, t, order, noise=noise, step_noise=step_noise)
    t = _for_each(t, x_0)
    check_holds_levels("x_0", x_0)
    checked_options(process, variance_type, prediction_type, False, "exact")
    x_prev = process.q_sample_prev(x_0, noise, t)
    x_t = process.q_step(x_prev, step_noise, t)
    output = model(x_t, process.timesteps_at(t))
    x_0, x_prev, x_t = x_0.double(), x_prev.double(), x_t.double()
    mean_x0, log_variance = predicted(process, output, x_t, t, prediction_type, variance_type)
    (log_posterior,) = process.at(t, x_t, "log_fixed_small")
    log_variance = _continued(torch.as_tensor(log_variance), log_posterior)
    # Each example's gradient is that of its own term: what the other would make of it is kept out
    at_0 = (t == 0).view(-1, *[1] * (x_0.ndim - 1))
    error = x_prev - torch.where(at_0, x_prev, process.q_posterior_mean(mean_x0, x_t, t))
    own = torch.where(at_0, log_posterior, log_variance)
    kernel = 0.5 * (error.square() * torch.exp(-own) + own - log_posterior - 1)
    decoder = -log_decoder(x_0, torch.where(at_0, mean_x0, x_0), torch.where(at_0, log_variance, 0))
    nats = torch.where(at_0, decoder, kernel).flatten(1).sum(1)
    return len(process) * bits_per_dim(nats, math.prod(x_0.shape[1:]))


@dataclass(frozen=True)
class Objective:
    """An objective and what it needs.

    Attributes:
        loss: a function (process, model, x_0, t, *noises) that gives a value per example, shape (B,). `model`
            is a denoiser (x_t, t) → output; x_0 is (B, C, H, W); t is (B,) int64; each noise is ε ~ N(0, I),
            shape of x_0.
        noises: how many independent ε it takes.
        variance: which reverse variances it goes with. "fixed": those that need no training, as it trains
            none. "any": a learned one is trained too. "learned": only learned ones.
        outputs: channels of the network's answer per channel of the images, 1 or 2; `make_objective` sets it.
    """

    loss: Callable[..., Tensor]
    noises: int = 1
    variance: Literal["fixed", "any", "learned"] = "fixed"
    outputs: int = 1

    __repr__ = fields_line

    def __post_init__(self):
        if not callable(self.loss):
            raise ValueError(
                f"loss is a {type(self.loss).__name__}; allowed: a function (process, model, x_0, t, *noises)"
            )
        check_count("noises", self.noises, 0)
        if self.variance not in ("fixed", "any", "learned"):
            raise ValueError(f"variance is {described(self.variance)}; allowed: 'fixed', 'any', 'learned'")

    @torch.no_grad()
    def cost_of_zero(
        self,
        process: DiffusionProcess,
        shape: Sequence[int] = (1, 8, 8),
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """About what answering zero to white images costs at each t; 1 for `simple` on ε.

        Args:
            process: the chain.
            shape: (C, H, W) of the images. A loss of one's own may take no other.
            device: where the images are.

        Returns:
            The cost, (T,) float64 on the CPU; 1e30 where it isn't above 0, as no loss can be judged by that.
        """
        generator = torch.Generator().manual_seed(0)
        costs = []
        for t in torch.arange(len(process)).split(max(1, COST_CHUNK // math.prod(shape))):
            images = torch.ones(len(t), *shape, device=device)
            zero = images.new_zeros(()).expand(len(t), shape[0] * self.outputs, *shape[1:])
            noises = [torch.randn(images.shape, generator=generator).to(device) for _ in range(self.noises)]
            cost = self.loss(process, lambda x_t, steps, zero=zero: zero, images, t.to(device), *noises)
            costs.append(cost.cpu().double())
        found = torch.cat(costs)
        return torch.where(found > 0, found, NO_LIMIT)


@dataclass(frozen=True)
class Choices:
    """The options of a run that an objective may depend on.

    Attributes:
        prediction_type: what the network's output means, one of `PREDICTION_TYPES`.
        variance_type: the reverse variance, one of `variances.TRAINED`.
        snr_gamma: γ of min-snr.
        hybrid_weight: λ of hybrid.
    """

    prediction_type: str = "epsilon"
    variance_type: str = "fixed_large"
    snr_gamma: float = 5.0
    hybrid_weight: float = 1e-3

    __repr__ = fields_line

    @property
    def both(self) -> dict[str, str]:
        """Prediction and variance type, as keywords of a loss."""
        return {"prediction_type": self.prediction_type, "variance_type": self.variance_type}


OBJECTIVES: dict[str, Callable[[Choices], Objective]] = {
    "simple": lambda how: Objective(partial(simple_loss, prediction_type=how.prediction_type)),
    "bound": lambda how: Objective(partial(bound_loss, **how.both), variance="any"),
    "hybrid": lambda how: Objective(
        partial(hybrid_loss, **how.both, weight=how.hybrid_weight), variance="learned"
    ),
    "min-snr": lambda how: Objective(
        partial(min_snr_loss, prediction_type=how.prediction_type, gamma=how.snr_gamma)
    ),
    "score-matching": lambda how: Objective(partial(score_matching_loss, **how.both)),
    "sddpm": lambda how: Objective(partial(sddpm_loss, **how.both), noises=2, variance="any"),
}


def register_objective(name: str, make: Callable[[Choices], Objective]) -> None:
    """Give an objective of yours a name, which `TrainConfig(objective=NAME)` and `make_objective` then know.

    Args:
        name: not one of `OBJECTIVES`.
        make: a function of the run's `Choices` that gives the `Objective`. It is called once for each run.

    Raises:
        ValueError: the name is taken or no text, or `make` can't be called.
    """
    if not isinstance(name, str) or not name or OBJECTIVES.get(name, make) is not make:
        raise ValueError(f"objective {name!r} can't be registered; allowed: a name that is not taken")
    if not callable(make):
        raise ValueError(f"make is {make!r}; allowed: a function of Choices that gives an Objective")
    OBJECTIVES[name] = make


def make_objective(
    objective: str | Objective | Callable[..., Tensor],
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_large",
    snr_gamma: float = 5.0,
    hybrid_weight: float = 1e-3,
) -> Objective:
    """The objective of a run.

    Args:
        objective: one of the names in `OBJECTIVES`; or an `Objective`; or a loss that trains no variance: a
            function (process, model, x_0, t, noise) that gives a value per example, shape (B,).
        prediction_type: what the network's output means, one of `PREDICTION_TYPES`. An `Objective` or a loss
            of your own must know it by itself.
        variance_type: one of `variances.TRAINED`; "learned_range" only with an objective that trains it.
        snr_gamma: γ of min-snr.
        hybrid_weight: λ of hybrid.

    Returns:
        The objective with its `outputs`, whose loss refuses values that are not one per example.

    Raises:
        ValueError: an unknown name, no objective, or a variance that the objective doesn't train.
    """
    choices = Choices(prediction_type, variance_type, snr_gamma, hybrid_weight)
    if isinstance(objective, str) and objective in OBJECTIVES:
        name, found = repr(objective), OBJECTIVES[objective](choices)
    else:
        name, found = getattr(objective, "__name__", "of your own"), objective
    if callable(found) and not isinstance(found, type):
        found = Objective(found)
    if not isinstance(found, Objective):
        if found is not objective:
            raise ValueError(
                f"objective {name} was registered with a function that gave {type(found).__name__}; "
                "allowed: an Objective"
            )
        shown = repr(objective) if isinstance(objective, str) else f"of type {type(objective).__name__}"
        raise ValueError(
            f"objective is {shown}; allowed: {', '.join(OBJECTIVES)}, an Objective, or a function "
            "(process, model, x_0, t, noise)"
        )
    if variance_type not in TRAINED:
        raise ValueError(f"variance_type is {variance_type!r}; allowed: {', '.join(TRAINED)}")
    if found.variance == "learned" and variance_type in FIXED:
        learned = ", ".join(kind for kind in TRAINED if kind in LEARNED)
        raise ValueError(
            f"variance_type is {variance_type!r}, but objective {name} trains one; allowed with it: {learned}"
        )
    if found.variance == "fixed" and variance_type in LEARNED:
        raise ValueError(
            f"variance_type is {variance_type!r}, which objective {name} doesn't train; allowed with it: "
            f"{', '.join(FIXED)}"
        )
    return replace(found, loss=partial(per_example, found.loss), outputs=outputs(variance_type))


def per_example(
    loss: Callable[..., Tensor],
    process: DiffusionProcess,
    model: Model,
    x_0: Tensor,
    t: Tensor,
    *noises: Tensor,
) -> Tensor:
    """The values of a loss, refused where there is not one per example.

    A mean over the batch in their place would train with other weights.

    Args:
        loss: a function (process, model, x_0, t, *noises).
        process: as the loss takes it, and so the arguments that follow.
        model: a denoiser.
        x_0: images, shape (B, C, H, W).
        t: steps, shape (B,).
        *noises: each of the shape of x_0.

    Raises:
        ValueError: the loss gave something else than a tensor of shape (B,).
    """
    values: Any = loss(process, model, x_0, t, *noises)
    if not isinstance(values, Tensor) or values.shape != x_0.shape[:1]:
        given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the objective's loss gave {given}; allowed: one value per example, shape ({len(x_0)},)"
        )
    return values


def _for_each(t: Tensor | int, x_0: Tensor) -> Tensor:
    """One step for each image, (B,), where one int stands for all."""
    return t if isinstance(t, Tensor) else torch.full(x_0.shape[:1], int(t), device=x_0.device)


def _square(
    process: DiffusionProcess, output: Tensor, x_0: Tensor, t: Tensor, noise: Tensor, prediction_type: str
) -> Tensor:
    """Mean square over dimensions of an output against its target, (B,), float32 or wider."""
    target = from_x0_eps(process, prediction_type, x_0, noise, t)
    if not isinstance(output, Tensor):
        raise ValueError(f"the model answered {described(output)}; allowed: a tensor")
    if output.shape != target.shape:  # a difference would broadcast without a word
        raise ValueError(f"the model answered shape {tuple(output.shape)}; allowed: {tuple(target.shape)}")
    return (wide(output) - wide(target)).square().flatten(1).mean(1)


def _doubles(x_0: Tensor) -> Tensor:
    """What asks for coefficients (B,) in float64, where a late SNR doesn't underflow; MPS has none."""
    dtype = torch.float32 if x_0.device.type == "mps" else torch.float64
    return torch.empty(len(x_0), device=x_0.device, dtype=dtype)


def _bound(
    process: DiffusionProcess,
    output: Tensor,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction_type: str,
    variance_type: str,
    largest_miss: float | None = None,
) -> Tensor:
    """The term T · L_t in bits/dim, (B,), float64, of a network's output at x_t.

    Args:
        process: as in `bound_loss`, and so the arguments that follow.
        output: the network's.
        x_0: images.
        t: steps.
        noise: in x_t.
        prediction_type: what the output means.
        variance_type: the reverse variance.
        largest_miss: how many √β̃_t the mean may be off; None for no limit. With one there is no gradient to
            the mean beyond it.
    """
    check_holds_levels("x_0", x_0)
    checked_options(process, variance_type, prediction_type, False, "exact")
    x_t = process.q_sample(x_0, noise, t).double()
    x_0 = x_0.double()
    mean_x0, log_variance = predicted(process, output, x_t, t, prediction_type, variance_type)
    log_posterior, c0 = process.at(t, x_0, "log_fixed_small", "posterior_mean_coef_x0")
    if largest_miss is not None:
        error, limit = mean_x0 - x_0, largest_miss * torch.exp(0.5 * log_posterior) / c0
        mean_x0 = torch.where(error.abs() <= limit, mean_x0, x_0 + error.clamp(-limit, limit))
    log_variance = _continued(torch.as_tensor(log_variance), log_posterior)
    nats = term_nats(process, x_0, mean_x0, log_variance, t)
    return len(process) * bits_per_dim(nats, math.prod(x_0.shape[1:]))


def _continued(log_variance: Tensor, log_posterior: Tensor) -> Tensor:
    """Replace a log-variance too far below log β̃_t: the inverse variance grows linearly from there on."""
    beyond = log_posterior - LOG_VARIANCE_DEPTH - log_variance
    replaced = log_posterior - LOG_VARIANCE_DEPTH - torch.log1p(beyond.clamp(min=0))
    return torch.where(beyond > 0, replaced, log_variance)

"""What is minimised. Each objective is a function of (process, model, x_0, t, noise), one value per example.

It knows the process and what outputs mean; it does not know how t is drawn or what is done with the gradient.
"""

from torch import Tensor

from hf_ddpm.parametrization import from_x0_eps
from hf_ddpm.precision import wide
from hf_ddpm.process import DiffusionProcess


def simple_loss(
    process: DiffusionProcess, model, x_0: Tensor, t: Tensor, noise: Tensor, prediction_type: str
) -> Tensor:
    """L_simple, Ho et al. 2020, eq. 14 and algorithm 1; with t uniform over all T steps.

        ⟨(ε − ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t))²⟩,   or the same for another target than ε

    Args:
        process: the chain that t indexes.
        model: a denoiser (x_t, t) → output, C channels.
        x_0: clean images in [−1, 1], shape (B, C, H, W).
        t: zero-based step of each example, shape (B,), int64.
        noise: ε ~ N(0, I), shape (B, C, H, W).
        prediction_type: what the output means, one of `PREDICTION_TYPES`.

    Returns:
        Mean square over dimensions, shape (B,), float32 or wider.

    Raises:
        ValueError: the model's answer has another shape than the images.
    """
    output = model(process.q_sample(x_0, noise, t), process.timesteps_at(t))
    target = from_x0_eps(process, prediction_type, x_0, noise, t)
    if output.shape != target.shape:  # a difference would broadcast without a word
        raise ValueError(f"the model answered shape {tuple(output.shape)}; allowed: {tuple(target.shape)}")
    return (wide(output) - wide(target)).square().flatten(1).mean(1)

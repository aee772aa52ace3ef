"""The toy of docs/maths.md 4.1: Gaussians of eight widths on 8x8 images, with their exact denoiser."""

import torch

from tests.bound_oracles import per_step

WIDTHS = torch.linspace(0.05, 0.6, 8, dtype=torch.float64)


def mixture_images(count, seed=0):
    """Images width · N(0, I), clamped and rounded to grey levels, float64."""
    generator = torch.Generator().manual_seed(seed)
    width = WIDTHS[torch.randint(8, (count,), generator=generator)]
    x = width[:, None] * torch.randn(count, 64, generator=generator, dtype=torch.float64)
    return (((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1).view(count, 1, 8, 8)


def mixture_denoiser(name="linear", factor=1.0):
    """The network of prediction type "sample" that says factor · E[x_0 | x_t]."""

    def mean(x_t, abar):
        x, a = x_t.flatten(1), abar.flatten(1)
        variance = a * WIDTHS**2 + 1 - a  # of x_t, for each width
        log_weight = -0.5 * x.square().sum(1, keepdim=True) / variance - 0.5 * x.shape[1] * variance.log()
        gain = (log_weight.softmax(1) * a.sqrt() * WIDTHS**2 / variance).sum(1, keepdim=True)
        return (factor * gain * x).view_as(x_t)

    return per_step(name, mean)

"""Networks and pipelines that several test files share: tiny ones, and exact ones in closed form."""

from functools import lru_cache

import numpy as np
import torch

from hf_ddpm.models import create_model
from hf_ddpm.scheduler import DDPMScheduler

ROUNDING = 2e-4  # of a grey level of 1; at ᾱ_999 = 4e-5 an error of x_t counts 160 times in x̂_0
SIGMA_0 = 0.01  # √(1 − ᾱ_0) of the default schedule
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # the default schedule by its definition


@lru_cache
def tiny(**changes):
    """An untrained network, shared: no test may change it."""
    torch.manual_seed(0)
    return create_model("tiny", **changes).eval()


def short(**changes):
    """A scheduler of 20 steps."""
    return DDPMScheduler(**{"num_train_timesteps": 20, "beta_end": 0.5, **changes})


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def draw(pipeline, *args, **kwargs):
    """One call from seed 0, as an array (B, H, W, C)."""
    return quiet(pipeline)(*args, generator=seeds(1)[0], output_type="np", **kwargs).images


# Networks in closed form. Between two steps, where Euler's grid falls, √((1 − ᾱ)/ᾱ) is a line, as there.


def abar_at(t):
    sigma = np.interp(t[0].item(), np.arange(1000), np.sqrt((1 - ABAR) / ABAR))
    return 1 / (1 + sigma**2)


def output_for(kind, x_t, x_0, abar):
    eps = (x_t - abar**0.5 * x_0) / (1 - abar) ** 0.5
    v = abar**0.5 * eps - (1 - abar) ** 0.5 * x_0
    return {"epsilon": eps, "sample": x_0.expand(x_t.shape), "v_prediction": v}[kind].float()


def one_image(x_0, kind="epsilon"):
    """The exact network of a data set that holds only x_0."""
    return lambda x_t, t: output_for(kind, x_t.double(), x_0.double(), abar_at(t))


def gaussian(mean, std):
    """The exact network of independent pixels N(mean, std²): E[x_0 | x_t] is a line."""

    def denoise(x_t, t):
        abar, x_t = abar_at(t), x_t.double()
        slope = abar**0.5 * std**2 / (abar * std**2 + 1 - abar)
        return output_for("epsilon", x_t, mean + slope * (x_t - abar**0.5 * mean), abar)

    return denoise

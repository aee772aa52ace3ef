"""What the tests of the maths compare with: definitions in numpy, 50-digit arithmetic, random chains.

No table of hf_ddpm enters an oracle; `chain` and `spaced` build what is tested, and the last three functions
put its tables and its KL together into numbers that docs/maths.md states.
"""

from functools import lru_cache

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from hf_ddpm.gaussian import normal_kl
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.schedules import make_betas

law = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def near(expected: float, rel: float):
    """pytest.approx without its default abs=1e-12, which would let small numbers be anything."""
    return pytest.approx(expected, rel=rel, abs=0)


STEPS = {"linear": 1000, "scaled_linear": 1000, "squaredcos_cap_v2": 1000, "sigmoid": 1000, "constant": 50}


def betas_by_definition(name: str) -> np.ndarray:
    """The table of docs/maths.md 1, in numpy: β_t of the five schedules."""
    if name == "constant":
        return np.full(50, 0.2)
    if name == "squaredcos_cap_v2":
        level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - level[1:] / level[:-1], 0.999)
    if name == "scaled_linear":
        return np.linspace(np.sqrt(1e-4), np.sqrt(0.02), 1000) ** 2
    if name == "sigmoid":
        return (0.02 - 1e-4) / (1 + np.exp(-np.linspace(-6, 6, 1000))) + 1e-4
    return np.linspace(1e-4, 0.02, 1000)


@lru_cache
def chain(name: str) -> DiffusionProcess:
    """The process of a schedule of docs/maths.md 1."""
    return DiffusionProcess.from_betas(make_betas(name, STEPS[name], 0.2 if name == "constant" else 1e-4))


def spaced_steps(count: int) -> np.ndarray:
    """round(linspace(0, 999, K)), the kept steps of docs/maths.md 2, 8."""
    return np.round(np.linspace(0, 999, count)).astype(np.int64)


@lru_cache
def spaced(name: str, count: int) -> DiffusionProcess:
    return chain(name).respaced(spaced_steps(count))


def tables_by_bayes(betas: np.ndarray) -> dict[str, np.ndarray]:
    """Constants of q in 50 digits; the posterior as a product of two Gaussians in x_prev (precisions add).

        N(x_t; √α_t x_prev, β_t) · N(x_prev; √ᾱ_prev x_0, 1 − ᾱ_prev)   for t >= 1

    Entries 0 of c0, ct and β̃ are 1, 0 and 0: x_prev is x_0 itself.
    """
    names = ("abar", "one_minus_abar", "posterior_variance", "c0", "ct", "w_small", "w_large")
    rows = []
    with mpmath.workdps(50):
        abar = mpmath.mpf(1)
        for beta in map(mpmath.mpf, map(float, betas)):
            alpha, prev = 1 - beta, abar
            abar = alpha * prev
            var, c0, ct = mpmath.mpf(0), mpmath.mpf(1), mpmath.mpf(0)
            weights = [mpmath.nan, mpmath.nan]
            if prev != 1:
                var = 1 / (alpha / beta + 1 / (1 - prev))
                ct, c0 = var * mpmath.sqrt(alpha) / beta, var * mpmath.sqrt(prev) / (1 - prev)
            if prev != 1 and abar:
                # Half the squared shift of the mean per unit error of ε, over σ² (w_t of docs/maths.md 5).
                shift = (c0 * mpmath.sqrt(1 - abar) / mpmath.sqrt(abar)) ** 2
                weights = [shift / (2 * var), shift / (2 * beta)]
            rows.append([float(z) for z in (abar, 1 - abar, var, c0, ct, *weights)])
    return dict(zip(names, np.array(rows).T, strict=True))


def log_probability(x: float, mean: float, sigma: float) -> tuple[float, float, float]:
    """The decoder of one pixel by its definition, and its derivatives by mean and by log σ², in 60 digits.

    A bin above the mean is mirrored: Φ has all its digits in the left tail only.
    """
    if x > mean:
        log_p, by_mean, by_log_variance = log_probability(-x, -mean, sigma)
        return log_p, -by_mean, by_log_variance
    with mpmath.workdps(60):
        x, mean, sigma = mpmath.mpf(x), mpmath.mpf(mean), mpmath.mpf(sigma)
        low, high = ((x - mean + half / mpmath.mpf(255)) / sigma for half in (-1, 1))
        low, high = (-mpmath.inf if x < -0.999 else low), (mpmath.inf if x > 0.999 else high)
        p = mpmath.ncdf(high) - mpmath.ncdf(low)
        at_low, at_high = ((z, mpmath.npdf(z)) if mpmath.isfinite(z) else (0, 0) for z in (low, high))
        by_mean = (at_low[1] - at_high[1]) / (p * sigma)
        by_log_variance = (at_low[0] * at_low[1] - at_high[0] * at_high[1]) / (2 * p)
        return float(mpmath.log(p)), float(by_mean), float(by_log_variance)


def expectation(f, reach: float = 12, points: int = 4001):
    """E f(z), z ~ N(0, 1): the trapezoid rule, exact to rounding for smooth f; z is the last axis of f."""
    z = np.linspace(-reach, reach, points)
    weight = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    return (f(z) * weight).sum(-1)


@st.composite
def random_betas(draw, min_steps: int = 1, max_steps: int = 12, high: float = 0.9, terminal: bool = True):
    """β_t of an arbitrary chain, now and then with β = 1 at the end."""
    betas = draw(st.lists(st.floats(1e-4, high), min_size=min_steps, max_size=max_steps))
    if terminal and len(betas) > 1 and draw(st.booleans()):
        betas[-1] = 1.0
    return np.array(betas)


@st.composite
def subset(draw, steps):
    """Some of `steps`, in any order, none twice."""
    return draw(st.lists(st.sampled_from(list(steps)), min_size=1, unique=True))


def mse_of_gaussian(process, variance):
    """E(x̂_0 − x_0)² of the exact denoiser of N(0, variance): one over the sum of two precisions."""
    return variance / (1 + variance * process.alphas_cumprod / process.one_minus_alphas_cumprod)


def step_kl(process, log_variance, mse):
    """L_t per dim at every t (meaningless at t = 0) when x̂_0 misses by √mse."""
    shift = process.posterior_mean_coef_x0 * torch.as_tensor(mse, dtype=torch.float64).sqrt()
    zero = shift.new_zeros(())
    return normal_kl(shift, process.posterior_variance.log(), zero, log_variance)


def optimal_log_variance(process, mse):
    """log σ*² of docs/maths.md 7; at t = 0 it is the log of mse_0, since c0 = 1 and β̃ = 0."""
    return (process.posterior_variance + process.posterior_mean_coef_x0**2 * mse).log()

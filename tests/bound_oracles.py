"""What the tests of the bound share: images, networks that know their x̂_0, and the bound by linear algebra.

One pixel's chain (x_0, x_1, ...) is a linear map of independent noises; every constant of q is a conditional
of its joint covariance, and D pixels are D copies of it. p is the reverse chain of a linear denoiser, built
the same way. β alone enters, no formula of docs/maths.md.
"""

import math

import numpy as np
import torch

from hf_ddpm.likelihood import bound_term, prior_kl
from hf_ddpm.process import DiffusionProcess
from tests.oracles import betas_by_definition, chain, log_probability, spaced

LN2 = math.log(2)


def draw(*shape, seed=0):
    """ε of that shape, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(*shape, seed=0):
    """Random images on the grid of 256 levels, float64."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).double() / 127.5 - 1


def every_level():
    """The 256 images of one pixel."""
    return torch.arange(256).double()[:, None] / 127.5 - 1


def trapezoid(points, reach=12):
    """Nodes and weights of E f(ε), exact to rounding for smooth f."""
    z = torch.linspace(-reach, reach, points, dtype=torch.float64)
    return z, torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (z[1] - z[0])


def all_steps(process, model, x_0, noise, **options):
    """`bound_term` of one image and one noise at every t."""
    x_0, noise = (z.expand(len(process), *z.shape[1:]) for z in (x_0, noise))
    return bound_term(process, model, x_0, torch.arange(len(process)), noise, **options)


def per_step(name, guess):
    """The network guess(x_t, ᾱ_t); ᾱ is looked up at the network's step, in numpy from the schedule."""
    abar = torch.from_numpy(np.cumprod(1 - betas_by_definition(name)))
    return lambda x_t, steps: guess(x_t, abar[steps].view(-1, *[1] * (x_t.ndim - 1)))


def gaussian_denoiser(name, variance):
    """x̂_0 = E[x_0 | x_t] for x_0 ~ N(0, variance)."""
    return per_step(name, lambda x_t, abar: abar.sqrt() * variance / (1 - abar + abar * variance) * x_t)


def answers(x_0):
    """The network of prediction type "sample" that says x_0."""
    return lambda x_t, steps: x_0.expand_as(x_t)


def toy_model(x_t, steps):
    """Some network; in `toy_learned` with a second half of its output."""
    return 0.3 * x_t + 0.01 * steps.view(-1, *[1] * (x_t.ndim - 1))


def toy_learned(x_t, steps):
    return torch.cat([toy_model(x_t, steps), 0.5 * torch.sin(x_t)], 1)


def continuous_l0(mse, log_variance):
    """E −log N(x_0; x̂_0, σ_0²) per pixel: L_0 of a continuous image."""
    log_variance = float(log_variance)
    return 0.5 * (math.log(2 * math.pi) + log_variance + mse * math.exp(-log_variance))


def given(cov, wanted, known):
    """Gain G and covariance of x[wanted] = G x[known] + noise under the joint covariance `cov`."""
    gain = np.linalg.solve(cov[np.ix_(known, known)], cov[np.ix_(known, wanted)]).T
    return gain, cov[np.ix_(wanted, wanted)] - gain @ cov[np.ix_(known, wanted)]


def kl(mean1, cov1, mean2, cov2):
    """KL of two multivariate normals."""
    inverse, d = np.linalg.inv(cov2), mean2 - mean1
    log_det = np.linalg.slogdet(cov2)[1] - np.linalg.slogdet(cov1)[1]
    return 0.5 * (np.trace(inverse @ cov1) - len(d) + d @ inverse @ d + log_det)


class LinearModel:
    """A chain that keeps some steps, and the denoiser x̂_0 = A_t x_t + b_t on D pixels (random A and b).

    Attributes:
        process: what is tested.
        cov: joint covariance of one pixel's (x_0, x_1, ..., x_K), x_0 ~ N(0, 1).
        a, s: x_t = a x_0 + s ε.
        c0, ct, small: mean and variance of x_prev given x_0 and x_t; 1, 0 and 0 at t = 0.
        own_c0, own_ct: the mean's, where x_prev is one step of the full chain before: a network's `mean`.
        large: variance of x_t given x_prev.
    """

    def __init__(self, betas, kept, dims):
        self.process = DiffusionProcess.from_betas(betas).respaced(kept)
        self.kept, self.dims, count = np.array(kept), dims, len(kept)
        noise = np.eye(len(betas) + 1)
        for t, beta in enumerate(betas):
            noise[t + 1] = np.sqrt(1 - beta) * noise[t] + np.sqrt(beta) * noise[t + 1]
        full = [given(noise @ noise.T, [t], [0, t + 1])[0][0] if t else (1, 0) for t in kept]
        self.own_c0, self.own_ct = np.array(full).T
        rows = noise[[0, *(t + 1 for t in kept)]]
        self.cov = rows @ rows.T
        forward = [given(self.cov, [t + 1], [0]) for t in range(count)]
        self.a = np.array([gain[0, 0] for gain, _ in forward])
        self.s = np.sqrt([var[0, 0] for _, var in forward])
        back = [given(self.cov, [t], [0, t + 1]) for t in range(1, count)]
        self.c0 = np.array([1, *(gain[0, 0] for gain, _ in back)])
        self.ct = np.array([0, *(gain[0, 1] for gain, _ in back)])
        self.small = np.array([0, *(var[0, 0] for _, var in back)])
        self.large = np.array([given(self.cov, [t + 1], [t])[1][0, 0] for t in range(count)])
        random = np.random.default_rng(count)
        self.A = 0.2 * np.eye(dims) + 0.05 * random.standard_normal((count, dims, dims))
        self.b = 0.1 * random.standard_normal((count, dims))
        self.v = random.uniform(-1.2, 1.2, (count, dims))

    def log_variance(self, variance_type):
        """Log σ_t² of each pixel, (K, D); bound_term's argument; the second half of the output or None."""
        log_small = np.log([self.small[1], *self.small[1:]])[:, None] + 0 * self.v
        log_large = np.log([self.small[1], *self.large[1:]])[:, None] + 0 * self.v
        if variance_type == "learned_range":
            f = (self.v + 1) / 2
            return f * np.log(self.large)[:, None] + (1 - f) * log_small, variance_type, self.v
        if variance_type == "learned":
            return log_small + self.v, variance_type, log_small + self.v
        if variance_type == "tensor":
            table = log_small[:, 0] + self.v[:, 0]
            return table[:, None] + 0 * self.v, torch.from_numpy(table), None
        return {"fixed_small": log_small, "fixed_large": log_large}[variance_type], variance_type, None

    def denoise(self, x_t, t):
        """x̂_0 of flat images, (B, D)."""
        return np.einsum("bij,bj->bi", self.A[t], x_t) + self.b[t]

    def terms(self, x_0, t, noise, log_variance):
        """Nats, ⟨(x̂_0 − x_0)²⟩ and ⟨(ε̂ − ε)²⟩ of each example, each (B,), where no x̂_0 leaves [−1, 1]."""
        x, eps, i = x_0.flatten(1).numpy(), noise.flatten(1).numpy(), t.numpy()
        a, s, c0, ct = (z[i][:, None] for z in (self.a, self.s, self.c0, self.ct))
        x_t = a * x + s * eps
        guess, sigma = self.denoise(x_t, i), np.exp(0.5 * log_variance[i])
        assert np.abs(guess).max() < 1
        nats, unit = [], np.eye(self.dims)
        for b, mean in enumerate(c0 * x + ct * x_t):
            if i[b] == 0:
                pixels = zip(x[b], guess[b], sigma[b], strict=True)
                nats.append(-sum(log_probability(*pixel)[0] for pixel in pixels))
            else:
                predicted = (c0 * guess + ct * x_t)[b]
                nats.append(kl(mean, self.small[i[b]] * unit, predicted, np.diag(sigma[b] ** 2)))
        return nats, ((guess - x) ** 2).mean(1), (((x_t - a * guess) / s - eps) ** 2).mean(1)

    def network(self, prediction_type, second):
        """The denoiser as a network with that output; it is told the kept steps of the full chain."""

        def model(x_t, steps):
            t = np.searchsorted(self.kept, steps.numpy())
            x = x_t.flatten(1).numpy()
            x_0 = self.denoise(x, t)
            a, s, c0, ct = (z[t][:, None] for z in (self.a, self.s, self.own_c0, self.own_ct))
            eps = (x - a * x_0) / s
            out = {
                "epsilon": eps,
                "sample": x_0,
                "v_prediction": a * eps - s * x_0,
                "mean": c0 * x_0 + ct * x,
                "score": -eps / s,
            }[prediction_type]
            out = torch.from_numpy(out).view_as(x_t)
            return out if second is None else torch.cat([out, torch.from_numpy(second[t]).view_as(x_t)], 1)

        return model

    def reverse(self, log_variance):
        """Mean and covariance of (x_0, x_1, ..., x_K) under p_θ, each D wide; log_variance is (K, D)."""
        d, count = self.dims, len(self.kept)
        mean, noise = np.zeros((count + 1, d)), np.zeros((count + 1, d, d * (count + 1)))
        unit = np.eye(d * (count + 1)).reshape(count + 1, d, -1)
        noise[count] = unit[count]  # x_K ~ N(0, I)
        for t in reversed(range(count)):  # x_prev = μ_θ(x_t) + σ_t z
            slope = self.c0[t] * self.A[t] + self.ct[t] * np.eye(d)
            mean[t] = slope @ mean[t + 1] + self.c0[t] * self.b[t]
            noise[t] = slope @ noise[t + 1] + np.exp(0.5 * log_variance[t])[:, None] * unit[t]
        noise = noise.reshape(d * (count + 1), -1)
        return mean.flatten(), noise @ noise.T

    def log_p_and_gap(self, x_0, log_variance):
        """Exact log p_θ(x_0) as a density, and KL(q(x_1..x_K | x_0) ‖ p_θ(x_1..x_K | x_0)); x_0 is (D,)."""
        d, (mean, joint) = self.dims, self.reverse(log_variance)
        image, path = list(range(d)), list(range(d, len(mean)))
        off, cov = x_0 - mean[:d], joint[:d, :d]
        log_p = -0.5 * (off @ np.linalg.solve(cov, off) + np.linalg.slogdet(2 * np.pi * cov)[1])
        gain, p_cov = given(joint, path, image)
        slope, q_cov = given(np.kron(self.cov, np.eye(d)), path, image)
        return log_p, kl(slope @ x_0, q_cov, mean[d:] + gain @ off, p_cov)


CHAINS = {"full": ("constant", chain("constant")), "respaced": ("linear", spaced("linear", 25))}


def pixelwise(name, variance_type):
    """The exact denoiser of N(0, 1/4), with a second half of output for learned variances."""
    guess = gaussian_denoiser(name, 0.25)
    if variance_type != "learned_range":
        return guess
    return lambda x_t, steps: torch.cat([guess(x_t, steps), torch.sin(3 * x_t)], 1)


def expected_terms(process, model, x_0, **options):
    """Of each image: L_t and ⟨(x̂_0 − x_0)²⟩ in expectation over the noise, both (N, T); bits/dim."""
    z, weight = trapezoid(801)
    pixels, inverse = x_0.flatten(1).unique(return_inverse=True)
    single, noise = pixels.repeat_interleave(801)[:, None], z.repeat(len(pixels))[:, None]
    terms = [bound_term(process, model, single, t, noise, **options) for t in range(len(process))]
    found = torch.stack([torch.stack([term.nats / LN2, term.x0_mse]) for term in terms])
    per_pixel = (found.view(len(process), 2, -1, 801) * weight).sum(-1)
    return per_pixel[..., inverse].mean(-1).permute(1, 2, 0)


def expected_bound(process, model, x_0, **options):
    """E of the bound of each image, bits/dim, (N,)."""
    prior = prior_kl(process, x_0) / (x_0[0].numel() * LN2)
    return prior + expected_terms(process, model, x_0, **options)[0].sum(1)

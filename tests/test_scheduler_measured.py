"""scheduler.py with the variances "optimal" and "by-value": closed forms, and what must be refused."""

import copy
import pickle

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm.gaussian import discretized_gaussian_log_likelihood
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.variances import VALUE_BINS
from tests.measured import known_errors
from tests.oracles import mse_of_gaussian

SHAPE = (2, 1, 4, 4)
SPREAD = 0.3  # of Gaussian data


def scheduler_with(variance_type="optimal", mse=None, **config):
    """A scheduler with the errors of the exact denoiser of N(0, SPREAD²), or the given ones."""
    scheduler = DDPMScheduler(variance_type=variance_type, **{"clip_sample": False, **config})
    exact = mse_of_gaussian(scheduler.process, SPREAD**2)
    scheduler.errors = known_errors(scheduler.process, exact if mse is None else mse)
    return scheduler


def noise_of(scheduler, t, x_t, output):
    """σ of a step: x_prev of one noise, less that of its opposite, over twice the noise."""
    z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0), dtype=x_t.dtype)
    step = scheduler.step(output, t, x_t, torch.Generator().manual_seed(0))
    index = scheduler.chain.index_of(torch.full((len(x_t),), int(t)))
    mean = scheduler.chain.q_posterior_mean(step.pred_original_sample, x_t, index)
    return (step.prev_sample - mean) / z


def optimal_sigma(abar, steps, mse):
    """σ of every step but the first of a chain: β̃ (1 + Δ m_t) from ᾱ alone, in numpy."""
    a = abar[np.sort(steps)]
    beta = 1 - a[1:] / a[:-1]
    snr = a / (1 - a)
    variance = beta * (1 - a[:-1]) / (1 - a[1:])
    return np.sqrt(variance * (1 + (snr[:-1] - snr[1:]) * np.asarray(mse)[np.sort(steps)][1:]))


# Closed forms


@pytest.mark.parametrize("steps", [7, 20])
def test_gaussian_data_keep_their_spread_with_the_optimal_variance_alone(steps):
    """Each exact step has variance β̃ + c0² m_t, so that all x_t have their right law, whatever the steps."""
    n, found = 100_000, {}
    for kind in ("optimal", "fixed_small", "fixed_large"):
        scheduler = scheduler_with(kind, prediction_type="sample", timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        abar, noise = scheduler.process.alphas_cumprod, torch.Generator().manual_seed(1)
        x = torch.randn(n, 1, 1, 1, generator=noise, dtype=torch.float64)
        for t in scheduler.timesteps.tolist():
            gain = abar[t].sqrt() * SPREAD**2 / (abar[t] * SPREAD**2 + 1 - abar[t])
            x = scheduler.step(gain * x, t, x, noise).prev_sample
        found[kind] = x.var().item()
    last = abar[t].item()
    expected = last * SPREAD**4 / (last * SPREAD**2 + 1 - last)  # of x̂_0 at the last step
    error = 5 * (2 / n) ** 0.5
    assert found["optimal"] == pytest.approx(expected, rel=error + 0.01)  # the table is smoothed
    assert (
        found["fixed_small"] < (1 - 5 * error) * expected < (1 + 5 * error) * expected < found["fixed_large"]
    )


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({}, [999, 500, 3, 0]),
        ({}, [3, 999, 0, 500]),  # in any order: each goes to the next lower one
        ({"beta_schedule": "squaredcos_cap_v2"}, [999, 700, 20]),
        ({"num_train_timesteps": 2, "beta_end": 0.5}, [1, 0]),
        ({"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}, [2, 0]),
        ({"rescale_betas_zero_snr": True}, [999, 500, 0]),
    ],
)
def test_sigma_follows_the_formula(config, steps):
    config = {"prediction_type": "sample", **config}
    scheduler = scheduler_with(**config)
    scheduler.timesteps = torch.tensor(steps)
    abar = scheduler.process.alphas_cumprod.numpy()
    sigma = optimal_sigma(abar, steps, scheduler.errors.x0_mse)
    x_t = torch.randn(SHAPE, dtype=torch.float64)
    for t, expected in zip(np.sort(steps)[1:].tolist(), sigma, strict=True):
        found = noise_of(scheduler, t, x_t, 0.1 * x_t)
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-6, atol=0)
        assert scheduler._get_variance(t).item() == pytest.approx(expected**2, rel=1e-6)
    last = scheduler.step(0.1 * x_t, min(steps), x_t)
    torch.testing.assert_close(last.prev_sample, 0.1 * x_t)  # no noise where the decoder begins
    assert scheduler._get_variance(min(steps)) == 0


def test_by_value_for_a_pixel_that_is_black_or_white():
    """Of data ±1 the error is 1 − x̂_0², at any step, so the noise of a pixel follows from its prediction."""
    edges = np.linspace(-1, 1, VALUE_BINS - 1)
    middles = np.array([-1, *(edges[1:] + edges[:-1]) / 2, 1])
    mse = np.broadcast_to(1 - middles**2, (1000, VALUE_BINS))
    scheduler = scheduler_with("by-value", mse, prediction_type="sample", clip_sample=True)
    scheduler.set_timesteps(timesteps=[600, 100, 0])
    x_t = torch.randn(SHAPE, dtype=torch.float64)
    x_0 = torch.linspace(-1.2, 1.2, 32, dtype=torch.float64).view(SHAPE)
    found = noise_of(scheduler, 600, x_t, x_0)
    a, b = scheduler.process.alphas_cumprod[[100, 600]].tolist()
    gap, posterior = a / (1 - a) - b / (1 - b), (1 - b / a) * (1 - a) / (1 - b)
    exact = (posterior * (1 + gap * (1 - x_0.clamp(-1, 1) ** 2))).sqrt()
    # Half of a bin's width, 1/30, moves 1 − x̂² by at most 2/30
    bound = (posterior * gap * (2 / 30) / exact).clamp(min=1e-6)
    assert ((found - exact).abs() <= bound).all()
    assert found.amax() > 1.5 * found.amin()
    torch.testing.assert_close(scheduler.step(x_0, 0, x_t).prev_sample, x_0.clamp(-1, 1))


def test_a_step_per_sample_is_that_of_each():
    for kind in ("optimal", "by-value"):
        scheduler = scheduler_with(kind)
        scheduler.set_timesteps(5)
        x_t, output = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
        t = scheduler.timesteps[[0, 3, 4]]
        together = scheduler.step(output, t, x_t, [torch.Generator().manual_seed(i) for i in range(3)])
        for i in range(3):
            alone = scheduler.step(
                output[i : i + 1], int(t[i]), x_t[i : i + 1], torch.Generator().manual_seed(i)
            )
            torch.testing.assert_close(together.prev_sample[i : i + 1], alone.prev_sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["optimal", "by-value"])
def test_half_precision_is_rounded_once(kind, dtype):
    scheduler = scheduler_with(kind, clip_sample=True)
    scheduler.set_timesteps(10)
    x_t, output = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    for t in scheduler.timesteps:
        half = scheduler.step(output, t, x_t, torch.Generator().manual_seed(2)).prev_sample
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=dtype)
        assert half.dtype == dtype and half.isfinite().all()
        index = int(scheduler.chain.index_of(t))
        x_0 = scheduler.step(output.float(), t, x_t.float()).pred_original_sample
        mean = scheduler.chain.q_posterior_mean(x_0, x_t.float(), index)
        sigma = noise_of(scheduler, t, x_t.float(), output.float()) if index else torch.zeros(SHAPE)
        torch.testing.assert_close(half, (mean + sigma * noise.float()).to(dtype), rtol=1e-2, atol=1e-2)


def test_one_step_draws_no_noise():
    scheduler = scheduler_with()
    scheduler.set_timesteps(1)
    x = torch.randn(SHAPE)
    assert torch.equal(*(scheduler.step(x, scheduler.timesteps[0], x).prev_sample for _ in range(2)))
    tiny = scheduler_with(mse=[0.1], num_train_timesteps=1)
    tiny.set_timesteps(1)
    assert tiny.step(x, 0, x).prev_sample.isfinite().all()


def test_the_decoder_has_the_measured_sigma():
    x_0 = (torch.randint(0, 256, SHAPE) / 127.5 - 1).float()
    for kind in ("optimal", "by-value"):
        got = scheduler_with(kind).decoder_log_likelihood(x_0, 0.9 * x_0)
        nats = discretized_gaussian_log_likelihood(x_0, 0.9 * x_0, 2 * np.log(0.01))
        torch.testing.assert_close(got, nats.flatten(1).sum(1), rtol=1e-3, atol=0)


# Where the errors are


@pytest.mark.parametrize("kind", ["optimal", "by-value"])
def test_without_errors_one_line_says_how_to_get_them(kind):
    scheduler, x = DDPMScheduler(variance_type=kind), torch.randn(SHAPE)
    for use in (
        lambda: scheduler.set_timesteps(10),
        lambda: scheduler.set_timesteps(timesteps=[5, 0]),
        lambda: scheduler.step(x, 500, x),
        lambda: scheduler.step(x, torch.tensor([500, 0]), x),
        lambda: scheduler.decoder_log_likelihood(x, x),
    ):
        with pytest.raises(ValueError, match=f"^variance_type '{kind}' needs .* hf-ddpm plan MODEL") as error:
            use()
        assert len(str(error.value)) < 300
    scheduler.step(x, 0, x)  # which adds no noise


def test_errors_that_are_none():
    scheduler = scheduler_with()
    for wrong in ("errors.safetensors", {}, torch.zeros(1000)):
        with pytest.raises(ValueError, match=r"^errors is .*; allowed: an Errors, such as pipeline\.errors"):
            scheduler.errors = wrong
    for config in ({"beta_end": 0.03}, {"num_train_timesteps": 900}):
        other = DDPMScheduler(**config)
        with pytest.raises(ValueError, match=r"is not in the chain|is not a chain of the one whose"):
            other.errors = scheduler.errors
    scheduler.errors = None
    with pytest.raises(ValueError, match="needs the network's measured errors"):
        scheduler.set_timesteps(10)


def test_other_errors_count_at_once():
    scheduler, x = scheduler_with(mse=torch.full((1000,), 0.1)), torch.randn(SHAPE)
    few, found = torch.Generator(), []
    for mse in (0.1, 0.4):
        scheduler.errors = known_errors(scheduler.process, torch.full((1000,), mse))
        found.append(scheduler.step(x, 500, x, few.manual_seed(0)).prev_sample)
    scheduler.variance_type = "by-value"
    found.append(scheduler.step(x, 500, x, few.manual_seed(0)).prev_sample)
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[1], found[2])  # all bins have the same error here


def test_copies_keep_them_and_the_config_does_not():
    scheduler = scheduler_with()
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    expected = scheduler.step(x, 500, x, torch.Generator().manual_seed(0)).prev_sample
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        other.set_timesteps(10)
        found = other.step(x, 500, x, torch.Generator().manual_seed(0)).prev_sample
        torch.testing.assert_close(found, expected)
    fresh = DDPMScheduler.from_config(scheduler.config)
    assert fresh.variance_type == "optimal" and fresh.errors is None
    assert "errors" not in str(dict(scheduler.config))


def test_a_network_that_learns_variances_is_refused():
    scheduler, x = scheduler_with(), torch.randn(SHAPE)
    with pytest.raises(ValueError, match="variance_type 'optimal' with samples of shape"):
        scheduler.step(torch.cat([x, x], 1), 500, x)


@pytest.mark.parametrize(
    "config", [{"variance_type": "optimal"}, {"variance_type": "by-value"}, {"timestep_spacing": "quadratic"}]
)
def test_what_plain_diffusers_can_not_run_is_hf_ddpms(config):
    assert DDPMScheduler(**config).__module__ == "hf_ddpm"
    scheduler = DDPMScheduler()
    scheduler.register_to_config(**config)
    assert scheduler.__module__ == "hf_ddpm"
    plain = dict.fromkeys(config)
    plain = {key: DDPMScheduler().config[key] for key in plain}
    scheduler.register_to_config(**plain)
    assert scheduler.__module__ == diffusers.DDPMScheduler.__module__

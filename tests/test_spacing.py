"""spacing.py: which K of the T steps a sampler visits, against definitions in numpy."""

import logging

import numpy as np
import pytest
import torch

from hf_ddpm import spacing
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.schedules import SPACINGS
from hf_ddpm.spacing import sampling_steps, start_step
from tests.oracles import STEPS, betas_by_definition, chain

LONG = ("linear", "scaled_linear", "squaredcos_cap_v2")  # where ten steps never meet
NAMES = (*LONG, "constant")


def abar(name):
    return np.cumprod(1 - betas_by_definition(name))


def zero_snr(total=1000):
    return DiffusionProcess.from_betas([*np.linspace(1e-4, 0.02, total - 1), 1.0])


# The start


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_the_lowest_step_that_knows_a_hundredth_of_a_bit(name):
    known = -0.5 * np.log2(1 - abar(name))
    start = start_step(chain(name))
    assert known[start] <= 0.01 < known[start - 1]


def test_a_process_that_ends_before_has_no_start():
    assert start_step(DiffusionProcess.linear(50)) is None


@pytest.mark.parametrize(
    ("name", "word", "count", "expected"),
    [
        ("linear", "leading", 1, [650]),
        ("linear", "linspace", 1, [650]),
        ("linear", "leading", 2, [650, 0]),
        ("linear", "leading", 3, [666, 333, 0]),  # which begins high enough as it is
        ("squaredcos_cap_v2", "leading", 5, [924, 693, 462, 231, 0]),
        ("squaredcos_cap_v2", "trailing", 2, [999, 499]),
    ],
)
def test_a_grid_that_begins_too_low_is_stretched(name, word, count, expected, caplog):
    scheduler = DDPMScheduler(beta_schedule=name, timestep_spacing=word)
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == expected
    assert not caplog.records


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("word", SPACINGS)
def test_every_grid_begins_in_noise(name, word):
    process = chain(name)
    for count in range(1, 41):
        steps = sampling_steps(process, word, count)
        assert steps.dtype == torch.int64 and steps.shape == (count,) and (steps.diff() < 0).all()
        assert steps[0] >= start_step(process) and steps[0] < STEPS[name] and steps[-1] >= 0


# Quadratic


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("count", [2, 5, 10])
def test_quadratic_steps_are_squares_up_to_the_start(name, count):
    start = start_step(chain(name))
    squares = start * (np.arange(count) / (count - 1)) ** 2
    np.testing.assert_allclose(sampling_steps(chain(name), "quadratic", count).flip(0), squares, atol=0.51)


# Align Your Steps


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("count", [5, 10])
def test_align_your_steps_takes_the_steps_nearest_in_log_snr(name, count):
    """Ten steps begin at ten of the eleven published levels, and five at every other one."""
    published = np.array([160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006])
    levels = published[: -1 : 10 // count]
    log_snr = np.log(abar(name)) - np.log1p(-abar(name))
    nearest = [int(np.abs(log_snr + 2 * np.log(level)).argmin()) for level in levels]
    assert sampling_steps(chain(name), "align-your-steps", count).tolist() == nearest


def test_the_authors_own_steps_of_stable_diffusion(monkeypatch):
    """diffusers has their levels for it, and the steps of its process that these are."""
    from diffusers.schedulers import AysSchedules

    levels = (*AysSchedules["StableDiffusionSigmas"][:10], 0.029)
    monkeypatch.setattr(spacing, "ALIGN_YOUR_STEPS", levels)
    process = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).process
    found = sampling_steps(process, "align-your-steps", 10)
    np.testing.assert_allclose(found, AysSchedules["StableDiffusionTimesteps"], atol=1)


def test_levels_between_the_published_ones_are_geometric_means():
    process, found = chain("linear"), {}
    for count in (10, 20):
        sigma = process.snr.rsqrt()[sampling_steps(process, "align-your-steps", count)]
        found[count] = sigma[:16] if count == 20 else sigma[:8]
    between = (found[10][:-1] * found[10][1:]).sqrt()
    np.testing.assert_allclose(found[20][1:15:2], between, rtol=0.02)


@pytest.mark.parametrize("word", ["quadratic", "align-your-steps"])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 50])
def test_short_processes_have_every_number_of_steps(word, total):
    for process in (DiffusionProcess.linear(total, 1e-3, 0.5), DiffusionProcess.cosine(total)):
        for count in range(1, total + 1):
            steps = sampling_steps(process, word, count).tolist()
            assert steps == sorted(set(steps), reverse=True) and len(steps) == count
        assert steps == list(range(total))[::-1]


def test_align_your_steps_never_asks_where_there_is_no_signal():
    """At zero terminal SNR the last step is infinitely far from any level; with all T steps it is there."""
    for count in (1, 10, 100):
        assert sampling_steps(zero_snr(), "align-your-steps", count)[0] == 998
    assert sampling_steps(zero_snr(20), "align-your-steps", 20)[0] == 19


def test_many_steps_of_a_long_process_take_no_table_of_both():
    process = DiffusionProcess.from_betas(torch.full((200_000,), 1e-4))
    assert len(sampling_steps(process, "align-your-steps", 100_000)) == 100_000


# Words


@pytest.mark.parametrize(
    ("word", "count", "message"),
    [
        (
            "quadradic",
            5,
            r"timestep_spacing is 'quadradic' \(did you mean 'quadratic'\?\); allowed: linspace, ",
        ),
        (
            None,
            5,
            "timestep_spacing is None; allowed: linspace, leading, trailing, quadratic, align-your-steps$",
        ),
        (["leading"], 5, "timestep_spacing is a list"),
        ("quadratic", 0, r"num_inference_steps is 0; allowed: whole numbers in 1\.\.1000"),
        ("align-your-steps", 1001, r"num_inference_steps is 1001; allowed: whole numbers in 1\.\.1000"),
        ("align-your-steps", 2.0, r"num_inference_steps is 2\.0; allowed"),
        ("quadratic", True, "num_inference_steps is True; allowed"),
    ],
)
def test_what_is_refused(word, count, message):
    with pytest.raises(ValueError, match=message) as error:
        sampling_steps(chain("linear"), word, count)
    assert len(str(error.value)) < 300


def test_a_process_that_ends_early_is_said(caplog):
    caplog.set_level(logging.WARNING)
    DDPMScheduler(num_train_timesteps=50, timestep_spacing="quadratic").set_timesteps(5)
    assert "sampling starts from N(0, I) at step 49" in caplog.text

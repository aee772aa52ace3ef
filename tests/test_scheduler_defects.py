"""The stock scheduler's defects (seen on diffusers 0.42.1), one test each: what it does and what ours does.

`stock` halves assert the defect, so that a release of diffusers that mends one is noticed here.
"""

import diffusers
import pytest
import torch

from hf_ddpm.scheduler import DDPMScheduler

S = diffusers.DDPMScheduler
X, E = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_01_fixed_large_log():
    assert S(variance_type="fixed_large_log").step(E, 500, X).prev_sample.isnan().all()
    ours = (
        DDPMScheduler(variance_type=v).step(E, 500, X, generator())
        for v in ("fixed_large_log", "fixed_large")
    )
    assert torch.equal(*(out.prev_sample for out in ours))


def test_02_trailing_has_as_many_steps_as_asked_for():
    stock, ours = S(timestep_spacing="trailing"), DDPMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(61)
    assert len(stock.timesteps) == 62 and stock.timesteps[-1] == -1
    for n in range(1, 1001):
        ours.set_timesteps(n)
        assert len(ours.timesteps) == n and ours.timesteps[-1] >= 0 and ours.timesteps[0] == 999
        assert (ours.timesteps.diff() < 0).all()


@pytest.mark.parametrize(("dtype", "t"), [(torch.bfloat16, 9), (torch.float16, 1)])
def test_03_half_precision_is_noised(dtype, t):
    x, e, steps = X.to(dtype), E.to(dtype), torch.tensor([0, t])
    assert torch.equal(S().add_noise(x, e, steps), x)
    ours = DDPMScheduler().add_noise(x, e, steps)
    assert torch.equal(ours, DDPMScheduler().add_noise(x.double(), e.double(), steps).to(dtype))
    assert not torch.equal(ours[1], x[1])
    exact = DDPMScheduler().get_velocity(x.double(), e.double(), steps).to(dtype)
    assert torch.equal(DDPMScheduler().get_velocity(x, e, steps), exact)
    assert not torch.equal(S().get_velocity(x, e, steps), exact)


@pytest.mark.parametrize("num_steps", [10, 50])
def test_04_no_noise_at_the_last_executed_step(num_steps):
    """With an exact ε of one image, the last step returns the image."""
    image = X.clamp(-1, 1)
    errors = []
    for scheduler in (
        S(timestep_spacing="trailing", variance_type="fixed_large"),
        DDPMScheduler(timestep_spacing="trailing", variance_type="fixed_large"),
    ):
        scheduler.set_timesteps(num_steps)
        x, noise = E, generator()
        for t in scheduler.timesteps:
            a = scheduler.alphas_cumprod[t]
            x = scheduler.step((x - a.sqrt() * image) / (1 - a).sqrt(), t, x, noise).prev_sample
        errors.append((x - image).abs().max().item())
    assert errors[0] > 0.1
    assert errors[1] < 1e-5


def test_05_offset_that_leaves_the_chain():
    stock = S(steps_offset=1)
    stock.set_timesteps(1000)
    with pytest.raises(IndexError):
        stock.step(E, stock.timesteps[0], X)
    with pytest.raises(ValueError, match=r"steps_offset 1 moves 1000 steps to 1\.\.1000; allowed: 0\.\.999"):
        DDPMScheduler(steps_offset=1).set_timesteps(1000)


@pytest.mark.parametrize(("n", "start"), [(600, 599), (501, 500), (640, 639)])
def test_06_leading_reaches_the_noisy_end(n, start):
    stock, ours = S(), DDPMScheduler()
    stock.set_timesteps(n)
    ours.set_timesteps(n)
    assert stock.timesteps[0] == start
    assert len(ours.timesteps) == n and ours.timesteps[-1] == 0
    assert ours.timesteps[0] >= 1000 - 1000 / n - 1


def test_07_learned_is_a_log_variance():
    both = torch.cat([E, -E.abs()], 1)
    assert S(variance_type="learned").step(both, 500, X).prev_sample.isnan().any()
    assert DDPMScheduler(variance_type="learned").step(both, 500, X).prev_sample.isfinite().all()
    for variance_type in ("learned", "learned_range"):
        with pytest.raises(TypeError):
            S(variance_type=variance_type).step(E, 500, X)
        with pytest.raises(ValueError, match=r"model_output has shape \(2, 3, 4, 4\).*wants \(2, 6, 4, 4\)"):
            DDPMScheduler(variance_type=variance_type).step(E, 500, X)


def test_08_fixed_variance_with_learned_output():
    with pytest.raises(RuntimeError):
        S().step(torch.cat([E, E], 1), 500, X)
    with pytest.raises(ValueError, match=r"wants \(2, 3, 4, 4\)"):
        DDPMScheduler().step(torch.cat([E, E], 1), 500, X)


def test_09_misspelt_variance_type():
    assert S(variance_type="fixed_lrage").step(E, 500, X) is not None
    ours = DDPMScheduler(variance_type="fixed_lrage")  # constructs, as diffusers' own tests want
    with pytest.raises(ValueError, match="variance_type is 'fixed_lrage'; allowed: fixed_small"):
        ours.step(E, 500, X)
    with pytest.raises(ValueError, match="fixed_lrage"):
        ours._get_variance(500)


def test_10_get_variance_is_always_a_variance():
    assert S(variance_type="fixed_small_log")._get_variance(500) == pytest.approx(
        0.100256, rel=1e-4
    )  # a sigma
    small, large = 1.00513357789e-2, 1e-4 + 500 * (0.02 - 1e-4) / 999  # β̃_500 and β_500 of `linear`
    for kind, wanted in (("fixed_small", small), ("fixed_large", large)):
        for suffix in ("", "_log"):
            got = DDPMScheduler(variance_type=kind + suffix)._get_variance(500)
            assert got.item() == pytest.approx(wanted, rel=1e-6)
    learned = DDPMScheduler(variance_type="learned")._get_variance(500, predicted_variance=E)
    torch.testing.assert_close(learned, E.exp())


def test_11_a_timestep_per_sample():
    with pytest.raises(RuntimeError, match="ambiguous"):
        S().step(E, torch.tensor([10, 500]), X)
    assert DDPMScheduler().step(E, torch.tensor([10, 500]), X).prev_sample.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, r"num_inference_steps is 0; allowed: whole numbers in 1\.\.1000"),
        ({"num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({}, "exactly one"),
        ({"num_inference_steps": 5, "timesteps": [4]}, "exactly one"),
        ({"timesteps": []}, "empty"),
        ({"timesteps": [100, -5]}, "timestep -5 is not in the chain"),
        ({"timesteps": [1000, 5]}, "timestep 1000 is not in the chain"),
        ({"timesteps": [5, 100]}, "descending"),
        ({"timesteps": [5, 5]}, "descending"),
        ({"timesteps": [5.5, 1]}, "whole numbers"),
    ],
    ids=str,
)
def test_12_impossible_steps(arguments, message):
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(7)
    before = scheduler.timesteps
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps is before and scheduler.num_inference_steps == 7


@pytest.mark.parametrize("t", [7, 1000, -1, 0.5, torch.tensor(7), torch.tensor([0, 7])], ids=str)
def test_12_steps_outside_the_chain(t):
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep"):
        scheduler.step(E, t, X)


def test_13_custom_timesteps_set_their_number():
    stock, ours = S(), DDPMScheduler()
    for scheduler in (stock, ours):
        scheduler.set_timesteps(50)
        scheduler.set_timesteps(timesteps=[9, 5, 0])
    assert stock.num_inference_steps == 50
    assert ours.num_inference_steps == 3 and ours.custom_timesteps


def test_14_one_generator_per_sample():
    three = [generator(i) for i in range(3)]
    assert S().step(E, 500, X, generator=three) is not None
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        DDPMScheduler().step(E, 500, X, generator=three)


def test_15_float64_tables():
    ours, exact = DDPMScheduler().process, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - exact, 0)
    stock = S().alphas_cumprod.double()
    assert ((1 - stock) / (1 - abar) - 1).abs().max() > 1e-4
    assert ((1 - ours.alphas_cumprod) / (1 - abar) - 1).abs().max() < 1e-11
    assert (ours.betas / exact - 1).abs().max() < 1e-15


def test_16_first_log_variance_is_usable():
    assert S()._get_variance(0).log() < -46
    assert DDPMScheduler().process.log_variance("fixed_small")[0].exp().item() == pytest.approx(
        5.45318766130e-5, rel=1e-10
    )
    assert DDPMScheduler()._get_variance(0) == 0  # what a stock test wants below 1e-5


def test_17_half_precision_stays_finite():
    config = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
    x, e = X.half(), 300 * E.half()
    assert not S(**config).step(e, 999, x).prev_sample.isfinite().all()
    ours = DDPMScheduler(**config).step(e, 999, x)
    assert ours.prev_sample.isfinite().all() and ours.pred_original_sample.isfinite().all()
    assert ours.prev_sample.dtype == torch.float16


def test_18_epsilon_at_zero_terminal_snr():
    assert (
        not S(rescale_betas_zero_snr=True, clip_sample=False)
        .step(E, 999, X)
        .pred_original_sample.isfinite()
        .all()
    )
    ours = DDPMScheduler(rescale_betas_zero_snr=True)
    for t in (999, ours.timesteps[0], torch.tensor([3, 999])):
        with pytest.raises(ValueError, match="alphas_cumprod is 0 at step 999"):
            ours.step(E, t, X)
    v = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False)
    assert torch.equal(v.step(E, 999, X).pred_original_sample, -E)


def test_19_too_few_trained_betas():
    ours = DDPMScheduler(trained_betas=[0.1, 0.2])  # constructs, as diffusers' own tests want
    for use in (
        lambda: ours.process,
        lambda: ours.set_timesteps(5),
        lambda: ours.step(E, 1, X),
        lambda: ours.add_noise(X, E, torch.tensor([0, 1])),
    ):
        with pytest.raises(ValueError, match="trained_betas has 2 values but num_train_timesteps is 1000"):
            use()


def test_20_unknown_schedules_and_one_variance_type():
    with pytest.raises(ValueError, match=r"'linaer' is unknown .did you mean 'linear'"):
        DDPMScheduler(beta_schedule="linaer")
    stock, ours = S(), DDPMScheduler()
    stock.variance_type = ours.variance_type = "fixed_large"
    assert stock.config.variance_type == "fixed_small"
    assert ours.config.variance_type == ours.variance_type == "fixed_large"
    assert dict(DDPMScheduler(beta_schedule="laplace").config)["beta_schedule"] == "laplace"


@pytest.mark.parametrize("t", [[-1, -1], [0, 1000]], ids=str)
def test_21_steps_do_not_wrap(t):
    for method in (DDPMScheduler().add_noise, DDPMScheduler().get_velocity):
        with pytest.raises(ValueError, match="not in the chain"):
            method(X, E, torch.tensor(t))


def test_betas_out_of_range_construct_but_do_not_run():
    ours = DDPMScheduler(beta_end=2.0)
    with pytest.raises(ValueError, match=r"betas\[\d+\] is [12]\.\d+; allowed"):
        ours.step(E, 0, X)


def test_an_unknown_prediction_type():
    with pytest.raises(
        ValueError, match=r"prediction_type is 'epsilom'; allowed: epsilon, sample, v_prediction, mean, score"
    ):
        DDPMScheduler(prediction_type="epsilom").step(E, 5, X)

"""scheduler.py, visited.py: `timesteps` assigned or changed from outside, and steps that can't be right."""

import re

import numpy as np
import pytest
import torch

from hf_ddpm.scheduler import DDPMScheduler

X, E = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def step(scheduler, t, samples=2):
    return scheduler.step(E[:samples], t, X[:samples], torch.Generator().manual_seed(2)).prev_sample


def chosen(timesteps, **config):
    scheduler = DDPMScheduler(**config)
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


GIVEN = [900, 700, 400, 100, 0]


@pytest.mark.parametrize(
    "order",
    [[0, 100, 400, 700, 900], [400, 900, 0, 700, 100]],
    ids=str,
)
def test_steps_assigned_in_any_order_are_looked_up(order):
    wanted, scheduler = chosen(GIVEN), DDPMScheduler()
    scheduler.set_timesteps(10)
    scheduler.timesteps = torch.tensor(order)
    for t in scheduler.timesteps:
        for given in (t, t.item(), t.clone(), t.repeat(2)):
            torch.testing.assert_close(step(scheduler, given), step(wanted, t.item()), rtol=0, atol=1e-6)


def test_the_whole_chain_in_another_order():
    scheduler = DDPMScheduler()
    scheduler.timesteps = torch.arange(1000)
    assert torch.equal(step(scheduler, scheduler.timesteps[900]), step(DDPMScheduler(), 900))


@pytest.mark.parametrize("change", ["steps[1] = 650", "steps.sub_(50)", "steps.numpy()[:] = [8, 6, 4, 2, 0]"])
def test_steps_that_are_changed_in_place(change):
    scheduler = chosen([950, 800, 600, 300, 50])
    steps = scheduler.timesteps
    step(scheduler, steps[0])
    exec(change)
    wanted = chosen(steps.tolist())
    for t in steps:
        assert torch.equal(step(scheduler, t), step(wanted, t.item()))
    with pytest.raises(ValueError, match="timestep 951 is not in the chain"):
        step(scheduler, 951)


def test_a_change_on_a_device_is_noticed_without_a_look():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10, device="meta")
    scheduler.step(E.to("meta"), scheduler.timesteps[3], X.to("meta"))
    scheduler.timesteps[3] = 5  # and then the steps have to be read, which a meta tensor refuses
    with pytest.raises(NotImplementedError):
        scheduler.step(E.to("meta"), scheduler.timesteps[3], X.to("meta"))


def test_inference_mode_has_no_count_of_changes_and_needs_none():
    with torch.inference_mode():
        scheduler = DDPMScheduler()
        scheduler.set_timesteps(5)
        scheduler.timesteps = torch.tensor([900, 0])
        scheduler.timesteps[0] = 500
        assert torch.equal(step(scheduler, scheduler.timesteps[0]), step(chosen([500, 0]), 500))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (torch.tensor([900, 900, 0]), "timestep 900 is repeated; allowed: each step once"),
        (torch.zeros(1000, dtype=torch.int64), "timestep 0 is repeated"),
        (torch.tensor([1000, 0]), "timestep 1000 is not in the chain"),
        (torch.tensor([900.0, 0.0]), "timesteps is a float32 tensor of shape (2,); allowed: a tensor"),
        (torch.tensor([[900, 0]]), "timesteps is an int64 tensor of shape (1, 2); allowed: a tensor"),
        ([900, 0], "timesteps is a list; allowed: a tensor of shape (K,), int64"),
        (None, "timesteps is None; allowed: a tensor"),
        (torch.tensor([], dtype=torch.int64), "timesteps is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_may_not_be_assigned(steps, words):
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    scheduler.timesteps = steps
    with pytest.raises(ValueError, match=re.escape(words)):
        step(scheduler, 900)


@pytest.mark.parametrize(
    "t",
    [True, np.bool_(True), None, "100", float("nan"), float("inf"), [100], np.array([100, 200]), 100 + 0j,
     torch.tensor(True), torch.tensor(100.5), torch.tensor([100.0, 200.0]), torch.tensor([True, False]),
     torch.tensor([100, 200, 300]), torch.tensor([[100], [200]]), torch.tensor([]), -1],
    ids=repr,
)  # fmt: skip
def test_a_timestep_that_is_none(t):
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"^timestep ") as error:
        step(scheduler, t)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_three_steps_for_one_sample_do_not_broadcast():
    scheduler, steps = DDPMScheduler(), torch.tensor([3, 5, 7])
    with pytest.raises(
        ValueError, match=r"timestep has shape \(3,\) for a batch of 1; allowed: one step, or"
    ):
        step(scheduler, steps, samples=1)
    for method in (scheduler.add_noise, scheduler.get_velocity):
        with pytest.raises(ValueError, match=r"shape \(3,\) for 1 images"):
            method(X[:1], E[:1], steps)
    torch.testing.assert_close(step(scheduler, steps[:1]), step(scheduler, 3))


@pytest.mark.parametrize(
    ("output", "sample", "words"),
    [
        (None, X, "model_output is None; allowed: a floating-point tensor"),
        (E, None, "sample is None"),
        (E.long(), X, "model_output is an int64 tensor of shape (2, 3, 4, 4)"),
        (E, X.to(torch.uint8), "sample is a uint8 tensor of shape (2, 3, 4, 4)"),
        (E, X[0, 0, 0], "sample is a float32 tensor of shape (4,)"),
        (E[:1], X, "model_output has shape (1, 3, 4, 4)"),
        (E.to("meta"), X, "model_output is on meta, but sample on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_that_are_none(output, sample, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        DDPMScheduler().step(output, 5, sample)


@pytest.mark.parametrize(
    ("generator", "words"),
    [
        (0, "generator is 0; allowed: a torch.Generator, or a list of them"),
        (False, "generator is False"),
        ((torch.Generator(),) * 2, "generator is a tuple"),
        ([torch.Generator(), 0], "an element of generator is 0"),
        ([torch.Generator()], "1 generators for a batch of 2; allowed: one, or one per image"),
    ],
    ids=["a seed", "a bool", "a tuple", "a seed in a list", "too few"],
)
def test_a_generator_that_is_none(generator, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        DDPMScheduler().step(E, 5, X, generator=generator)


# A chain of one step adds no noise, whoever knows that it is the last


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_one_step_for_each_sample_of_a_chain_of_one(variance_type):
    scheduler = chosen([999], variance_type=variance_type)
    output = torch.cat([E, torch.full_like(E, 1e4)], 1) if "learned" in variance_type else E
    noise = torch.Generator().manual_seed(0)
    before = noise.get_state()
    per_sample = scheduler.step(output, torch.tensor([999, 999]), X, noise).prev_sample
    torch.testing.assert_close(per_sample, scheduler.step(output, 999, X).prev_sample)
    assert per_sample.isfinite().all()
    assert torch.equal(noise.get_state(), before)
    # On a device nothing is read: the same goes through, where a value would be asked for it would raise
    scheduler.set_timesteps(timesteps=[999], device="meta")
    on_device = torch.full((2,), 999, device="meta")
    assert scheduler.step(output.to("meta"), on_device, X.to("meta")).prev_sample.shape == X.shape


def test_the_last_step_of_one_sample_of_several_asks_for_no_variance():
    # exp(σ) of 1e4 is infinite: at the last step it is not used, and times 0 it would be NaN
    scheduler = DDPMScheduler(variance_type="learned")
    output = torch.cat([E, torch.full_like(E, 1e4)], 1)
    output[1, 3:] = -1
    out = scheduler.step(output, torch.tensor([0, 500]), X).prev_sample
    assert out.isfinite().all()


def test_a_chain_of_one_step_keeps_the_first_variance_of_the_whole_one():
    process = DDPMScheduler().process
    kept = process.respaced([999], "full")
    for kind in ("fixed_small", "fixed_large"):
        assert torch.equal(kept.log_variance(kind), process.log_variance("fixed_small")[:1])
    assert torch.equal(
        kept.respaced([999], "full").log_variance("fixed_small"), kept.log_variance("fixed_small")
    )
    with pytest.raises(ValueError, match="a chain of one step has no log-variance"):
        process.respaced([999]).log_variance("fixed_small")


# The grid


@pytest.mark.parametrize(("total", "number"), [(50, 3), (50, 7), (20, 3)])
def test_the_leading_grid_is_diffusers_where_another_would_cure_nothing(total, number, caplog):
    scheduler = DDPMScheduler(num_train_timesteps=total)  # which ends far from noise
    scheduler.set_timesteps(number)
    assert scheduler.timesteps.tolist() == [i * (total // number) for i in reversed(range(number))]
    assert "sampling starts from N(0, I)" in caplog.text


def test_a_late_start_is_said_once(caplog):
    scheduler = DDPMScheduler(num_train_timesteps=50)
    for _ in range(3):
        scheduler.set_timesteps(2)
    assert len(caplog.records) == 1
    scheduler.set_timesteps(1)
    assert len(caplog.records) == 2


def test_infinite_answers_stay_infinite_in_float16():
    scheduler = DDPMScheduler(clip_sample=False)
    out = scheduler.step(torch.full_like(E, torch.inf).half(), 500, X.half())
    assert out.prev_sample.isinf().all() and out.pred_original_sample.isinf().all()

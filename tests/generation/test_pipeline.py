"""pipeline.py: the images of plain diffusers, exact networks under every sampler, portable folders."""

import copy
import json
import logging
import pickle
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import SCHEDULERS, swap_scheduler
from hf_ddpm.models import create_model
from hf_ddpm.scheduler import DDPMScheduler

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")

SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
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


# The same as plain diffusers


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({}, 10),
        ({"variance_type": "fixed_large"}, 20),
        ({"num_train_timesteps": 20, "beta_end": 0.5}, None),
        ({"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}, 25),
    ],
    ids=str,
)
def test_same_images_as_diffusers(config, steps):
    unet, stock = tiny(), diffusers.DDPMScheduler(**config)
    theirs = quiet(diffusers.DDPMPipeline(unet, stock))
    count = steps or config["num_train_timesteps"]  # where plain diffusers would insist on 1000
    expected = theirs(3, seeds(1)[0], num_inference_steps=count, output_type="np").images
    ours = DDPMPipeline(unet, stock)
    assert type(ours.scheduler) is DDPMScheduler
    np.testing.assert_allclose(draw(ours, 3, num_inference_steps=steps), expected, atol=ROUNDING)


def test_learned_variance_with_ours_and_with_ddim():
    unet = tiny(out_channels=2)
    stock = diffusers.DDPMScheduler(variance_type="learned_range")
    theirs = quiet(diffusers.DDPMPipeline(unet, stock))
    expected = theirs(3, seeds(1)[0], num_inference_steps=10, output_type="np").images
    ours = DDPMPipeline(unet, stock)
    np.testing.assert_allclose(draw(ours, 3, num_inference_steps=10), expected, atol=ROUNDING)

    # DDIM has no use for the second half of the channels.
    swap_scheduler(ours, "ddim")
    first_half = DDPMPipeline(lambda x, t: unet(x, t).sample[:, :1], ours.scheduler)
    expected = draw(first_half, 3, num_inference_steps=10, image_shape=(1, 8, 8))
    np.testing.assert_array_equal(draw(ours, 3, num_inference_steps=10), expected)


# What comes out


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [8, (4, 12)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_output_types_agree(channels, size, count):
    pipeline = quiet(DDPMPipeline(tiny(channels=channels, image_size=size), short()))
    height, width = (size, size) if isinstance(size, int) else size

    def images(output_type):
        return pipeline(count, seeds(1)[0], 5, output_type).images

    array, tensor = images("np"), images("pt")
    assert array.shape == (count, height, width, channels) and array.dtype == np.float32
    assert tensor.shape == (count, channels, height, width) and tensor.dtype == torch.float32
    assert array.min() >= 0 and array.max() <= 1
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    if channels == 5:
        with pytest.raises(
            ValueError, match="output_type is 'pil'; allowed: np, pt for images of 5 channels"
        ):
            images("pil")
        return
    pictures = images("pil")
    assert [picture.mode for picture in pictures] == [{1: "L", 3: "RGB"}[channels]] * count
    assert {picture.size for picture in pictures} == {(width, height)}
    stacked = np.stack([np.asarray(picture) for picture in pictures]).reshape(array.shape)
    np.testing.assert_array_equal(stacked, np.round(array * 255).astype(np.uint8))


def test_pictures_hold_the_exact_grey_levels():
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    pipeline = quiet(DDPMPipeline(one_image(levels / 127.5 - 1), DDPMScheduler()))
    picture = pipeline(1, seeds(1)[0], 50, image_shape=(1, 16, 16)).images[0]
    np.testing.assert_array_equal(np.asarray(picture), levels[0, 0].numpy())


def test_return_dict():
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    (images,) = pipeline(2, output_type="np", return_dict=False)
    assert images.shape == (2, 8, 8, 1)
    images, previews = pipeline(2, output_type="np", return_dict=False, pred_original_steps=[0])
    assert images.shape == previews[0].shape == (2, 8, 8, 1)
    assert pipeline(1).pred_original_images is None


def test_half_precision_weights_are_sampled_in_half_precision():
    pipeline = DDPMPipeline(copy.deepcopy(tiny()).to(torch.bfloat16), short())
    images = draw(pipeline, 2, num_inference_steps=5)
    assert images.dtype == np.float32 and np.isfinite(images).all()


# Draws and batches


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver++", "euler-ancestral"])
def test_with_a_generator_each_an_image_is_its_own(sampler):
    pipeline = quiet(DDPMPipeline(tiny(), DDPMScheduler()))
    swap_scheduler(pipeline, sampler)

    def images(count, first=0, **options):
        return pipeline(count, seeds(count, first), 5, "np", return_dict=False, **options)[0]

    whole = images(4)
    alone = np.concatenate([images(1, i) for i in range(4)])
    np.testing.assert_allclose(alone, whole, atol=ROUNDING)
    for chunk in (3, 64):
        np.testing.assert_allclose(images(4, max_batch_size=chunk), whole, atol=ROUNDING)
    assert len(np.unique(whole.round(3), axis=0)) == 4


def test_chunks_are_calls_in_a_row():
    pipeline, sizes = quiet(DDPMPipeline(tiny(), short())), []

    def unet(x, t):
        assert t.shape == x.shape[:1]
        sizes.append(len(x))
        return pipeline.unet(x, t)

    watched, one, another = quiet(DDPMPipeline(unet, short())), *seeds(1), *seeds(1)
    images, previews = watched(
        5, one, 4, "np", False, max_batch_size=2, pred_original_steps=[1], image_shape=(1, 8, 8)
    )
    assert sizes == [2] * 8 + [1] * 4
    calls = [pipeline(n, another, 4, "np", False, pred_original_steps=[1]) for n in (2, 2, 1)]
    np.testing.assert_allclose(images, np.concatenate([call[0] for call in calls]), atol=ROUNDING)
    np.testing.assert_allclose(previews[1], np.concatenate([call[1][1] for call in calls]), atol=ROUNDING)


def test_numbers_may_be_numpys():
    images = draw(DDPMPipeline(tiny(), short()), np.int64(2), num_inference_steps=np.int32(4))
    assert images.shape == (2, 8, 8, 1)


# Looking on


def test_callback_sees_every_step_and_may_replace_the_sample():
    pipeline, seen = quiet(DDPMPipeline(tiny(), short())), []

    def watch(owner, step, t, kept):
        seen.append((owner is pipeline, step, int(t), kept["sample"].shape))

    watched = draw(pipeline, 2, num_inference_steps=5, callback_on_step_end=watch)
    assert seen == [(True, i, t, (2, 1, 8, 8)) for i, t in enumerate([16, 12, 8, 4, 0])]
    np.testing.assert_array_equal(watched, draw(pipeline, 2, num_inference_steps=5))
    np.testing.assert_array_equal(
        watched, draw(pipeline, 2, num_inference_steps=5, callback_on_step_end=lambda *_: {})
    )

    def whiten(owner, step, t, kept):
        return {"sample": torch.ones_like(kept["sample"])} if t == 0 else {}

    assert (draw(pipeline, 2, num_inference_steps=5, callback_on_step_end=whiten) == 1).all()


def test_pred_original_by_position():
    x_0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    pipeline = quiet(DDPMPipeline(one_image(x_0), DDPMScheduler()))
    out = pipeline(
        3, output_type="pt", num_inference_steps=10, pred_original_steps=[0, 4, -1], image_shape=(1, 8, 8)
    )
    assert list(out.pred_original_images) == [0, 4, -1]
    for preview in out.pred_original_images.values():
        torch.testing.assert_close(preview, (x_0 / 2 + 0.5).expand(3, 1, 8, 8), atol=ROUNDING, rtol=0)

    # With a network that errs, the last prediction is the image, and two names of a position agree.
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    out = pipeline(2, output_type="np", pred_original_steps=[3, -17, -1])
    previews = out.pred_original_images
    np.testing.assert_array_equal(previews[3], previews[-17])
    np.testing.assert_allclose(previews[-1], out.images, atol=1e-6)
    assert np.abs(previews[3] - out.images).max() > 0.01


@pytest.mark.parametrize("sampler", ["dpm-solver++", "unipc", "pndm"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_pred_original_of_samplers_that_report_none(sampler, kind):
    unet, calls = tiny(), []

    def recorded(x_t, t):
        output = unet(x_t, t).sample
        calls.append((x_t.double().numpy(), int(t[0]), output.double().numpy()))
        return output

    pipeline = quiet(DDPMPipeline(recorded, DDPMScheduler(prediction_type=kind)))
    swap_scheduler(pipeline, sampler)
    out = pipeline(2, seeds(1)[0], 8, "pt", pred_original_steps=range(8), image_shape=(1, 8, 8))
    for position, preview in out.pred_original_images.items():
        x_t, t, output = calls[position]
        a, s = np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t])
        x_0 = (x_t - s * output) / a if kind == "epsilon" else a * x_t - s * output
        np.testing.assert_allclose(preview, np.clip(x_0 / 2 + 0.5, 0, 1), atol=ROUNDING)


# From a step on


def visited(pipeline, t, steps=None):
    """The steps that `denoise` executes."""
    seen = []
    pipeline.denoise(
        torch.zeros(1, 1, 8, 8),
        t,
        num_inference_steps=steps,
        callback_on_step_end=lambda owner, step, t, kept: seen.append(int(t)),
    )
    return seen


def test_denoise_visits_the_steps_from_t_down():
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    assert visited(pipeline, 7) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert visited(pipeline, 0) == [0]
    # Five of twenty are 16, 12, 8, 4, 0.
    for t, steps in {10: [10, 8, 4, 0], 8: [8, 4, 0], 2: [2, 0], 19: [19, 16, 12, 8, 4, 0]}.items():
        assert visited(pipeline, t, 5) == steps
    assert visited(pipeline, 3, 1) == [3, 0]


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_denoise_from_noise_is_a_call(steps, variance_type):
    pipeline = quiet(DDPMPipeline(tiny(), short(variance_type=variance_type)))
    images = pipeline(3, seeds(3), steps, "pt").images
    first, generators = int(pipeline.scheduler.timesteps[0]), seeds(3)
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators])
    x_0 = pipeline.denoise(noise, first, generators, steps)
    np.testing.assert_allclose((x_0 / 2 + 0.5).clamp(0, 1), images, atol=1e-6)
    for generator in (seeds(1)[0], None):
        assert pipeline.denoise(noise, 10, generator).shape == noise.shape


@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("t", [0, 100, 500])
def test_denoise_of_a_gaussian_has_the_posterior_mean(t, steps):
    # Each step's mean is linear in x_t and exact, so the mean after all of them is E[x_0 | x_t] for any σ.
    mean, std, value = 0.2, 0.25, 0.7
    pipeline = quiet(DDPMPipeline(gaussian(mean, std), DDPMScheduler(clip_sample=False)))
    x_0 = pipeline.denoise(torch.full((1, 1, 64, 64), value), t, seeds(1)[0], steps)
    expected = (mean / std**2 + ABAR[t] ** 0.5 / (1 - ABAR[t]) * value) / (
        1 / std**2 + ABAR[t] / (1 - ABAR[t])
    )
    assert abs(x_0.double().mean() - expected) < 5 * x_0.std() / 64 + 1e-5  # rounding, at t = 0
    if t == 500 and steps is None:
        spread = (1 / (1 / std**2 + ABAR[t] / (1 - ABAR[t]))) ** 0.5
        assert x_0.std().item() == pytest.approx(spread, rel=0.06)  # five standard errors of 4096 pixels


def test_equal_seeds_are_equal_noise():
    pipeline = quiet(DDPMPipeline(gaussian(0.2, 0.25), DDPMScheduler(clip_sample=False)))
    x_t = torch.stack([torch.full((1, 4, 4), value) for value in (0.0, 1.0, 1.0)])
    same = [torch.Generator().manual_seed(7) for _ in range(3)]
    a, b, c = pipeline.denoise(x_t, 300, same)
    assert torch.equal(b, c)
    assert (b - a).std() < 1e-5 < (b - a).mean()  # the network is linear, so the noise cancels
    d, e = pipeline.denoise(x_t[1:], 300, seeds(2))
    assert (d - e).std() > 0.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"t": 20}, "t is 20; allowed: whole numbers in 0..19"),
        ({"t": -1}, "t is -1; allowed: whole numbers in 0..19"),
        ({"t": 2.0}, "t is 2.0; allowed: whole numbers in 0..19"),
        ({"x_t": torch.zeros(8, 8)}, "shape of x_t is (8, 8); allowed: (B, C, H, W)"),
        ({"x_t": torch.zeros(1, 3, 8, 8)}, "(3, 8, 8); allowed: (1, H, W) with H and W multiples of 2"),
        ({"generator": seeds(3)}, "3 generators for 2 images; allowed: one, or one per image"),
        ({"num_inference_steps": 21}, "num_inference_steps is 21; allowed: whole numbers in 1..20"),
    ],
    ids=lambda part: part if isinstance(part, str) else ", ".join(part),
)
def test_denoise_refuses(arguments, words):
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    with pytest.raises(ValueError, match=re.escape(words)):
        pipeline.denoise(**{"x_t": torch.zeros(2, 1, 8, 8), "t": 5, **arguments})


def test_other_samplers_cannot_start_in_the_middle():
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    swap_scheduler(pipeline, "ddim")
    with pytest.raises(
        ValueError, match=r"the scheduler is 'DDIMScheduler'; allowed: DDPMScheduler \(ddpm\)"
    ):
        pipeline.denoise(torch.zeros(1, 1, 8, 8), 5)


# Every sampler


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_every_sampler_draws_images(sampler):
    pipeline = DDPMPipeline(tiny(channels=3, image_size=(8, 4)), DDPMScheduler())
    swap_scheduler(pipeline, sampler)
    assert type(pipeline.scheduler) is SCHEDULERS[sampler]
    images = draw(pipeline, 3, num_inference_steps=6, max_batch_size=2)
    assert images.shape == (3, 8, 4, 3) and np.isfinite(images).all()
    np.testing.assert_array_equal(draw(pipeline, 3, num_inference_steps=6, max_batch_size=2), images)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("steps", [4, 17, 50])
def test_every_sampler_lands_on_the_only_image(sampler, steps):
    x_0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    pipeline = DDPMPipeline(one_image(x_0), DDPMScheduler())
    swap_scheduler(pipeline, sampler)
    images = draw(pipeline, 3, num_inference_steps=steps, max_batch_size=2, image_shape=(1, 8, 8))
    # DEIS stops at the noise level of step 0, in diffusers: five standard deviations of that noise.
    tolerance = 5 * SIGMA_0 / 2 if sampler == "deis" else 1e-4
    np.testing.assert_allclose(images[..., 0], np.broadcast_to(x_0[0] / 2 + 0.5, (3, 8, 8)), atol=tolerance)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++", "unipc", "euler", "heun"])
@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_other_prediction_types_land_too(sampler, kind):
    x_0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    pipeline = DDPMPipeline(one_image(x_0, kind), DDPMScheduler(prediction_type=kind))
    swap_scheduler(pipeline, sampler)
    images = draw(pipeline, 2, num_inference_steps=20, image_shape=(1, 8, 8))
    np.testing.assert_allclose(images[..., 0], np.broadcast_to(x_0[0] / 2 + 0.5, (2, 8, 8)), atol=1e-4)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_every_sampler_draws_a_gaussian(sampler):
    mean, std = 0.2, 0.25
    pipeline = DDPMPipeline(gaussian(mean, std), DDPMScheduler(clip_sample=False))
    swap_scheduler(pipeline, sampler)
    x = draw(pipeline, 4, num_inference_steps=250, image_shape=(1, 32, 32)) * 2 - 1
    assert abs(x.mean() - mean) < 5 * std / np.sqrt(x.size)
    # Steps of 4 cost ancestral and first-order samplers a few percent; pixels beyond ±1 (0.07%) are clamped.
    assert x.std() == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("through_disk", [False, True])
def test_a_swap_keeps_the_process(sampler, through_disk, tmp_path):
    for config in (
        {},  # Heun's own betas are others
        {
            "beta_start": 0.001,
            "beta_end": 0.03,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
        },
        {"num_train_timesteps": 5, "trained_betas": [0.1, 0.2, 0.3, 0.4, 0.5]},
    ):
        pipeline = DDPMPipeline(tiny(), DDPMScheduler(variance_type="fixed_large", **config))
        process = pipeline.scheduler.process
        swap_scheduler(pipeline, sampler)
        if through_disk:
            pipeline.save_pretrained(tmp_path / "model")
            pipeline = DDPMPipeline.from_pretrained(tmp_path / "model")
        scheduler = pipeline.scheduler
        assert type(scheduler) is SCHEDULERS[sampler]
        np.testing.assert_allclose(
            scheduler.alphas_cumprod.numpy(), process.alphas_cumprod.numpy(), rtol=2e-6
        )
        assert scheduler.config.prediction_type == config.get("prediction_type", "epsilon")

        swap_scheduler(pipeline, "ddpm")  # and back: nothing was lost on the way
        before = DDPMScheduler(variance_type="fixed_large", **config).config
        assert {key: pipeline.scheduler.config[key] for key in before if key[0] != "_"} == {
            key: value for key, value in before.items() if key[0] != "_"
        }


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_swap_to_the_samplers_own_steps(sampler, tiny_folder):
    for pipeline in (DDPMPipeline(tiny(), short()), DDPMPipeline.from_pretrained(tiny_folder)):
        swap_scheduler(pipeline, sampler)
        own = SCHEDULERS[sampler]().config.timestep_spacing
        assert pipeline.scheduler.config.timestep_spacing == own


def test_a_swap_keeps_trailing_steps_and_takes_changes():
    pipeline = DDPMPipeline(tiny(), DDPMScheduler(timestep_spacing="trailing"))
    swap_scheduler(pipeline, "ddim", clip_sample_range=2.0)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.scheduler.config.clip_sample_range == 2.0


# Networks


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x_t, t):
        return self.factor * x_t


def test_any_module_or_function_samples_but_only_diffusers_models_are_saved(tmp_path):
    module = DDPMPipeline(Scale(), short())
    function = DDPMPipeline(lambda x_t, t: 0.5 * x_t, short())
    shape = {"image_shape": (2, 3, 5)}
    np.testing.assert_array_equal(draw(module.to("cpu"), 2, **shape), draw(function.to("cpu"), 2, **shape))
    for pipeline in (module, function):
        with pytest.raises(
            ValueError, match=r"has no config with a sample_size; pass image_shape=\(C, H, W\)"
        ):
            pipeline()
        with pytest.raises(ValueError, match="can't be saved in a pipeline; allowed: a diffusers ModelMixin"):
            pipeline.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Refused, in one line that says what is allowed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0; allowed: whole numbers >= 1"),
        ({"batch_size": -1}, "batch_size is -1; allowed: whole numbers >= 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5; allowed: whole numbers >= 1"),
        ({"batch_size": True}, "batch_size is True; allowed: whole numbers >= 1"),
        ({"max_batch_size": 0}, "max_batch_size is 0; allowed: whole numbers >= 1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed: whole numbers in 1..20"),
        ({"num_inference_steps": 21}, "num_inference_steps is 21; allowed: whole numbers in 1..20"),
        ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0; allowed: whole numbers in 1..20"),
        ({"output_type": "png"}, "output_type is 'png'; allowed: pil, np, pt"),
        (
            {"batch_size": 2, "generator": seeds(3)},
            "3 generators for 2 images; allowed: one, or one per image",
        ),
        ({"pred_original_steps": [20]}, "a position in pred_original_steps is 20; allowed: -20..19"),
        ({"pred_original_steps": [-21]}, "a position in pred_original_steps is -21; allowed: -20..19"),
        ({"pred_original_steps": [0.5]}, "a position in pred_original_steps is 0.5; allowed: -20..19"),
        (
            {"image_shape": (1, 7, 8)},
            "image_shape is (1, 7, 8); allowed: (1, H, W) with H and W multiples of 2, which the UNet halves",
        ),
        ({"image_shape": (3, 8, 8)}, "image_shape is (3, 8, 8); allowed: (1, H, W) with"),
        ({"image_shape": (1, -8, 8)}, "image_shape is (1, -8, 8); allowed: (C, H, W), whole numbers >= 1"),
        ({"image_shape": (8, 8)}, "image_shape is (8, 8); allowed: (C, H, W)"),
        ({"image_shape": 8}, "image_shape is 8; allowed: (C, H, W)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_argument(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        quiet(DDPMPipeline(tiny(), short()))(**arguments)


def test_steps_that_a_sampler_cannot_do():
    pipeline = quiet(DDPMPipeline(tiny(), DDPMScheduler()))
    swap_scheduler(pipeline, "pndm")
    with pytest.raises(ValueError, match="PNDMScheduler can't do 3 steps: "):
        pipeline(num_inference_steps=3)
    for sampler in ("dpm-solver++", "unipc", "deis"):  # all T of them end in NaN, or in an IndexError
        swap_scheduler(pipeline, sampler)
        with pytest.raises(
            ValueError, match=r"num_inference_steps is 1000; allowed: fewer, \w+ would repeat a step"
        ):
            pipeline()
    swap_scheduler(pipeline, "ddim", timestep_spacing="trailing")
    with pytest.raises(
        ValueError, match=r"num_inference_steps is 61; allowed: fewer, DDIMScheduler would .* pass 0"
    ):
        pipeline(num_inference_steps=61)  # its 62nd step is -1
    with pytest.raises(
        ValueError, match=r"scheduler 'dimm' is unknown \(did you mean 'ddim'\?\); allowed: ddpm, "
    ):
        swap_scheduler(pipeline, "dimm")


def test_images_that_are_not_finite():
    unet = copy.deepcopy(tiny())
    unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the images are not finite"):
        draw(DDPMPipeline(unet, short()), 1)


# Folders


def test_folder(tiny_folder):
    files = {path.relative_to(tiny_folder).as_posix() for path in tiny_folder.rglob("*") if path.is_file()}
    assert files == {"model_index.json", SCHEDULER, "unet/config.json", WEIGHTS}
    index = json.loads((tiny_folder / "model_index.json").read_text())
    assert index.pop("_diffusers_version") == diffusers.__version__
    assert index == {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    assert json.loads((tiny_folder / SCHEDULER).read_text())["_class_name"] == "DDPMScheduler"


def test_reload_draws_the_same_bits(tiny_folder, tmp_path, capfd):
    first = DDPMPipeline.from_pretrained(tiny_folder)
    first.save_pretrained(tmp_path / "again")
    second = DDPMPipeline.from_pretrained(str(tmp_path / "again"))
    assert type(second.scheduler) is DDPMScheduler
    assert second.scheduler.config.variance_type == "fixed_large"
    np.testing.assert_array_equal(draw(first, 3), draw(second, 3))
    assert capfd.readouterr() == ("", "")


ELSEWHERE = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_ddpm":
            raise ModuleNotFoundError("No module named 'hf_ddpm'")

sys.meta_path.insert(0, Missing())
import diffusers, numpy as np, torch
for folder in sys.argv[1:]:
    for cls in (diffusers.DDPMPipeline, diffusers.DiffusionPipeline):
        pipeline = cls.from_pretrained(folder)
        assert type(pipeline) is diffusers.DDPMPipeline, type(pipeline)
        assert type(pipeline.scheduler).__module__.startswith("diffusers."), type(pipeline.scheduler)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(3, generator, num_inference_steps=20, output_type="np").images
        np.save(f"{folder}/{cls.__name__}.npy", images)
assert "hf_ddpm" not in sys.modules
"""


def test_folders_load_where_hf_ddpm_is_not_installed(tiny_folder, tmp_path):
    ours = DDPMPipeline.from_pretrained(tiny_folder)
    plain, ddim = tmp_path / "plain", tmp_path / "ddim"
    expected = {tmp_path / "ours": draw(ours, 3), plain: draw(ours, 3)}
    ours.save_pretrained(tmp_path / "ours")
    # Someone puts our scheduler into diffusers' own pipeline.
    diffusers.DDPMPipeline(ours.unet, ours.scheduler).save_pretrained(plain)
    swap_scheduler(ours, "ddim")
    ours.save_pretrained(ddim)
    expected[ddim] = draw(ours, 3)

    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, expected)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for folder, images in expected.items():
        for loader in ("DDPMPipeline", "DiffusionPipeline"):
            np.testing.assert_allclose(np.load(folder / f"{loader}.npy"), images, atol=ROUNDING)


def test_a_folder_of_plain_diffusers_gets_our_scheduler(tmp_path):
    stock = diffusers.DDPMScheduler(20, beta_end=0.5, variance_type="fixed_large", clip_sample_range=2.0)
    theirs = diffusers.DDPMPipeline(tiny(), stock)
    theirs.save_pretrained(tmp_path)
    ours = DDPMPipeline.from_pretrained(tmp_path)
    assert type(ours) is DDPMPipeline and type(ours.scheduler) is DDPMScheduler
    assert {key: ours.scheduler.config[key] for key in stock.config if key[0] != "_"} == {
        key: value for key, value in stock.config.items() if key[0] != "_"
    }
    expected = quiet(theirs)(3, seeds(1)[0], num_inference_steps=20, output_type="np").images
    np.testing.assert_allclose(draw(ours, 3), expected, atol=ROUNDING)


def test_ddim_survives_saving(tiny_folder, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    swap_scheduler(pipeline, "ddim")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.DDIMScheduler
    np.testing.assert_array_equal(
        draw(again, 2, num_inference_steps=5), draw(pipeline, 2, num_inference_steps=5)
    )


class Mark:
    """Unpickling this leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_read_or_written(tiny_folder, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "was-unpickled"
    shutil.copytree(tiny_folder, folder)
    pickle.loads(pickle.dumps(Mark(mark)))
    assert mark.exists()
    mark.unlink()
    (folder / WEIGHTS).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Mark(mark)))
    with pytest.raises(ValueError, match=rf"can't load a pipeline from '{folder}': .*\.safetensors") as error:
        DDPMPipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)
    for value in (False, None):
        with pytest.raises(ValueError, match="would load a pickle; allowed: safetensors only"):
            DDPMPipeline.from_pretrained(folder, use_safetensors=value)
    with pytest.raises(ValueError, match="would write a pickle; allowed: safetensors only"):
        DDPMPipeline.from_pretrained(tiny_folder).save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not mark.exists() and not (tmp_path / "x").exists()


def cut(file, size):
    def damage(folder):
        (folder / file).write_bytes((folder / file).read_bytes()[:size])

    return damage


def remove(name):
    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


def edit(file, **changes):
    def damage(folder):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return damage


def forget_a_weight(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGE = {
    "one byte short": (cut(WEIGHTS, -1), f"{WEIGHTS}'. Error while deserializing header: incomplete"),
    "weights cut": (cut(WEIGHTS, 1000), f"{WEIGHTS}'. Error while deserializing header: "),
    "weights empty": (cut(WEIGHTS, 0), f"{WEIGHTS}'. Error while deserializing header: header too small"),
    "a weight missing": (forget_a_weight, "newly initialized: ['conv_in.weight']"),
    "no weights": (remove(WEIGHTS), "no file named diffusion_pytorch_model.safetensors"),
    "no index": (remove("model_index.json"), "has no model_index.json: it is not a pipeline folder"),
    "no network": (remove("unet"), "no file named config.json"),
    "no scheduler": (remove("scheduler"), "no file named scheduler_config.json"),
    "index cut": (cut("model_index.json", 20), "model_index.json' is not a valid JSON file"),
    "index a list": (write("model_index.json", "[]"), "can't load a pipeline"),
    "index empty": (write("model_index.json", "{}"), "_class_name"),
    "network cut": (cut("unet/config.json", 20), "unet/config.json' is not a valid JSON file"),
    "scheduler cut": (cut(SCHEDULER, 20), f"{SCHEDULER}' is not a valid JSON file"),
    "foreign class": (edit("model_index.json", unet=["elsewhere.models", "Net"]), "elsewhere.models"),
    "bad network": (edit("unet/config.json", block_out_channels=[8]), "number of `block_out_channels`"),
    "bad scheduler": (edit(SCHEDULER, beta_schedule="linaer"), "linaer is not implemented"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folder(kind, tiny_folder, tmp_path, capfd):
    damage, words = DAMAGE[kind]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    with pytest.raises(ValueError) as error:
        DDPMPipeline.from_pretrained(folder)
    message = str(error.value)
    assert words in message and f"'{folder}'" in message and "\n" not in message
    assert capfd.readouterr() == ("", "")  # nothing but the message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/model", "model folder '/nowhere/model' does not exist"),
        ("./model", "model folder './model' does not exist"),
        ("~/no-such-model", "model folder '~/no-such-model' does not exist"),
        ("runs/a/b", "model folder 'runs/a/b' does not exist"),
        ("somebody/no-such-model", "from 'somebody/no-such-model': no such folder, and from the Hub: "),
        ("no such model", "from 'no such model': no such folder, and from the Hub: "),
    ],
)
def test_missing_folder(name, words, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        DDPMPipeline.from_pretrained(name)
    assert "\n" not in str(error.value)


def test_home_and_relative_folders(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/model", "model", "./model/", Path("model")):
        assert type(DDPMPipeline.from_pretrained(name).scheduler) is DDPMScheduler


def test_a_config_of_another_version_is_a_warning(tiny_folder, tmp_path, caplog):
    shutil.copytree(tiny_folder, tmp_path / "model")
    edit("unet/config.json", key_of_tomorrow=1)(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "hf_ddpm"):
        DDPMPipeline.from_pretrained(tmp_path / "model")
    assert "key_of_tomorrow" in caplog.text


def test_output_folder_that_cannot_be_written(tiny_folder, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    file = tmp_path / "file"
    file.write_text("precious")
    for folder, reason in ((file, "File exists"), (file / "model", "Not a directory")):
        with pytest.raises(ValueError, match=rf"folder '{folder}' can't be written: {reason}"):
            pipeline.save_pretrained(folder)
    assert file.read_text() == "precious"


@pytest.mark.parametrize("kind", ["mean", "score"])
@pytest.mark.parametrize(
    "sampler", [diffusers.DDIMScheduler, diffusers.IPNDMScheduler, diffusers.DDPMScheduler]
)
def test_no_other_sampler_reads_what_it_has_no_word_for(sampler, kind):
    # IPNDM looks at no prediction type: its pictures would be wrong without a word.
    network, config = create_model("tiny"), DDPMScheduler(prediction_type=kind).config
    pipeline = DDPMPipeline(network, DDPMScheduler.from_config(config))
    pipeline.scheduler = sampler.from_config(config)
    with pytest.raises(ValueError, match=f"can't read a network of prediction_type '{kind}'; allowed: ddpm"):
        pipeline(2, num_inference_steps=3)

"""pipeline.py: the images of plain diffusers, output types, draws and batches, what is refused."""

import copy
import re

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.scheduler import DDPMScheduler
from tests.generation.networks import (
    ABAR,
    ROUNDING,
    draw,
    one_image,
    quiet,
    seeds,
    short,
    tiny,
)

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")


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
    assert seen == [(True, i, t, (2, 1, 8, 8)) for i, t in enumerate([17, 13, 9, 4, 0])]
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
            "3 generators for a batch of 2; allowed: one, or one per image",
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

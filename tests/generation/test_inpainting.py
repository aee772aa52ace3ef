"""Inpainting: its law on Gaussian data in closed form, known pixels to the last bit, masks of every kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler, create_model
from hf_ddpm.generation.inpainting import as_mask, inpaint
from tests.generation.networks import ABAR, abar_at, quiet, seeds, short, tiny

SE = 5  # standard errors
RHO, STD, KNOWN = 0.8, 0.5, 0.6
COVARIANCE = STD**2 * np.array([[1, RHO], [RHO, 1]])  # of a column of two pixels, mean 0
MASK = [True, False]  # the first of them is filled


def pairs(x_t, t):
    """The exact network of images of independent columns of two pixels."""
    abar = abar_at(t)
    gain = abar**0.5 * COVARIANCE @ np.linalg.inv(abar * COVARIANCE + (1 - abar) * np.eye(2))
    x_0 = torch.from_numpy(gain) @ x_t.double()
    return ((x_t.double() - abar**0.5 * x_0) / (1 - abar) ** 0.5).float()


def drawn(steps, resample, count, **config):
    """Filled pixels of `count` columns whose other pixel is known."""
    pipeline = quiet(
        DDPMPipeline(pairs, DDPMScheduler(clip_sample=False, **config), image_shape=(1, 2, count))
    )
    pipeline.check_inputs(1, None, steps, "pt")
    x_0 = torch.full((1, 1, 2, count), KNOWN)
    filled = torch.tensor(MASK).view(1, 1, 2, 1).expand(1, 1, 2, count)
    images = inpaint(pipeline, pairs, x_0, filled, resample, steps, seeds(1)[0])
    assert torch.equal(images[..., 1, :], x_0[..., 1, :])
    return images[0, 0, 0].double()


def law(steps, resample):
    """Mean and variance of the filled pixel after algorithm 1: the recursion of a Gaussian, step by step."""
    abar = ABAR[:: 1000 // steps]
    before = np.concatenate([[1.0], abar[:-1]])
    mean, covariance, filled = np.zeros(2), np.eye(2), np.array(MASK)
    for i in reversed(range(steps)):
        a, p, beta = abar[i], before[i], 1 - abar[i] / before[i]
        x_0 = a**0.5 * COVARIANCE @ np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(2))
        back = p**0.5 * beta / (1 - a) * x_0 + (1 - beta) ** 0.5 * (1 - p) / (1 - a) * np.eye(2)
        for again in range(resample if i else 1):
            if again:
                mean, covariance = (1 - beta) ** 0.5 * mean, (1 - beta) * covariance + beta * np.eye(2)
            mean, covariance = back @ mean, back @ covariance @ back.T + (beta if i else 0) * np.eye(2)
            mean = np.where(filled, mean, p**0.5 * KNOWN)
            covariance = covariance * np.outer(filled, filled) + np.diag(~filled * (1 - p))
    return mean[0], covariance[0, 0]


def check(found, mean, variance):
    count = len(found)
    assert abs(found.mean() - mean) < SE * (variance / count) ** 0.5
    assert abs(found.var() / variance - 1) < SE * (2 / count) ** 0.5


@pytest.mark.parametrize(("steps", "resample"), [(50, 1), (50, 3), (100, 5)])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_law_of_algorithm_1(steps, resample, variance_type):
    check(drawn(steps, resample, 20_000, variance_type=variance_type), *law(steps, resample))


def test_filled_pixels_of_gaussian_images_have_their_conditional_mean_and_variance():
    exact = RHO * KNOWN, STD**2 * (1 - RHO**2)
    check(drawn(250, 20, 1500), *exact)
    # Its errors go down as 1/resample; each step taken once is far off, so that the check above can fail
    for n in (5, 10, 20):
        mean, variance = law(250, n)
        assert abs(mean - exact[0]) < 0.75 / n * exact[1] ** 0.5 and abs(variance / exact[1] - 1) < 0.8 / n
    with pytest.raises(AssertionError):
        check(drawn(250, 1, 1500), *exact)


# Known pixels


@pytest.fixture(scope="module")
def pipeline():
    return quiet(DDPMPipeline(tiny(), short()))


def levels(count=1, seed=0):
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=seeds(1, seed)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_known_pixels_come_back_as_they_were(dtype):
    torch.manual_seed(0)
    pipeline = quiet(DDPMPipeline(create_model("tiny").eval(), short()).to(dtype))
    images, mask = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:7] = True
    found = pipeline.inpaint(images, mask, resample=2, num_inference_steps=5, generator=seeds(4)).images
    for image, picture in zip(images, found, strict=True):
        array = np.asarray(picture)
        np.testing.assert_array_equal(array[~mask], image[0].numpy()[~mask])
        assert not np.array_equal(array[mask], image[0].numpy()[mask])
    tensor = pipeline.inpaint(images, mask, resample=1, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(tensor[:, 0, ~mask] * 255, images[:, 0, ~mask].float(), rtol=0, atol=1e-4)


def test_an_image_depends_on_its_own_generator_mask_and_class():
    torch.manual_seed(0)
    network = create_model("tiny", num_classes=2).eval()
    torch.nn.init.normal_(network.class_embedding.weight, std=4)
    pipeline = quiet(DDPMPipeline(network, short()))
    images, masks = levels(2), torch.zeros(2, 8, 8)
    masks[0, :4], masks[1, :, 2:] = 1, 1
    both = pipeline.inpaint(
        images, masks, generator=seeds(2), class_labels=[0, 1], guidance_scale=2, resample=2
    )
    for i in range(2):
        one = pipeline.inpaint(
            images[i : i + 1], masks[i], generator=seeds(1, i), class_labels=i, guidance_scale=2, resample=2
        )
        difference = np.asarray(one.images[0]).astype(int) - np.asarray(both.images[i])
        assert np.abs(difference).max() <= 1
    none = pipeline.inpaint(images, masks, generator=seeds(2), resample=2).images
    assert not np.array_equal(np.asarray(none[0]), np.asarray(both.images[0]))


def test_the_pipeline_s_sampler_stays_as_it_is(pipeline):
    before = dict(pipeline.scheduler.config)
    pipeline.inpaint(levels(), torch.ones(8, 8), resample=1, num_inference_steps=3)
    assert dict(pipeline.scheduler.config) == before


# Masks


def hole():
    mask = np.zeros((8, 8), bool)
    mask[:3] = mask[5, 6] = True
    return mask


FORMS = {
    "bool": hole(),
    "0/1 uint8": hole().astype(np.uint8),
    "0/255 uint8": hole().astype(np.uint8) * 255,
    "float": hole().astype(np.float32),
    "int64 tensor": torch.from_numpy(hole()).long(),
    "bool tensor": torch.from_numpy(hole()),
    "bfloat16 tensor": torch.from_numpy(hole()).bfloat16(),
    "channel first": hole()[None],
    "channel last": hole()[..., None],
    "three channels": np.stack([hole()] * 3, -1).astype(np.uint8) * 255,
    "(1, 1, H, W)": hole()[None, None],
    "lists": hole().astype(int).tolist(),
    "PIL 1": Image.fromarray(hole()),
    "PIL L": Image.fromarray(hole().astype(np.uint8) * 255),
    "PIL RGB": Image.fromarray(hole().astype(np.uint8) * 255).convert("RGB"),
    "PIL P": Image.fromarray(hole().astype(np.uint8) * 255).convert("P"),
    "flipped": torch.from_numpy(hole()).flip(0).numpy()[::-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_any_form_fills_its_white_side(form):
    expected = torch.from_numpy(hole()).expand(3, 1, 8, 8)
    assert torch.equal(as_mask(FORMS[form], 3, 8, 8), expected)
    assert torch.equal(as_mask(FORMS["bool"], 1, 8, 8), expected[:1])
    if form != "lists":
        assert torch.equal(as_mask([FORMS[form], hole(), FORMS["PIL L"]], 3, 8, 8), expected)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.full((8, 8), 128, np.uint8), "mask holds 128; allowed: 0 where a pixel is kept, and 1 or 255"),
        (np.arange(64).reshape(8, 8), "mask holds 2; allowed"),
        (np.full((8, 8), 0.5), "mask holds 0.5; allowed"),
        (np.full((8, 8), np.nan), "mask holds nan; allowed"),
        (np.array([[1] * 8, [255] * 8] * 4), "mask holds both 1 and 255; allowed"),
        (-hole().astype(int), "mask holds -1; allowed"),
        (np.zeros((8, 8)), "a mask fills no pixel; allowed"),
        (np.ones((7, 8)), "mask has shape (7, 8); allowed: the height and width of the images, (8, 8)"),
        (np.ones((2, 8, 8, 4)), "mask has shape (2, 8, 8, 4); allowed"),
        (np.ones((2, 8, 8)), "there are 2 masks for 3 images; allowed: as many, or one"),
        ([hole(), hole()], "there are 2 masks for 3 images"),
        (np.stack([hole(), ~hole(), hole()], -1), "mask has channels that differ; allowed: black and white"),
        (Image.new("RGBA", (8, 8)), "mask has PIL mode RGBA; allowed: 1, L, P, RGB"),
        (Image.new("I;16", (8, 8)), "mask has PIL mode I;16"),
        ("mask.png", "mask is 'mask.png'; allowed: a PIL image, an array or a tensor of numbers"),
        (None, "mask is None; allowed"),
        ([[1, 0], [1]], "mask is a list; allowed"),
        (torch.zeros(8, 8, dtype=torch.complex64), "mask is a complex64 tensor of shape (8, 8); allowed"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_other_masks_are_refused(pipeline, mask, words):
    with pytest.raises(ValueError) as caught:
        pipeline.inpaint(levels(3), mask)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_other_arguments_are_refused(pipeline):
    import diffusers

    image, mask = levels(), hole()
    for given, words in (
        ({"resample": 0}, "resample is 0; allowed: whole numbers >= 1"),
        ({"resample": 2.5}, "resample is 2.5; allowed"),
        ({"num_inference_steps": 21}, "num_inference_steps is 21; allowed: whole numbers in 1..20"),
        ({"output_type": "latent"}, "output_type is 'latent'"),
        ({"generator": seeds(2)}, "generator"),
        ({"class_labels": 1}, "class_labels is 1, but the network knows no classes"),
        ({"guidance_scale": 2}, "guidance_scale is 2, but the network knows no classes"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline.inpaint(image, mask, **given)
    with pytest.raises(ValueError, match="images are a uint8 tensor"):
        pipeline.inpaint(torch.zeros(1, 1, 9, 9, dtype=torch.uint8), np.ones((9, 9)))
    with pytest.raises(ValueError, match=r"images have values from .* to 9; allowed: \[-1, 1\]"):
        pipeline.inpaint(torch.full((1, 1, 8, 8), 9.0), mask)
    other = DDPMPipeline(pipeline.unet, diffusers.DDIMScheduler.from_config(pipeline.scheduler.config))
    with pytest.raises(ValueError, match="the scheduler is 'DDIMScheduler'; allowed: DDPMScheduler"):
        other.inpaint(image, mask)

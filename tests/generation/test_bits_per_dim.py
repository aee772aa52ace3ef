"""generation/bits_per_dim.py: the bound of a few images in every usual form."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler, create_model
from hf_ddpm.data.pixels import to_float
from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.generation.given import as_images
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.likelihood import estimate_bound

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)


def transparent():
    image = Image.fromarray(PIXELS[0])
    image.info["transparency"] = 0
    return image


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    return DDPMPipeline(create_model("tiny"), DDPMScheduler(50, beta_end=0.3))


def test_every_form_has_the_same_bound(pipeline):
    x_0 = to_float(torch.from_numpy(PIXELS)[:, None])
    pipeline.unet.eval()
    expected = estimate_bound(
        pipeline.process, as_denoiser(pipeline.unet), x_0, num_evals_per_image=4, variance_type="fixed_small"
    )
    pipeline.unet.train()
    tensor = torch.from_numpy(PIXELS)
    for images in (
        [Image.fromarray(image) for image in PIXELS],
        *(list(PIXELS), PIXELS, PIXELS[..., None], PIXELS[:, None], tensor, tensor[:, None], x_0),
        *(x_0.numpy(), x_0.permute(0, 2, 3, 1)),
    ):
        found = pipeline.bits_per_dim(images, num_evals_per_image=4)
        torch.testing.assert_close(found.per_image_bpd, expected.per_image_bpd, rtol=1e-5, atol=0)
    assert pipeline.unet.training and found.stderr > 0
    one = pipeline.bits_per_dim(Image.fromarray(PIXELS[0]), num_evals_per_image=4)
    assert one.bpd == pytest.approx(found.per_image_bpd[0].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (Image.fromarray(PIXELS[0]).convert("P"), "PIL mode P; allowed: L, RGB, RGBA"),
        (Image.fromarray(PIXELS[0]).convert("RGB"), r"RGB is \(3, 8, 8\); the model's are \(1, 8, 8\)"),
        (transparent(), "an image has a transparent colour; allowed: L, RGB, RGBA"),
        (PIXELS[0, :7], r"shape \(7, 8\); the model's are"),
        (PIXELS / 255, r"did you mean 2 \* x - 1"),
        (PIXELS.astype(np.int64), "int64 NumPy array"),
        (to_float(torch.from_numpy(PIXELS)).half(), "half precision"),
        ([], "no images"),
        (None, "images are None"),
        ("picture.png", "images are 'picture.png'"),
    ],
    ids=range(10),
)
def test_what_is_no_image_is_refused(pipeline, images, words):
    with pytest.raises(ValueError, match=words) as error:
        pipeline.bits_per_dim(images, num_evals_per_image=4)
    assert len(str(error.value)) < 300


def test_pictures_of_a_form_that_numbers_alone_do_not_tell():
    """Images of 3x3 pixels of 3 channels, whose arrays may be (C, H, W) or (H, W, C)."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    picture = as_images(Image.fromarray(pixels), (3, 3, 3))
    assert torch.equal(picture, to_float(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
    for images in (pixels, torch.from_numpy(pixels), pixels[None].repeat(3, 0)):
        with pytest.raises(ValueError, match=r"may be \(.*\) or \(.*\); allowed: PIL images"):
            as_images(images, (3, 3, 3))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_sampler_that_has_no_variance_leaves_it_to_the_networks(scheduler):
    pipeline = DDPMPipeline(
        create_model("tiny"), DDPMScheduler(50, beta_end=0.3, variance_type="fixed_large")
    )
    x_0 = to_float(torch.from_numpy(PIXELS)[:, None])
    expected = pipeline.bits_per_dim(x_0, num_evals_per_image=4).bpd
    assert expected != pipeline.bits_per_dim(x_0, num_evals_per_image=4, variance_type="fixed_small").bpd
    pipeline.scheduler = scheduler()
    assert pipeline.bits_per_dim(x_0, num_evals_per_image=4).bpd == expected
    swap_scheduler(pipeline, "ddpm")
    assert pipeline.scheduler.variance_type == "fixed_large"
    pipeline.scheduler = DDIMScheduler(50, beta_end=0.3)  # of the same process, so that its own keys stay
    swap_scheduler(pipeline, "ddpm")
    assert pipeline.scheduler.variance_type == "fixed_large"

"""docs/scheduler.md's swaps: our scheduler in diffusers scripts, diffusers' samplers in our pipeline."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.models import create_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")
ROUNDING = 2e-4


def unet(channels=3):
    torch.manual_seed(0)
    return create_model("tiny", channels=channels).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_stock_pipeline(variance_type):
    pipe = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(variance_type=variance_type))
    pipe.set_progress_bar_config(disable=True)
    before = pipe(2, generator(), num_inference_steps=20, output_type="np").images
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    after = pipe(2, generator(), num_inference_steps=20, output_type="np").images
    np.testing.assert_allclose(after, before, atol=ROUNDING)


class LatentPipeline(DiffusionPipeline):
    """A latent diffusion script, as people write them around diffusers' schedulers."""

    def __init__(self, vae, unet, scheduler):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, batch_size, generator, num_inference_steps):
        latents = randn_tensor((batch_size, 4, 8, 8), generator=generator, device=self.device)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            noise_pred = self.unet(self.scheduler.scale_model_input(latents, t), t).sample
            latents = self.scheduler.step(noise_pred, t, latents, generator=generator).prev_sample
        image = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (image / 2 + 0.5).clamp(0, 1)


def latent_pipeline(scheduler):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()
    return LatentPipeline(vae, unet(4), scheduler)


LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_latent_pipeline(prediction_type):
    pipe = latent_pipeline(diffusers.DDPMScheduler(**LATENT, prediction_type=prediction_type))
    before = pipe(2, generator(), 20)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    after = pipe(2, generator(), 20)
    assert before.shape == (2, 3, 16, 16)
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)


def image_to_image(scheduler, unet, image, strength, steps, generator):
    """Noise an image part of the way, and denoise it from there: the loop of diffusers' img2img pipelines."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[steps - int(steps * strength) :]
    sample = scheduler.add_noise(image, torch.randn(image.shape, generator=generator), timesteps[:1])
    with torch.no_grad():
        for t in timesteps:
            sample = scheduler.step(unet(sample, t).sample, t, sample, generator=generator).prev_sample
    return sample


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_image_to_image(strength):
    image, model = torch.rand(2, 3, 8, 8, generator=generator(1)) * 2 - 1, unet()
    stock = diffusers.DDPMScheduler()
    before = image_to_image(stock, model, image, strength, 20, generator())
    after = image_to_image(DDPMScheduler.from_config(stock.config), model, image, strength, 20, generator())
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)


def test_image_to_image_with_the_exact_network_finds_the_image():
    image, ours = torch.rand(2, 3, 8, 8, generator=generator(1)) * 2 - 1, DDPMScheduler()

    def exact(sample, t):
        eps = ours.process.predict_eps(sample, image, t.expand(len(sample)))
        return type("Output", (), {"sample": eps})

    found = image_to_image(ours, exact, image, 0.5, 20, generator())
    torch.testing.assert_close(found, image, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_samplers_of_diffusers_in_our_pipeline(sampler, tmp_path):
    pipeline = DDPMPipeline(unet(), DDPMScheduler(variance_type="fixed_large"))
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, generator(), num_inference_steps=10, output_type="np").images
    pipeline.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is sampler
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(
        again(2, generator(), num_inference_steps=10, output_type="np").images, images
    )
    assert type(diffusers.DDPMPipeline.from_pretrained(tmp_path).scheduler) is sampler
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)  # and back
    assert pipeline.scheduler.config.variance_type == "fixed_large"

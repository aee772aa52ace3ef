"""samplers.py: every sampler of diffusers draws what an exact network knows; swaps keep the process."""

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import SCHEDULERS, swap_scheduler
from hf_ddpm.models import create_model
from hf_ddpm.scheduler import DDPMScheduler
from tests.generation.networks import SIGMA_0, draw, gaussian, one_image, short, tiny

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")


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

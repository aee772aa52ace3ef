"""What a pipeline's network was trained for is said once, by the scheduler that it came with."""

import copy
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.scheduler import DDPMScheduler
from tests.generation.networks import draw, quiet, seeds, short, tiny

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")
REFUSED = "HeunDiscreteScheduler has 1000 steps, but the network was trained for 20; allowed: swap_scheduler"


def assign(pipeline, scheduler):
    pipeline.scheduler = scheduler


def register(pipeline, scheduler):
    pipeline.register_modules(scheduler=scheduler)


@pytest.mark.parametrize("give", [assign, register])
def test_a_scheduler_of_another_process_is_refused_at_the_call(give):
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    process = pipeline.process
    give(pipeline, diffusers.HeunDiscreteScheduler())
    for use in (pipeline, pipeline.check_inputs):
        with pytest.raises(ValueError, match=REFUSED):
            use(num_inference_steps=5)
    # What the network says doesn't depend on the sampler
    x_t = torch.zeros(1, 1, 8, 8)
    expected = DDPMPipeline(tiny(), short())
    assert torch.equal(pipeline.process.betas, process.betas)
    for ask in ("predict_x0", "score"):
        assert torch.equal(getattr(pipeline, ask)(x_t, 7), getattr(expected, ask)(x_t, 7))
    # And it gets its own back
    swap_scheduler(pipeline, "ddpm")
    np.testing.assert_array_equal(
        draw(pipeline, 2, num_inference_steps=5), draw(expected, 2, num_inference_steps=5)
    )


def test_a_new_pipeline_defines_the_process_anew():
    pipeline = quiet(DDPMPipeline(tiny(), short()))
    pipeline.scheduler = short(beta_end=0.4)
    with pytest.raises(ValueError, match="or a new pipeline"):
        pipeline(num_inference_steps=5)
    assert len(quiet(DDPMPipeline(pipeline.unet, pipeline.scheduler))(num_inference_steps=5).images) == 1


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("made_with", [DDPMScheduler, diffusers.DDIMScheduler])
def test_what_the_network_predicts_is_said_by_the_scheduler_that_it_came_with(kind, made_with):
    pipeline = quiet(DDPMPipeline(tiny(), made_with(num_train_timesteps=20, beta_end=0.5)))
    own = pipeline.scheduler
    swap_scheduler(pipeline, "ddim")
    pipeline.scheduler.register_to_config(prediction_type=kind)
    with pytest.raises(
        ValueError,
        match=f"DDIMScheduler reads prediction_type '{kind}', but the network was trained for 'epsilon'",
    ):
        pipeline(num_inference_steps=5)
    assert pipeline.prediction_type == pipeline.trained_scheduler.config.prediction_type == "epsilon"
    own.register_to_config(prediction_type=kind)  # diffusers' idiom for a config that is wrong
    assert pipeline.prediction_type == pipeline.trained_scheduler.config.prediction_type == kind
    pipeline(num_inference_steps=5)


def test_a_pipeline_of_another_sampler_has_its_process():
    ddim = diffusers.DDIMScheduler(20, beta_end=0.5)
    pipeline = quiet(DDPMPipeline(tiny(), ddim))
    assert torch.equal(pipeline.process.betas, short().process.betas)
    swap_scheduler(pipeline, "heun")
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod, ddim.alphas_cumprod, atol=1e-6)
    # diffusers' own idiom takes Heun's betas here: DDIM's config notes its own as defaults
    pipeline.scheduler = diffusers.HeunDiscreteScheduler.from_config(ddim.config)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler has 1000 steps, but the network"):
        pipeline(num_inference_steps=5)


def test_a_scheduler_passed_at_loading_is_held_to_the_folders(tiny_folder, tmp_path):
    heun = diffusers.HeunDiscreteScheduler()
    pipeline = quiet(DDPMPipeline.from_pretrained(tiny_folder, scheduler=heun))
    with pytest.raises(ValueError, match=REFUSED):
        pipeline(num_inference_steps=5)
    own = diffusers.HeunDiscreteScheduler.from_pretrained(tiny_folder, subfolder="scheduler")
    assert (
        len(quiet(DDPMPipeline.from_pretrained(tiny_folder, scheduler=own))(num_inference_steps=5).images)
        == 1
    )
    # A folder that says no process leaves it to the scheduler that is passed
    shutil.copytree(tiny_folder, tmp_path / "odd")
    file = tmp_path / "odd/scheduler/scheduler_config.json"
    for config in ({}, json.loads(file.read_text()) | {"beta_schedule": "linaer"}):
        file.write_text(json.dumps(config))
        pipeline = DDPMPipeline.from_pretrained(tmp_path / "odd", scheduler=short(beta_end=0.4))
        assert torch.equal(pipeline.process.betas, short(beta_end=0.4).process.betas)


def test_copies_remember():
    pipeline = copy.deepcopy(quiet(DDPMPipeline(tiny(), short())))
    pipeline.scheduler = short(beta_end=0.4)
    with pytest.raises(ValueError, match="runs another process"):
        pipeline(num_inference_steps=5)


@pytest.mark.parametrize("scheduler", [None, 0, "ddpm", DDPMScheduler, {}], ids=str)
def test_what_is_no_scheduler(scheduler):
    with pytest.raises(ValueError, match=r"^scheduler is .*; allowed: a scheduler of diffusers, such as"):
        DDPMPipeline(tiny(), scheduler)


# An infinite answer is not hidden by what comes after it


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_answer_that_is_not_finite_is_named_by_its_step(value, dtype, sampler):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))

        def forward(self, x_t, t):
            return torch.full_like(x_t, value if t[0] in (8, 9) else 0.0)

    pipeline = quiet(DDPMPipeline(Network(), short()))
    swap_scheduler(pipeline, sampler)
    with pytest.raises(
        ValueError, match=r"not finite: the network's answer at step [89] \(call 3 of 5\) is not"
    ):
        pipeline(1, seeds(1)[0], 5, image_shape=(1, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"generator": 0}, "generator is 0; allowed: a torch.Generator, or a list of them"),
        ({"batch_size": 0}, "batch_size is 0; allowed: whole numbers >= 1"),
        ({"pred_original_steps": 3}, "pred_original_steps is 3; allowed: a list of positions"),
        ({"pred_original_steps": [True]}, "a position in pred_original_steps is True"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is 'a int'; allowed: a function"),
        (
            {"callback_on_step_end": lambda *_: 3},
            "callback_on_step_end gave a int at step 0; allowed: None, or",
        ),
        (
            {"callback_on_step_end": lambda *_: {"sample": torch.zeros(1)}},
            "callback_on_step_end gave a Tensor at step 0; allowed: None, or {'sample': floating-point ",
        ),
        ({"image_shape": ()}, "image_shape is (); allowed: (C, H, W)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_argument(arguments, words):
    with pytest.raises(ValueError) as error:
        quiet(DDPMPipeline(tiny(), short()))(**arguments)
    assert words in str(error.value)

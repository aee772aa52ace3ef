"""measured.py: a pipeline samples with its network's measured errors, and ends with grey levels."""

import copy
import dataclasses
import json

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm.decoders import LevelsDecoder
from hf_ddpm.folders.errors import ErrorsOf, StoredErrors, network_digest, process_digest, write_errors
from hf_ddpm.folders.layout import ERRORS
from hf_ddpm.generation.measured import ENDINGS, ended
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.sample import sample
from hf_ddpm.generation.samplers import respace, swap_scheduler
from hf_ddpm.scheduler import DDPMScheduler
from tests.generation.networks import draw, quiet, seeds, short, tiny
from tests.measured import known_errors

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")
GREYS = torch.tensor([0, 100, 255])  # of the images, by the table
LEVELS = torch.zeros(1, 256, dtype=torch.int64).index_fill(1, GREYS, 10**6)


def plan(folder, pipeline=None, clip_x0=True, mse=0.2):
    """Leave measured errors in a pipeline's folder, as `hf-ddpm plan` does."""
    pipeline = DDPMPipeline.from_pretrained(folder) if pipeline is None else pipeline
    process = pipeline.process
    errors = known_errors(process, torch.full((len(process),), mse), LEVELS, sigma=0.5)
    of = ErrorsOf(
        weights=network_digest(pipeline.unet),
        process=process_digest(process),
        prediction_type=pipeline.prediction_type,
        clip_x0=clip_x0,
        dataset="digits",
        split="train",
        part="train",
        holdout=None,
        holdout_seed=None,
        data="b" * 16,
        chosen="c" * 16,
        num_rows=1,
        evaluations=400,
        seed=0,
    )
    write_errors(folder, StoredErrors(errors, torch.tensor([0]), torch.tensor([1]), of))


@pytest.fixture
def planned(tiny_folder, tmp_path):
    """A pipeline's folder with measured errors, whose scheduler has the variance "optimal"."""
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.scheduler.variance_type = "optimal"
    pipeline.save_pretrained(tmp_path / "model")
    plan(tmp_path / "model", pipeline)
    return tmp_path / "model"


# The variance


def test_a_planned_folder_samples_by_its_errors(planned, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(planned)
    images = draw(pipeline, 4, num_inference_steps=5)
    assert pipeline.scheduler.errors is not None
    by_hand = DDPMPipeline(pipeline.unet, short(variance_type="optimal"))
    by_hand.scheduler.errors = pipeline.errors.errors
    np.testing.assert_array_equal(draw(by_hand, 4, num_inference_steps=5), images)
    fixed = DDPMPipeline(pipeline.unet, short())
    assert np.abs(draw(fixed, 4, num_inference_steps=5) - images).max() > 0.01

    pipeline.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / ERRORS).exists()
    again = DDPMPipeline.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(draw(again, 4, num_inference_steps=5), images)


def test_other_samplers_and_back(planned):
    pipeline = DDPMPipeline.from_pretrained(planned)
    images = draw(pipeline, 2, num_inference_steps=5)
    swap_scheduler(pipeline, "ddim")
    draw(pipeline, 2, num_inference_steps=5)
    swap_scheduler(pipeline, "ddpm")
    np.testing.assert_array_equal(draw(pipeline, 2, num_inference_steps=5), images)
    respace(pipeline, "leading")
    np.testing.assert_array_equal(draw(pipeline, 2, num_inference_steps=5), images)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    np.testing.assert_array_equal(draw(pipeline, 2, num_inference_steps=5), images)
    np.testing.assert_array_equal(draw(copy.deepcopy(pipeline), 2, num_inference_steps=5), images)


def test_errors_that_were_assigned_outlive_other_samplers():
    pipeline = DDPMPipeline(tiny(), short(variance_type="by-value"))
    pipeline.scheduler.errors = known_errors(pipeline.process, torch.full((20,), 0.2))
    images = draw(pipeline, 2, num_inference_steps=5)
    for name in ("dpm-solver++", "ddpm"):
        swap_scheduler(pipeline, name)
        again = draw(pipeline, 2, num_inference_steps=5)
    np.testing.assert_array_equal(again, images)


def test_a_folder_that_lacks_what_its_variance_needs_is_said(tmp_path, caplog):
    pipeline = DDPMPipeline(tiny(), short(variance_type="optimal"))
    pipeline.save_pretrained(tmp_path)
    assert "but no measured errors are saved: hf-ddpm plan measures them" in caplog.text


def test_plain_diffusers_refuses_the_folder(planned, no_hub):
    assert json.loads((planned / "model_index.json").read_text())["scheduler"] == ["hf_ddpm", "DDPMScheduler"]
    with pytest.raises((ValueError, AttributeError, OSError)):
        diffusers.DDPMPipeline.from_pretrained(planned)
    pipeline = diffusers.DDPMPipeline(tiny(), DDPMScheduler(variance_type="optimal"))
    with pytest.raises(ValueError, match="variance_type 'optimal' needs the network's measured errors"):
        pipeline(num_inference_steps=2)


def test_other_weights_are_refused(planned):
    pipeline = DDPMPipeline.from_pretrained(planned)
    draw(pipeline, 1, num_inference_steps=2)
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1)
    with pytest.raises(ValueError, match="is of other weights than the model's"):
        draw(pipeline, 1, num_inference_steps=2)


@pytest.mark.parametrize("word", ["optimal", "by-value"])
def test_a_model_without_errors_is_refused_in_one_line(tiny_folder, word):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.scheduler.variance_type = word
    with pytest.raises(
        ValueError, match=f"^variance_type is '{word}'; allowed: after hf-ddpm plan has"
    ) as error:
        draw(pipeline, 1, num_inference_steps=2)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "config", [{"clip_sample": False}, {"clip_sample_range": 2.0}, {"thresholding": True}], ids=str
)
def test_another_clipping_than_the_measured_one_is_refused(planned, config):
    pipeline = DDPMPipeline.from_pretrained(planned)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **config)
    with pytest.raises(ValueError, match="measured with clip_x0 True and the scheduler clips otherwise"):
        draw(pipeline, 1, num_inference_steps=2)
    plan(planned, pipeline, clip_x0=False)
    if config == {"clip_sample": False}:
        draw(pipeline, 1, num_inference_steps=2)
        return
    with pytest.raises(ValueError, match="measured with clip_x0 False"):
        draw(pipeline, 1, num_inference_steps=2)


# Endings


def test_a_mode_is_the_likeliest_level_and_a_draw_has_its_chances():
    """G and σ are such that a pixel at 0 is level 100 or 180, by 3 to 1; one near 1 is 255."""
    log_g = torch.full((1, 256), -60.0, dtype=torch.float64)
    log_g[0, [100, 180, 255]] = 0
    level = torch.tensor([100, 180, 255]) / 127.5 - 1
    x_0 = torch.tensor([0.0, 0.99]).view(1, 1, 2, 1).expand(4, 1, 2, 2000)
    sigma = ((level[1] ** 2 - level[0] ** 2) / (2 * np.log(3))).sqrt()
    decoder = LevelsDecoder(log_g, sigma.log())
    mode = ((ended(x_0, decoder, "mode", None) + 1) * 127.5).round()
    assert (mode[:, :, 0] == 100).all() and (mode[:, :, 1] == 255).all()
    found = ((ended(x_0, decoder, "draw", seeds(1)[0]) + 1) * 127.5).round()
    weights = (-0.5 * (level / sigma) ** 2).exp()
    chances = weights / weights.sum()
    assert set(found[:, :, 0].unique().tolist()) <= {100, 180, 255}
    for grey, chance in zip((100, 180, 255), chances.tolist(), strict=True):
        share = (found[:, :, 0] == grey).double().mean().item()
        assert abs(share - chance) < 5 * (chance * (1 - chance) / 8000) ** 0.5
    assert chances[0] / chances[1] == pytest.approx(3, rel=1e-6)
    assert ended(x_0, None, "mean", None) is x_0


@pytest.mark.parametrize("ending", ["mode", "draw"])
@pytest.mark.parametrize("name", ["ddpm", "unipc", "euler"])
def test_samples_end_on_the_images_levels(planned, ending, name):
    pipeline = quiet(DDPMPipeline.from_pretrained(planned))
    swap_scheduler(pipeline, name)
    images = pipeline(6, seeds(6), 5, "np", ending=ending).images
    assert set(np.unique((images * 255).round())) <= set(GREYS.tolist())
    np.testing.assert_array_equal(pipeline(2, seeds(2), 5, "np", ending=ending).images, images[:2])
    pieces = pipeline(6, seeds(6), 5, "np", max_batch_size=4, ending=ending).images
    np.testing.assert_allclose(pieces, images, atol=1e-6)


def test_the_steps_are_not_the_endings(planned):
    """All endings are of the same predicted x_0: the draw comes after the noise of the steps."""
    pipeline = quiet(DDPMPipeline.from_pretrained(planned))
    found = {}
    for ending in ENDINGS:
        out = pipeline(2, seeds(2), 5, "pt", ending=ending, pred_original_steps=[-1])
        found[ending] = out.images
        assert torch.equal(out.pred_original_images[-1], found["mean"])
    greys = GREYS.double() / 255
    nearest = greys[(found["mean"].double()[..., None] - greys).abs().argmin(-1)]  # all are as frequent
    torch.testing.assert_close(found["mode"].double(), nearest, rtol=0, atol=1e-6)


def test_what_an_ending_needs(tiny_folder, planned):
    plain, pipeline = (quiet(DDPMPipeline.from_pretrained(folder)) for folder in (tiny_folder, planned))
    with pytest.raises(ValueError, match=r"^ending is 'mode'; allowed: after hf-ddpm plan has measured"):
        plain(ending="mode")
    for wrong, hint in (("modes", r" \(did you mean 'mode'\?\)"), (None, ""), (3, "")):
        with pytest.raises(ValueError, match=rf"^ending is {wrong!r}{hint}; allowed: mean, mode, draw$"):
            pipeline(ending=wrong)
    stored = pipeline.errors
    two = dataclasses.replace(stored.errors, levels=torch.ones(3, 256, dtype=torch.int64))
    pipeline.scheduler.errors = two
    with pytest.raises(ValueError, match="grey levels of 3"):
        pipeline(num_inference_steps=2, ending="mode")
    respace(pipeline, "trailing")  # whose last step, 9 of 20, is all noise
    with pytest.raises(
        ValueError, match=r"^ending is 'draw', but the chain begins at step 9; allowed"
    ) as error:
        pipeline(num_inference_steps=2, ending="draw")
    assert len(str(error.value)) < 300


# The command's function


def test_sample_with_an_ending(planned, tmp_path):
    from PIL import Image

    out = tmp_path / "out"
    sample(str(planned), 3, str(out), steps=4, variance_type="by-value", ending="mode")
    images = [np.asarray(Image.open(out / f"0000{i}.png")) for i in range(3)]
    assert set(np.unique(images)) <= set(GREYS.tolist())
    with pytest.raises(ValueError, match="holds samples already"):
        sample(str(planned), 3, str(out), steps=4, variance_type="by-value", ending="draw")
    plan(planned, mse=0.3)  # the samples of other errors are other samples
    with pytest.raises(ValueError, match="holds samples already"):
        sample(str(planned), 4, str(out), steps=4, variance_type="by-value", ending="mode")
    with pytest.raises(ValueError, match=r"'best'; allowed: fixed_small, fixed_large, optimal, by-value$"):
        sample(str(planned), 3, str(out), variance_type="best")


# Spacings


@pytest.mark.parametrize("name", ["ddpm", "dpm-solver++", "euler"])
@pytest.mark.parametrize("spacing", ["quadratic", "align-your-steps"])
def test_samplers_that_take_steps_take_those(name, spacing, tmp_path):
    pipeline = quiet(DDPMPipeline(tiny(), DDPMScheduler(timestep_spacing=spacing)))
    pipeline.check_inputs(num_inference_steps=7)
    expected = pipeline.scheduler.timesteps.tolist()
    swap_scheduler(pipeline, name)  # a spacing that somebody chose stays
    images = draw(pipeline, 2, num_inference_steps=7)
    assert pipeline.scheduler.timesteps.tolist() == expected
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"][0] == "hf_ddpm"
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is type(pipeline.scheduler)
    np.testing.assert_array_equal(draw(again, 2, num_inference_steps=7), images)
    respace(pipeline, "trailing")
    draw(pipeline, 2, num_inference_steps=7)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"][0] == "diffusers"


@pytest.mark.parametrize("name", ["ddim", "unipc", "heun", "pndm"])
def test_samplers_that_take_none_say_so(name, caplog):
    pipeline = quiet(DDPMPipeline(tiny(), DDPMScheduler(timestep_spacing="quadratic")))
    swap_scheduler(pipeline, name)
    own = pipeline.scheduler.config.timestep_spacing
    assert f"Scheduler can't space its steps by 'quadratic', and spaces them by '{own}'" in caplog.text
    draw(pipeline, 1, num_inference_steps=5)
    with pytest.raises(
        ValueError, match="takes no steps that others chose; allowed: linspace, lead"
    ) as error:
        respace(pipeline, "quadratic")
    assert "or a sampler of ddpm, dpm-solver++, euler" in str(error.value) and len(str(error.value)) < 300


def test_a_sampler_that_was_made_with_such_a_spacing_by_hand():
    pipeline = quiet(DDPMPipeline(tiny(), DDPMScheduler()))
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(config, timestep_spacing="quadratic")
    with pytest.raises(
        ValueError, match="UniPCMultistepScheduler can't do 5 steps: timestep_spacing is 'quadr"
    ):
        draw(pipeline, 1, num_inference_steps=5)

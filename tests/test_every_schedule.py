"""Every beta schedule, a user's own too: saved, loaded by both libraries, sampled from and evaluated."""

import diffusers
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler, create_model
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.generation.samplers import SCHEDULERS, swap_scheduler
from hf_ddpm.schedules import SCHEDULES, Schedule

pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")

OWN = Schedule(lambda num_steps, start, end: torch.linspace(0.1, 0.6, num_steps, dtype=torch.float64))


@pytest.fixture(autouse=True)
def own_schedule(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "own", OWN)


@pytest.mark.parametrize("name", [*SCHEDULES, "own"])
@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero-snr"])
def test_saved_loaded_sampled_and_evaluated(name, zero_snr, tmp_path):
    options = {"beta_start": 0.05, "beta_end": 0.5, "prediction_type": "v_prediction"}
    scheduler = DDPMScheduler(20, beta_schedule=name, rescale_betas_zero_snr=zero_snr, **options)
    torch.manual_seed(0)
    DDPMPipeline(create_model("tiny"), scheduler).save_pretrained(tmp_path / "model")

    ours = DDPMPipeline.from_pretrained(tmp_path / "model")
    plain = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model")
    assert type(plain.scheduler) is diffusers.DDPMScheduler
    assert torch.equal(ours.process.betas, scheduler.process.betas)
    torch.testing.assert_close(plain.scheduler.betas.double(), ours.process.betas, rtol=2e-5, atol=1e-7)

    images = [
        pipeline(2, torch.Generator().manual_seed(1), 20, output_type="np").images
        for pipeline in (ours, plain)
    ]
    assert abs(images[0] - images[1]).max() < 1e-3
    report = evaluate(
        EvaluationConfig(model=str(tmp_path / "model"), dataset="digits", num_images=2, num_evals_per_image=2)
    )
    assert report["bits_per_dim"]["bpd"]["value"] > 0


@pytest.mark.parametrize("name", ["constant", "own"])
def test_other_samplers_read_a_schedule_that_they_have_no_word_for(name, tmp_path):
    scheduler = DDPMScheduler(20, beta_schedule=name, beta_start=0.2)
    pipeline = DDPMPipeline(create_model("tiny"), scheduler)
    swap_scheduler(pipeline, "ddim")
    torch.testing.assert_close(pipeline.scheduler.betas, scheduler.betas)
    in_memory = diffusers.DDIMScheduler.from_config(scheduler.config)
    torch.testing.assert_close(in_memory.betas, scheduler.betas)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(DDPMPipeline.from_pretrained(tmp_path).process.betas, scheduler.process.betas)


@pytest.mark.parametrize("sampler", [name for name in SCHEDULERS if name != "ddpm"])
@pytest.mark.parametrize("name", [*SCHEDULES, "own"])
def test_every_sampler_runs_its_process(name, sampler):
    ends = {"beta_start": 0.05, "beta_end": 0.5} if name != "linear" else {"beta_end": 0.3}
    scheduler = DDPMScheduler(20, beta_schedule=name, **ends)
    pipeline = DDPMPipeline(create_model("tiny"), scheduler)
    swap_scheduler(pipeline, sampler)
    torch.testing.assert_close(
        pipeline.scheduler.alphas_cumprod.double(), scheduler.process.alphas_cumprod, rtol=1e-4, atol=1e-6
    )
    assert torch.equal(pipeline.process.betas, scheduler.process.betas)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(1, torch.Generator().manual_seed(0), 5, output_type="pt").images
    assert images.isfinite().all()

"""A model whose scheduler has a measured variance is scored and drawn with it."""

from pathlib import Path

import pytest
import torch

from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.scored_model import load_scored_model
from hf_ddpm.generation.pipeline import DDPMPipeline
from tests.generation.test_measured import plan


@pytest.fixture
def measured(tiny_folder, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.scheduler.variance_type = "optimal"
    pipeline.save_pretrained(tmp_path / "model")
    plan(tmp_path / "model", pipeline)
    return tmp_path / "model"


def test_it_is_the_default_variance_of_the_bound(measured):
    model = load_scored_model(str(measured), torch.device("cpu"), steps=5)
    errors = model.pipeline.errors.errors
    assert model.variance_type == "optimal" and len(model.process) == 5
    torch.testing.assert_close(model.variance, errors.variance(model.process, "optimal"))
    assert load_scored_model(str(measured), torch.device("cpu"), "fixed_small").variance == "fixed_small"


def test_evaluate_scores_and_draws_with_it(measured):
    classifier = Path(__file__).parents[2] / "train_scripts" / "classifiers" / "digits"
    options = {"num_images": 4, "num_evals_per_image": 2, "extractor": str(classifier), "num_samples": 4}
    report = evaluate(EvaluationConfig(model=str(measured), dataset="digits", sampling_steps=3, **options))
    assert report["bits_per_dim"]["variance_type"] == "optimal"
    (measured / "errors.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no errors\.safetensors; allowed: after hf-ddpm plan"):
        evaluate(EvaluationConfig(model=str(measured), dataset="digits", **options))

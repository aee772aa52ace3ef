"""model_cards/fashion-mnist-28: the model that is shipped loads anywhere, and is as good as its card says.

`fashion_mnist_64.parquet` holds the first 64 of the test images that its evaluation scored (Zalando Research,
MIT licence), as written by

    images = load_dataset("parquet", data_files="data/fashion-mnist/test-*.parquet", split="train")
    rows = load_file(FOLDER / "evaluation.safetensors")["image_indices"][:64].tolist()
    images.select(rows).to_parquet(IMAGES)
"""

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline
from hf_ddpm.data.pixels import image_digest, to_float
from hf_ddpm.data.stream import load_stream
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.likelihood import estimate_bound
from hf_ddpm.models import create_model

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "model_cards" / "fashion-mnist-28"
IMAGES = Path(__file__).with_name("fashion_mnist_64.parquet")


@pytest.fixture(scope="module")
def report():
    return json.loads((FOLDER / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def measured():
    """What the evaluation found for each image."""
    return load_file(FOLDER / "evaluation.safetensors")


def images(count):
    return list(load_stream(IMAGES).select(range(count)))


def test_it_is_small_and_loads_without_the_hub(no_hub):
    assert (FOLDER / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 3e6  # half precision
    ours, plain = DDPMPipeline.from_pretrained(FOLDER), diffusers.DDPMPipeline.from_pretrained(FOLDER)
    weights = plain.unet.state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(torch.equal(weight, weights[name]) for name, weight in ours.unet.state_dict().items())
    preset = create_model("fashion-mnist").config
    shape = {key: value for key, value in preset.items() if key[0] != "_"}
    assert json.loads(json.dumps({key: ours.unet.config[key] for key in shape})) == json.loads(
        json.dumps(shape)
    )


@pytest.mark.parametrize("kind", [DDPMPipeline, diffusers.DDPMPipeline], ids=["ours", "diffusers"])
def test_it_draws(kind):
    pipeline = kind.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=10).images[0]
    assert picture.size == (28, 28) and picture.mode == "L"


def test_images_score_as_in_its_evaluation(report, measured):
    """The same images, steps and noise: the bound of each, but for rounding."""
    found, pipeline = images(4), DDPMPipeline.from_pretrained(FOLDER)
    assert [image_digest(image) for image in found] == measured["digests"][:4].tolist()
    estimate = estimate_bound(
        pipeline.process,
        lambda x_t, t: pipeline.unet(x_t, t).sample,
        to_float(torch.stack(found)),
        num_evals_per_image=report["method"]["evaluations_per_image"],
        seed=report["method"]["seed"],
        image_indices=measured["image_indices"][:4].tolist(),
        variance_type=report["bits_per_dim"]["variance_type"],
        prediction_type="epsilon",
    )
    np.testing.assert_allclose(estimate.per_image_bpd, measured["bpd"][:4], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("variance_type", ["fixed_large", "fixed_small"])
def test_its_bits_stay_where_the_card_says(variance_type, report, measured, tmp_path):
    """`hf-ddpm evaluate` on 64 test images, with noise of their own, against the card within its error.

    A single file is a split "train", whatever images it has.
    """
    config = EvaluationConfig(
        model=str(FOLDER),
        dataset=str(IMAGES),
        split="train",
        variance_type=variance_type,
        out=str(tmp_path / "evaluation"),
    )
    found = evaluate(config)["bits_per_dim"]["bpd"]
    said = next(
        part["bpd"]
        for part in (report["bits_per_dim"], report["other_variance"])
        if part["variance_type"] == variance_type
    )
    text = (FOLDER / "README.md").read_text()
    assert f"{said['value']:.3f} ± {said['stderr']:.3f}" in text
    assert abs(found["value"] - said["value"]) < 3 * math.hypot(found["stderr"], said["stderr"])
    if variance_type == report["bits_per_dim"]["variance_type"]:
        # Image by image, it differs by the noise only
        change = load_file(tmp_path / "evaluation" / "evaluation.safetensors")["bpd"] - measured["bpd"][:64]
        assert abs(change.mean()) < 3 * change.std() / 8

"""Networks and data of all kinds, and losses and weights that stop a run."""

import json
import logging

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Features
from PIL import Image

from hf_ddpm import DDPMPipeline, create_model, train
from tests.training.helpers import (
    Conv,
    assert_same,
    folder_of_images,
    log,
    refused,
    small,
    weights,
)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images(tmp_path, caplog, num_workers):
    data = folder_of_images(tmp_path / "data", 5, (8, 8))
    (data / "train" / "003.png").write_bytes(b"no image")
    plan = {"dataset": str(data), "shuffle_memory": 0, "num_workers": num_workers, "max_steps": 3}
    assert "003.png" in refused(small(tmp_path / "stops", **plan), Conv())
    with caplog.at_level(logging.WARNING):
        train(small(tmp_path / "skips", **plan, skip_corrupt=True), Conv())
    (skipped,) = (line for line in caplog.messages if line.startswith("skipped "))  # by whichever worker
    assert "003.png" in skipped
    assert "images that could not be read and were skipped: 1" in caplog.text  # the same one in two epochs
    lines = [json.loads(line) for line in (tmp_path / "skips" / "log.jsonl").read_text().splitlines()]
    assert [line.get("skipped", 0) for line in lines] == [1, 1, 1]
    assert [line["images"] for line in lines] == [4, 8, 12]  # positions, holes included


def test_a_network_that_is_not_of_diffusers(tmp_path):
    model = Conv()
    train(small(tmp_path), model)
    assert_same(weights(tmp_path, 3), dict(model.state_dict()))
    assert not (tmp_path / "model_index.json").exists()
    assert train(small(tmp_path, max_steps=4), Conv()).step == 4


def test_grids_of_a_network_that_is_not_of_diffusers(tmp_path):
    train(small(tmp_path, sample_every=3, sample_steps=2, sample_num_images=2), Conv())
    assert (tmp_path / "samples" / "step-00000003.png").exists()
    assert (tmp_path / "training.png").exists()


class Breaks(Conv):
    """A network that answers NaN from the third call on."""

    calls = 0

    def forward(self, x_t, t):
        self.calls += 1
        return self.conv(x_t) * (np.nan if self.calls > 2 else 1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    text = refused(small(tmp_path, max_steps=9, checkpoint_every=1), Breaks(), kind=RuntimeError)
    assert text == "the loss is nan at step 3; checkpoints from before stand"
    assert log(tmp_path, "step") == [1, 2]


def test_the_step_is_named_where_several_are_logged_at_once(tmp_path):
    text = refused(small(tmp_path, max_steps=9, log_every=5), Breaks(), kind=RuntimeError)
    assert text == "the loss is nan at step 3; checkpoints from before stand"


@pytest.mark.parametrize("last_good", [2, 3])
def test_what_is_not_finite_is_never_saved(tmp_path, last_good):
    # at step 3 the loss is NaN; or it is not, but the weights are
    class Late(Breaks):
        def forward(self, x_t, t):
            answer = super().forward(x_t, t)
            return answer if last_good == 2 else self.conv(x_t)

    def poison(run):
        if run.step == last_good + 1 == 4:
            run.model.conv.weight.data[0] = np.inf

    config = small(tmp_path, max_steps=9, checkpoint_every=1, log_every=5)
    text = refused(config, Late(), kind=RuntimeError, after_step=poison)
    assert f"at step {last_good + 1}; checkpoints from before stand" in text
    assert ("weights" in text) == (last_good == 3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (last_good - 1, last_good)]


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    config = small(tmp_path, max_steps=9, checkpoint_every=1, max_loss=0.01)
    text = refused(config, Conv(), kind=RuntimeError)
    assert text.startswith("the mean loss of steps 1 to 1 is ") and "above max_loss 0.01" in text
    assert not (tmp_path / "checkpoints").exists()


def test_rgb_images_that_are_not_square(tmp_path):
    data = folder_of_images(tmp_path / "data", 6, (16, 8, 3))
    plan = {"dataset": str(data), "sample_every": 2, "sample_num_images": 2, "sample_steps": 2}
    train(small(tmp_path / "run", **plan, max_steps=2, batch_size=4))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.image_shape == (3, 16, 8)
    assert pipeline(1, num_inference_steps=2).images[0].size == (8, 16)
    assert Image.open(tmp_path / "run" / "samples" / "step-00000002.png").size == (2 * (48 + 4) + 4, 96 + 8)


def test_five_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 5), dtype=np.uint8)
    data = Dataset.from_dict(
        {"image": list(pixels)}, features=Features({"image": Array3D((8, 8, 5), "uint8")})
    )
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train-0.parquet")
    plan = {"dataset": str(tmp_path / "data"), "sample_every": 2, "sample_num_images": 5, "sample_steps": 2}
    assert "; add channels=5 if it is (H, W, 5)" in refused(small(tmp_path / "run", **plan))
    train(small(tmp_path / "run", **plan, channels=5, max_steps=2))
    grid = np.load(tmp_path / "run" / "samples" / "step-00000002.npy")
    assert grid.shape == (5, 8, 8, 5) and grid.min() >= 0 and grid.max() <= 1
    assert DDPMPipeline.from_pretrained(tmp_path / "run").image_shape == (5, 8, 8)


def test_fine_tuning_begins_with_the_weights_of_the_pipeline(finished, tmp_path, caplog):
    # with one step of warm-up, the first step has learning rate 0
    train(small(tmp_path, model=str(finished), max_steps=1, lr_warmup_steps=1))
    assert_same(weights(tmp_path, 1), weights(finished, 4, "ema_0.9999"))
    assert f"{finished} was trained with num_train_timesteps 100, this run has 1000" in caplog.text
    assert "beta_end 0.2, this run has 0.02" in caplog.text


def test_a_half_precision_network_is_trained_in_float32(finished, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(finished)
    pipeline.unet.half()
    pipeline.save_pretrained(tmp_path / "half")
    train(small(tmp_path / "run", model=str(tmp_path / "half"), max_steps=1))
    for name in ("model", "ema_0.9999"):
        assert {tensor.dtype for tensor in weights(tmp_path / "run", 1, name).values()} == {torch.float32}


def test_networks_that_do_not_fit(finished, tmp_path):
    text = refused(small(tmp_path, model=str(finished), channels=3))
    assert text == "1,497 images of 8x8, mode L, for a network of 1x8x8 (CxHxW): add --channels 1"
    words = "answers 2 channels; allowed with variance_type 'fixed_large': 1"
    assert words in refused(small(tmp_path), create_model("tiny", out_channels=2))
    assert "has its own; allowed: none" in refused(small(tmp_path, model=str(finished), dropout=0.1))
    assert "did you mean 'tiny'" in refused(small(tmp_path, model="tinny"))
    assert "nowhere" in refused(small(tmp_path, dataset=str(tmp_path / "nowhere")))

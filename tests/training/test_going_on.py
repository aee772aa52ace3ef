"""A run that was stopped, killed, damaged or made longer goes on, to the last bit, or says why not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, TrainConfig, train
from hf_ddpm.training.checkpoint import load_checkpoint
from tests.training.helpers import (
    Conv,
    again,
    assert_same,
    checkpoint,
    folder_of_images,
    kill_at,
    log,
    refused,
    small,
    weights,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "dropout": 0.2, "horizontal_flip": True}
        | {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "shuffle_memory": 16, "channels_last": True},
    ],
    ids=["plain", "everything"],
)
def test_a_killed_run_goes_on_to_the_last_bit(tmp_path, changes):
    plan = {"max_steps": 8, "checkpoint_every": 4, "batch_size": 2, **changes}
    train(small(tmp_path / "whole", **plan))
    config = small(tmp_path / "parts", **plan)
    with pytest.raises(KeyboardInterrupt):
        train(config, after_step=kill_at(6))
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    result = train(config)
    assert (result.step, result.images) == (8, 8 * 2 * config.gradient_accumulation_steps)
    whole, parts = (load_checkpoint(checkpoint(tmp_path / name, 8)) for name in ("whole", "parts"))
    assert_same(dict(parts.model), dict(whole.model))
    assert_same(dict(parts.averages), dict(whole.averages))
    assert_same(parts.optimizer["optimizer"]["state"], whole.optimizer["optimizer"]["state"])
    assert parts.optimizer["optimizer"]["param_groups"] == whole.optimizer["optimizer"]["param_groups"]
    for key in ("step", "images", "loss", "lr", "grad_norm"):
        assert log(tmp_path / "parts", key) == log(tmp_path / "whole", key)


def test_a_finished_run_has_nothing_to_do(copied):
    def files():
        skip = ("train_config.json", "state.json")  # they name the folder
        return {p: p.read_bytes() for p in copied.rglob("*") if p.is_file() and p.name not in skip}

    before = files()
    result = train(again(copied))
    assert (result.step, result.images) == (4, 16)
    assert np.isnan(result.loss) and np.isnan(result.images_per_second)
    assert files() == before


def test_a_pipeline_that_a_kill_left_out_is_written(copied):
    weight = copied / "unet" / "diffusion_pytorch_model.safetensors"
    saved = weight.read_bytes()
    weight.write_bytes(b"of step 2")
    train(again(copied))
    assert weight.read_bytes() == saved


def test_a_run_may_be_made_longer(copied, tmp_path):
    result = train(again(copied, max_steps=5, checkpoint_every=1, log_every=1, keep_checkpoints=1))
    assert result.step == 5 and log(copied, "step") == [1, 2, 3, 4, 5]
    assert [path.name for path in (copied / "checkpoints").iterdir()] == ["step-00000005"]
    train(again(tmp_path / "whole", max_steps=5))
    assert_same(weights(copied, 5), weights(tmp_path / "whole", 5))


def test_a_schedule_that_ends_elsewhere_is_pointed_out(tmp_path, caplog):
    train(small(tmp_path, lr_scheduler="linear", max_steps=2), Conv())
    train(small(tmp_path, lr_scheduler="linear", max_steps=4), Conv())
    assert "max_steps 2 -> 4 moves the end of the linear schedule" in caplog.text
    np.testing.assert_allclose(log(tmp_path, "lr"), [1e-3, 5e-4, 5e-4, 2.5e-4])


def test_another_config_is_refused(finished):
    text = refused(again(finished, batch_size=8, dropout=0.1))
    assert f"checkpoint '{checkpoint(finished, 4)}' is of another run" in text
    assert "(dropout None -> 0.1, batch_size 4 -> 8)" in text


def test_never_is_refused_where_a_run_is(finished):
    text = refused(again(finished, resume="never"))
    assert text == f"output_dir '{finished}' holds a run at step 4; resume 'auto' goes on with it"


def test_resume_from_a_named_checkpoint(finished, tmp_path):
    train(again(tmp_path, resume=str(checkpoint(finished, 2))))
    for name in ("model", "ema_0.9999"):
        assert_same(weights(tmp_path, 4, name), weights(finished, 4, name))
    assert log(tmp_path, "loss") == log(finished, "loss")[2:]


def test_a_run_from_a_named_checkpoint_goes_on_with_the_same_command(finished, tmp_path):
    config = again(tmp_path, resume=str(checkpoint(finished, 2)), max_steps=6, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, after_step=kill_at(5))
    assert train(config).step == 6
    assert log(tmp_path, "loss")[:2] == log(finished, "loss")[2:]


@pytest.mark.parametrize("extra", [1, 3])
def test_a_data_set_that_has_changed_is_refused(tmp_path, extra):
    data = folder_of_images(tmp_path / "data", 6, (8, 8))
    plan = {"dataset": str(data), "checkpoint_every": 1}
    train(small(tmp_path / "run", **plan, max_steps=1), Conv())
    for number in range(extra):
        shutil.copy(data / "train" / "000.png", data / "train" / f"new{number}.png")
    text = refused(small(tmp_path / "run", **plan, max_steps=2), Conv())
    assert text.startswith(
        f"the images are not those that the run began with ({6 + extra} rows in shards of {6 + extra}, "
    )


def test_several_averages(tmp_path):
    train(small(tmp_path, ema_decay="0.9,0", max_steps=3))
    first, last = weights(tmp_path, 3, "ema_0.9"), weights(tmp_path, 3, "ema_0")
    assert_same(last, weights(tmp_path, 3))  # decay 0 is the network itself
    assert any(not torch.equal(first[name], last[name]) for name in first)
    for loader in (DDPMPipeline, diffusers.DDPMPipeline):
        assert_same(dict(loader.from_pretrained(tmp_path).unet.state_dict()), first)
        assert_same(dict(loader.from_pretrained(tmp_path, variant="ema_0").unet.state_dict()), last)
    train(small(tmp_path, ema_decay="0.9,0", max_steps=4))
    assert_same(weights(tmp_path, 4, "ema_0"), weights(tmp_path, 4))


def test_a_decay_with_a_point_is_found_as_a_variant(tmp_path):
    train(small(tmp_path, ema_decay="0.9,0.25", max_steps=3))
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path, variant="ema_0_25").unet
    assert_same(dict(loaded.state_dict()), weights(tmp_path, 3, "ema_0.25"))


def test_the_norm_is_logged_where_nothing_is_clipped(tmp_path):
    train(small(tmp_path / "clipped", max_grad_norm=1e9), Conv())
    train(small(tmp_path / "free", max_grad_norm=0.0), Conv())
    assert log(tmp_path / "free", "grad_norm") == log(tmp_path / "clipped", "grad_norm")
    assert_same(weights(tmp_path / "free", 3), weights(tmp_path / "clipped", 3))


def test_one_image_a_step_of_which_one_is_corrupt(tmp_path):
    data = folder_of_images(tmp_path / "data", 4, (8, 8))
    (data / "train" / "001.png").write_bytes(b"no image")
    plan = {"dataset": str(data), "shuffle_memory": 0, "skip_corrupt": True, "batch_size": 1, "max_steps": 5}
    train(small(tmp_path / "run", **plan, checkpoint_every=1), Conv())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["loss" in line for line in lines] == [True, False, True, True, True]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_log_on_a_full_disk(tmp_path):
    config = small(tmp_path, max_steps=4, checkpoint_every=2, log_every=2)
    file = tmp_path / "log.jsonl"

    def fill(run):
        file.unlink(missing_ok=True)
        file.symlink_to("/dev/full")

    text = refused(config, Conv(), kind=OSError, after_step=fill)
    assert text == f"can't write '{file}': No space left on device"
    file.unlink()
    assert train(config, Conv()).step == 4


def test_what_a_killed_run_left_of_a_file_goes(tmp_path):
    train(small(tmp_path, max_steps=1), Conv())
    (tmp_path / "samples").mkdir()
    left = [tmp_path / ".log.jsonl.7.tmp", tmp_path / "samples" / ".step-00000002.png.7.tmp"]
    other = tmp_path / ".evaluation.json.7.tmp"  # of a program that may be writing it now
    for file in (*left, other):
        file.write_text("half")
    train(small(tmp_path, max_steps=2), Conv())
    assert [file.exists() for file in (*left, other)] == [False, False, True]


def test_an_older_checkpoint_does_not_overwrite_a_run(finished):
    text = refused(again(finished, resume=str(checkpoint(finished, 2))))
    assert f"but output_dir '{finished}' holds a run at step 4; allowed: its newest checkpoint, or" in text
    assert checkpoint(finished, 4).is_dir()


def test_one_training_at_a_time_in_a_folder(tmp_path):
    hold = "import sys, os, fcntl; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)"
    script = f"{hold}; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        words = f"output_dir '{tmp_path}' is in use by process {other.pid}; allowed: another folder, or later"
        assert refused(small(tmp_path)) == words
        other.stdin.close()
    assert train(small(tmp_path, max_steps=1), Conv()).step == 1


def test_resume_from_nowhere(tmp_path):
    assert refused(small(tmp_path, resume=str(tmp_path / "none"))) == (
        f"checkpoint '{tmp_path / 'none'}' does not exist"
    )


def test_a_pipeline_without_checkpoints_is_not_overwritten(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "holds a pipeline, but no checkpoint" in refused(small(tmp_path))
    assert (tmp_path / "model_index.json").read_text() == "{}"


@pytest.mark.parametrize(
    "name", ["state.json", "model.safetensors", "ema_0.9999.safetensors", "optimizer.pt", "SHA256SUMS"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(copied, finished, name, caplog):
    file = checkpoint(copied, 4) / name
    file.write_bytes(file.read_bytes()[:20])
    assert train(again(copied)).step == 4
    assert f"checkpoint file '{file}' is missing or damaged" in caplog.text
    assert "; going on from step-00000002" in caplog.text
    assert "damaged checkpoint step-00000004 set aside as damaged-step-00000004" in caplog.text
    assert_same(weights(copied, 4), weights(finished, 4))
    assert log(copied) == log(finished)


def test_a_checkpoint_of_another_network(copied):
    # max_steps may change, so it gets as far as the weights
    assert "the checkpoint at step 4 is of another network" in refused(again(copied, max_steps=6), Conv())


def test_the_saved_config_repeats_the_run(finished, tmp_path):
    config = TrainConfig.load(finished / "train_config.json", output_dir=str(tmp_path))
    assert config == again(tmp_path, mixed_precision="no")  # what was meant by None, resolved
    train(config)
    assert_same(weights(tmp_path, 4), weights(finished, 4))

"""resume.py: the newest whole checkpoint of the same run, or one clear line; and what a run's end leaves."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_ddpm.folders.output
import hf_ddpm.training.resume
import hf_ddpm.training.run
from hf_ddpm import TrainConfig, train
from hf_ddpm.cli import run as command
from hf_ddpm.cli import train_command
from hf_ddpm.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_newer_aside,
)
from hf_ddpm.training.resume import FREE_TO_CHANGE, find_checkpoint
from tests.disks import largest_file, read_only
from tests.launching import together

FILES = ("model.safetensors", "ema_0.9999.safetensors", "optimizer.pt", "state.json", "SHA256SUMS")


@pytest.fixture(scope="module")
def alone():
    return Accelerator(cpu=True)


def save(run: Path, *steps: int, **changes) -> TrainConfig:
    """Checkpoints of a run at some steps, and its config."""
    config = TrainConfig(output_dir=str(run), mixed_precision="no", **changes)
    if steps:
        run.mkdir(exist_ok=True)
    for step in steps:
        weight = {"w": torch.full((2,), float(step))}
        state = {"config": dataclasses.asdict(config)}
        save_checkpoint(run, Checkpoint(step, weight, {"0.9999": weight}, {"o": 1}, state), keep=9)
    return config


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damage(folder: Path, name: str = "model.safetensors") -> Path:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    return folder / name


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def refused(config: TrainConfig, alone) -> str:
    before = sorted(Path(config.output_dir).rglob("*"))
    with pytest.raises(ValueError) as error:
        find_checkpoint(config, Path(config.output_dir), alone)
    assert "\n" not in str(error.value)
    assert sorted(Path(config.output_dir).rglob("*")) == before  # nothing is renamed
    return str(error.value)


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "hf_ddpm.training.resume"]


def test_a_fresh_start(tmp_path, alone):
    assert find_checkpoint(save(tmp_path), tmp_path, alone) is None
    assert find_checkpoint(save(tmp_path / "nowhere"), tmp_path / "nowhere", alone) is None


def test_the_newest_is_taken(tmp_path, alone, caplog):
    found = find_checkpoint(save(tmp_path, 2, 4), tmp_path, alone)
    assert found.step == 4 and found.model["w"].tolist() == [4, 4] and not warnings(caplog)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_named_set_aside_and_the_one_before_it_taken(tmp_path, alone, caplog, name):
    config = save(tmp_path, 2, 4)
    file = damage(at(tmp_path, 4), name)
    assert find_checkpoint(config, tmp_path, alone).step == 2
    (text,) = warnings(caplog)
    assert "is missing or damaged: " in text and str(file.parent) in text
    assert name == "SHA256SUMS" or f"checkpoint file '{file}'" in text
    assert text.endswith("; going on from step-00000002")
    assert names(tmp_path) == ["step-00000002", "step-00000004"]  # a start that is refused changes nothing
    set_newer_aside(tmp_path, 2)
    assert names(tmp_path) == ["damaged-step-00000004", "step-00000002"]
    caplog.clear()
    assert find_checkpoint(config, tmp_path, alone).step == 2 and not warnings(caplog)
    save(tmp_path, 4)  # the run comes there again
    assert find_checkpoint(config, tmp_path, alone).step == 4
    damage(at(tmp_path, 4))
    assert find_checkpoint(config, tmp_path, alone).step == 2
    set_newer_aside(tmp_path, 2)
    assert names(tmp_path) == ["damaged-step-00000004", "damaged-step-00000004-2", "step-00000002"]


def test_two_damaged(tmp_path, alone, caplog):
    config = save(tmp_path, 2, 4, 6)
    files = damage(at(tmp_path, 6), "optimizer.pt"), damage(at(tmp_path, 4))
    assert find_checkpoint(config, tmp_path, alone).step == 2
    assert [str(file) in text for file, text in zip(files, warnings(caplog), strict=True)] == [True, True]
    set_newer_aside(tmp_path, 2)
    assert names(tmp_path) == ["damaged-step-00000004", "damaged-step-00000006", "step-00000002"]


def test_an_older_damaged_one_is_left_alone(tmp_path, alone, caplog):
    config = save(tmp_path, 2, 4)
    damage(at(tmp_path, 2))
    assert find_checkpoint(config, tmp_path, alone).step == 4
    assert names(tmp_path) == ["step-00000002", "step-00000004"] and not warnings(caplog)


def test_all_damaged(tmp_path, alone):
    config = save(tmp_path, 2, 4)
    damage(at(tmp_path, 2))
    file = damage(at(tmp_path, 4))
    text = refused(config, alone)
    assert text.startswith(f"checkpoint file '{file}' is missing or damaged: ")
    assert text.endswith("; none of the 2 checkpoints is whole")


def test_damaged_and_named(tmp_path, alone):
    save(tmp_path, 2, 4)
    file = damage(at(tmp_path, 4))
    config = save(tmp_path, resume=str(at(tmp_path, 4)))
    assert refused(config, alone).startswith(f"checkpoint file '{file}' is missing or damaged: ")


def test_named(tmp_path, alone):
    save(tmp_path / "a", 2, 4)
    config = save(tmp_path / "b", resume=str(at(tmp_path / "a", 2)))
    assert find_checkpoint(config, tmp_path / "b", alone).step == 2
    config = save(tmp_path / "a", resume=str(at(tmp_path / "a", 4)))
    assert find_checkpoint(config, tmp_path / "a", alone).step == 4
    older = save(tmp_path / "a", resume=str(at(tmp_path / "a", 2)))
    assert "holds a run at step 4; allowed: its newest checkpoint" in refused(older, alone)
    assert refused(save(tmp_path / "c", resume=str(tmp_path / "none")), alone) == (
        f"checkpoint '{tmp_path / 'none'}' does not exist"
    )


def test_never(tmp_path, alone):
    assert find_checkpoint(save(tmp_path, resume="never"), tmp_path, alone) is None
    save(tmp_path, 2)
    text = refused(save(tmp_path, resume="never"), alone)
    assert text == f"output_dir '{tmp_path}' holds a run at step 2; resume 'auto' goes on with it"


OTHER = {bool: lambda old: not old, int: lambda old: old + 1, float: lambda old: old * 0.5}
TEXTS = {
    **{"dataset": "x", "split": "x", "image_column": "x", "image_size": "16", "channels": 3, "fit": "resize"},
    **{"model": "tiny", "dropout": 0.5, "beta_schedule": "sigmoid", "prediction_type": "sample"},
    **{"variance_type": "fixed_small", "lr_scheduler": "linear", "ema_decay": "0.5", "trackers": "wandb"},
    **{"mixed_precision": "bf16", "output_dir": "x", "resume": "auto", "sample_steps": 5},
    **{
        "objective": "bound",
        "t_sampler": "importance",
        "evaluate_split": "x",
        "holdout": 0.25,
        "weight_decay": 0.1,
        "push_to_hub": "tester/x",
        "dataset_id": "tester/x",
    },
    "background": "black",
    "label_column": "label",
    **dict.fromkeys(("license", "dataset_license"), "mit"),
}


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(TrainConfig)])
def test_every_key_is_free_or_refused(tmp_path, alone, monkeypatch, key):
    config = save(tmp_path, 2)
    old = getattr(config, key)
    new = TEXTS[key] if key in TEXTS else OTHER[type(old)](old)
    changed = dataclasses.replace(config)
    object.__setattr__(changed, key, new)  # whether the whole makes sense is config.py's
    if key in ("output_dir", "resume", "trackers"):
        assert key in FREE_TO_CHANGE
    if key in FREE_TO_CHANGE:
        assert find_checkpoint(changed, tmp_path, alone).step == 2
    else:
        with pytest.raises(ValueError) as error:
            find_checkpoint(changed, tmp_path, alone)
        assert f"is of another run ({key} {old!r} -> {new!r}); allowed: the same config" in str(error.value)


def test_what_is_free_to_change():
    """Steps, logging, sampling, checkpoints, and where things are: nothing that moves a weight.

    The data set may have another name, as it may have moved; that it is the same is said by its fingerprint.
    """
    assert {
        *(
            "dataset",
            "max_steps",
            "output_dir",
            "resume",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ),
        *("trackers", "sample_every", "sample_num_images", "sample_steps", "num_workers", "max_loss"),
        *("evaluate_every", "evaluate_split", "evaluate_num_images", "evaluate_num_evals"),
        *("push_to_hub", "push_every", "push_private", "license", "dataset_license", "dataset_id"),
    } == FREE_TO_CHANGE


def test_another_config_is_refused_before_a_damaged_checkpoint_is_set_aside(tmp_path, alone):
    save(tmp_path, 2, 4)
    damage(at(tmp_path, 4))
    text = refused(save(tmp_path, batch_size=8, seed=1), alone)
    assert text.startswith(f"checkpoint '{at(tmp_path, 2)}' is of another run (")
    assert "batch_size 64 -> 8, seed 0 -> 1" in text or ("seed 0 -> 1" in text and "batch_size" in text)


def test_a_checkpoint_without_a_config_is_refused(tmp_path, alone):
    config = save(tmp_path)
    save_checkpoint(tmp_path, Checkpoint(2, {}, {}, {}, {}), keep=1)
    assert "is of another run (" in refused(config, alone)


def chosen(run: Path, hidden: bool):
    """What a process finds, the second of which may not see the folder."""
    accelerator = Accelerator(cpu=True)
    if hidden and not accelerator.is_main_process:
        hf_ddpm.training.resume.load_checkpoint = lambda folder: load_checkpoint(folder / "elsewhere")
    try:
        found = find_checkpoint(save(run), run, accelerator)
    except ValueError as error:
        return str(error)
    return found and (found.step, found.model["w"].tolist())


@pytest.mark.distributed
def test_two_processes_take_the_same(tmp_path):
    assert together(tmp_path, chosen, tmp_path / "run", False) == [None, None]
    save(tmp_path / "run", 2, 4)
    damage(at(tmp_path / "run", 4))
    assert together(tmp_path, chosen, tmp_path / "run", False) == [(2, [2, 2])] * 2
    damage(at(tmp_path / "run", 2))
    first, second = together(tmp_path, chosen, tmp_path / "run", False)
    assert first == second and "none of the 2 checkpoints is whole" in first


@pytest.mark.distributed
def test_a_folder_that_the_others_do_not_see_is_named(tmp_path):
    save(tmp_path / "run", 2)
    first, second = together(tmp_path, chosen, tmp_path / "run", True)
    assert first == (2, [2, 2])
    assert second.startswith("process 1 can't read what process 0 could, in a folder that all must see: ")


# A whole run


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x_t, t):
        return self.conv(x_t)


def small(run: Path, **changes) -> TrainConfig:
    values = {"batch_size": 4, "max_steps": 4, "checkpoint_every": 2, "lr_warmup_steps": 0, "sample_every": 0}
    return TrainConfig(**{"model": "tiny", "log_every": 1, "output_dir": str(run)} | values | changes)


def test_a_run_goes_on_from_before_the_damage_to_the_last_bit(tmp_path, caplog):
    train(small(tmp_path / "whole"), Conv())
    train(small(tmp_path / "damaged"), Conv())
    file = damage(at(tmp_path / "damaged", 4), "ema_0.9999.safetensors")
    with caplog.at_level(logging.WARNING):
        train(small(tmp_path / "damaged"), Conv())
    assert str(file) in caplog.text
    for name in FILES[:3]:
        a, b = ((at(tmp_path / run, 4) / name).read_bytes() for run in ("whole", "damaged"))
        assert a == b
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "damaged")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_full_disk_ends_the_command_with_a_line_and_the_same_command_goes_on(tmp_path, capsys):
    run = tmp_path / "run"
    train(small(run, max_steps=2))
    before = {path.name: path.read_bytes() for path in at(run, 2).iterdir()}
    size = (at(run, 2) / "model.safetensors").stat().st_size
    values = {"model": "tiny", "batch_size": 4, "max_steps": 4, "checkpoint_every": 2, "lr_warmup_steps": 0}
    values |= {"sample_every": 0, "log_every": 1, "output_dir": run}
    words = [f"--{key}={value}" for key, value in values.items()]
    with largest_file(size // 2), pytest.raises(SystemExit) as stop:
        command(train_command, words, "hf-ddpm train")
    assert stop.value.code == 1
    told, file = capsys.readouterr().err, at(run, 4).with_name(".step-00000004.tmp") / "model.safetensors"
    last = told.splitlines()[-1]
    assert "failed (HF_DDPM_TRACEBACK=1 shows where): " in last
    assert f"can't write '{file}': " in last and "File too large" in last
    assert "Traceback" not in told
    assert names(run) == ["step-00000002"]
    assert {path.name: path.read_bytes() for path in at(run, 2).iterdir()} == before
    assert train(small(run)).step == 4
    assert [step for step, _ in list_checkpoints(run)] == [2, 4]


def read_only_in(folder: Path, work):
    """The work, done while a folder is read-only."""

    def in_vain(*args):
        with read_only(folder):
            return work(*args)

    return in_vain


@pytest.mark.parametrize(
    ("owner", "work", "folder", "kind"),
    [
        (hf_ddpm.folders.output.FolderLock, "acquire", ".", ValueError),
        (hf_ddpm.training.run, "save_checkpoint", "checkpoints", PermissionError),
    ],
    ids=["at the start", "while it saves"],
)
def test_a_read_only_folder_is_one_line_and_leaves_the_last_checkpoint(
    open_folder, monkeypatch, owner, work, folder, kind
):
    run = open_folder / "run"
    train(small(run, max_steps=2), Conv())
    with monkeypatch.context() as patch, pytest.raises(kind) as error:
        patch.setattr(owner, work, read_only_in(run / folder, getattr(owner, work)))
        train(small(run), Conv())
    text = str(error.value)
    assert "Permission denied" in text and str(run) in text and "\n" not in text
    assert names(run) == ["step-00000002"] and load_checkpoint(at(run, 2)).step == 2
    assert train(small(run), Conv()).step == 4

"""checkpoint.py: folders that are whole or not there, and files that can't do harm."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from hf_ddpm.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    update_folder,
    write_folder,
)

FILES = ("state.json", "model.safetensors", "ema.safetensors", "optimizer.pt")


def example(step: int = 4) -> Checkpoint:
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter])
    parameter.square().sum().backward()
    optimizer.step()
    return Checkpoint(
        step, {"w": weight}, {"w": weight / 2}, optimizer.state_dict(), {"seed": 3, "name": "ü"}
    )


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


class Harm:
    """A pickle that writes a file when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


# Checkpoints


def test_what_is_saved_comes_back(tmp_path):
    saved = example()
    folder = save_checkpoint(tmp_path, saved, keep=2)
    assert folder == tmp_path / "checkpoints" / "step-00000004"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    loaded = load_checkpoint(folder)
    assert (loaded.step, loaded.state) == (saved.step, saved.state)
    torch.testing.assert_close(
        [dict(loaded.model), dict(loaded.ema), loaded.optimizer["state"]],
        [dict(saved.model), dict(saved.ema), saved.optimizer["state"]],
        rtol=0,
        atol=0,
    )
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]


def test_tied_and_permuted_weights_are_saved(tmp_path):
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tied = Checkpoint(1, {"a": weight, "b": weight}, {"a": weight}, {}, {})
    loaded = load_checkpoint(save_checkpoint(tmp_path, tied, keep=1))
    assert torch.equal(loaded.model["a"], weight) and torch.equal(loaded.model["b"], weight)


def test_rotation_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 123_456_789):
        save_checkpoint(tmp_path, example(step), keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 123_456_789]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_only_checkpoints_are_listed(tmp_path):
    assert list_checkpoints(tmp_path) == []
    for name in ("step-12", "step-00000001.old", ".step-00000003.tmp", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    left = tmp_path / "checkpoints" / ".step-00000003.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    folder = save_checkpoint(tmp_path, example(4), keep=2)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_damaged_file_is_named(tmp_path, name):
    folder = save_checkpoint(tmp_path, example(), keep=1)
    whole = (folder / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x00rubbish"):
        (folder / name).write_bytes(damaged)
        assert f"checkpoint file '{folder / name}' is missing or damaged: " in refused(folder)
    (folder / name).unlink()
    assert f"checkpoint file '{folder / name}' is missing or damaged: " in refused(folder)


def test_files_of_the_wrong_kind(tmp_path):
    folder = save_checkpoint(tmp_path, example(), keep=1)
    torch.save([1, 2], folder / "optimizer.pt")
    assert "optimizer.pt' is missing or damaged: it holds list, not dict" in refused(folder)
    for text in ("[]", "{}", '{"step": "four"}'):
        (folder / "state.json").write_text(text)
        assert "state.json' is missing or damaged: it has no step" in refused(folder)
    assert refused(tmp_path / "nowhere") == f"checkpoint '{tmp_path / 'nowhere'}' does not exist"


@pytest.mark.parametrize("save", [torch.save, lambda harm, path: path.write_bytes(pickle.dumps(harm, 2))])
def test_no_pickle_is_executed(tmp_path, save):
    harmed = tmp_path / "harmed"
    folder = save_checkpoint(tmp_path, example(), keep=1)
    save({"optimizer": Harm(harmed)}, folder / "optimizer.pt")
    text = refused(folder)
    assert "optimizer.pt' is missing or damaged: it is not a file of tensors and plain values" in text
    assert "weights_only" not in text  # torch's own message tells how to run it
    assert not harmed.exists()
    pickle.loads(pickle.dumps(Harm(harmed)))
    assert harmed.exists()  # the harm is real


# Folders


def test_write_folder_leaves_the_old_one_if_filling_fails(tmp_path):
    folder = tmp_path / "deep" / "folder"
    write_folder(folder, lambda place: (place / "a").write_text("old"))

    def fail(place: Path) -> None:
        (place / "a").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_folder(folder, fail)
    assert contents(folder) == {"a": "old"}
    write_folder(folder, lambda place: (place / "b").write_text("new"))
    assert contents(folder) == {"b": "new"}
    assert list(folder.parent.iterdir()) == [folder]


def test_update_folder_keeps_other_files_and_writes_last_last(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / "unet").mkdir(parents=True)
    (folder / "log.jsonl").write_text("kept")
    (folder / "unet" / "old.txt").write_text("kept")
    (folder / "index").write_text("old")
    order, replace = [], os.replace

    def watched(source, target):
        order.append(Path(target).relative_to(folder).as_posix())
        replace(source, target)

    def fill(place: Path) -> None:
        (place / "index").write_text("new")
        (place / "unet").mkdir()
        (place / "unet" / "weights").write_text("new")
        (place / "zebra").write_text("new")

    monkeypatch.setattr(os, "replace", watched)
    update_folder(folder, fill, last="index")
    assert order[-1] == "index" and len(order) == 3
    expected = {"index": "new", "unet/weights": "new", "zebra": "new"}
    assert contents(folder) == {**expected, "log.jsonl": "kept", "unet/old.txt": "kept"}


def test_update_folder_changes_nothing_if_filling_fails(tmp_path):
    (tmp_path / "index").write_text("old")

    def fail(place: Path) -> None:
        (place / "index").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        update_folder(tmp_path, fail, last="index")
    assert contents(tmp_path) == {"index": "old"} and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_an_oserror(tmp_path):
    def fail(place: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for write in (
        lambda: write_folder(tmp_path / "a", fail),
        lambda: update_folder(tmp_path / "b", fail, "x"),
    ):
        with pytest.raises(OSError, match=r"can't write .*No space left on device"):
            write()
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_replaces_one_of_the_same_step(tmp_path):
    folder = save_checkpoint(tmp_path, example(), keep=1)
    shutil.copytree(folder, tmp_path / "copy")
    state = json.loads((tmp_path / "copy" / "state.json").read_text())
    assert state == {"step": 4, "seed": 3, "name": "ü"}
    save_checkpoint(tmp_path, Checkpoint(4, {"v": torch.ones(1)}, {}, {}, {}), keep=1)
    assert list(load_checkpoint(folder).model) == ["v"]

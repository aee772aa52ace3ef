"""checkpoint.py: folders that are whole or not there, and files that can't do harm."""

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import hf_ddpm.training.checkpoint
from hf_ddpm.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside,
)
from tests.disks import largest_file, read_only

TENSORS = ("model.safetensors", "ema_0.9.safetensors", "ema_0.99.safetensors")
FILES = (*TENSORS, "optimizer.pt", "state.json", "SHA256SUMS")


def example(step: int = 4, size: int = 6) -> Checkpoint:
    weight = torch.randn(size // 2, 2, generator=torch.Generator().manual_seed(step))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter])
    parameter.square().sum().backward()
    optimizer.step()
    averages = {"0.9": {"w": weight / 2}, "0.99": {"w": weight / 3}}
    return Checkpoint(step, {"w": weight}, averages, optimizer.state_dict(), {"seed": 3, "name": "ü"})


def sealed(folder: Path) -> Path:
    """The folder with sums that fit what is in it, as whoever wrote such files would have left it."""
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in folder.iterdir()]
    (folder / "SHA256SUMS").write_text("".join(line + "\n" for line in sums))
    return folder


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
        [dict(loaded.model), dict(loaded.averages), loaded.optimizer["state"]],
        [dict(saved.model), dict(saved.averages), saved.optimizer["state"]],
        rtol=0,
        atol=0,
    )
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]


def test_tied_and_permuted_weights_are_saved(tmp_path):
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tied = Checkpoint(1, {"a": weight, "b": weight}, {"0.9": {"a": weight}}, {}, {})
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
    sealed(folder)
    assert "optimizer.pt' is missing or damaged: it holds list, not dict" in refused(folder)
    for text in ("[]", "{}"):
        (folder / "state.json").write_text(text)
        sealed(folder)
        assert "state.json' is missing or damaged: it has no step" in refused(folder)
    assert refused(tmp_path / "nowhere") == f"checkpoint '{tmp_path / 'nowhere'}' does not exist"


@pytest.mark.parametrize("save", [torch.save, lambda harm, path: path.write_bytes(pickle.dumps(harm, 2))])
def test_no_pickle_is_executed(tmp_path, save):
    harmed = tmp_path / "harmed"
    folder = save_checkpoint(tmp_path, example(), keep=1)
    save({"optimizer": Harm(harmed)}, folder / "optimizer.pt")
    assert "its content is not what SHA256SUMS says" in refused(folder)
    sealed(folder)
    text = refused(folder)
    assert "optimizer.pt' is missing or damaged: it is not a file of tensors and plain values" in text
    assert "weights_only" not in text  # torch's own message tells how to run it
    assert not harmed.exists()
    pickle.loads(pickle.dumps(Harm(harmed)))
    assert harmed.exists()  # the harm is real


# Damage


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_any_flipped_bit_is_noticed_and_its_file_named(tmp_path):
    folder = save_checkpoint(tmp_path, example(), keep=1)
    whole = {name: (folder / name).read_bytes() for name in FILES}
    places = [(name, bit) for name in FILES[:-1] for bit in range(8 * len(whole[name]))]
    for name, bit in random.Random(0).sample(places, 200):
        (folder / name).write_bytes(flipped(whole[name], bit))
        assert f"checkpoint file '{folder / name}' is missing or damaged: its content" in refused(folder)
        (folder / name).write_bytes(whole[name])
    load_checkpoint(folder)


def test_any_flipped_bit_of_the_sums_is_noticed(tmp_path):
    folder = save_checkpoint(tmp_path, example(), keep=1)
    whole = (folder / "SHA256SUMS").read_bytes()
    for bit in range(8 * len(whole)):
        (folder / "SHA256SUMS").write_bytes(flipped(whole, bit))
        assert "is missing or damaged" in refused(folder)
    for length in range(len(whole)):
        (folder / "SHA256SUMS").write_bytes(whole[:length])
        assert f"checkpoint file '{folder / 'SHA256SUMS'}' is missing or damaged" in refused(folder)


def test_a_renamed_file_is_the_fault_of_the_sums(tmp_path):
    folder = save_checkpoint(tmp_path, example(), keep=1)
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("optimizer.pt", "optimizes.pt"))
    assert refused(folder).endswith("SHA256SUMS' is missing or damaged: it lacks optimizer.pt")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_reads_the_sums(tmp_path):
    folder = save_checkpoint(tmp_path, example(), keep=1)
    check = ["sha256sum", "--strict", "--check", "SHA256SUMS"]
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(FILES) - 1
    (folder / "state.json").write_text("{}")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


def test_a_damaged_checkpoint_is_set_aside(tmp_path):
    for number in ("", "-2", "-3"):
        folder = save_checkpoint(tmp_path, example(), keep=1)
        aside = set_aside(folder)
        assert aside == folder.with_name(f"damaged-step-00000004{number}") and aside.is_dir()
        assert list_checkpoints(tmp_path) == []


# Kills


class Killed(BaseException):
    """The process is gone: nothing that it would do afterwards has an effect."""


OPERATIONS = [
    *((Path, name) for name in ("mkdir", "open", "rename", "write_text")),
    *((os, name) for name in ("open", "fsync", "replace")),
    *((shutil, "rmtree"), (torch, "save"), (hf_ddpm.training.checkpoint, "save_file")),
]


def kill_at(monkeypatch, number: int, midway: bool) -> list[str]:
    """Let the process die before its operation of that number on files, or midway; the operations done."""
    done: list[str] = []

    def patched(name, real):
        def operation(*args, **kwargs):
            if len(done) > number:
                raise Killed
            done.append(name)
            if len(done) > number:
                if midway:
                    half_of(name, real, *args, **kwargs)
                raise Killed
            return real(*args, **kwargs)

        return operation

    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, patched(name, getattr(owner, name)))
    return done


def half_of(name: str, real, *args, **kwargs) -> None:
    """What a kill leaves of an operation."""
    if name == "rmtree":
        files = sorted(path for path in Path(args[0]).glob("*") if path.is_file())
        for path in files[: len(files) // 2]:
            path.unlink()
    elif name == "write_text":
        os.truncate(args[0], 0) if args[0].exists() else args[0].touch()
    else:
        real(*args, **kwargs)
        if name == "save_file":
            os.truncate(args[1], 40)


@pytest.mark.parametrize("midway", [False, True])
@pytest.mark.parametrize(
    ("steps", "step", "keep"),
    [((1, 2), 3, 1), ((1, 2), 3, 2), ((1, 3), 3, 2), ((), 3, 1)],
    ids=["drops two", "drops one", "again", "first"],
)
def test_a_kill_at_any_moment_of_saving(tmp_path, monkeypatch, steps, step, keep, midway):
    saved = {number: example(number) for number in (*steps, step)}
    for number in range(1000):
        run = tmp_path / str(number)
        run.mkdir()
        for before in steps:
            save_checkpoint(run, saved[before], keep=5)
        with monkeypatch.context() as patch:
            done = kill_at(patch, number, midway)
            try:
                save_checkpoint(run, saved[step], keep)
                break
            except Killed:
                pass
        found = list_checkpoints(run)
        for at, folder in found:
            assert torch.equal(load_checkpoint(folder).model["w"], saved[at].model["w"]), done
        if steps:  # the newest, or the one before it
            assert found and found[-1][0] in (step, max(set(steps) - {step})), done
        save_checkpoint(run, saved[step], keep)  # the next attempt
        names = [f"step-{at:08d}" for at in sorted(saved)[-keep:]]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    assert number > 10 and "save_file" in done and ("rmtree" in done)


# Disks that are full, folders that are read-only


def too_large(name: str) -> Checkpoint:
    """A checkpoint of which one file is too large, and not by its last byte."""
    small, large = torch.zeros(2), torch.zeros(100_000)
    return Checkpoint(
        5,
        {"w": large if name == "model.safetensors" else small},
        {"0.9": {"w": large if name == "ema_0.9.safetensors" else small}},
        {"o": [small, large if name == "optimizer.pt" else small]},
        {"text": "x" * 400_000 if name == "state.json" else ""},
    )


@pytest.mark.parametrize("name", ["model.safetensors", "ema_0.9.safetensors", "optimizer.pt", "state.json"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, name):
    folder = save_checkpoint(tmp_path, example(4), keep=1)
    with largest_file(50_000), pytest.raises(OSError) as error:
        save_checkpoint(tmp_path, too_large(name), keep=1)
    file = folder.with_name(".step-00000005.tmp") / name
    assert str(error.value).startswith(f"can't write '{file}': ") and "\n" not in str(error.value)
    assert "File too large" in str(error.value)
    assert list(folder.parent.iterdir()) == [folder] and load_checkpoint(folder).step == 4
    save_checkpoint(tmp_path, too_large(name), keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5]


def test_a_disk_that_is_full_when_it_is_forced(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    folder = save_checkpoint(tmp_path, example(4), keep=1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"can't write '.*step-00000005.*': No space left on device$"):
        save_checkpoint(tmp_path, example(5), keep=1)
    assert list(folder.parent.iterdir()) == [folder] and load_checkpoint(folder).step == 4


def test_a_read_only_folder_leaves_the_checkpoint_before(open_folder):
    folder = save_checkpoint(open_folder, example(4), keep=1)
    with read_only(folder.parent), pytest.raises(PermissionError) as error:
        save_checkpoint(open_folder, example(5), keep=1)
    assert str(folder.with_name(".step-00000005.tmp")) in str(error.value) and "\n" not in str(error.value)
    assert list(folder.parent.iterdir()) == [folder] and load_checkpoint(folder).step == 4


def test_a_checkpoint_replaces_one_of_the_same_step(tmp_path):
    folder = save_checkpoint(tmp_path, example(), keep=1)
    shutil.copytree(folder, tmp_path / "copy")
    state = json.loads((tmp_path / "copy" / "state.json").read_text())
    assert state == {"step": 4, "seed": 3, "name": "ü"}
    save_checkpoint(tmp_path, Checkpoint(4, {"v": torch.ones(1)}, {}, {}, {}), keep=1)
    assert list(load_checkpoint(folder).model) == ["v"]

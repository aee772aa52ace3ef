"""disk.py: files and folders that are whole or not there, and errors that name what can't be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from hf_ddpm.runtime.disk import (
    free_path,
    load_tensors,
    named,
    save_tensors,
    update_folder,
    whole_file,
    why_not_writable,
    write_folder,
)
from tests.disks import largest_file
from tests.launching import ROOT


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


# One file


def test_a_file_is_seen_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert not path.exists() and partial.parent == path.parent
    assert contents(tmp_path) == {"deep/a.txt": "new"}
    with whole_file(path) as partial:
        partial.write_text("newer")
        assert path.read_text() == "new"
    assert contents(tmp_path) == {"deep/a.txt": "newer"}


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), whole_file(path) as partial:
        partial.write_text("half")
        raise error
    assert contents(tmp_path) == {"a.txt": "old"}


def test_two_processes_may_write_a_file_at_once(tmp_path):
    path = tmp_path / "a.txt"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom hf_ddpm.runtime.disk import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('theirs'); print('half', flush=True); input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert other.stdout is not None and other.stdout.readline() == "half\n"
    with whole_file(path) as partial:
        partial.write_text("ours")
    assert path.read_text() == "ours"
    other.communicate("\n", timeout=60)
    assert other.returncode == 0 and contents(tmp_path) == {"a.txt": "theirs"}


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path):
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom hf_ddpm.runtime.disk import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os._exit(9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.txt")], env=environment)
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.txt.") and left.suffix == ".tmp" and left.read_text() == "half"


def test_a_folder_that_is_a_file_is_told_of_the_file_that_was_meant(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.txt"
    with pytest.raises(OSError) as error, whole_file(path):
        pass
    assert str(error.value).startswith(f"can't write '{path}': ")


def test_tensors_come_back(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1, 2])}
    save_tensors(tmp_path / "deep" / "x.safetensors", tensors, {"facts": "ü"})
    found = load_file(tmp_path / "deep" / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    with safe_open(tmp_path / "deep" / "x.safetensors", "pt") as file:
        assert file.metadata().keys() == {"facts", "sha256"}
    again, texts = load_tensors(tmp_path / "deep" / "x.safetensors")
    assert torch.equal(again["a"], tensors["a"]) and texts == {"facts": "ü"}


def test_a_full_disk_leaves_the_old_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    with largest_file(50_000), pytest.raises(OSError) as error:
        save_tensors(path, {"a": torch.zeros(100_000)})
    assert str(error.value).startswith(f"can't write '{path}': ") and "File too large" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path] and load_file(path)["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (SafetensorError("I/O error: No space left\non device"), "I/O error: No space left on device"),
        (RuntimeError("basic_ios::clear: iostream error"), "basic_ios::clear: iostream error"),
    ],
)
def test_every_librarys_words_name_the_file(tmp_path, raised, words):
    with pytest.raises(OSError) as error, named(tmp_path / "a"):
        raise raised
    assert str(error.value) == f"can't write '{tmp_path / 'a'}': {words}"
    with pytest.raises(ValueError, match=r"^bad$"), named(tmp_path / "a"):  # which is about no disk
        raise ValueError("bad")


def test_the_systems_words_are_told_rather_than_a_librarys(tmp_path):
    with pytest.raises(OSError, match=r"can't write '.*/a': No space left on device$"), named(tmp_path / "a"):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed")  # noqa: B904  as torch does


# Folders


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    folder, rename = tmp_path / "folder", Path.rename
    write_folder(folder, lambda place: (place / "a").write_text("old"))

    def fail(self, target):
        if self.name == ".folder.tmp":
            raise OSError(5, "Input/output error", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_folder(folder, lambda place: (place / "a").write_text("new"))
    assert contents(folder) == {"a": "old"} and list(tmp_path.iterdir()) == [folder]


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


def test_a_full_disk_in_the_words_of_others_is_named(tmp_path):
    def write(place: Path) -> None:
        (place / "model_index.json").write_text("x" * 100)

    with largest_file(50), pytest.raises(OSError) as error:
        update_folder(tmp_path, write, "model_index.json")
    assert str(error.value) == f"can't write '{tmp_path / '.new.tmp'}': [Errno 27] File too large"


def test_why_a_folder_cannot_be_written(open_folder):
    assert why_not_writable(open_folder) is None and why_not_writable(open_folder / "a" / "b") is None
    assert not (open_folder / "a").exists()  # it only looks
    (open_folder / "file").touch()
    assert why_not_writable(open_folder / "file") == "File exists"
    assert why_not_writable(open_folder / "file" / "a") == "Not a directory"
    (open_folder / "link").symlink_to(open_folder / "nowhere")
    assert why_not_writable(open_folder / "link") == "File exists"
    assert why_not_writable(open_folder / ("a" * 300)) == "File name too long"


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "closed"])
def test_the_folder_of_another_cannot_be_written(mode, open_folder):
    # os.access asks for the real user, to whom root's rights belong: a process of another user asks here
    script = (
        "import os, sys\nfrom pathlib import Path\n"
        "from hf_ddpm.runtime.disk import why_not_writable\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "print(why_not_writable(Path(sys.argv[1])))\n"
    )
    open_folder.chmod(mode)
    done = subprocess.run(
        [sys.executable, "-c", script, str(open_folder / "a")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    open_folder.chmod(0o755)
    assert done.stdout == "Permission denied\n", done.stderr


def test_a_free_name(tmp_path):
    assert free_path(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").touch()
    (tmp_path / "a-2").mkdir()
    assert free_path(tmp_path / "a") == tmp_path / "a-3"

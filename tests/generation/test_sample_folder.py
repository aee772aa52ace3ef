"""`hf-ddpm sample` and its folder: two at once, stopped and gone on with, and files of other people."""

import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

import hf_ddpm.generation.sample
from tests.commands import pixels, refused, sample
from tests.launching import ROOT, finish, start

FLAGS = ("--num-images", 6, "--steps", 3, "--batch-size", 2)
SCRIPT = ROOT / "train_scripts" / "sample.py"


def photo(path, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size), 7, np.uint8)).save(path)
    return path.read_bytes()


def stopped(model, out, after, *flags):
    """The command, ended by SIGTERM before it writes the image of that number."""
    save, left = hf_ddpm.generation.sample.save_image, [after]

    def killed(*what):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        left[0] -= 1
        return save(*what)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(hf_ddpm.generation.sample, "save_image", killed)
        sample(model, out, *FLAGS, *flags)
    assert stop.value.code == 75


@pytest.fixture
def drawn(monkeypatch):
    """How many images are drawn at once, one entry for each call of the model."""
    calls, call = [], hf_ddpm.generation.sample.DDPMPipeline.__call__

    def counted(self, number, *rest, **options):
        calls.append(number)
        return call(self, number, *rest, **options)

    monkeypatch.setattr(hf_ddpm.generation.sample.DDPMPipeline, "__call__", counted)
    return calls


def test_a_stopped_drawing_goes_on_with_the_same_command(tiny_folder, tmp_path, capfd, drawn):
    whole = sample(tiny_folder, tmp_path / "whole", *FLAGS)
    capfd.readouterr()
    stopped(tiny_folder, tmp_path / "out", 3)
    assert capfd.readouterr().err.endswith("hf-ddpm sample: stopped by SIGTERM; the same command goes on\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"0000{i}.png" for i in range(3)]
    (tmp_path / "out" / ".00003.png.7.tmp").write_text("half")  # what a SIGKILL leaves
    line = refused(capfd, "sample", tiny_folder, "--out", tmp_path / "out", *FLAGS, "--seed", 1)
    assert "holds samples already; allowed: another folder, or --overwrite" in line  # of another drawing
    drawn.clear()
    again = sample(tiny_folder, tmp_path / "out", *FLAGS)
    assert drawn == [2, 2]  # the first two were whole
    assert all(np.array_equal(again[name], whole[name]) for name in whole) and again.keys() == whole.keys()
    assert len(list((tmp_path / "out").iterdir())) == 7


def test_a_damaged_image_is_named_and_drawn_anew(tiny_folder, tmp_path, caplog, drawn):
    whole = sample(tiny_folder, tmp_path / "whole", *FLAGS)
    stopped(tiny_folder, tmp_path / "out", 4)
    file = tmp_path / "out" / "00001.png"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1  # a pixel
    file.write_bytes(data)
    drawn.clear()
    again = sample(tiny_folder, tmp_path / "out", *FLAGS)
    assert f"'{file}' is damaged and drawn anew" in caplog.text and drawn == [2, 2]
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("name", ["00003.png", "grid.png"])
def test_a_photo_by_the_name_of_a_sample_is_never_replaced(name, tiny_folder, tmp_path, capfd):
    data = photo(tmp_path / "out" / name)
    line = refused(capfd, "sample", tiny_folder, "--out", tmp_path / "out", *FLAGS)
    assert f"holds other things, such as '{name}'; allowed: an empty or new folder" in line
    line = refused(capfd, "sample", tiny_folder, "--out", tmp_path / "out", *FLAGS, "--overwrite")
    assert f"holds '{name}', which is damaged or not of `hf-ddpm sample`; allowed: another folder" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_bytes() == data


def test_photos_beyond_the_samples_are_never_deleted(tiny_folder, tmp_path):
    data = photo(tmp_path / "out" / "00009.png")
    sample(tiny_folder, tmp_path / "out", *FLAGS, "--overwrite")
    new = sample(tiny_folder, tmp_path / "out", "--num-images", 2, "--steps", 3, "--overwrite")
    assert sorted(new) == ["00000.png", "00001.png", "00009.png", "grid.png"]
    assert (tmp_path / "out" / "00009.png").read_bytes() == data


def test_a_folder_that_cannot_be_written_shows_before_the_model_is_loaded(capfd):
    line = refused(capfd, "sample", "/nowhere/model", "--out", "/proc/x")
    assert line.endswith("out '/proc/x' can't be written: No such file or directory")


def test_a_folder_that_is_moved_meanwhile(tiny_folder, tmp_path, capfd, monkeypatch):
    save = hf_ddpm.generation.sample.save_image

    def moved(image, path, note):
        save(image, path, note)
        if path.name == "00002.png":
            (tmp_path / "out").rename(tmp_path / "else")

    monkeypatch.setattr(hf_ddpm.generation.sample, "save_image", moved)
    line = refused(capfd, "sample", tiny_folder, "--out", tmp_path / "out", *FLAGS, code=1).split("\r")[-1]
    assert f"the folder '{tmp_path / 'out'}' was moved or deleted while it was in use" in line
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "else").iterdir())) == 3


def test_many_at_once_leave_the_samples_of_one(tiny_folder, tmp_path):
    started = {}
    for seed in range(5):
        place = tmp_path / str(seed)
        place.mkdir()
        command = [SCRIPT, tiny_folder, "--out", tmp_path / "out", *FLAGS, "--seed", seed]
        (started[seed],) = start(command, place)
    codes = dict(zip(started, finish(list(started.values())), strict=True))
    told = {seed: (tmp_path / str(seed) / "output").read_text() for seed in started}
    (winner,) = (seed for seed, code in codes.items() if code == 0)
    assert sorted(codes.values()) == [0, 2, 2, 2, 2], told
    for seed in started.keys() - {winner}:
        assert "is in use by process " in told[seed] or "holds samples already" in told[seed]
    left = pixels(tmp_path / "out")
    expected = sample(tiny_folder, tmp_path / "alone", *FLAGS, "--seed", winner)
    assert left.keys() == expected.keys()
    assert all(np.array_equal(left[name], expected[name]) for name in left)


def test_a_terminal_that_is_closed(tiny_folder, tmp_path):
    (process,) = start(
        [SCRIPT, tiny_folder, "--out", "out", "--num-images", 400, "--batch-size", 1], tmp_path
    )
    while process.is_alive() and not (tmp_path / "out" / "00001.png").exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGHUP)
    assert finish([process]) == [75], (tmp_path / "output").read_text()
    assert (tmp_path / "output").read_text().endswith("stopped by SIGHUP; the same command goes on\n")
    assert not list((tmp_path / "out").glob(".*"))

"""hf-ddpm compress and decompress: what a person types and reads."""

import numpy as np
import pytest
from PIL import Image

from hf_ddpm.cli import main
from hf_ddpm.data.stream import load_stream
from hf_ddpm.folders.layout import ERRORS
from tests.commands import pixels, refused


def compress(*words):
    main(["compress", *map(str, words)])


def test_there_and_back(tiny_folder, tmp_path, capfd, caplog):
    compress(tiny_folder, "digits:test:0-9", "--out", tmp_path / "x.hfdc", "--steps", 4, "--verify")
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("10 images of 1x8x8 (C, H, W): ") and "bits/dim" in lines[0]
    assert lines[1].startswith("by the model alone: ") and "640 bytes raw" in lines[2] and "PNG" in lines[2]
    assert lines[3].startswith("verified: every pixel came back") and lines[4].endswith("x.hfdc")
    assert f"the model has no {ERRORS}" in caplog.text and "hf-ddpm plan" in caplog.text
    main(["decompress", str(tiny_folder), str(tmp_path / "x.hfdc"), "--out", str(tmp_path / "back")])
    assert capfd.readouterr().out.startswith(
        f"10 images in {tmp_path / 'back'}, as compressed to the last bit"
    )
    whole = list(load_stream("digits", "test").images())
    found = pixels(tmp_path / "back")
    assert len(found) == 10
    for i, (name, image) in enumerate(sorted(found.items())):
        assert name == f"{i:05d}.png" and np.array_equal(image, whole[i][0])


def test_a_folder_and_files(tiny_folder, tmp_path):
    for i in range(2):
        Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(tmp_path / f"photo {i}.png")
    files = [tmp_path / "photo 1.png", tmp_path / "photo 0.png"]
    compress(tiny_folder, *files, "--out", tmp_path / "x.hfdc", "--steps", 3, "--dtype", "float32")
    compress(tiny_folder, tmp_path, "--out", tmp_path / "x.hfdc", "--steps", 3, "--overwrite")
    main(["decompress", str(tiny_folder), str(tmp_path / "x.hfdc"), "--out", str(tmp_path / "back")])
    assert sorted(pixels(tmp_path / "back")) == ["photo 0.png", "photo 1.png"]


def test_what_is_refused_before_the_model_is_loaded(tiny_folder, tmp_path, capfd):
    (tmp_path / "there").write_text("mine")
    digits = "digits:test:0-3"
    words = refused(capfd, "compress", tiny_folder, digits, "--out", tmp_path / "there")
    assert words.startswith("hf-ddpm compress: error: --out") and "or --overwrite" in words
    assert "--out" in refused(capfd, "compress", tiny_folder, digits, "--out", tmp_path)
    assert "--out" in refused(capfd, "compress", tiny_folder, digits, "--out", tmp_path / "there" / "x")
    assert "--out" in refused(capfd, "decompress", tiny_folder, tmp_path / "there", "--out", tmp_path)
    for flags in (
        ["--steps", "0"],
        ["--batch", "0"],
        ["--batch", "9999"],
        ["--dtype", "int8"],
        ["--step", "3"],
    ):
        assert flags[0] in refused(capfd, "compress", tiny_folder, digits, "--out", tmp_path / "x", *flags)


def test_what_is_refused_of_images_and_files(tiny_folder, tmp_path, capfd):
    out = ["--out", tmp_path / "x"]
    assert "IMAGES has 'nothing'" in refused(capfd, "compress", tiny_folder, "nothing", *out)
    assert "--steps is 99" in refused(capfd, "compress", tiny_folder, "digits:test:0-3", "--steps", 99, *out)
    (tmp_path / "other").write_bytes(b"PK\3\4")
    words = refused(capfd, "decompress", tiny_folder, tmp_path / "other", "--out", tmp_path / "back")
    assert "is no file of hf-ddpm compress" in words
    assert "No such file" in refused(
        capfd, "decompress", tiny_folder, tmp_path / "n", "--out", tmp_path / "b"
    )
    compress(tiny_folder, "digits:test:0-3", "--out", tmp_path / "x", "--steps", 3)
    capfd.readouterr()
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-3])
    words = refused(capfd, "decompress", tiny_folder, tmp_path / "cut", "--out", tmp_path / "back")
    assert "cut off or damaged" in words
    assert not (tmp_path / "back").exists()


def test_without_the_coder(tiny_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    words = refused(capfd, "compress", tiny_folder, "digits:test:0-3", "--out", tmp_path / "x")
    assert words == (
        "hf-ddpm compress: error: the package constriction, the entropy coder, is not installed; allowed: "
        "after pip install 'hf_ddpm[codec]'"
    )


def test_force_is_named_as_a_flag(tiny_folder, tmp_path, capfd, monkeypatch):
    compress(tiny_folder, "digits:test:0-3", "--out", tmp_path / "x", "--steps", 3)
    capfd.readouterr()
    monkeypatch.setattr("hf_ddpm.compression.scheme.Chain.digest", "5" * 16)
    words = refused(capfd, "decompress", tiny_folder, tmp_path / "x", "--out", tmp_path / "back")
    assert words.endswith("add --force to try it all the same")
    main(["decompress", str(tiny_folder), str(tmp_path / "x"), "--out", str(tmp_path / "back"), "--force"])


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out

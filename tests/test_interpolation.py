"""`hf-ddpm interpolate`: from files and rows of a data set to a picture, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_ddpm import DDPMPipeline, load_stream
from hf_ddpm.cli import main
from hf_ddpm.data.pixels import to_float
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.pictures import draw_interpolation, interpolate
from tests.commands import pixels, refused


def test_interpolate_rows_of_a_data_set_and_files(tiny_folder, tmp_path, capfd):
    rows = list(load_stream("digits", "test").select([4, 17]))
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for row, file in zip(rows, files, strict=True):
        Image.fromarray(row[0].numpy()).save(file)
    out = tmp_path / "deep" / "mixed.png"
    command = ["interpolate", tiny_folder, "digits:test:4", "digits:test:17", "--num-images", 3, "--seed", 2]
    main([str(word) for word in (*command, "--t", "3,7", "--out", out)])
    assert capfd.readouterr().out == f"picture: {out}\n"
    drawn = pixels(out.parent)["mixed.png"]

    # By hand, from Python.
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    sheet = interpolate(pipeline, *(to_float(row) for row in rows), [3, 7], 3, 2)
    np.testing.assert_array_equal(
        drawn, pixels(sheet.save(tmp_path / "hand" / "mixed.png").parent)["mixed.png"]
    )

    same = ["interpolate", tiny_folder, *files, "--num-images", 3, "--seed", 2, "--t", "3,7", "--out", out]
    line = refused(capfd, *same)
    assert line.endswith(f"out '{out}' is there already; allowed: another file, or --overwrite")
    main([str(word) for word in (*same, "--overwrite")])
    np.testing.assert_array_equal(pixels(out.parent)["mixed.png"], drawn)
    main([str(word) for word in (*same, "--overwrite", "--steps", 5)])
    assert not np.array_equal(pixels(out.parent)["mixed.png"], drawn)

    # T/4, T/2 and 3T/4 of 20 steps
    main([str(word) for word in (*command, "--out", tmp_path / "default.png")])
    main([str(word) for word in (*command, "--out", tmp_path / "named.png", "--t", "5,10,15")])
    written = pixels(tmp_path)
    np.testing.assert_array_equal(written["default.png"], written["named.png"])


@pytest.mark.parametrize(
    ("a", "flags", "words"),
    [
        ("digits:test:4", "--t 20", "t is 20; allowed: steps in 0..19"),
        ("digits:test:4", "--t 3,x", "--t is '3,x'; allowed: whole numbers >= 0 between commas"),
        ("digits:test:4", "--t -1", "--t is '-1'; allowed: whole numbers >= 0 between commas"),
        ("digits:test:4", "--steps 21", "steps is 21; allowed: whole numbers in 1..20"),
        ("digits:test:4", "--num-images 1", "--num-images is 1; allowed: whole numbers >= 2"),
        ("digits:test:4", "--out mixed.jpg", "out is 'mixed.jpg'; allowed: a file name that ends in .png"),
        ("digits:test:4", "--out file/mixed.png", "out 'file/mixed.png' can't be written: Not a directory"),
        ("digits:test:4", "--image-column pixels", "no column 'pixels'; there are: image"),
        ("digits:test:9999", "", "no row 9999 in "),
        ("digits:tset:4", "", "no split 'tset' in digits (did you mean 'test'?); it has train, test"),
        ("digits:4", "", "image 'digits:4' is no file; allowed: an image file, or DATASET:SPLIT:ROW such"),
        ("nowhere.png", "", "image 'nowhere.png' is no file; allowed: an image file, or DATASET:SPLIT:ROW"),
        ("file", "", "file: corrupt image: not a whole file of a format that is read"),
        ("large.png", "", "image 'large.png' is (1, 9, 8) (C, H, W); allowed: the model's (1, 8, 8)"),
        ("color.png", "", "image 'color.png' is (3, 8, 8) (C, H, W); allowed: the model's (1, 8, 8)"),
    ],
)
def test_interpolate_refuses(a, flags, words, tiny_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no image")
    Image.new("L", (8, 9)).save("large.png")
    Image.new("RGB", (8, 8)).save("color.png")
    line = refused(
        capfd, "interpolate", tiny_folder, a, "digits:test:17", "--out", "mixed.png", *flags.split()
    )
    assert line.startswith("hf-ddpm interpolate: error: ") and words in line
    assert not Path("mixed.png").exists()


def test_interpolate_spares_its_images(tiny_folder, tmp_path, capfd):
    image = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(image)
    content = image.read_bytes()
    words = ["interpolate", tiny_folder, image, "digits:test:17", "--overwrite"]
    assert f"is the image '{image}'; allowed: another file" in refused(capfd, *words, "--out", image)
    assert image.read_bytes() == content
    assert "of which no home folder is known" in refused(capfd, *words, "--out", "~nobody-here/x.png")
    assert "allowed: 4095 bytes, and 255 for each part of a path" in refused(
        capfd, *words[:2], "a" * 300, *words[3:], "--out", tmp_path / "x.png"
    )


def test_interpolate_refuses_models(tiny_folder, tmp_path, capfd):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    swap_scheduler(pipeline, "ddim")
    pipeline.save_pretrained(tmp_path / "ddim")
    capfd.readouterr()
    command = ["digits:test:4", "digits:test:17", "--out", tmp_path / "mixed.png"]
    line = refused(capfd, "interpolate", tmp_path / "ddim", *command)
    assert line.endswith("the scheduler is 'DDIMScheduler'; allowed: DDPMScheduler (ddpm)")
    line = refused(capfd, "interpolate", "/nowhere/model", *command)
    assert line.endswith("model folder '/nowhere/model' does not exist")
    line = refused(capfd, "interpolate", tiny_folder)
    assert line.endswith("the following arguments are required: A, B, --out")


def test_paths_are_as_good_as_text(tiny_folder, tmp_path):
    image = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(image)
    out = tmp_path / "mixed.png"
    assert draw_interpolation(tiny_folder, image, "digits:test:4", out, [3], 2) == out
    with pytest.raises(ValueError, match="image is 3; allowed: a name as text or a path"):
        draw_interpolation(str(tiny_folder), str(image), 3, str(out))  # type: ignore[arg-type]

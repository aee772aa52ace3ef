"""Which images `hf-ddpm evaluate` scores of a run's own data, and what it takes from the run.

The images' pixels are the number of their row, so that their digests say which were scored.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from hf_ddpm import TrainConfig, train
from hf_ddpm.cli import main
from hf_ddpm.data.holdout import held_out
from hf_ddpm.data.pixels import image_digest
from hf_ddpm.folders.layout import ERRORS
from tests.evaluation.commands import refused, run

N = 60
HELD = held_out(range(N), 0.1, 5).tolist()
FEW = ("--num-evals-per-image", 2)


def make_images(folder):
    folder.mkdir(parents=True)
    for row in range(N):
        Image.fromarray(np.full((10, 12), row, np.uint8)).save(folder / f"{row:03d}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "photos")


def trained(folder, photos, **changes):
    values = {
        **{"dataset": str(photos), "holdout": 0.1, "seed": 5, "fit": "random_crop", "image_size": 8},
        **{"model": "tiny", "max_steps": 1, "batch_size": 2, "sample_every": 0, "lr_warmup_steps": 0},
        **{"num_train_timesteps": 20, "beta_end": 0.5, "output_dir": str(folder)},
    }
    train(TrainConfig(**values | changes))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, photos):
    return trained(tmp_path_factory.mktemp("runs") / "run", photos)


def score(model, out, *words, oracle=True):
    """The report of the data, and the scored rows, which an oracle finds to be those they are said to be."""
    main(["evaluate", *(str(word) for word in (model, *words, *FEW, "--out", out))])
    from safetensors.torch import load_file

    tensors = load_file(out / "evaluation.safetensors")
    rows = tensors["image_indices"].tolist()
    digests = [image_digest(torch.full((1, 8, 8), row, dtype=torch.uint8)) for row in rows]
    assert not oracle or tensors["digests"].tolist() == digests
    return json.loads((out / "evaluation.json").read_text())["data"], rows


def test_by_default_the_held_out_images_of_the_run(model, photos, tmp_path, capsys, caplog):
    data, rows = score(model, tmp_path / "a")
    assert rows == HELD and data["part"] == "held-out" and data["split"] == "train"
    assert (data["dataset"], data["holdout"], data["holdout_seed"]) == (str(photos), 0.1, 5)
    assert (data["fit"], data["trained_on"], data["num_trained_on"]) == ("center_crop", False, 0)
    words = f"6 of 6 held-out images of {photos}, train (holdout 0.1, seed 5), changed by fit center_crop; "
    assert words in capsys.readouterr().out and "trained on" not in caplog.text
    for number, words in enumerate([[photos], [photos, "--split", "train"], [f"{photos}/../photos"]]):
        assert score(model, tmp_path / str(number), *words)[1] == HELD


def test_the_same_images_in_another_folder_are_known(model, photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved")
    data, rows = score(model, tmp_path / "a", moved)
    assert rows == HELD and data["part"] == "held-out" and data["dataset"] == str(moved)


def test_other_parts_are_asked_for_and_told(model, photos, tmp_path, capsys, caplog):
    others = sorted(set(range(N)) - set(HELD))
    data, rows = score(model, tmp_path / "a", "--part", "train")
    assert rows == others and data["trained_on"] and data["num_trained_on"] == 54
    assert "54 of 54 trained-on images of " in capsys.readouterr().out
    data, rows = score(model, tmp_path / "b", "--part", "all")
    assert rows == list(range(N)) and data["num_trained_on"] == 54 and "part" not in data
    assert "60 of 60 images of " in (out := capsys.readouterr().out) and ", 54 of them trained on" in out
    assert "the model was trained on 54 of these 60 images: their bits/dim here say nothing" in caplog.text
    data, rows = score(model, tmp_path / "c", photos, "--split", "train[:50%]")
    assert rows == [row for row in HELD if row < 30] and data["split"] == "train[:50%]"
    data, rows = score(model, tmp_path / "d", photos, "--holdout", 12, "--num-images", 5)
    wider = held_out(range(N), 12, 5).tolist()
    assert len(rows) == 5 and set(rows) <= set(wider) and data["num_trained_on"] == 6


def test_an_image_has_the_same_number_in_every_slice(model, photos, tmp_path):
    """Its draws depend on the seed and its row in the whole split alone."""
    _, one = run(model, tmp_path / "a", *FEW, "--part", "all", "--split", "train[20:40]", dataset=photos)
    _, two = run(model, tmp_path / "b", *FEW, "--part", "all", "--split", "train", dataset=photos)
    assert one["image_indices"].tolist() == list(range(20, 40))
    torch.testing.assert_close(one["bpd"], two["bpd"][20:40], rtol=1e-5, atol=1e-5)


def test_a_run_on_a_slice(photos, tmp_path, capfd, caplog):
    folder = trained(tmp_path / "run", photos, holdout=None, split="train[:80%]")
    line = refused(capfd, folder, "--out", tmp_path / "out")
    assert (
        f"the run's own data set, as DATASET is not given: no split 'test' in {photos}; it has train"
        "; add --split train" in line
    )
    line = refused(capfd, folder, photos, "--out", tmp_path / "out")
    assert f"no split 'test' in {photos}; it has train; add --split train" in line
    data, rows = score(folder, tmp_path / "a", "--split", "train[80%:]")
    assert rows == list(range(48, 60)) and not data["trained_on"]
    assert "trained on" not in caplog.text
    data, _ = score(folder, tmp_path / "b", "--split", "train[70%:]")
    assert data["trained_on"] and (data["num_trained_on"], data["num_rows"]) == (6, 18)
    words = refused(
        capfd, folder, photos, "--split", "train", "--part", "held-out", "--out", tmp_path / "out"
    )
    assert "--part is 'held-out', but no record says that the model's training had such images" in words


def plan(model, *words):
    """The rows that are measured, what they are of, and what is printed."""
    main(["plan", *(str(word) for word in (model, *words, "--evals", 210))])
    out = Path(words[words.index("--out") + 1] if "--out" in words else model)
    with safe_open(out / ERRORS, "pt") as table:
        return table.get_tensor("rows").tolist(), json.loads(table.metadata()["of"])


def typed(capsys):
    """The command that a plan tells to type next, as words."""
    found = re.search(r"next, on images .*:\n\n  hf-ddpm ((.*\\\n)*.*)\n", capsys.readouterr().out)
    return shlex.split(found.group(1).replace("\\\n", " "))


def test_errors_are_measured_on_what_the_run_trained_on(model, photos, tmp_path, capfd):
    folder = shutil.copytree(model, tmp_path / "run")
    rows, of = plan(folder)
    assert rows == sorted(set(range(N)) - set(HELD))
    assert (of["part"], of["split"], of["holdout"], of["holdout_seed"]) == ("train", "train", 0.1, 5)
    command = typed(capfd)
    assert command[:3] == ["evaluate", str(folder), "--steps"]
    main([*command, FEW[0], str(FEW[1])])
    report = json.loads(next(folder.glob("by-value-*/evaluation.json")).read_text())
    assert report["data"]["part"] == "held-out" and report["few_steps"]["errors"] == of
    by_value = ("--variance", "by-value", "--out", tmp_path / "out", *FEW)
    for words, said in (
        (["--part", "train"], "were measured on these images"),
        (["--part", "all"], "were measured on 54 of these 60 images"),
        ([photos, "--split", "train", "--holdout", 0.2, "--holdout-seed", 6], "of these 12 images"),
        ([shutil.copytree(photos, tmp_path / "moved"), "--part", "train"], "were measured on these images"),
    ):
        assert said in refused(capfd, folder, *words, *by_value)


@pytest.mark.slow
def test_errors_of_a_run_on_a_slice(photos, tmp_path, capfd):
    folder = trained(tmp_path / "run", photos, holdout=None, split="train[:80%]")
    for number, words in enumerate([[], [photos, "--split", "train"]]):
        rows, _ = plan(folder, *words, "--out", tmp_path / str(number))
        assert rows == list(range(48))
    rows, _ = plan(folder, "--split", "train", "--part", "all", "--out", tmp_path / "all")
    assert rows == list(range(N))
    score(
        folder, tmp_path / "a", "--split", "train[80%:]", "--variance", "optimal", "--errors", tmp_path / "0"
    )
    words = ("--split", "train[75%:]", "--variance", "optimal", "--errors", tmp_path / "0")
    assert "3 of these 15 images" in refused(capfd, folder, *words, "--out", tmp_path / "b")


def test_errors_of_a_model_without_a_run(tiny_folder, photos, tmp_path, capfd):
    words = (photos, "--fit", "center_crop", "--holdout", 12, "--holdout-seed", 5, "--clip-x0", "false")
    rows, of = plan(tiny_folder, *words, "--out", tmp_path / "plan")
    assert rows == sorted(set(range(N)) - set(held_out(range(N), 12, 5).tolist()))
    assert (of["holdout"], of["holdout_seed"], of["clip_x0"]) == (12, 5, False)
    main([*typed(capfd), FEW[0], str(FEW[1])])
    report = json.loads(next((tmp_path / "plan").glob("by-value-*/evaluation.json")).read_text())
    assert report["data"]["num_rows"] == 12 and report["data"]["fit"] == "center_crop"


def test_a_run_with_a_test_split_is_scored_on_it(photos, tmp_path, caplog):
    data = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(photos, data / split)
    folder = trained(tmp_path / "run", data, holdout=None)
    found, rows = score(folder, tmp_path / "a")
    assert (found["dataset"], found["split"], found["trained_on"]) == (str(data), "test", False)
    assert rows == list(range(N)) and "part" not in found
    score(folder, tmp_path / "part", data / "train", "--split", "train")
    assert "nobody knows on which of its images the model was trained" in caplog.text
    folder = trained(tmp_path / "held", data)
    assert score(folder, tmp_path / "b")[0]["split"] == "train"
    found, rows = score(folder, tmp_path / "c", "--split", "test")
    assert rows == list(range(N)) and not found["trained_on"]


def test_data_that_have_changed_are_noticed(photos, tmp_path, capfd, caplog):
    data = shutil.copytree(photos, tmp_path / "data")
    folder = trained(tmp_path / "run", data)
    (data / "030.png").unlink()
    for words in ([], [data], [data, "--split", "train", "--part", "train"]):
        line = refused(capfd, folder, *words, "--out", tmp_path / "out")
        assert " (60 images then, 59 now), so nobody knows which of its images are " in line
        assert line.endswith("add --part all")
    run(folder, tmp_path / "a", *FEW, "--part", "all", "--split", "train", dataset=data)
    report = json.loads((tmp_path / "a" / "evaluation.json").read_text())["data"]
    assert report["changed"] == "60 images then, 59 now" and report["trained_on"] is True
    assert report["num_trained_on"] is None
    words = "has changed since the run began (60 images then, 59 now): nobody knows on which of its images"
    assert words in caplog.text
    # Nobody knows which of these are held out, so nobody says that the model hasn't met them
    report, _ = score(folder, tmp_path / "b", data, "--holdout", 0.1, oracle=False)
    assert report["trained_on"] is True and report["num_trained_on"] is None
    Image.fromarray(np.full((10, 12), 99, np.uint8)).save(data / "030.png")
    assert "(other names, sizes or images)" in refused(capfd, folder, "--out", tmp_path / "out")
    shutil.copytree(data, tmp_path / "elsewhere")
    assert "no split 'test'" in refused(capfd, folder, tmp_path / "elsewhere", "--out", tmp_path / "out")


def test_skipped_images_are_counted(photos, tmp_path, capfd):
    data = shutil.copytree(photos, tmp_path / "data")
    held, other = HELD[2], next(row for row in range(N) if row not in HELD)
    for row in (held, other):
        (data / f"{row:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    folder = trained(tmp_path / "run", data, skip_corrupt=True)
    found, rows = score(folder, tmp_path / "a", "--nearest-dataset", data, "--num-samples", 2)
    assert rows == [row for row in HELD if row != held] and found["num_skipped"] == 1
    line = refused(capfd, folder, "--skip-corrupt", "false", "--out", tmp_path / "out")
    assert f"{held:03d}.png: corrupt image" in line


def test_nearest_images_are_those_that_it_trained_on(model, photos, tmp_path, capfd):
    words = [*FEW, "--nearest-dataset", photos, "--num-samples", 4, "--sampling-steps", 2]
    report, tensors = run(model, tmp_path / "a", *words, dataset=photos)
    assert report["memorisation"]["num_rows"] == 54 and report["memorisation"]["trained_on"] is True
    assert set(tensors["heldout_rows"].tolist()) <= set(HELD)
    assert not set(tensors["nearest_rows"].tolist()) & set(HELD)
    for row, nearest in zip(tensors["heldout_rows"], tensors["heldout_nearest_rows"], strict=True):
        others = [other for other in range(N) if other not in HELD]
        assert abs(int(nearest) - int(row)) == min(abs(other - int(row)) for other in others)
    line = refused(capfd, model, photos, "--part", "train", "--out", tmp_path / "b", *words)
    assert "has the images that are evaluated" in line


def test_without_a_run_there_is_no_default(tiny_folder, photos, tmp_path, capfd):
    line = refused(capfd, tiny_folder, "--out", tmp_path / "out")
    assert "DATASET is not given, and " in line and "has no record of a training run" in line
    for words, said in (
        (["--part", "held-out"], "--part is 'held-out', but no record says"),
        (["--holdout-seed", 3], "--holdout-seed is 3, but has no use without --holdout"),
        (
            ["--holdout", 1],
            "--holdout is 1; allowed: a share of the images, above 0 and below 1, or how many",
        ),
        (["--part", "heldout"], "--part is 'heldout' (did you mean 'held-out'?)"),
        (["--split", "test[1"], "--split is 'test[1'; allowed: a split's name, or a slice"),
    ):
        assert said in refused(capfd, tiny_folder, "digits", *words, "--out", tmp_path / "out")
    # Another model, such as a baseline, on the images that a run held out
    data, rows = score(
        tiny_folder, tmp_path / "a", photos, "--fit", "center_crop", "--holdout", 0.1, "--holdout-seed", 5
    )
    assert rows == HELD and data["part"] == "held-out" and not data["trained_on"]


def test_images_that_an_earlier_run_trained_on_are_told(model, photos, tmp_path, caplog):
    """The network began as a model that was trained on most of what the new run holds out."""
    folder = trained(tmp_path / "run", photos, model=str(model), seed=6)
    held = held_out(range(N), 0.1, 6).tolist()
    seen = len(set(held) - set(HELD))
    assert seen and f"{model} was trained on {seen} of the images that are held out now" in caplog.text
    found, rows = score(folder, tmp_path / "a")
    assert rows == held and found["trained_on"] and found["num_trained_on"] == seen
    assert score(folder, tmp_path / "b", "--part", "all")[0]["num_trained_on"] == N - len(
        set(HELD) & set(held)
    )
    caplog.clear()
    same = trained(tmp_path / "same", photos, model=str(model))
    assert "held out now" not in caplog.text
    assert score(same, tmp_path / "c")[0]["num_trained_on"] == 0

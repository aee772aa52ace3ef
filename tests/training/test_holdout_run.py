"""A run with held-out images: what it never trains on, what it measures, and how it goes on.

The oracle is independent of the code that chooses rows: each image's pixels are the number of its row.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import hf_ddpm.training.run
from hf_ddpm import TrainConfig, train
from hf_ddpm.data.pixels import image_digest
from hf_ddpm.data.stream import load_stream
from hf_ddpm.runtime.disk import load_tensors
from hf_ddpm.training.checkpoint import load_checkpoint
from tests.data.pictures import png, write_parquet
from tests.launching import ROOT, finish, start
from tests.training.helpers import Conv, checkpoint, kill_at, log, refused, small

N = 60
NOTING = ROOT / "tests" / "distributed_script.py"


def picture(row):
    return np.full((8, 8), row, np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    for row in range(N):
        Image.fromarray(picture(row)).save(root / f"{row:03d}.png")
    return root


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    values = [png(picture(row)) for row in range(N)]
    return write_parquet(tmp_path_factory.mktemp("parquet"), values, [20, 1, 39], row_group_size=6)


@pytest.fixture
def noted(monkeypatch):
    """The rows of the images that runs of this test are given, in their order."""
    found, make_batches = [], hf_ddpm.training.run.make_batches

    def noting(*args):
        for batch in make_batches(*args):
            found.extend(int(image[0, 0, 0]) for image in batch.images[batch.present])
            yield batch

    monkeypatch.setattr(hf_ddpm.training.run, "make_batches", noting)
    return found


def held_rows(dataset, holdout=0.1, seed=0, split="train"):
    stream = load_stream(dataset, split, holdout=holdout, seed=seed, part="held-out")
    return [int(image[0, 0, 0]) for image in stream.images()]


def plan(output_dir, dataset, **changes):
    """Four epochs of the images that aren't held out."""
    values = {"dataset": str(dataset), "holdout": 0.1, "batch_size": 18, "max_steps": 12}
    return small(output_dir, **values | changes)


@pytest.mark.parametrize("memory", [0, 0.001, 32])
def test_a_held_out_image_is_never_trained_on(tmp_path, folder, parquet, noted, memory):
    held = held_rows(folder)
    assert len(held) == 6 == len(set(held))
    for name, dataset in (("folder", folder), ("parquet", parquet)):
        noted.clear()
        train(plan(tmp_path / name, dataset, shuffle_memory=memory), Conv())
        # One more batch may have been made than was asked for
        counts = np.bincount(noted[: 12 * 18], minlength=N)
        assert np.flatnonzero(counts == 0).tolist() == sorted(held)
        assert set(counts) == {0, 4}


def test_it_is_said_and_recorded(tmp_path, parquet, caplog):
    train(plan(tmp_path, parquet, max_steps=1), Conv())
    assert "54 images to train on, 6 held out" in caplog.text
    record = json.loads((tmp_path / "train_config.json").read_text())
    assert record["holdout"] == 0.1 and TrainConfig.load(tmp_path / "train_config.json").holdout == 0.1
    data = json.loads((tmp_path / "train_data.json").read_text())
    assert (data["num_rows"], data["chosen"], data["left_out"]) == (60, 54, 6)
    state = load_checkpoint(checkpoint(tmp_path, 1)).state
    assert state["data"]["rows"] == [20, 1, 39] and state["data"]["chosen"][0] == 54


def test_workers_and_a_kill_change_nothing(tmp_path, parquet, noted):
    train(plan(tmp_path / "whole", parquet), Conv())
    whole = noted[: 12 * 18]
    noted.clear()
    config = plan(tmp_path / "killed", parquet, checkpoint_every=3, num_workers=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, Conv(), after_step=kill_at(8))
    del noted[6 * 18 :]  # what came after the checkpoint is done again
    train(config, Conv())
    assert noted[: 12 * 18] == whole
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def test_the_bound_is_of_the_held_out_images(tmp_path, folder):
    """Of the holdout unless another split is named; its rows are those of the whole split."""
    measured = {"evaluate_every": 1, "evaluate_num_evals": 2, "max_steps": 1, "split": "train[30:]"}
    train(plan(tmp_path / "own", folder, **measured), Conv())
    found, _ = load_tensors(tmp_path / "own" / "heldout" / "step-00000001.safetensors")
    rows = held_rows(folder, split="train[30:]")
    assert found["rows"].tolist() == rows and len(rows) == 3 and min(rows) >= 30
    digests = [image_digest(torch.from_numpy(picture(row))[None]) for row in rows]
    assert found["digests"].tolist() == digests
    train(plan(tmp_path / "other", folder, **measured, evaluate_split="train[:5]"), Conv())
    found, _ = load_tensors(tmp_path / "other" / "heldout" / "step-00000001.safetensors")
    assert found["rows"].tolist() == [0, 1, 2, 3, 4]


def test_a_held_out_image_that_is_trained_on_is_told(tmp_path, folder, caplog):
    measured = {"evaluate_every": 1, "evaluate_num_evals": 2, "max_steps": 1, "holdout": None}
    for number, (split, words) in enumerate(
        [
            ("train[25:35]", "evaluate_split 'train[25:35]' has 5 images of 10 that the run trains on"),
            ("train[:10]", "evaluate_split 'train[:10]' is the split that the run trains on"),
            ("train[30:]", None),
        ]
    ):
        caplog.clear()
        config = plan(tmp_path / str(number), folder, **measured, split="train[:50%]", evaluate_split=split)
        train(config, Conv())
        assert (words in caplog.text) if words else ("that the run trains on" not in caplog.text)


def test_corrupt_held_out_images_are_skipped_if_others_are(tmp_path, folder):
    data, held = tmp_path / "data", held_rows(folder)
    data.mkdir()
    for row in range(N):
        Image.fromarray(picture(row)).save(data / f"{row:03d}.png")
    (data / f"{held[0]:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    measured = {"evaluate_every": 1, "evaluate_num_evals": 2, "max_steps": 1}
    said = refused(plan(tmp_path / "a", data, **measured), Conv())
    assert said.endswith(f"1 can't be read ({held[0]:03d}.png): add --skip-corrupt")
    train(plan(tmp_path / "b", data, **measured, skip_corrupt=True), Conv())
    found, _ = load_tensors(tmp_path / "b" / "heldout" / "step-00000001.safetensors")
    assert found["rows"].tolist() == held[1:]


def test_another_holdout_or_seed_is_refused_by_name(tmp_path, folder):
    config = plan(tmp_path, folder, max_steps=1)
    train(config, Conv())
    for changes, words in (
        ({"holdout": 0.2}, "holdout 0.1 -> 0.2"),
        ({"holdout": 6}, "holdout 0.1 -> 6"),
        ({"holdout": None}, "holdout 0.1 -> None"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"split": "train[:90%]"}, "split 'train' -> 'train[:90%]'"),
    ):
        assert words in refused(plan(tmp_path, folder, **{"max_steps": 2, **changes}), Conv())


def test_a_checkpoint_from_before_there_were_holdouts_goes_on(tmp_path, folder):
    train(plan(tmp_path, folder, max_steps=1, holdout=None), Conv())
    state = checkpoint(tmp_path, 1) / "state.json"
    said = json.loads(state.read_text())
    assert said["config"].pop("holdout", 0) is None and said["config"].pop("evaluate_split") is None
    assert "chosen" not in said["data"]
    was, text = state.read_bytes(), json.dumps(said)
    state.write_text(text)
    sums = checkpoint(tmp_path, 1) / "SHA256SUMS"
    now = (hashlib.sha256(data).hexdigest() for data in (was, text.encode()))
    sums.write_text(sums.read_text().replace(*now))
    assert train(plan(tmp_path, folder, max_steps=2, holdout=None), Conv()).step == 2
    assert "holdout None -> 0.1" in refused(plan(tmp_path, folder, max_steps=3), Conv())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"holdout": 0.001}, "holdout is 0.001, none of the 60 images; allowed: what makes 1 to 59 of them"),
        ({"holdout": 60}, "holdout is 60, not fewer than the 60 images"),
        ({"split": "train[:1%]", "holdout": 0.5}, "holdout is 0.5, not fewer than the 1 images"),
        ({"split": "train[60:]"}, "split is 'train[60:]', which is none of the 60 rows of 'train'"),
        ({"split": "train[1]"}, "split is 'train[1]'; allowed: a split's name, or a slice"),
        (
            {"evaluate_split": "train[1]", "evaluate_every": 1},
            "evaluate_split 'train[1]': split is 'train[1]'; allowed: a split's name, or a slice",
        ),
    ],
    ids=["too few", "all", "of one", "an empty slice", "no slice", "no slice to evaluate"],
)
def test_what_is_refused_at_the_start(tmp_path, folder, changes, words):
    assert words in refused(plan(tmp_path, folder, **changes), Conv())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_then_one(tmp_path, parquet):
    """Two processes that a signal stops, gone on with by one: each of the others as often, none held out."""
    changes = {"batch_size": 9, "max_steps": 12, "learning_rate": 1e-4, "num_train_timesteps": 4}
    (tmp_path / "config.json").write_text(plan(tmp_path / "run", parquet, **changes).to_json())
    words = [NOTING, tmp_path / "config.json", tmp_path]
    assert set(finish(start([*words, "1", "SIGTERM", "5"], tmp_path, 2))) == {75}
    assert set(finish(start(words, tmp_path, 1))) == {0}, (tmp_path / "output").read_text()
    digests = {image_digest(torch.from_numpy(picture(row))[None]): row for row in range(N)}
    seen = {}
    for path in tmp_path.glob("rank*.jsonl"):
        for line in path.read_text().splitlines():
            seen.update({position: digests[own] for position, own, _, here in json.loads(line) if here})
    counts = np.bincount([seen[position] for position in range(12 * 18)], minlength=N)
    assert np.flatnonzero(counts == 0).tolist() == sorted(held_rows(parquet)) and set(counts) == {0, 4}


def test_the_flags_to_add_are_those_of_the_held_out_images_too(tmp_path, folder):
    rows = shutil.copytree(folder, tmp_path / "rows")
    Image.new("RGB", (8, 8)).save(rows / f"{held_rows(folder)[0]:03d}.png")
    said = refused(plan(tmp_path / "run", rows), Conv())
    assert said == "60 images of 8x8, modes L 59, RGB 1: add --channels 3"
    assert not (tmp_path / "run").exists()

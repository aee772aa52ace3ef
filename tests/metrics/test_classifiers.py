"""The shipped classifiers, and train_scripts/train_classifier.py, which made them."""

import importlib
import re
import sys

import numpy as np
import pytest
import torch
from datasets import load_dataset
from torch import nn

from hf_ddpm.metrics import Features, load_extractor, sample_metrics
from tests.launching import ROOT
from tests.metrics.images import images

CLASSIFIERS = ROOT / "train_scripts" / "classifiers"
FASHION = ROOT / "data" / "fashion-mnist"


def stated(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    return float(re.search(r"Test accuracy \*\*([0-9.]+)\*\*", text)[1]), text


def measured(folder, data, count=None):
    rows = load_dataset("parquet", data_files=str(data), split="train", streaming=True)
    rows = list(rows if count is None else rows.take(count))
    pixels = torch.from_numpy(np.stack([np.asarray(row["image"]) for row in rows]))[:, None]
    extractor = load_extractor(folder)
    found = Features.cat(map(extractor, pixels.split(250)))
    accuracy = np.mean(found.logits.argmax(1).numpy() == [row["label"] for row in rows])
    return accuracy, found


class TestShippedClassifiers:
    @pytest.mark.parametrize(
        ("name", "limit", "least"), [("digits", 300_000, 0.95), ("fashion-mnist", 1_000_000, 0.90)]
    )
    def test_size_and_statement(self, name, limit, least):
        folder = CLASSIFIERS / name
        accuracy, text = stated(folder)
        assert (folder / "model.safetensors").stat().st_size <= limit and accuracy >= least
        assert f"`{load_extractor(folder).name}`" in text

    def test_digits_accuracy_is_the_stated_one(self):
        folder = CLASSIFIERS / "digits"
        data = ROOT / "hf_ddpm" / "data" / "digits" / "test-00000-of-00001.parquet"
        accuracy, found = measured(folder, data)
        assert accuracy == pytest.approx(stated(folder)[0], abs=1.5 / 300)
        halves = sample_metrics(found[::2], found[1::2])
        noise = load_extractor(folder)(images(150))
        assert sample_metrics(noise, found).frechet_distance > 5 * halves.frechet_distance

    @pytest.mark.skipif(
        not FASHION.is_dir(), reason="needs data/fashion-mnist, see train_scripts/convert_idx.py"
    )
    def test_fashion_accuracy_is_the_stated_one(self):
        """On the first 1000 of 10,000 test images: within five standard errors."""
        folder = CLASSIFIERS / "fashion-mnist"
        accuracy, _ = measured(folder, FASHION / "test-00000-of-00001.parquet", 1000)
        wanted = stated(folder)[0]
        assert abs(accuracy - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / 1000)


class TestTrainClassifier:
    @pytest.fixture
    def main(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "train_scripts"))
        return importlib.import_module("train_classifier").main

    def test_a_short_run(self, main, tmp_path, capsys):
        words = ["--dataset", "digits", "--side", "8", "--widths", "2,4", "--epochs", "1", "--flip"]
        assert main([*words, "--out", str(tmp_path / "c")]) == 0
        accuracy, text = stated(tmp_path / "c")
        assert f"test accuracy {accuracy:.4f}" in capsys.readouterr().out
        assert load_extractor(tmp_path / "c").name in text

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--dataset", "missing"], "no folder 'missing'"),
            (["--dataset", "digits", "--epochs", "0"], "--epochs is 0; allowed: whole numbers >= 1"),
            (["--dataset", "digits", "--learning-rate", "nan"], "--learning-rate is nan; allowed: between"),
        ],
    )
    def test_bad_input_is_one_line(self, main, tmp_path, capsys, words, message):
        assert main([*words, "--out", str(tmp_path / "c")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
        assert not (tmp_path / "c").exists()

    def test_augmentation_moves_and_mirrors(self, main):
        augment = sys.modules["train_classifier"].augment
        x, generator = images(200, 2), torch.Generator().manual_seed(0)
        assert torch.equal(augment(x, False, 0, generator), x)
        moved = augment(x, True, 1, generator)
        assert moved.shape == x.shape and moved.dtype == torch.uint8
        padded = nn.functional.pad(x, (1, 1, 1, 1))
        mirrored = nn.functional.pad(x.flip(-1), (1, 1, 1, 1))
        seen = set()
        for i in range(200):
            fits = {
                (flip, top, left)
                for flip, source in enumerate((padded, mirrored))
                for top in range(3)
                for left in range(3)
                if torch.equal(moved[i], source[i, :, top : top + 8, left : left + 8])
            }
            assert len(fits) == 1
            seen |= fits
        assert len(seen) == 18

"""metrics.py: distances against their definitions in numpy, labels, extractors, saved references."""

import importlib
import json
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from datasets import load_dataset
from scipy import linalg
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from hf_ddpm import metrics
from hf_ddpm.metrics import (
    Features,
    SampleMetrics,
    load_extractor,
    load_reference,
    sample_metrics,
    save_reference,
)
from tests.launching import ROOT

CLASSIFIERS = ROOT / "train_scripts" / "classifiers"
FASHION = ROOT / "data" / "fashion-mnist"
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def normal(count, dim=5, seed=0, shift=0.0, scale=1.0):
    x = np.random.default_rng(seed).normal(shift, scale, (count, dim))
    return torch.from_numpy(x).float()


def features(x, logits=None, extractor="net@0"):
    return Features(extractor, x, logits)


def images(count, channels=1, side=8, seed=0):
    shape = (count, channels, side, side)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def frechet(x, y):
    """|μ − μ_r|² + Tr(Σ + Σ_r − 2 (Σ Σ_r)^½), by scipy's matrix root."""
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(a @ b).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * root)


def mmd(x, y):
    """The unbiased estimate under (xᵀy / D + 1)³, pair by pair."""
    x, y = x.double().numpy(), y.double().numpy()

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    def inside(z):
        return np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    return inside(x) + inside(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


class TestDistances:
    def test_frechet_distance_of_two_gaussians(self):
        """For N(μ, s² I): |Δμ|² + D (s − s_r)², here with exactly these sample moments."""
        z = normal(64, 4)
        z = z.double() - z.double().mean(0)
        z = (z @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T).double()  # covariance I
        x, y = (3 * z + 2).float(), (0.5 * z).float()
        found = sample_metrics(features(x), features(y)).frechet_distance
        assert found == pytest.approx(4 * 2**2 + 4 * (3 - 0.5) ** 2, rel=1e-5)

    @pytest.mark.parametrize("counts", [(40, 60), (200, 30)])
    @pytest.mark.parametrize("offset", [0.0, 1000.0])
    def test_frechet_distance_against_scipy(self, counts, offset):
        mix = normal(5, 5, seed=9)
        x, y = normal(counts[0]) @ mix + offset, normal(counts[1], seed=1, shift=0.3) + offset
        found = sample_metrics(features(x), features(y)).frechet_distance
        assert found == pytest.approx(frechet(x, y), rel=1e-6)

    def test_kid_is_the_mean_of_subsets_of_half_the_smaller_set(self):
        """torch draws the subsets; their mean and spread are those of a numpy MMD² on the same draws."""
        x, y = normal(11, 3), normal(9, 3, seed=1, shift=0.5)
        found = sample_metrics(features(x), features(y), seed=4)
        generator = torch.Generator().manual_seed(4)
        subsets = []
        for _ in range(100):
            of_y = torch.randperm(9, generator=generator)[:4]
            of_x = torch.randperm(11, generator=generator)[:4]
            subsets.append(mmd(x[of_x], y[of_y]))
        assert found.kid_mean == pytest.approx(np.mean(subsets), rel=1e-9)
        assert found.kid_std == pytest.approx(np.std(subsets), rel=1e-9)

    def test_kid_agrees_with_all_pairs(self):
        """The subsets' mean is unbiased for the MMD² of the whole sets: within five standard errors."""
        x, y = normal(60, 3), normal(60, 3, seed=1, shift=0.5)
        found = sample_metrics(features(x), features(y))
        assert abs(found.kid_mean - mmd(x, y)) < 5 * found.kid_std / 10

    def test_classifier_score_against_its_definition(self):
        logits = normal(50, 4, seed=3, scale=3.0)
        found = sample_metrics(features(normal(50), logits), features(normal(20)), seed=1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(100):  # KID draws before it
            torch.randperm(20, generator=generator), torch.randperm(50, generator=generator)
        p = np.exp(logits.double().numpy())[torch.randperm(50, generator=generator).numpy()]
        p /= p.sum(1, keepdims=True)
        parts = [part * np.log(part / part.mean(0)) for part in np.split(p, 10)]
        scores = [np.exp(part.sum(1).mean()) for part in parts]
        assert found.inception_score == pytest.approx((np.mean(scores), np.std(scores, ddof=1)), rel=1e-9)

    @pytest.mark.parametrize(("scale", "score"), [(0.0, 1.0), (1e4, 5.0)], ids=["undecided", "certain"])
    def test_extreme_scores(self, scale, score):
        """1 where the network sees no difference; the number of classes where it is certain."""
        logits = torch.eye(5).repeat(200, 1) * scale
        found = sample_metrics(features(normal(1000), logits), features(normal(20)))
        assert found.inception_score is not None
        assert found.inception_score[0] == pytest.approx(score, rel=0.05)  # 5 e^(-4/200) in parts of 100

    def test_equal_sets_are_at_distance_zero(self):
        x = normal(60)
        found = sample_metrics(features(x), features(x.flip(0)))
        assert abs(found.frechet_distance) < 1e-9
        assert abs(found.kid_mean - mmd(x, x)) < 5 * found.kid_std / 10  # shared rows lower it by O(1/N)
        assert found.inception_score is None
        assert (found.num_samples, found.num_reference) == (60, 60)

    def test_more_features_than_images(self):
        x, y = normal(20, 64), normal(20, 64, seed=1)
        found = sample_metrics(features(x), features(y)).frechet_distance
        assert found == pytest.approx(frechet(x, y), rel=1e-4)

    def test_the_seed_decides_and_the_global_state_stays(self):
        x, y = features(normal(40), normal(40, 3)), features(normal(40, seed=1))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [sample_metrics(x, y, seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(torch.get_rng_state(), before)
        assert found[0] == found[1] and found[0].kid_mean != found[2].kid_mean
        assert found[0].frechet_distance == found[2].frechet_distance

    @pytest.mark.parametrize(
        ("samples", "reference", "words"),
        [
            (features(normal(1)), features(normal(9)), "samples: 1 images; allowed: at least 2"),
            (features(normal(9)), features(normal(0)), "reference: 0 images; allowed: at least 2"),
            (features(normal(9)), features(normal(9), None, "b@1"), "by net@0, the reference is by b@1"),
            (features(normal(9)), features(normal(9, 4)), "5 wide, the reference's 4"),
            (features(normal(9) / 0), features(normal(9)), "samples: the features of net@0 are not finite"),
            (features(normal(9), normal(9) / 0), features(normal(9)), "samples: .* not finite"),
        ],
        ids=["one", "none", "extractors", "widths", "infinite", "infinite logits"],
    )
    def test_refusals(self, samples, reference, words):
        with pytest.raises(ValueError, match=words):
            sample_metrics(samples, reference)


class TestFeatures:
    def test_parts_and_slices(self):
        x, logits = normal(7), normal(7, 3)
        whole = Features.cat(features(a, b) for a, b in zip(x.split(3), logits.split(3), strict=True))
        assert len(whole) == 7 and torch.equal(whole.features, x)
        assert torch.equal(whole[2:4].features, x[2:4]) and torch.equal(whole[2:4].logits, logits[2:4])
        assert features(x)[:2].logits is None

    @pytest.mark.parametrize("other", [features(normal(2), None, "b"), features(normal(2), normal(2))])
    def test_parts_of_several_kinds(self, other):
        with pytest.raises(ValueError, match="features of 2 kinds"):
            Features.cat([features(normal(2)), other])
        with pytest.raises(ValueError, match="features of 0 kinds"):
            Features.cat([])

    @pytest.mark.parametrize(
        "tensors", [(normal(2).double(),), (normal(2)[0],), (normal(2), normal(3)), (normal(2), normal(2)[0])]
    )
    def test_refusals(self, tensors):
        with pytest.raises(ValueError, match="allowed: float32"):
            Features("net", *tensors)


class TestLabels:
    def measured(self, extractor, score=(2.0, 0.1)):
        return SampleMetrics(extractor, 1.0, 0.5, 0.2, score, 10, 20).labelled()

    def test_only_inception_has_fid(self):
        names = ("FID", "KID", "KID std", "IS", "IS std")
        assert self.measured("inception-v3") == {
            f"{name} (inception-v3)": value for name, value in zip(names, (1, 0.5, 0.2, 2, 0.1), strict=True)
        }
        assert list(self.measured("dino@ab12cd34", None)) == [
            f"{name} (dino@ab12cd34)" for name in ("FD", "KD", "KD std")
        ]
        assert not any("FID" in name or "IS" in name for name in self.measured("inception-v3@ab12cd34"))


FACTS = {"data": "fashion-mnist", "fingerprint": "f00", "images": 6, "size": [28, 28]}


class TestReference:
    @pytest.mark.parametrize("logits", [None, normal(6, 3)], ids=["features", "logits"])
    def test_round_trip(self, tmp_path, logits):
        path = tmp_path / "new" / "reference.safetensors"
        for facts in ({}, {**FACTS, "size": (28, 28)}):  # the second replaces the first
            save_reference(path, features(normal(6), logits), facts)
        found = load_reference(path, "net@0", FACTS)
        assert found.extractor == "net@0" and torch.equal(found.features, normal(6))
        assert found.logits is None if logits is None else torch.equal(found.logits, logits)
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize(
        ("extractor", "facts", "words"),
        [
            ("net@1", FACTS, "extractor is 'net@0', wanted 'net@1'$"),
            (
                "net@0",
                {**FACTS, "images": 7, "fingerprint": "b"},
                "fingerprint is 'f00', .*; images is 6, wanted 7$",
            ),
            ("net@0", {**FACTS, "split": "test"}, "split is None, wanted 'test'$"),
            ("net@0", {"data": "fashion-mnist"}, "fingerprint is 'f00', wanted None"),
        ],
    )
    def test_another_one_is_refused(self, tmp_path, extractor, facts, words):
        save_reference(tmp_path / "r", features(normal(6)), FACTS)
        with pytest.raises(ValueError, match=words):
            load_reference(tmp_path / "r", extractor, facts)

    @pytest.mark.parametrize("data", [None, b"", b"not safetensors", b"\x02\0\0\0\0\0\0\0{}"])
    def test_missing_or_damaged(self, tmp_path, data):
        if data is not None:
            (tmp_path / "r").write_bytes(data)
        with pytest.raises(ValueError, match="r' is missing or damaged"):
            load_reference(tmp_path / "r", "net@0", {})

    def test_a_failed_write_leaves_the_old_one(self, tmp_path, monkeypatch):
        save_reference(tmp_path / "r", features(normal(6)), {})
        monkeypatch.setattr(metrics.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            save_reference(tmp_path / "r", features(normal(3)), {})
        assert [path.name for path in tmp_path.iterdir()] == ["r"]
        assert len(load_reference(tmp_path / "r", "net@0", {})) == 6


class Mean(nn.Module):
    """Mean level of each channel, times a weight; its dropout shows whether it is in eval mode."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.weight * x.double().mean((2, 3)))


class TestModule:
    def test_features_and_name(self):
        extractor = load_extractor(Mean().train())
        assert re.fullmatch(r"Mean@[0-9a-f]{8}", extractor.name)
        x = images(6, 3)
        found = extractor(x)
        assert found.extractor == extractor.name and found.logits is None
        assert found.features.dtype == torch.float32 and not found.features.requires_grad
        torch.testing.assert_close(found.features, x.float().mean((2, 3)))

    def test_the_name_follows_the_weights(self):
        assert load_extractor(Mean(1.0)).name == load_extractor(Mean(1.0)).name
        assert load_extractor(Mean(1.0)).name != load_extractor(Mean(2.0)).name

    @pytest.mark.parametrize("bad", [images(2).float(), images(2)[0], images(2)[:0]])
    def test_images_must_be_a_uint8_batch(self, bad):
        with pytest.raises(ValueError, match=r"allowed: uint8 \(B, C, H, W\)"):
            load_extractor(Mean())(bad)

    @pytest.mark.parametrize("answer", [lambda x: x, lambda x: "words", lambda x: x[0, 0], lambda x: x + "1"])
    def test_an_answer_that_is_no_features(self, answer):
        module = nn.Module()
        module.forward = answer
        with pytest.raises(ValueError, match=r"Module@\w+ (failed on|made)"):
            load_extractor(module)(images(3))


def save_model(folder, model, channels=3, **processor):
    model.save_pretrained(folder)
    settings = {
        "size": {"height": 8, "width": 8},
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }
    ViTImageProcessorPil(**settings | processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SMALL))
    return save_model(tmp_path_factory.mktemp("dinov2") / "dinov2-tiny", model), model.eval()


class TestTransformers:
    def test_dinov2(self, dinov2):
        """Its pooled output on images scaled to [-1, 1]; the name is the folder's and a hash."""
        folder, model = dinov2
        extractor, x = load_extractor(folder), images(3, 3)
        found = extractor(x)
        assert re.fullmatch(r"dinov2-tiny@[0-9a-f]{8}", extractor.name) and extractor.channels == 3
        with torch.no_grad():
            wanted = model(x / 127.5 - 1).pooler_output
        torch.testing.assert_close(found.features, wanted, rtol=1e-4, atol=1e-5)
        assert found.logits is None and found.extractor == extractor.name

    def test_grey_images_are_repeated_and_others_refused(self, dinov2):
        extractor, x = load_extractor(str(dinov2[0])), images(3)
        torch.testing.assert_close(extractor(x).features, extractor(x.repeat(1, 3, 1, 1)).features)
        with pytest.raises(ValueError, match=r"images have 4 channels, dinov2-tiny@.* wants 3"):
            extractor(images(3, 4))

    def test_images_are_resized(self, dinov2):
        extractor, x = load_extractor(dinov2[0]), images(3, 3)
        large = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
        torch.testing.assert_close(extractor(large).features, extractor(x).features, rtol=0.2, atol=0.2)

    def test_the_name_follows_weights_and_preparation(self, dinov2, tmp_path):
        folder, model = dinov2
        name = load_extractor(folder).name
        assert load_extractor(save_model(tmp_path / "a" / folder.name, model)).name == name
        other = save_model(tmp_path / "b" / folder.name, model, image_mean=[0.4] * 3)
        assert load_extractor(other).name != name

    def test_classifier_without_pooler(self, tmp_path):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**SMALL, num_labels=4, num_channels=1)).eval()
        found = load_extractor(save_model(tmp_path / "vit", model, 1))(x := images(3))
        with torch.no_grad():
            pixels = x / 127.5 - 1
            logits, hidden = model(pixels).logits, model.vit(pixels).last_hidden_state
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.features, hidden[:, 0], rtol=1e-4, atol=1e-5)

    def test_a_pooler_drawn_at_random_is_not_used(self, tmp_path):
        torch.manual_seed(0)
        model = ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).eval()
        folder = save_model(tmp_path / "vit", model)
        x, found = images(3, 3), [load_extractor(folder) for _ in range(2)]
        with torch.no_grad():
            wanted = model(x / 127.5 - 1).last_hidden_state[:, 0]
        assert found[0].name == found[1].name
        torch.testing.assert_close(found[0](x).features, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["convolutions", "clip"])
    def test_other_architectures(self, tmp_path, kind):
        torch.manual_seed(0)
        if kind == "clip":
            tower = {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
            vision = {**tower, "image_size": 8, "patch_size": 4}
            config = CLIPConfig(
                text_config={**tower, "vocab_size": 9}, vision_config=vision, projection_dim=4
            )
            model = CLIPModel(config)
        else:
            model = ConvNextModel(
                ConvNextConfig(patch_size=2, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)
            )
        found = load_extractor(save_model(tmp_path / "model", model))(images(3))
        assert found.features.shape == (3, 8) and found.features.std(0).min() > 0

    def test_half_precision_weights_are_used_in_float32(self, dinov2, tmp_path):
        folder = save_model(tmp_path / "half", Dinov2Model.from_pretrained(dinov2[0]).half())
        found = load_extractor(folder)(images(3)).features
        torch.testing.assert_close(found, load_extractor(dinov2[0])(images(3)).features, rtol=0.02, atol=0.02)

    def test_incomplete_weights(self, dinov2, tmp_path):
        folder = save_model(tmp_path / "m", dinov2[1])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
        with pytest.raises(ValueError, match=r"the weights of '.*' lack .*layer\.1.* more"):
            load_extractor(folder)

    def test_pickled_weights_are_refused(self, dinov2, tmp_path):
        folder = save_model(tmp_path / "m", dinov2[1])
        torch.save(dinov2[1].state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"can't load the safetensors weights of '.*m'") as caught:
            load_extractor(folder)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("file", "what"),
        [
            ("config.json", "config"),
            ("preprocessor_config.json", "image processor"),
            ("model.safetensors", "safetensors weights"),
        ],
    )
    @pytest.mark.parametrize("damaged", [False, True])
    def test_missing_or_damaged_files(self, dinov2, tmp_path, no_hub, file, what, damaged):
        folder = save_model(tmp_path / "m", dinov2[1])
        (folder / file).unlink()
        if damaged:
            (folder / file).write_text("{")
        with pytest.raises(ValueError, match=f"can't load the {what} of ") as caught:
            load_extractor(folder)
        assert "\n" not in str(caught.value)

    def test_code_in_the_folder_does_not_run(self, dinov2, tmp_path):
        folder = save_model(tmp_path / "m", dinov2[1])
        config = json.loads((folder / "config.json").read_text())
        auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(ValueError, match="can't load the config"):
            load_extractor(folder)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("source", ["./missing", "/no/such", "a/b/c", ""])
    def test_no_folder(self, source):
        with pytest.raises(ValueError, match=f"no folder '{source}'"):
            load_extractor(source)

    def test_hub_id_without_a_network(self, no_hub):
        with pytest.raises(ValueError, match="can't load the config of 'nobody/nothing-xyz'"):
            load_extractor("nobody/nothing-xyz")


class TestMissingPackages:
    def test_torchmetrics(self, monkeypatch):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
        with pytest.raises(ValueError, match=r"pip install 'hf_ddpm\[eval\]'"):
            sample_metrics(features(normal(9)), features(normal(9)))

    def test_torch_fidelity(self, monkeypatch):
        monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
        with pytest.raises(ValueError, match=r"needs torch-fidelity: pip install 'hf_ddpm\[eval\]'"):
            load_extractor("inception")

    def test_inception_gives_features_and_logits_of_colour(self, monkeypatch):
        class Network(nn.Module):  # what torch-fidelity's answers with; the real one is not to be had here
            def __init__(self, name, layers, antialias):
                super().__init__()
                assert (name, layers, antialias) == (
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    False,
                )

            def _torch_fidelity_forward(self, x):
                assert x.dtype == torch.uint8 and x.shape[1] == 3
                return x.float().mean((2, 3)), x.float().amax((2, 3))

        monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Network)
        extractor = load_extractor("inception")
        found = extractor(images(12))
        assert extractor.name == "inception-v3" and found.features.shape == found.logits.shape == (12, 3)
        assert "FID (inception-v3)" in sample_metrics(found, found).labelled()


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

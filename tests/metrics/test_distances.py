"""distances.py: distances against their definitions in numpy, labels, saved references."""

import os
import warnings

import numpy as np
import pytest
import torch
from scipy import linalg

from hf_ddpm.metrics import SampleMetrics, load_reference, sample_metrics, save_reference
from tests.metrics.images import features, normal


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

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "r")
        with pytest.raises(ValueError, match=r"r' is missing or damaged: r is a pipe; allowed: a regular"):
            load_reference(tmp_path / "r", "net@0", {})

    def test_a_flipped_bit_is_noticed(self, tmp_path):
        save_reference(tmp_path / "r", features(normal(6)), FACTS)
        data = bytearray((tmp_path / "r").read_bytes())
        data[-1] ^= 0x40  # the exponent of the last feature
        (tmp_path / "r").write_bytes(data)
        with pytest.raises(
            ValueError, match=r"r' is missing or damaged: .*its content is not what its sum says"
        ):
            load_reference(tmp_path / "r", "net@0", FACTS)

    def test_a_failed_write_leaves_the_old_one(self, tmp_path, monkeypatch):
        save_reference(tmp_path / "r", features(normal(6)), {})
        monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            save_reference(tmp_path / "r", features(normal(3)), {})
        assert [path.name for path in tmp_path.iterdir()] == ["r"]
        assert len(load_reference(tmp_path / "r", "net@0", {})) == 6

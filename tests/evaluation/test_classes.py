"""Classes in an evaluation: the Bayes classifier against closed forms, each image's class, refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hf_ddpm.cli import main
from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import load_stream
from hf_ddpm.evaluation.classes import classes_section, classify, given_classes, rounds
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.scored_model import ScoredModel, load_scored_model
from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.folders.labels import write_labels
from hf_ddpm.folders.layout import ERRORS
from hf_ddpm.folders.numbers import check_report, describe
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.likelihood import default_proposal, estimate_bound
from hf_ddpm.models import create_model
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.scheduler import DDPMScheduler
from tests.evaluation.commands import FEW, TENSORS, assert_same, digits_at, refused, run, run_killed

NAMES = tuple(map(str, range(10)))
OWN = ("--label-column", "label")


class OfClasses(nn.Module):
    """A denoiser for each class, and a last one for no class, as a class-conditional network."""

    def __init__(self, *denoisers):
        super().__init__()
        self.denoisers, self.num_classes = denoisers, len(denoisers) - 1

    def forward(self, x_t, t, class_labels):
        answer = torch.empty_like(x_t)
        for y in class_labels.unique().tolist():
            mine = class_labels == y
            answer[mine] = self.denoisers[y](x_t[mine], t[mine])
        return answer


def scored(process, *denoisers, counts=None):
    pipeline = SimpleNamespace(unet=OfClasses(*denoisers), device=torch.device("cpu"), id2label=None)
    return ScoredModel(
        pipeline, process, "sample", "fixed_large", "exact", False, None, None, {"class_counts": counts}
    )


def digits(split):
    return load_stream("digits", split, label_column="label", label_names=NAMES)


def asked(out, model, count, **changes):
    config = EvaluationConfig(model="exact", dataset="digits", classify=True, **changes)
    stream = digits("test")
    what = (list(range(count)), "images", default_proposal(model.process), out)
    return classify(config, model, stream, *what), stream


@pytest.fixture(scope="module")
def exact():
    """The exact denoiser of each class of the embedded digits, and of all of them."""
    process = DiffusionProcess.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    stream = digits("train")
    images, labels = to_float(torch.stack(list(stream.images()))), torch.from_numpy(stream.labels)
    some = [images[labels == y] for y in range(10)]
    return scored(process, *(ExactDenoiser(process, one) for one in (*some, images)))


def test_exact_denoisers_of_digits_classify_them_and_halving_gives_the_same_answer(exact, tmp_path):
    full, stream = asked(tmp_path / "full", exact, 60, num_evals_per_image=20)
    few, _ = asked(tmp_path / "few", exact, 60, num_evals_per_image=20, halving=True)
    own = torch.from_numpy(stream.labels[:60])
    answers = [one.log_probabilities.argmax(1) for one in (full, few)]
    assert (answers[0] == own).double().mean() >= 0.93  # about 98 %
    assert torch.equal(*answers)
    assert full.evaluations == 60 * 10 * 20 and few.evaluations < 0.7 * full.evaluations
    torch.testing.assert_close(full.log_probabilities.exp().sum(1), torch.ones(60).double())


def test_rounds_of_halving():
    assert list(rounds(10, 20, False)) == [(10, 20)]
    assert list(rounds(10, 40, True)) == [(10, 5), (5, 10), (3, 20), (2, 40)]
    assert list(rounds(2, 20, True)) == list(rounds(2, 20, False)) == [(2, 20)]
    assert [each for _, each in rounds(1000, 4, True)][:3] == [2, 2, 2]


def gaussian(process, mean, deviation):
    """E[x_0 | x_t] of pixels of one Gaussian: the posterior's mean of a normal prior and normal noise."""

    def denoiser(x_t, t):
        a = process.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        gain = a.sqrt() * deviation**2 / (a * deviation**2 + 1 - a)
        return (mean + gain * (x_t.double() - a.sqrt() * mean)).to(x_t.dtype)

    return denoiser


def test_classes_of_gaussian_images_give_a_logistic_function(tmp_path):
    process = DiffusionProcess.from_betas(torch.linspace(1e-3, 0.05, 400, dtype=torch.float64))
    means, deviation = (-0.3, -0.2), 0.8
    two = [gaussian(process, mean, deviation) for mean in means]
    model = scored(process, *two, two[0], counts=[300, 100])
    found, stream = asked(tmp_path, model, 40, exact=True, clip_x0=False)
    x = to_float(torch.stack(list(stream.select(range(40))))).double().flatten(1)
    # log p(x | 1) − log p(x | 0) of normal pixels is linear in their sum
    expected = ((x - means[0]).square() - (x - means[1]).square()).sum(1) / (2 * deviation**2)
    log_p = found.log_probabilities
    error = log_p[:, 1] - log_p[:, 0] - (expected + torch.tensor(100 / 300).log())
    stderr = error.std() / len(error) ** 0.5
    assert error.mean().abs() < 5 * stderr + 0.02 and error.std() < 0.3 * expected.std()
    slope = (expected * (error - error.mean())).sum() / (expected - expected.mean()).square().sum()
    assert slope.abs() < 0.1


def test_numbers_of_classes_average_to_the_whole(exact, tmp_path):
    stream = digits("test")
    config = EvaluationConfig(model="x", dataset="digits", label_column="label")
    given = given_classes(config, exact, stream, range(50))
    bpd = torch.rand(50, dtype=torch.float64)
    found = classes_section(given, bpd, None, "label", 64)["per_class"].values()
    assert sum(one["num_images"] for one in found) == 50
    total = sum(one["num_images"] * one["bpd"]["value"] for one in found) / 50
    assert total == pytest.approx(bpd.mean().item(), rel=1e-12)


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a model of ten classes that differ, of untrained weights."""
    torch.manual_seed(0)
    network = create_model("tiny", num_classes=10).eval()
    nn.init.normal_(network.class_embedding.weight, std=4)
    nn.init.normal_(network.conv_out.weight, std=0.1)
    folder = tmp_path_factory.mktemp("classes") / "model"
    pipeline = DDPMPipeline(network, DDPMScheduler(20, beta_end=0.5, variance_type="fixed_large"))
    pipeline.save_pretrained(folder)
    write_labels(folder, dict(enumerate(NAMES)))
    return folder


def test_each_image_is_given_its_own_class_one_for_all_or_none(model, tmp_path):
    report, own = run(model, tmp_path / "own", *FEW, *OWN)
    assert report["classes"]["given"] == "its own"
    labels = digits("test").labels[own["image_indices"].numpy()]
    assert own["labels"].tolist() == labels.tolist()
    network = load_scored_model(str(model), torch.device("cpu"))
    options = {"num_evals_per_image": 4, "seed": 0, "clip_x0": True, "variance_type": "fixed_large"}
    for label in (int(labels[0]), 10):
        name = "none" if label == 10 else str(label)
        one_report, one = run(model, tmp_path / name, *FEW, "--class", name)
        assert one_report["classes"]["given"] == name
        expected = estimate_bound(
            network.process,
            network.given(label),
            digits_at(one["image_indices"]),
            image_indices=one["image_indices"].tolist(),
            proposal=one["proposal"],
            **options,
        )
        torch.testing.assert_close(one["bpd"], expected.per_image_bpd, rtol=0, atol=1e-5)
        mine = torch.from_numpy(labels) == label
        torch.testing.assert_close(one["bpd"][mine], own["bpd"][mine], rtol=0, atol=1e-5)
        assert (one["bpd"][~mine] - own["bpd"][~mine]).abs().min() > 1e-4


def test_a_killed_run_goes_on_and_tells_what_it_found(model, tmp_path):
    flags = (*FEW, *OWN, "--classify")
    whole, tensors = run(model, tmp_path / "whole", *flags)
    run_killed(model, tmp_path / "killed", *flags, part=5)
    report, again = run(model, tmp_path / "killed", *flags)
    assert_same(tensors, again)
    assert report["classes"] == whole["classes"]
    check_report(report)
    told = describe(report)
    for words in ("given the image's class", "bits/dim of the images of each class", "accuracy"):
        assert words in told
    for key, wrong in (("per_class", 3), ("classifier", [1]), ("per_class", {"a": 1})):
        with pytest.raises(ValueError, match=f"classes.{key}.* is "):
            check_report(report | {"classes": report["classes"] | {key: wrong}})


def test_a_table_of_errors_is_of_the_classes_that_were_given(model, tmp_path, capfd):
    found = {}
    for name, flags in (("own", OWN), ("none", ("--class", "none"))):
        words = ["plan", model, "digits", "--evals", 260, *flags, "--out", tmp_path / name]
        main([str(word) for word in words])
        with safe_open(tmp_path / name / ERRORS, "pt") as file:
            assert json.loads(file.metadata()["of"])["classes"] == {"own": "its own"}.get(name, name)
        found[name] = load_file(tmp_path / name / ERRORS)["squared"]
    assert "--class-label none" in capfd.readouterr().out
    assert not torch.equal(found["own"], found["none"])
    chain = (*FEW, "--steps", 5, "--chain", "chosen", "--variance", "by-value")
    run(model, tmp_path / "fair", *chain, *OWN, "--errors", tmp_path / "own")
    for name, flags in (("own", ("--class", "none")), ("none", OWN), ("own", ("--class", "3"))):
        line = refused(
            capfd,
            *(model, "digits", *chain, *flags, "--errors", tmp_path / name, "--out", tmp_path / "x"),
        )
        assert "the class of each image is " in line and " when the errors were measured" in line
    assert not (tmp_path / "x" / TENSORS).exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--halving"], "--halving is True, but has no use without --classify"),
        (["--halving", "--classify", "--exact"], "--halving is True, but exact evaluates every step"),
        ([], "has classes, and nothing says those of the images"),
        (["--classify", "--class", "3"], "has classes, and nothing says those of the images"),
        (["--class", "11"], "--class is 11; allowed: 0 to 9, none"),
        (["--class", "bag"], "--class is 'bag'"),
        (["--label-column", "lable"], "no column 'lable' of labels"),
        (["--guidance", "2"], "--guidance"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(flags, words, model, tmp_path, capfd):
    assert words in refused(capfd, model, "digits", *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_other_classes_are_refused(model, tmp_path, capfd):
    other = DDPMPipeline.from_pretrained(model)
    other.id2label = {y: f"digit {y}" for y in range(10)}
    other.save_pretrained(tmp_path / "model")
    line = refused(capfd, tmp_path / "model", "digits", *OWN, "--out", tmp_path / "out")
    assert "digit 0" in line
    line = refused(capfd, tmp_path / "model", "digits", "--class", "digit3", "--out", tmp_path / "out")
    assert "did you mean 'digit 3'" in line


@pytest.mark.parametrize("flags", [OWN, ("--class", "none"), ("--classify",)], ids=" ".join)
def test_a_model_without_classes_is_given_none(flags, tiny_folder, tmp_path, capfd):
    assert "has no classes" in refused(capfd, tiny_folder, "digits", *flags, "--out", tmp_path / "out")


def test_samples_are_drawn_without_a_class_which_is_said(model, tmp_path, caplog):
    nearest = ("--nearest-dataset", "digits", "--num-samples", 2, "--sampling-steps", 2)
    run(model, tmp_path / "out", *FEW, "--class", "none", *nearest)
    assert "drawn without a class" in caplog.text

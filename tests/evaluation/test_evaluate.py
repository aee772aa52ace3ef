"""`hf-ddpm evaluate`: the numbers, what is refused, killed runs, comparisons, samples, two processes."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features as Columns
from datasets import Image as ImageColumn
from PIL import Image
from safetensors.torch import load_file

import hf_ddpm.evaluation.bits_per_dim
import hf_ddpm.evaluation.evaluate
import hf_ddpm.metrics.extractors
from hf_ddpm.cli import main
from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import load_stream
from hf_ddpm.denoiser import Counted
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.evaluation.quality import QualityConfig, choose_real
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.likelihood import default_proposal, estimate_bound, evaluate_bound, image_noise, pilot_proposal
from hf_ddpm.metrics import load_extractor, sample_metrics
from hf_ddpm.models import create_model
from hf_ddpm.scheduler import DDPMScheduler
from tests.launching import ROOT, forked

CLASSIFIER = str(ROOT / "train_scripts" / "classifiers" / "digits")
TENSORS = "evaluation.safetensors"
PICTURES = ("bits-per-step.png", "rate-distortion.png", "reconstructions.png")
FEW = ("--num-images", 7, "--num-evals-per-image", 4, "--batch-size", 3)


@pytest.fixture
def real_pictures():
    """Asked for by a test that wants the plots, which take seconds."""


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """What is plotted, by the file's name, instead of plotting."""
    seen = {}
    if "real_pictures" not in request.fixturenames:
        if "pictures" not in request.node.function.__code__.co_varnames:
            monkeypatch.setattr(hf_ddpm.evaluation.evaluate, "plot_reconstruction_levels", lambda *_: None)
        for name in ("plot_bits_per_step", "plot_rate_distortion", "plot_reconstructions"):
            monkeypatch.setattr(
                hf_ddpm.evaluation.evaluate, name, lambda *what: seen.__setitem__(what[-1].name, what[:-1])
            )
    return seen


def run(model, out, *flags, dataset="digits"):
    """The report and the tensors that the command leaves in `out`."""
    main(["evaluate", *(str(word) for word in (model, dataset, "--out", out, *flags))])
    return json.loads((out / "evaluation.json").read_text()), load_file(out / TENSORS)


def refused(capfd, *words, code=2):
    """The one line on stderr of a command that has to fail."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *(str(word) for word in words)])
    out, err = capfd.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("hf-ddpm")]
    assert stop.value.code == code and out == "" and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def files(folder):
    return sorted(path.name for path in folder.rglob("*"))


def assert_same(a, b):
    """Equal to the last bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@functools.lru_cache(1)
def all_test_digits():
    return torch.stack(list(load_stream("digits", "test").images()))


def digits_at(rows):
    return to_float(all_test_digits()[torch.as_tensor(rows)])


def save_plain(folder, scheduler, out_channels=1, seed=0):
    """A pipeline folder of plain diffusers."""
    torch.manual_seed(seed)
    config = dict(create_model("tiny").config) | {"out_channels": out_channels}
    unet = diffusers.UNet2DModel.from_config(config).eval()
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def write_images(folder, images, split="test"):
    """A parquet data set of one column of PNG files."""
    folder.mkdir(parents=True)
    rows = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
        rows.append({"bytes": (folder / f"{i}.png").read_bytes(), "path": None})
        (folder / f"{i}.png").unlink()
    schema = Columns({"image": ImageColumn()}).arrow_schema
    pq.write_table(
        pa.Table.from_pydict({"image": rows}, schema=schema), folder / f"{split}-00000-of-00001.parquet"
    )
    return folder


def grey(count, height=8, width=8, dtype=np.uint8, top=256):
    return np.random.default_rng(0).integers(0, top, (count, height, width)).astype(dtype)


@pytest.fixture
def evaluations(monkeypatch):
    """Images that the network is asked about while scoring, one entry per call."""
    seen, call = [], Counted.__call__

    def counted(self, x_t, t):
        seen.append(len(x_t))
        return call(self, x_t, t)

    monkeypatch.setattr(Counted, "__call__", counted)
    return seen


@pytest.fixture
def extracted(monkeypatch):
    """Batches that the feature network looks at."""
    seen, call = [], hf_ddpm.metrics.extractors.Extractor.__call__

    def watched(self, images_uint8):
        seen.append(images_uint8)
        return call(self, images_uint8)

    monkeypatch.setattr(hf_ddpm.metrics.extractors.Extractor, "__call__", watched)
    return seen


# The numbers


def test_what_an_evaluation_leaves(tiny_folder, tmp_path, capsys, real_pictures):
    report, tensors = run(tiny_folder, tmp_path / "deep" / "out", *FEW)
    out, err = capsys.readouterr()
    assert files(tmp_path / "deep" / "out") == sorted(["evaluation.json", TENSORS, *PICTURES])
    for name in PICTURES:
        with Image.open(tmp_path / "deep" / "out" / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300 and np.asarray(picture).std() > 1
    assert "evaluate: 100%" in err and "28/28" in err

    sections = "bits_per_dim other_variance method data model seconds processes device command date versions"
    assert list(report) == sections.split()
    numbers, other = report["bits_per_dim"], report["other_variance"]
    assert list(numbers) == ["variance_type", "bpd", "rate_bpd", "distortion_bpd", "prior_bpd"]
    assert (numbers["variance_type"], other["variance_type"]) == ("fixed_large", "fixed_small")
    assert report["method"] == {
        "name": "stratified estimate",
        "steps": 20,
        "first_variance": None,
        "evaluations_of_l_0": 1,
        "clip_x0": True,
        "decoder": "exact",
        "evaluations_per_image": 4,
        "evaluations": 28,
        "pilot_images": 0,
        "seed": 0,
    }
    fingerprint = report["data"].pop("fingerprint")
    assert len(fingerprint) == 16 and report["data"] == {
        "dataset": "digits",
        "split": "test",
        "num_images": 7,
        "num_rows": 300,
        "shape": [1, 8, 8],
        "fit": "exact",
        "trained_on": False,
    }
    assert report["model"]["name"] == str(tiny_folder) and report["model"]["prediction_type"] == "epsilon"
    assert report["command"].startswith(f"hf-ddpm evaluate {tiny_folder} digits --out ")
    assert report["versions"]["torch"] == torch.__version__ and "hf_ddpm" in report["versions"]

    values = [numbers["bpd"]["value"], numbers["bpd"]["stderr"]]
    parts = [numbers[key]["value"] for key in ("rate_bpd", "distortion_bpd")]
    lines = out.splitlines()
    assert len(lines) == 4 and lines[0] == (
        f"{values[0]:.4f} ± {values[1]:.4f} bits/dim (fixed_large): rate {parts[0]:.4f} + distortion "
        f"{parts[1]:.4f}"
    )
    assert lines[1].startswith(f"{other['bpd']['value']:.4f} ± ") and "(fixed_small)" in lines[1]
    assert lines[2] == ("7 of 300 images of digits, test; 4 network evaluations each (stratified estimate)")
    assert lines[3] == f"written: {tmp_path}/deep/out/evaluation.json"
    assert {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()} == {
        **{f"{name}bpd": (torch.float64, (7,)) for name in ("", "rate_", "distortion_", "prior_")},
        "image_indices": (torch.int64, (7,)),
        "digests": (torch.int64, (7,)),
        "proposal": (torch.float64, (20,)),
    }


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--seed 3 --clip-x0 false", {"clip_x0": False}),
        ("--decoder tanh --variance-type fixed_small", {"decoder": "tanh"}),
        ("--pilot-images 3", {}),
        ("--steps 5", {}),
        ("--steps 5 --first-variance full", {}),
        ("--exact", {}),
        ("--exact --clip-x0 false --decoder tanh --steps 5", {"clip_x0": False, "decoder": "tanh"}),
    ],
    ids=str,
)
def test_numbers_are_the_estimators(flags, options, tiny_folder, tmp_path):
    """Also `other_variance`, against a second evaluation that scores the other variance itself."""
    words, seed, exact = flags.split(), 3 if "--seed" in flags else 0, "--exact" in flags
    shared = ("--num-images", 7, "--batch-size", 3) if exact else FEW
    report, tensors = run(tiny_folder, tmp_path, *shared, *words)
    rows = tensors["image_indices"]
    scheduler = DDPMScheduler(20, beta_end=0.5)
    process = scheduler.process
    if "--steps" in flags:
        scheduler.set_timesteps(5)
        process = process.respaced(scheduler.timesteps, "full" if "full" in flags else "spaced")
    model = DDPMPipeline.from_pretrained(tiny_folder).unet.eval()
    images = digits_at(rows)

    def network(x_t, t):
        return model(x_t, t).sample

    found, first = {}, {}
    for name in ("bits_per_dim", "other_variance"):
        kind = {"prediction_type": "epsilon", **options, "variance_type": report[name]["variance_type"]}
        first = first or kind
        if exact:
            noise = image_noise(seed, rows.tolist(), images)
            bound = evaluate_bound(process, network, images, noise_fn=noise, **kind)
            found[name] = bound.total_bpd, bound.rate_bpd, bound.distortion_bpd, bound.prior_bpd
            continue
        proposal = default_proposal(process)
        if "--pilot" in flags:
            proposal = pilot_proposal(process, network, images[:3], seed=seed, **first)
        draws = {"seed": seed, "image_indices": rows, "proposal": proposal}
        e = estimate_bound(process, network, images, num_evals_per_image=4, **draws, **kind)
        found[name] = e.per_image_bpd, e.per_image_rate_bpd, e.per_image_distortion_bpd, e.prior_bpd
    names = ("bpd", "rate_bpd", "distortion_bpd", "prior_bpd")
    for name, expected in zip(names, found["bits_per_dim"], strict=True):
        torch.testing.assert_close(tensors[name], expected, rtol=1e-6, atol=1e-6)
    for section, expected in found.items():
        for name, values in zip(names, expected, strict=True):
            wanted = values.mean().item(), np.std(values.numpy(), ddof=1) / np.sqrt(7)
            written = report[section][name]
            np.testing.assert_allclose([written["value"], written["stderr"]], wanted, rtol=2e-6)
    wanted = "fixed_small" if "fixed_small" in flags else "fixed_large"
    assert report["bits_per_dim"]["variance_type"] == wanted != report["other_variance"]["variance_type"]
    method = report["method"]
    assert method["name"] == ("every step once" if exact else "stratified estimate")
    assert method["steps"] == len(process) and method["seed"] == seed
    pilot = 3 * sum(1 for _ in {*np.round(np.geomspace(1, 19, 20)).astype(int)}) if "--pilot" in flags else 0
    assert method["evaluations"] == 7 * method["evaluations_per_image"] + pilot
    assert method["evaluations_per_image"] == (len(process) if exact else 4)


def test_first_variance_matters_for_the_decoder_only(tiny_folder, tmp_path):
    found = {}
    for name in ("spaced", "full"):
        flags = ["--exact", "--steps", 5, "--first-variance", name]
        report, found[name] = run(tiny_folder, tmp_path / name, "--num-images", 3, *flags)
        assert report["method"]["first_variance"] == name
    assert_same(found["spaced"]["rate_bpd"], found["full"]["rate_bpd"])
    assert (found["spaced"]["distortion_bpd"] - found["full"]["distortion_bpd"]).abs().min() > 1e-4


def test_a_random_subset(tiny_folder, tmp_path):
    """Rows are those of the data set; an image's numbers don't depend on which others are scored."""
    flags = ["--num-evals-per-image", 2]
    report, whole = run(tiny_folder, tmp_path / "all", *flags, "--batch-size", 100)
    assert torch.equal(whole["image_indices"], torch.arange(300)) and report["data"]["num_images"] == 300
    chosen = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        part, found = run(tiny_folder, tmp_path / name, *flags, "--num-images", 20, "--seed", seed)
        chosen[name] = rows = found["image_indices"]
        assert (rows.diff() > 0).all() and rows.min() >= 0 and rows.max() < 300
        assert torch.equal(found["digests"], whole["digests"][rows])
        assert part["data"]["fingerprint"] != report["data"]["fingerprint"]
        if seed == 0:
            torch.testing.assert_close(found["bpd"], whole["bpd"][rows], rtol=0, atol=1e-6)
    assert torch.equal(chosen["a"], chosen["b"]) and not torch.equal(chosen["a"], chosen["c"])
    assert chosen["a"].max() > 150  # of a set that may be sorted, not the first ones


def test_the_fingerprint_is_of_pixels(tiny_folder, tmp_path):
    images = all_test_digits()[:4, 0].numpy().copy()
    one, _ = run(tiny_folder, tmp_path / "1", *FEW[2:], dataset=write_images(tmp_path / "a", images))
    two, _ = run(tiny_folder, tmp_path / "2", *FEW[2:], dataset=write_images(tmp_path / "b", images))
    images[2, 3, 4] ^= 1
    three, _ = run(tiny_folder, tmp_path / "3", *FEW[2:], dataset=write_images(tmp_path / "c", images))
    prints = [report["data"]["fingerprint"] for report in (one, two, three)]
    assert prints[0] == prints[1] != prints[2]


def test_pictures_show_the_first_images(tiny_folder, tmp_path, pictures):
    _, tensors = run(tiny_folder, tmp_path, *FEW)
    assert set(pictures) == set(PICTURES)
    rows, labels = pictures["reconstructions.png"]
    assert len(rows) == 12 and all(len(row) == len(labels) for row in rows)  # x_t above x̂_0
    assert labels[:2] == ["image", "t = 0"] and labels[-1] == "t = 19"
    shown = np.stack([np.asarray(row[0]) for row in rows[::2]])
    np.testing.assert_array_equal(shown, all_test_digits()[tensors["image_indices"][:6], 0].numpy())
    curve = pictures["bits-per-step.png"][0]
    assert abs(curve.rate_bpd + curve.distortion_bpd - tensors["bpd"].mean().item()) < 1e-9


def test_colour_and_not_square(tmp_path, pictures):
    torch.manual_seed(0)
    unet = create_model("tiny", image_size=(8, 12), channels=3).eval()
    scheduler = DDPMScheduler(20, beta_end=0.5, variance_type="fixed_large_log")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    data = write_images(tmp_path / "data", images)
    report, _ = run(tmp_path / "model", tmp_path / "out", "--num-evals-per-image", 4, dataset=data)
    assert report["data"]["shape"] == [3, 8, 12]
    assert report["bits_per_dim"]["variance_type"] == "fixed_large"
    assert pictures["reconstructions.png"][0][0][0].size == (12, 8)


def test_one_image_has_no_error(tiny_folder, tmp_path, capsys):
    report, _ = run(tiny_folder, tmp_path, "--num-images", 1, "--num-evals-per-image", 4)
    assert report["bits_per_dim"]["bpd"]["stderr"] is None
    assert capsys.readouterr().out.startswith(f"{report['bits_per_dim']['bpd']['value']:.4f} bits/dim (")


def test_from_python(tiny_folder, tmp_path):
    config = EvaluationConfig(str(tiny_folder), "digits", num_images=3, out=str(tmp_path), exact=True)
    report = evaluate(config)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert json.loads(json.dumps(report)) == written and written["command"] == ""


# Models that plain diffusers wrote


@pytest.mark.parametrize(
    ("scheduler", "prediction_type", "variance_type"),
    [
        (diffusers.DDPMScheduler(20, beta_end=0.5), "epsilon", "fixed_small"),
        (
            diffusers.DDPMScheduler(20, prediction_type="sample", variance_type="fixed_large"),
            "sample",
            "fixed_large",
        ),
        (
            diffusers.DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
            "v_prediction",
            "fixed_small",
        ),
        (diffusers.DDPMScheduler(20, variance_type="learned_range"), "epsilon", "learned_range"),
        (diffusers.DDIMScheduler(20, beta_schedule="scaled_linear"), "epsilon", "fixed_small"),
    ],
    ids=["epsilon", "sample", "v", "learned_range", "ddim"],
)
def test_plain_diffusers(scheduler, prediction_type, variance_type, tmp_path):
    learned = variance_type == "learned_range"
    model = save_plain(tmp_path / "model", scheduler, out_channels=2 if learned else 1)
    report, tensors = run(model, tmp_path / "out", *FEW)
    assert report["model"]["prediction_type"] == prediction_type
    assert report["bits_per_dim"]["variance_type"] == variance_type
    assert ("other_variance" in report) != learned
    unet = diffusers.UNet2DModel.from_pretrained(model / "unet").eval()
    config = {key: scheduler.config[key] for key in ("num_train_timesteps", "beta_start", "beta_end")}
    ours = DDPMScheduler(**config, beta_schedule=scheduler.config["beta_schedule"])
    expected = estimate_bound(
        ours.process,
        lambda x_t, t: unet(x_t, t).sample,
        digits_at(tensors["image_indices"]),
        num_evals_per_image=4,
        image_indices=tensors["image_indices"],
        variance_type=variance_type,
        prediction_type=prediction_type,
    )
    torch.testing.assert_close(tensors["bpd"], expected.per_image_bpd, rtol=1e-6, atol=1e-6)


def test_half_precision_weights_are_scored_in_float32(tmp_path):
    torch.manual_seed(0)
    diffusers.DDPMPipeline(create_model("tiny").half(), diffusers.DDPMScheduler(20)).save_pretrained(
        tmp_path / "model"
    )
    report, tensors = run(tmp_path / "model", tmp_path / "out", *FEW)
    assert tensors["bpd"].isfinite().all() and report["bits_per_dim"]["bpd"]["value"] > 0


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.ScoreSdeVeScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_another_kind_of_process_is_refused(scheduler, tmp_path, capfd):
    model = save_plain(tmp_path / "model", scheduler)
    refused(capfd, model, "digits", "--out", tmp_path / "out", *FEW)


# Killed, and again


def kill_at(monkeypatch, number):
    """End the command as Ctrl-C would, before its `number`-th part is saved."""
    save, left = Parts.save, [number]

    def killed(self, *what):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        save(self, *what)

    monkeypatch.setattr(Parts, "save", killed)


def run_killed(model, out, *flags, part=2):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        kill_at(patch, part)
        run(model, out, *flags)
    assert stop.value.code == 130
    assert not (out / "evaluation.json").exists() and any(out.glob(".parts-*/*.safetensors"))


@pytest.mark.parametrize("method", [FEW, (*FEW[:2], *FEW[4:], "--exact", "--steps", 5)], ids=["few", "all"])
def test_a_killed_evaluation_goes_on(method, tiny_folder, tmp_path, evaluations):
    expected, tensors = run(tiny_folder, tmp_path / "unbroken", *method)
    evaluations.clear()
    run_killed(tiny_folder, tmp_path / "out", *method, part=3)
    per_image = 5 if "--exact" in method else 4
    assert sum(evaluations) == 7 * per_image
    evaluations.clear()
    report, again = run(tiny_folder, tmp_path / "out", *method)
    assert sum(evaluations) == 1 * per_image  # of batches of 3, 3 and 1, the last
    assert_same(again, tensors)
    for key in ("bits_per_dim", "other_variance", "method", "data"):
        assert report[key] == expected[key]
    assert not list((tmp_path / "out").glob(".parts-*"))


def test_parts_of_other_work_are_not_taken(tiny_folder, tmp_path, evaluations):
    other = save_plain(tmp_path / "other", diffusers.DDPMScheduler(20, beta_end=0.5), seed=1)
    run_killed(tiny_folder, tmp_path / "killed", *FEW)
    for i, (model, flags) in enumerate(
        [
            (tiny_folder, ["--seed", 1]),
            (other, ["--variance-type", "fixed_large"]),
            (tiny_folder, ["--variance-type", "fixed_small"]),
            (tiny_folder, ["--num-evals-per-image", 5]),
            (tiny_folder, ["--split", "train"]),
        ]
    ):
        out = shutil.copytree(tmp_path / "killed", tmp_path / str(i))
        evaluations.clear()
        run(model, out, *FEW, *flags)
        assert sum(evaluations) == 7 * (5 if "--num-evals-per-image" in flags else 4), flags
        assert not list(out.glob(".parts-*"))  # nor are they left


@pytest.mark.parametrize("change", [{"beta_end": 0.4}, {"timestep_spacing": "trailing"}], ids=str)
def test_parts_of_another_process_are_not_taken(change, tiny_folder, tmp_path, evaluations):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    run_killed(model, tmp_path / "out", *FEW, "--steps", 5)
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    evaluations.clear()
    run(model, tmp_path / "out", *FEW, "--steps", 5)
    assert sum(evaluations) == 28


def test_parts_of_other_images_are_not_taken(tiny_folder, tmp_path, evaluations):
    data = write_images(tmp_path / "data", grey(7))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        kill_at(patch, 2)
        run(tiny_folder, tmp_path / "out", *FEW, dataset=data)
    shutil.rmtree(data)
    write_images(data, 255 - grey(7))
    evaluations.clear()
    run(tiny_folder, tmp_path / "out", *FEW, dataset=data)
    assert sum(evaluations) == 28


# What is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--split tset", "no split 'tset' in digits; it has train, test"),
        ("--num-images 301", "num_images is 301, but the split has 300; allowed: 1 to 300"),
        ("--num-images 0", "num_images is 0; allowed: >= 1"),
        ("--num-imges 3", "unknown argument '--num-imges'; did you mean --num-images?"),
        ("--num-samples 8", "num_samples is 8, but has no use without extractor or nearest_dataset"),
        ("--sampling-steps 8", "sampling_steps is 8, but has no use without extractor or nearest_dataset"),
        ("--num-reference 8", "num_reference is 8, but has no use without extractor"),
        ("--reference file", "reference is 'file', but has no use without extractor"),
        ("--nearest-split a", "nearest_split is 'a', but has no use without nearest_dataset"),
        ("--first-variance full", "first_variance is 'full', but has no use without steps"),
        ("--exact --num-evals-per-image 4", "num_evals_per_image is 4, but exact evaluates every step"),
        ("--exact --pilot-images 4", "pilot_images is 4, but exact evaluates every step"),
        ("--num-evals-per-image 1", "num_evals_per_image is 1; allowed: >= 2"),
        ("--steps 21", "steps is 21; allowed: <= 20 (T)"),
        ("--steps 1", "steps is 1; allowed: >= 2"),
        ("--fit random_crop", "allowed: exact, resize, resize_crop, center_crop"),
        ("--decoder tan", "decoder is 'tan' (did you mean 'tanh'?); allowed: exact, tanh"),
        ("--variance-type learned", "variance_type is 'learned'; allowed: fixed_large, fixed_small"),
        ("--image-column picture", "no column 'picture'; there are: image, label"),
        ("--compare-with nowhere", "'nowhere' holds no evaluation that can be read: "),
        ("--seed -1", "seed is -1; allowed: >= 0"),
        (
            f"--extractor {CLASSIFIER} --num-samples 8 --num-reference 299",
            "num_reference is 299, but the split has 300 images; allowed: 2 to 298",
        ),
        pytest.param(
            "--num-images 4 --extractor /nowhere/model",
            "no folder '/nowhere/model' (it looks like a path",
        ),
        pytest.param(
            f"--extractor {CLASSIFIER} --sampling-steps 21 --num-images 4 --num-reference 4",
            "sampling_steps is 21; allowed: whole numbers in 1..20",
        ),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_refused_flags(flags, words, tiny_folder, tmp_path, capfd, evaluations):
    out = tmp_path / "out"
    line = refused(capfd, tiny_folder, "digits", "--out", out, *flags.split())
    assert line.startswith("hf-ddpm evaluate: error: ") and words in line
    assert files(tmp_path) in ([], ["out"]) and not evaluations


def test_a_refused_command_leaves_no_folder(tiny_folder, tmp_path, capfd):
    refused(capfd, tiny_folder, "digits", "--split", "tset", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_are_refused(tiny_folder, tmp_path, capfd, no_hub):
    learned = save_plain(tmp_path / "learned", diffusers.DDPMScheduler(20, variance_type="learned_range"), 2)
    out = ["--out", tmp_path / "out"]
    line = refused(capfd, learned, "digits", *out, "--variance-type", "fixed_small")
    assert "variance_type is 'fixed_small', but the network learns its own (learned_range)" in line
    assert "model folder '/nowhere/model' does not exist" in refused(capfd, "/nowhere/model", "digits", *out)
    line = refused(capfd, "nobody/no-such-model", "digits")
    assert "'nobody/no-such-model' is no folder for the results; allowed: a folder as out" in line
    line = refused(capfd, "nobody/no-such-model", "digits", *out)
    assert "can't load a pipeline from 'nobody/no-such-model'" in line
    one_step = save_plain(tmp_path / "one", diffusers.DDPMScheduler(1))
    assert "allowed: at least 2" in refused(capfd, one_step, "digits", *out)
    file = tiny_folder / "scheduler" / "scheduler_config.json"
    odd = shutil.copytree(tiny_folder, tmp_path / "odd")
    config = json.loads(file.read_text()) | {"prediction_type": "flow_prediction"}
    (odd / "scheduler" / file.name).write_text(json.dumps(config))
    line = refused(capfd, odd, "digits", *out)
    assert "has prediction_type 'flow_prediction'; allowed: epsilon, sample, v_prediction" in line


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (
            grey(4, 6, 6),
            r"are (1, 6, 6) (C, H, W); allowed: the model's (1, 8, 8); a `fit` would resize them",
        ),
        (np.stack([grey(4)] * 3, 3), "are (3, 8, 8) (C, H, W); allowed: the model's (1, 8, 8)"),
        (grey(4, dtype=np.uint16, top=65536), "are not all 8-bit grey levels"),
    ],
    ids=["size", "channels", "16 bits"],
)
def test_images_that_are_refused(images, words, tiny_folder, tmp_path, capfd, evaluations):
    data = write_images(tmp_path / "data", images)
    assert words in refused(capfd, tiny_folder, data, "--out", tmp_path / "out")
    assert not evaluations and not (tmp_path / "out" / "evaluation.json").exists()


def test_values_off_the_grid_are_refused(tiny_folder, tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    values = (grey(4) / 255).tolist()
    pq.write_table(pa.Table.from_pydict({"image": values}), data / "test-00000-of-00001.parquet")
    assert "no image column; there are: image" in refused(capfd, tiny_folder, data, "--out", tmp_path / "out")
    line = refused(capfd, tiny_folder, data, "--out", tmp_path / "out", "--image-column", "image")
    assert "are not all 8-bit grey levels" in line


def test_one_bad_image_among_good_ones_is_named(tiny_folder, tmp_path, capfd):
    images = [*grey(3), *grey(1, dtype=np.uint16, top=65536), *grey(2, 6, 6)]
    data = write_images(tmp_path / "data", images)
    line = refused(capfd, tiny_folder, data, "--out", tmp_path / "out", "--num-evals-per-image", 2)
    assert "row 3 of " in line and "are not all 8-bit grey levels" in line


def test_resized_images_are_noted(tiny_folder, tmp_path):
    data = write_images(tmp_path / "data", grey(4, 6, 6))
    report, _ = run(tiny_folder, tmp_path / "out", "--fit", "resize", *FEW[2:], dataset=data)
    assert report["data"]["fit"] == "resize" and report["data"]["shape"] == [1, 8, 8]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = (
        "--model tiny --batch-size 4 --max-steps 1 --num-train-timesteps 20 --beta-end 0.5 --sample-every 0"
    )
    main(["train", *flags.split(), "--output-dir", str(folder)])
    return folder


def test_a_scheduler_that_contradicts_the_training_record(trained, tmp_path, capfd):
    file = Path("scheduler", "scheduler_config.json")
    for key, value, words in (
        ("beta_end", 0.4, "beta_end 0.4, trained 0.5"),
        ("prediction_type", "v_prediction", "prediction_type 'v_prediction', trained 'epsilon'"),
        ("num_train_timesteps", 21, "num_train_timesteps 21, trained 20"),
        ("beta_schedule", "scaled_linear", "beta_schedule 'scaled_linear', trained 'linear'"),
        ("trained_betas", [0.1] * 20, "other betas"),
    ):
        folder = shutil.copytree(trained, tmp_path / key)
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | {key: value}))
        line = refused(capfd, folder, "digits", *FEW)
        assert f"the scheduler of '{folder}' contradicts its train_config.json: {words}; allowed: " in line
        assert not (folder / "evaluation.json").exists()


def test_a_training_run_is_evaluated_in_its_folder(trained, tmp_path, caplog, capfd):
    folder = shutil.copytree(trained, tmp_path / "run")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"variance_type": "fixed_small"}))  # says nothing of the training
    main(["evaluate", str(folder), "digits", *map(str, FEW)])
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["data"]["trained_on"] is False and "trained on this split" not in caplog.text
    assert capfd.readouterr().out.endswith(f"written: {folder}/evaluation.json\n")
    report, _ = run(folder, tmp_path / "out", *FEW, "--split", "train")
    assert report["data"]["trained_on"] is True and "the model was trained on this split" in caplog.text


def test_an_evaluation_is_not_overwritten_by_chance(tiny_folder, tmp_path, capfd):
    run(tiny_folder, tmp_path, *FEW)
    old = (tmp_path / "evaluation.json").read_bytes()
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path, *FEW, "--seed", 1)
    assert f"out '{tmp_path}' holds an evaluation already; allowed: another folder, or overwrite" in line
    assert (tmp_path / "evaluation.json").read_bytes() == old
    report, _ = run(tiny_folder, tmp_path, *FEW, "--seed", 1, "--overwrite")
    assert report["method"]["seed"] == 1


def test_an_out_that_cannot_be_written(tiny_folder, tmp_path, capfd, evaluations):
    (tmp_path / "file").write_text("kept")
    for out, words in (("file", "File exists"), ("file/below", "Not a directory")):
        line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / out)
        assert line.endswith(f"out '{tmp_path / out}' can't be written: {words}")
    if os.geteuid():  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "closed")
        assert line.endswith(f"out '{tmp_path / 'closed'}' can't be written: Permission denied")
    assert (tmp_path / "file").read_text() == "kept" and not evaluations


def test_a_bound_that_is_not_finite_is_a_failure(tiny_folder, tmp_path, capfd, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    pipeline = DDPMPipeline.from_pretrained(folder)
    next(pipeline.unet.parameters()).data.fill_(float("nan"))
    pipeline.save_pretrained(folder)
    line = refused(capfd, folder, "digits", "--out", tmp_path / "out", *FEW, code=1)
    assert "the bound is not finite for 7 of 7 images" in line
    assert not (tmp_path / "out" / "evaluation.json").exists()


# Compared with another model


def test_paired_difference(tiny_folder, tmp_path, capsys):
    other = save_plain(tmp_path / "other", diffusers.DDPMScheduler(20, beta_end=0.5), seed=1)
    _, theirs = run(other, tmp_path / "theirs", *FEW, "--variance-type", "fixed_large")
    report, ours = run(tiny_folder, tmp_path / "ours", *FEW, "--compare-with", tmp_path / "theirs")
    found, difference = report["comparison"], (ours["bpd"] - theirs["bpd"]).numpy()
    assert found["with"]["name"] == str(other) and found["variance_types"] == ["fixed_large"] * 2
    np.testing.assert_allclose(found["difference_bpd"], difference.mean(), rtol=1e-12)
    np.testing.assert_allclose(found["stderr"], difference.std(ddof=1) / np.sqrt(7), rtol=1e-12)
    spread = (ours["bpd"].var() / 7 + theirs["bpd"].var() / 7).sqrt().item()
    np.testing.assert_allclose(found["stderr_without_pairing"], spread, rtol=1e-12)
    line = (
        f"{found['difference_bpd']:.4f} ± {found['stderr']:.4f} bits/dim difference to {other} "
        "(fixed_large - fixed_large)"
    )
    assert line in capsys.readouterr().out.splitlines()


def test_comparisons_that_are_refused(tiny_folder, tmp_path, capfd):
    two = ["--num-images", 2, "--num-evals-per-image", 4]
    run(tiny_folder, tmp_path / "a", *two)
    compare = ["--compare-with", tmp_path / "a"]
    for i, (flags, words) in enumerate(
        [
            (["--seed", 1], "seed 0, this one has 1; allowed: equal"),
            (["--num-images", 3], "other images; allowed: the same"),
            (["--num-evals-per-image", 5], "evaluations_per_image 4, this one has 5; allowed: equal"),
            (["--decoder", "tanh"], "decoder 'exact', this one has 'tanh'; allowed: equal"),
            (["--steps", 5], "steps 20, this one has 5; allowed: equal"),
            (["--pilot-images", 2], "pilot_images 0, this one has 2; allowed: equal"),
        ]
    ):
        out = tmp_path / str(i)
        line = refused(capfd, tiny_folder, "digits", "--out", out, *two, *flags, *compare)
        assert f"compare_with '{tmp_path / 'a'}' was made with {words}" in line
        assert not (out / "evaluation.json").exists()
    exact = ["--exact", "--num-images", 2]
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "x", *exact, *compare)
    assert "with name 'stratified estimate', this one has 'every step once'; allowed: equal" in line
    (tmp_path / "a" / TENSORS).write_bytes(b"cut")
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "y", *two, *compare)
    assert f"'{tmp_path / 'a'}' holds no evaluation that can be read: " in line


def test_comparing_exact_evaluations_of_two_seeds_is_refused(tiny_folder, tmp_path, capfd):
    data = write_images(tmp_path / "data", grey(3))
    run(tiny_folder, tmp_path / "a", "--exact", dataset=data)
    flags = ["--exact", "--seed", 1, "--compare-with", tmp_path / "a"]
    line = refused(capfd, tiny_folder, data, "--out", tmp_path / "b", *flags)
    assert "with seed 0, this one has 1; allowed: equal" in line


def test_comparing_one_image(tiny_folder, tmp_path):
    flags = ["--num-images", 1, "--num-evals-per-image", 4]
    run(tiny_folder, tmp_path / "a", *flags)
    report, _ = run(tiny_folder, tmp_path / "b", *flags, "--compare-with", tmp_path / "a")
    assert report["comparison"]["difference_bpd"] == 0
    assert report["comparison"]["stderr"] is None


# Samples

QUALITY = (*FEW, "--extractor", CLASSIFIER, "--num-samples", 12, "--num-reference", 10, "--batch-size", 5)


def test_sample_metrics(tiny_folder, tmp_path, extracted, capsys):
    steps = ["--sampling-steps", 10, "--seed", 3]
    report, _ = run(tiny_folder, tmp_path / "out", *QUALITY, *steps)
    found = report["sample_metrics"]
    looked = torch.cat(extracted[1:])  # the first is one real image, to see whether such images fit
    samples, reference, floor = looked[:12], looked[12:22], looked[22:]
    assert len(floor) == 12

    # The samples are those of `hf-ddpm sample`, the real images of the data set, none of them twice.
    draw = "--num-images 12 --steps 10 --seed 3 --batch-size 5".split()
    main(["sample", str(tiny_folder), "--out", str(tmp_path / "samples"), *draw])
    drawn = [np.asarray(Image.open(tmp_path / "samples" / f"{i:05d}.png")) for i in range(12)]
    np.testing.assert_array_equal(samples[:, 0].numpy(), np.stack(drawn))
    digits = [image.numpy().tobytes() for image in all_test_digits()]
    places = [digits.index(image.numpy().tobytes()) for image in looked[12:]]
    assert len(set(places)) == 22 and max(places) > 150

    extractor = load_extractor(CLASSIFIER)
    assert found["extractor"] == extractor.name and extractor.name.startswith("digits@")
    real = extractor(reference)
    for name, images in (("samples", samples), ("floor", floor)):
        expected = sample_metrics(extractor(images), real, 3).labelled()
        assert list(found[name]) == list(expected)
        np.testing.assert_allclose(list(found[name].values()), list(expected.values()), rtol=1e-5, atol=1e-6)
    assert list(found["samples"]) == [
        f"{name} ({extractor.name})" for name in ("FD", "KD", "KD std", "CS", "CS std")
    ]
    assert [found[key] for key in ("num_samples", "num_reference", "num_floor")] == [12, 10, 12]
    assert (found["sampling_steps"], found["scheduler"]) == (10, "DDPMScheduler")
    assert found["variance_type"] == "fixed_large"
    lines = capsys.readouterr().out.splitlines()
    assert sum(f"({extractor.name}): " in line and " of 12 samples, " in line for line in lines) == 3


def test_a_reference_is_written_and_reused(tiny_folder, tmp_path, extracted, capfd):
    reference = tmp_path / "kept" / "reference.safetensors"
    flags = [*QUALITY, "--sampling-steps", 2, "--reference", reference]
    first, _ = run(tiny_folder, tmp_path / "a", *flags)
    assert reference.is_file() and sum(map(len, extracted)) == 1 + 12 + 10 + 12
    written = reference.read_bytes()
    extracted.clear()
    again, _ = run(tiny_folder, tmp_path / "b", *flags)
    assert sum(map(len, extracted)) == 1 + 12 + 12 and reference.read_bytes() == written
    assert again["sample_metrics"] == first["sample_metrics"]
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "c", *flags, "--seed", 1)
    assert f"reference '{reference}' is another one: images is " in line
    assert not (tmp_path / "c" / "evaluation.json").exists() and reference.read_bytes() == written


def test_killed_while_sampling(tiny_folder, tmp_path, extracted, evaluations):
    """Of three parts of images and three of samples, the fifth is not saved."""
    flags = [*QUALITY, "--sampling-steps", 2, "--batch-size", 4, "--num-images", 12]
    expected, _ = run(tiny_folder, tmp_path / "unbroken", *flags)
    run_killed(tiny_folder, tmp_path / "out", *flags, part=5)
    extracted.clear(), evaluations.clear()
    report, _ = run(tiny_folder, tmp_path / "out", *flags)
    assert not evaluations and sum(map(len, extracted)) == 1 + 8 + 10 + 12
    assert report["sample_metrics"] == expected["sample_metrics"]
    assert not list((tmp_path / "out").glob(".parts-*"))


def test_real_images_are_disjoint(caplog):
    def config(num_samples, num_reference=None, seed=0):
        return QualityConfig("", num_samples, num_reference, None, seed, 1)

    reference, floor = choose_real(config(10), 40)
    assert len(reference) == len(floor) == 10 and not set(reference) & set(floor)
    assert (np.diff(reference) > 0).all() and (np.diff(floor) > 0).all() and not caplog.text
    assert not np.array_equal(reference, choose_real(config(10, seed=1), 40)[0])
    reference, floor = choose_real(config(30), 40)  # too few: half serves as the reference
    assert (len(reference), len(floor)) == (20, 20) and not set(reference) & set(floor)
    assert "the floor has 20 images, not 30" in caplog.text
    for total, wanted in ((3, 1), (2, 1)):
        with pytest.raises(ValueError, match=f"num_reference is {wanted}, but the split has {total} images"):
            choose_real(config(30), total)
    with pytest.raises(ValueError, match="allowed: 2 to 38, as the floor needs others"):
        choose_real(config(5, 39), 40)


def test_samples_are_found_again_by_another_process(tiny_folder, tmp_path, extracted, monkeypatch):
    """The order in which diffusers notes what an older config leaves at its default is a set's."""
    flags, load = [*QUALITY, "--sampling-steps", 2], DDPMPipeline.from_pretrained
    names = ["thresholding", "steps_offset"]

    def loaded(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        pipeline.scheduler.register_to_config(_use_default_values=list(names))
        return pipeline

    monkeypatch.setattr(DDPMPipeline, "from_pretrained", loaded)
    run_killed(tiny_folder, tmp_path, *flags, part=5)
    names.reverse()
    extracted.clear()
    run(tiny_folder, tmp_path, *flags)
    assert sum(map(len, extracted)) < 1 + 12 + 10 + 12


# Two processes

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ALONE = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Evaluates, is refused, evaluates every step, and trains: each on both processes.
PROBE = """
import os, sys
from pathlib import Path

here, model = Path(sys.argv[1]), sys.argv[2]
import hf_ddpm.evaluation.evaluate
from hf_ddpm.cli import main

for name in ("plot_bits_per_step", "plot_rate_distortion", "plot_reconstruction_levels"):
    # of the main process only
    setattr(hf_ddpm.evaluation.evaluate, name, lambda *what: open(what[-1], "x").close())
few = "--num-images 7 --num-evals-per-image 4 --batch-size 2".split()
ends = []
for name, flags in {
    "plain": few,
    "again": [*few, "--out", str(here / "plain")],
    "exact": [*few[:2], "--batch-size", "2", "--exact"],
}.items():
    try:
        main(["evaluate", model, "digits", "--out", str(here / name), *flags])
        ends.append("0")
    except SystemExit as stop:
        ends.append(str(stop.code))
train = "--model tiny --max-steps 2 --num-train-timesteps 20 --beta-end 0.5 --sample-every 0 --log-every 1"
held = "--batch-size 4 --evaluate-every 1 --evaluate-num-images 7 --evaluate-num-evals 4"
main(["train", *train.split(), *held.split(), "--output-dir", str(here / "run")])
(here / f"rank{os.environ['RANK']}").write_text(" ".join(ends))
"""


@pytest.mark.distributed
def test_two_processes(tiny_folder, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    done = forked([tmp_path / "probe.py", tmp_path, tiny_folder], tmp_path / "launch")
    assert (tmp_path / "rank1").exists(), done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["0 2 0"] * 2, done.stderr
    assert done.stderr.count("holds an evaluation already") == 2  # refused together, before any work
    assert done.stdout.count("7 of 300 images of digits, test; ") == 2  # each evaluation said once

    few = ["--num-images", 7, "--batch-size", 2]
    for name, flags in (("plain", ["--num-evals-per-image", 4]), ("exact", ["--exact"])):
        report = json.loads((tmp_path / name / "evaluation.json").read_text())
        expected, one = run(tiny_folder, tmp_path / "one" / name, *few, *flags)
        torch.testing.assert_close(load_file(tmp_path / name / TENSORS), one, rtol=0, atol=1e-6)
        assert report["processes"] == 2
        assert report["data"] == expected["data"] and report["method"] == expected["method"]
        assert files(tmp_path / name) == sorted(["evaluation.json", TENSORS, *PICTURES])

    # What the run noted of held-out images is what one process finds in the pipeline that it left
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    held = [line for line in lines if "heldout_bpd" in line]
    assert [line["step"] for line in held] == [1, 2]
    two = load_file(tmp_path / "run" / "heldout" / "step-00000002.safetensors")
    _, one = run(tmp_path / "run", tmp_path / "one" / "run", *few, "--num-evals-per-image", 4)
    assert torch.equal(two["rows"].long(), one["image_indices"])
    torch.testing.assert_close(two["bpd"], one["bpd"], rtol=0, atol=1e-6)
    assert abs(held[1]["heldout_bpd"] - one["bpd"].mean().item()) < 1e-6


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_sample_with_a_config_of_an_older_diffusers(tiny_folder, tmp_path):
    older = shutil.copytree(tiny_folder, tmp_path / "model")
    file = older / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    for key in ("thresholding", "steps_offset", "timestep_spacing", "rescale_betas_zero_snr"):
        del config[key]
    file.write_text(json.dumps(config))
    few = ["--num-images", 7, "--batch-size", 2, "--num-evals-per-image", 4, "--extractor", CLASSIFIER]
    few = [str(word) for word in [*few, "--num-samples", 5, "--num-reference", 6, "--sampling-steps", 2]]
    command = [
        *LAUNCH,
        ROOT / "train_scripts" / "evaluate.py",
        older,
        "digits",
        "--out",
        tmp_path / "two",
        *few,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ALONE)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())["sample_metrics"]
    one, _ = run(older, tmp_path / "one", *few)
    for name in ("samples", "floor"):
        values = [list(found[name].values()) for found in (two, one["sample_metrics"])]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-4)

"""`hf-ddpm evaluate`: the numbers, and of which models and images."""

import dataclasses
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate, measure, prepare, write
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.likelihood import default_proposal, estimate_bound, evaluate_bound, image_noise, pilot_proposal
from hf_ddpm.models import create_model
from hf_ddpm.scheduler import DDPMScheduler
from tests.evaluation.commands import (
    FEW,
    PICTURES,
    TENSORS,
    all_test_digits,
    assert_same,
    digits_at,
    files,
    refused,
    run,
    save_plain,
    write_images,
)

# The numbers


def test_what_an_evaluation_leaves(tiny_folder, tmp_path, capsys, real_pictures):
    report, tensors = run(tiny_folder, tmp_path / "deep" / "out", *FEW)
    out, err = capsys.readouterr()
    assert files(tmp_path / "deep" / "out") == sorted(["evaluation.json", TENSORS, *PICTURES])
    for name in PICTURES:
        with Image.open(tmp_path / "deep" / "out" / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300 and np.asarray(picture).std() > 1
    assert "evaluate: 28/28 evals, " in err and "\r" not in err

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
        "channels": None,
        "background": "white",
        "to_8_bit": False,
        "trained_on": False,
        **{"num_trained_on": 0, "num_skipped": 0, "changed": None},
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
    rows, labels, kinds = pictures["reconstructions.png"]
    assert kinds == ["x_t", "x̂_0"] * 6
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


def test_the_three_steps_of_an_evaluation(tiny_folder, tmp_path):
    """Preparing writes nothing, measuring only parts, and writing leaves what the whole command leaves."""
    config = EvaluationConfig(
        str(tiny_folder), "digits", num_images=3, num_evals_per_image=2, out=str(tmp_path / "out")
    )
    plan = prepare(config)
    assert not (tmp_path / "out").exists()
    results = measure(plan)
    assert [path.name[:7] for path in (tmp_path / "out").iterdir()] == [".parts-"]
    report = write(plan, results, "by hand")
    assert files(tmp_path / "out") == sorted(["evaluation.json", TENSORS, *PICTURES])
    whole = evaluate(dataclasses.replace(config, out=str(tmp_path / "whole")))
    for key in ("bits_per_dim", "other_variance", "method", "data", "model"):
        assert report[key] == whole[key]
    assert report["command"] == "by hand"


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

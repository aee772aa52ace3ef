"""`hf-ddpm sweep`: equal numbers everywhere, killed and gone on with, extended, on two processes, refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMPipeline
from hf_ddpm.cli import main
from hf_ddpm.evaluation.sweep import Diverged, sweep
from hf_ddpm.evaluation.sweep_config import SweepConfig
from hf_ddpm.folders.layout import SWEEP, SWEEP_PLOT
from hf_ddpm.folders.sweep import read_sweep
from hf_ddpm.metrics import frechet_distance, load_extractor, sample_metrics
from tests.evaluation import commands
from tests.evaluation.commands import CLASSIFIER, kill_at
from tests.launching import forked

FEW = ("--num-samples", 12, "--batch-size", 5, "--extractor", CLASSIFIER)
SMALL = (*FEW, "--steps", "2,4", "--schedulers", "ddim,heun")


def run(model, out, *flags):
    main(["sweep", *(str(word) for word in (model, "digits", "--out", out, *flags))])
    return json.loads((out / SWEEP).read_text())


def refused(capfd, *words, code=2):
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *(str(word) for word in words)])
    err = capfd.readouterr().err
    line = err.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]
    assert stop.value.code == code and line.startswith("hf-ddpm sweep: ") and "Traceback" not in err, err
    assert len(line) <= 320, line
    return line


def cells(report):
    return {(cell["sampler"], cell["steps"]): cell for cell in report["cells"]}


@pytest.fixture(scope="module")
def small(tiny_folder, tmp_path_factory):
    """A finished sweep of two samplers and two numbers of steps, to be read only."""
    out = tmp_path_factory.mktemp("small") / "out"
    run(tiny_folder, out, *SMALL)
    return out


def test_what_is_measured(tiny_folder, small, tmp_path, extracted, capsys):
    """Every cell is of as many samples, which are those of `hf-ddpm sample`; the floor of as many images."""
    report = json.loads((small / SWEEP).read_text())
    assert list(cells(report)) == [("ddim", 2), ("ddim", 4), ("heun", 2), ("heun", 4)]
    assert [cell["evaluations"] for cell in report["cells"]] == [2, 4, 3, 7]
    assert all(cell["seconds_per_image"] > 0 for cell in report["cells"])
    lengths = {len(found["left_out"]) for found in (report["floor"], *report["cells"])}
    assert lengths == {12} and report["of"]["num_samples"] == report["of"]["num_reference"] == 12

    draw = "--num-images 12 --steps 4 --scheduler ddim --batch-size 7".split()
    main(["sample", str(tiny_folder), "--out", str(tmp_path / "samples"), *draw])
    drawn = [np.asarray(Image.open(tmp_path / "samples" / f"{i:05d}.png")) for i in range(12)]
    evaluation, _ = commands.run(
        tiny_folder, tmp_path / "evaluation", *commands.FEW, *FEW, "--sampling-steps", 2
    )
    looked = torch.cat(extracted)[-24:]  # by evaluate: the reference and the floor
    extractor = load_extractor(CLASSIFIER)
    samples = extractor(torch.from_numpy(np.stack(drawn))[:, None])
    reference, floor = extractor(looked[:12]), extractor(looked[12:])
    for found, features in ((cells(report)["ddim", 4], samples), (report["floor"], floor)):
        expected = sample_metrics(features, reference).frechet_distance
        assert found["value"] == pytest.approx(expected, rel=1e-4)
        assert found["stderr"] == pytest.approx(frechet_distance(features, reference).stderr, rel=1e-4)
    label = report["label"]
    assert report["floor"]["value"] == pytest.approx(evaluation["sample_metrics"]["floor"][label], rel=1e-4)


def test_ancestral_samples_are_those_of_an_evaluation(tiny_folder, tmp_path):
    flags = ("--steps", 2, "--schedulers", "ddpm,ddpm:fixed_small,ddpm:fixed_large,ddpm:trailing")
    found = cells(run(tiny_folder, tmp_path / "sweep", *FEW, *flags))
    report, _ = commands.run(tiny_folder, tmp_path / "evaluation", *commands.FEW, *FEW, "--sampling-steps", 2)
    (value,) = [v for k, v in report["sample_metrics"]["samples"].items() if k.startswith("FD ")]
    assert found["ddpm", 2]["value"] == pytest.approx(value, rel=1e-4)
    assert found["ddpm:fixed_large", 2]["value"] == found["ddpm", 2]["value"]  # the model's own
    values = {round(found[name, 2]["value"], 3) for name in ("ddpm", "ddpm:fixed_small", "ddpm:trailing")}
    assert len(values) == 3


def test_the_same_again_draws_nothing_and_more_draws_the_rest(small, tiny_folder, tmp_path, extracted, capfd):
    out = shutil.copytree(small, tmp_path / "out")
    before = (out / SWEEP).read_bytes()
    extracted.clear()
    run(tiny_folder, out, *SMALL)
    assert (out / SWEEP).read_bytes() == before and sum(map(len, extracted)) == 1
    table = capfd.readouterr().out
    assert "FD (digits@" in table and "Take " in table and f"written: {out / SWEEP}, {SWEEP_PLOT}" in table
    assert len(re.findall(r"^(?:ddim|heun) +\d+ +\d+ ", table, re.MULTILINE)) == 4

    extracted.clear()
    report = run(tiny_folder, out, *FEW, "--steps", "4,1", "--schedulers", "unipc,ddim")
    assert sum(map(len, extracted)) == 1 + 12 + 3 * 12  # the first look, the reference, three new cells
    found = list(cells(report))
    assert found == [("ddim", n) for n in (1, 2, 4)] + [("heun", n) for n in (2, 4)] + [
        ("unipc", n) for n in (1, 4)
    ]
    old = json.loads(before)
    assert report["floor"] == old["floor"] and all(
        cells(report)[key] == cells(old)[key] for key in cells(old)
    )
    alone = run(tiny_folder, tmp_path / "alone", *FEW, "--steps", 1, "--schedulers", "ddim")
    assert cells(alone)["ddim", 1]["value"] == cells(report)["ddim", 1]["value"]


def test_killed_and_gone_on_with(tiny_folder, small, tmp_path, extracted):
    """Of three parts of each cell, the fifth is not saved; the second run finds the four before it."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        kill_at(patch, 5)
        run(tiny_folder, out, *SMALL)
    assert stop.value.code == 130 and not (out / SWEEP).exists() and not (out / SWEEP_PLOT).exists()
    extracted.clear()
    report = run(tiny_folder, out, *SMALL)
    assert sum(map(len, extracted)) == 1 + 12 + 12 + 7 + 24
    assert not list(out.glob(".parts-*"))
    expected = json.loads((small / SWEEP).read_text())
    for key in ("of", "data", "floor", "label", "fast", "best", "recommendation"):
        assert report[key] == expected[key]
    for key, cell in cells(expected).items():
        assert cells(report)[key]["left_out"] == cell["left_out"]


def test_what_was_stopped_with_other_numbers_is_begun_anew(tiny_folder, tmp_path, extracted, caplog):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        kill_at(patch, 3)
        run(tiny_folder, out, *SMALL)
    extracted.clear()
    run(tiny_folder, out, *SMALL, "--seed", 1, "--steps", 2)
    assert sum(map(len, extracted)) == 1 + 24 + 24
    assert f"what was begun in '{out}' is of something else: it is not gone on with" in caplog.text


def test_another_sweep_needs_overwrite(small, tiny_folder, tmp_path, capfd):
    out = shutil.copytree(small, tmp_path / "out")
    before = (out / SWEEP).read_bytes()
    base = (tiny_folder, "digits", "--out", out, *SMALL)
    for flags, differs in (
        (("--seed", 1), "images, seed"),
        (("--num-samples", 11), "--num-samples, --num-reference, images"),
        (("--num-reference", 11), "--num-reference, images"),
        (("--split", "train"), "images"),
    ):
        line = refused(capfd, *base, *flags)
        assert line.endswith(f"holds {SWEEP} with another {differs}; allowed: another folder as out, or "
                             "--overwrite"), line  # fmt: skip
    other = DDPMPipeline.from_pretrained(tiny_folder)
    other.unet.conv_out.bias.data += 1
    other.scheduler.variance_type = "fixed_small"
    other.save_pretrained(tmp_path / "other")
    line = refused(capfd, tmp_path / "other", "digits", "--out", out, *SMALL)
    assert "with another weights, rounded, scheduler; " in line
    assert (out / SWEEP).read_bytes() == before
    (out / SWEEP).write_text("{}")
    assert f"holds '{SWEEP}', which hf_ddpm did not write; allowed" in refused(capfd, *base)
    (out / SWEEP).write_bytes(before)
    report = run(tiny_folder, out, *SMALL, "--overwrite", "--seed", 1)
    assert report["of"]["seed"] == 1


def test_what_a_sampler_cannot_do_is_passed_over(tiny_folder, tmp_path, capfd, caplog):
    flags = ("--steps", "3,10,21", "--schedulers", "ddim:trailing,unipc")
    report = run(tiny_folder, tmp_path / "out", *FEW, *flags)
    assert list(cells(report)) == [("ddim:trailing", 10), ("unipc", 3), ("unipc", 10)]
    passed = {(one["sampler"], one["steps"]): one["reason"] for one in report["passed_over"]}
    assert passed.keys() == {("ddim:trailing", 3), ("ddim:trailing", 21), ("unipc", 21)}
    assert "goes down by 6 from each step" in passed["ddim:trailing", 3]
    assert "steps is 21; allowed: whole numbers in 1..20" in passed["unipc", 21]
    assert caplog.text.count("passed over: ") == 3 and "passed over: unipc, 21 steps: " in caplog.text
    assert read_sweep(tmp_path / "out").passed_over == report["passed_over"]

    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "none", *FEW, "--steps", 21)
    assert "--steps is '21', of which no sampler can do any; ddpm, 21 steps: " in line
    assert not (tmp_path / "none" / SWEEP).exists()


def test_samples_that_are_not_finite_are_passed_over(tiny_folder, tmp_path, monkeypatch, capfd, caplog):
    call = DDPMPipeline.__call__

    def diverging(self, *what, **more):
        if type(self.scheduler).__name__ == "HeunDiscreteScheduler" or everything:
            raise Diverged("the images are not finite: ...")
        return call(self, *what, **more)

    everything = False
    monkeypatch.setattr(DDPMPipeline, "__call__", diverging)
    report = run(tiny_folder, tmp_path / "out", *SMALL)
    assert list(cells(report)) == [("ddim", 2), ("ddim", 4)]
    assert [(one["sampler"], one["reason"]) for one in report["passed_over"]] == [
        ("heun", "the images are not finite")
    ] * 2
    assert "passed over: heun, 4 steps: the images are not finite" in caplog.text
    everything = True
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "none", *SMALL)
    assert "the images of every sampler are not finite" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--steps", "2,x"), "--steps is '2,x'; allowed: whole numbers >= 1 with commas between them"),
        (("--steps", "2,2"), "--steps is '2,2'; allowed: whole numbers >= 1 with commas between them, none"),
        (("--steps", "0"), "--steps is '0'; allowed"),
        (("--steps", ""), "--steps is ''; allowed"),
        (("--steps", "10, 1e2"), "--steps is '10, 1e2'; allowed"),
        (("--schedulers", "unpic"), "--schedulers is 'unpic': scheduler 'unpic' is unknown (did you mean"),
        (("--schedulers", "ddim,,unipc"), "--schedulers is 'ddim,,unipc': scheduler '' is unknown"),
        (("--schedulers", "ddim,ddim"), "--schedulers is 'ddim,ddim', with 'ddim' twice; allowed: once"),
        (("--schedulers", "ddim:trailling"), "'ddim' has no choice 'trailling' (did you mean 'trailing'?)"),
        (("--schedulers", "ddim:fixed_small"), "'ddim' has no choice 'fixed_small'; allowed: linspace, "),
        (("--schedulers", "ddim:"), "'ddim' has no choice ''"),
        (("--num-samples", 9), "--num-samples is 9; allowed: >= 10"),
        (("--num-samples", 151), "--num-samples is 151, but the split has 300 images: too few for 151 of the "
         "reference and 151 others; allowed: --num-samples <= 150, or a larger split"),
        (("--num-reference", 289), "289 of the reference and 12 others; allowed: --num-samples <= 11,"),
        (("--num-reference", 299), "allowed: a larger split"),
        (("--extractor", "/nothing"), "no folder '/nothing'"),
        (("--steps", ",".join(map(str, range(1, 150)))), "make 298 pairs; allowed: at most 200 in one sweep"),
        (("--split", "nothing"), "split"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(str(word)[:20] for word in value),
)  # fmt: skip
def test_refused(tiny_folder, tmp_path, capfd, flags, said):
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "out", *SMALL, *flags)
    assert said in line, line
    assert not (tmp_path / "out" / SWEEP).exists()


def test_refused_in_python_too(tiny_folder, tmp_path, capfd):
    assert "--extractor is not given; allowed: inception" in refused(capfd, tiny_folder, "digits")
    for wrong in ({"steps": [2, 2]}, {"steps": True}, {"steps": []}, {"schedulers": ["ddim", 3]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SweepConfig(model="x", extractor="y", **wrong)
    with pytest.raises(TypeError, match="did you mean 'schedulers'"):
        SweepConfig(model="x", extractor="y", scheduler="ddim")
    config = SweepConfig(model="x", extractor="y", steps=[20, 10], schedulers=["ddim", "ddpm:fixed_small"])
    assert config.step_numbers == [10, 20] and list(map(str, config.samplers)) == ["ddim", "ddpm:fixed_small"]
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "photo.jpg").touch()
    assert "holds other things, such as 'photo.jpg'" in refused(
        capfd, tiny_folder, "digits", "--out", strange, *SMALL
    )
    (strange / "photo.jpg").unlink()
    (strange / SWEEP_PLOT).touch()
    assert f"holds '{SWEEP_PLOT}', which hf_ddpm did not write" in refused(
        capfd, tiny_folder, "digits", "--out", strange, *SMALL
    )


def test_pictures_and_python(tiny_folder, tmp_path, real_pictures):
    config = SweepConfig(
        model=str(tiny_folder),
        dataset="digits",
        extractor=CLASSIFIER,
        num_samples=12,
        steps=[2, 4],
        schedulers=["ddim", "heun"],
        out=str(tmp_path),
    )
    found = sweep(config, "a command")
    assert read_sweep(tmp_path).text() == found.text() and found.record["command"] == "a command"
    with Image.open(tmp_path / SWEEP_PLOT) as picture:
        assert picture.format == "PNG" and picture.width > 600


PROBE = """
import os, sys
from pathlib import Path

here, model, classifier = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
import hf_ddpm.evaluation.sweep
from hf_ddpm.cli import main

hf_ddpm.evaluation.sweep.plot_sweep = lambda found, path: open(path, "x").close()  # of the main process only
few = ["--num-samples", "12", "--batch-size", "5", "--extractor", classifier, "--steps", "2,21"]
ends = []
for flags in (["--schedulers", "ddim,heun"], ["--schedulers", "ddim"], ["--seed", "1"]):
    try:
        main(["sweep", model, "digits", "--out", str(here / "two"), *few, *flags])
        ends.append("0")
    except SystemExit as stop:
        ends.append(str(stop.code))
(here / f"rank{os.environ['RANK']}").write_text(" ".join(ends))
"""


@pytest.mark.distributed
def test_two_processes(tiny_folder, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    done = forked([tmp_path / "probe.py", tmp_path, tiny_folder, CLASSIFIER], tmp_path / "launch")
    assert (tmp_path / "rank1").exists(), done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["0 0 2"] * 2, done.stderr
    assert done.stdout.count("Take ") == 2 and done.stderr.count("passed over: heun, 21 steps") == 1
    assert done.stderr.count("with another images, seed") == 2  # refused together, before any work
    two = json.loads((tmp_path / "two" / SWEEP).read_text())
    one = run(tiny_folder, tmp_path / "one", *FEW, "--steps", "2,21", "--schedulers", "ddim,heun")
    assert two["processes"] == 2 and two["of"] == one["of"] and not list(tmp_path.glob("two/.parts-*"))
    for key, cell in cells(one).items():
        np.testing.assert_allclose(cells(two)[key]["left_out"], cell["left_out"], rtol=1e-3)

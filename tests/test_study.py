"""train_scripts/study: a tiny study through the real code; what it says comes from the runs' own files."""

import dataclasses
import importlib
import json
import math
import re
import runpy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline, load_stream
from hf_ddpm.cli import run
from tests.launching import ROOT
from tests.launching import run as start

SCRIPTS = ROOT / "train_scripts"
TINY = {"model": "tiny", "prediction_type": "epsilon"}
WORDS = ("--max-steps", 6, "--num-samples", 12, "--sampling-steps", 3, "--jobs", 1)


@pytest.fixture(scope="module")
def scripts():
    """The modules of the study, with runs that take no time, one of which can't but diverge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS / "study")
        study, page, stages = map(importlib.import_module, ("study", "page", "stages"))
        patch.setattr(stages, "NUM_EVALS", 2)
        runs = {
            "eps": {**TINY, "objective": "simple"},
            "eps-hybrid": {**TINY, "objective": "hybrid", "variance_type": "learned_range"},
            "mean": {**TINY, "objective": "simple", "learning_rate": 1e6, "lr_warmup_steps": 0},
            "sddpm-conv": {**TINY, **study.SDDPM},
        }
        patch.setattr(study, "RUNS", runs)
        yield study, page, stages


@pytest.fixture(scope="module")
def whole(scripts, tmp_path_factory):
    """The folder of a study that nothing disturbed, whose page is in "page", and its results."""
    out = tmp_path_factory.mktemp("study")
    return out, command(scripts[0], out, "--page", out / "page")


def command(study, out, *words):
    run(study.study_command, [str(word) for word in ("--out", out, *WORDS, *words)], "study.py")
    return json.loads((out / "results.json").read_text())


def rows(page):
    """Cells of every row of the page's tables, by the run's name, one list for each table."""
    found = {}
    for line in page.splitlines():
        if match := re.match(r"\| `([\w-]+)` \| (.*) \|", line):
            found.setdefault(match[1], []).append(match[2].split(" | "))
    return found


def test_a_study(whole):
    out, results = whole
    page = (out / "page" / "README.md").read_text()
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (out / "page" / picture).stat().st_size > 1000
    assert results["command"].startswith("python train_scripts/study/study.py --out ")
    table, runs = rows(page), results["runs"]
    assert list(table) == ["eps", "eps-hybrid", "mean", "sddpm-conv"]

    # Bits/dim are those that the evaluation left in the run's folder
    report = json.loads((out / "eps" / "evaluation.json").read_text())
    for cell, found in zip(
        table["eps"][0][1:3], (report["bits_per_dim"], report["other_variance"]), strict=True
    ):
        assert cell == f"{found['bpd']['value']:.3f} ± {found['bpd']['stderr']:.3f}"
    learned = json.loads((out / "eps-hybrid" / "evaluation.json").read_text())["bits_per_dim"]
    assert learned["variance_type"] == "learned_range"
    assert table["eps-hybrid"][0][1] == table["eps-hybrid"][0][2]
    assert table["eps-hybrid"][0][1].startswith(f"{learned['bpd']['value']:.3f}") and "† It learns" in page

    # The paired difference, by its definition
    bpd = [load_file(out / name / "evaluation.safetensors")["bpd"] for name in ("eps-hybrid", "eps")]
    change = bpd[0] - bpd[1]
    error = change.std() / math.sqrt(len(change))
    assert table["eps-hybrid"][0][-1] == f"{change.mean():+.3f} ± {error:.3f}"
    assert "difference" not in runs["sddpm-conv"]  # of another T

    # Least L_0: a pixel at its bin's centre, inside and at the ends of the range, by 50-digit arithmetic
    images = torch.cat(list(load_stream("digits", "test").batches(256, epochs=1)))
    ends = ((images == 0) | (images == 255)).double().mean().item()
    for name, inside, end in (("eps", 1.305377656, 0.509825070), ("sddpm-conv", 6.735172281, 0.986521074)):
        assert runs[name]["bits"]["floor_of_l_0"] == pytest.approx(inside * (1 - ends) + end * ends, abs=1e-8)

    # Samples: with the variance that was asked for, as many steps as there are
    for name, variances in (("eps", {"fixed_large", "fixed_small"}), ("eps-hybrid", {"learned_range"})):
        assert set(runs[name]["samples"]) == variances
        for variance, found in runs[name]["samples"].items():
            assert (found["variance_type"], found["num_samples"], found["sampling_steps"]) == (
                variance,
                12,
                3,
            )
    large, small = (runs["eps"]["samples"][v]["samples"] for v in ("fixed_large", "fixed_small"))
    assert large != small
    assert table["eps"][1][0] == f"{next(v for k, v in large.items() if k.startswith('FD')):.2f}"
    assert DDPMPipeline.from_pretrained(out / "eps").scheduler.variance_type == "fixed_large"

    # What diverged says so, and its numbers are nowhere
    failed, message = (runs["mean"]["train"][key] for key in ("failed", "message"))
    step = re.search(r"at step (\d)|to (\d),", message).group(0).strip(",").split()[-1]
    assert failed == f"diverged at step {step}" and "bits" not in runs["mean"]
    assert set(table["mean"][0][1:6]) == {failed}
    assert f"Here `mean`: {failed}" in page and "`v` (not run) and (not run)" in page


def test_a_study_goes_on(scripts, whole, tmp_path, monkeypatch):
    study, _, stages = scripts
    sample_run = stages.sample_run

    def killed(study, folder, variance):
        if variance == "fixed_large":
            raise KeyboardInterrupt
        return sample_run(study, folder, variance)

    monkeypatch.setattr(stages, "sample_run", killed)
    with pytest.raises(SystemExit, match="130"):
        command(study, tmp_path / "out", "--only", "eps")
    assert not (tmp_path / "out" / "results.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "stages").glob("*.json")}

    monkeypatch.setattr(stages, "sample_run", sample_run)
    monkeypatch.setattr(stages, "train", None)  # nothing that is finished is done again
    monkeypatch.setattr(stages, "evaluate", None)
    again = command(study, tmp_path / "out", "--only", "eps")
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "stages").glob("*.json")}
    assert done.items() <= now.items() and now.keys() - done.keys() == {"eps.samples-fixed_large.json"}
    for key in ("by_variance", "floor_of_l_0"):
        assert again["runs"]["eps"]["bits"][key] == whole[1]["runs"]["eps"]["bits"][key]
    for variance in ("fixed_large", "fixed_small"):
        found = again["runs"]["eps"]["samples"][variance]
        assert found["samples"] == whole[1]["runs"]["eps"]["samples"][variance]["samples"]
        assert found["interrupted"] == (variance == "fixed_large")
    table = rows((tmp_path / "out" / "README.md").read_text())
    assert table["eps"][1][-1].startswith("≥ ") and not table["eps"][1][-2].startswith("≥ ")


def test_the_time_of_a_training_that_was_stopped(scripts):
    _, _, stages = scripts
    log = [
        {"step": 50, "images": 3200, "images_per_second": 800.0},
        {"step": 50, "images": 3200, "heldout_bpd": 5.0},
        {"step": 100, "images": 6400, "images_per_second": 320.0},  # after a resume, of a busier machine
    ]
    assert stages.trained(log) == {"images": 6400, "seconds": 4.0 + 10.0}


def test_what_is_not_finite_is_a_finding(scripts, tiny_folder, tmp_path):
    study, _, stages = scripts
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    unet = DDPMPipeline.from_pretrained(folder).unet
    unet.conv_in.weight.data.fill_(3e38)  # finite, but what they give is not
    unet.save_pretrained(folder / "unet")
    few = stages.Study(tmp_path, 6, 12, 3, study.RUNS, 0.0)
    assert stages.score_run(folder)["failed"] == "not finite"
    assert stages.sample_run(few, folder, "fixed_small")["failed"] == "samples not finite"


def test_bad_input_is_one_line(scripts, tmp_path, capsys):
    study, _, _ = scripts
    stages = tmp_path / "out" / "stages"
    stages.mkdir(parents=True)
    there = {"max_steps": 5, "num_samples": 12, "sampling_steps": 3, "changes": study.RUNS["eps"]}
    (stages / "eps.settings.json").write_text(json.dumps(there))
    (tmp_path / "file").touch()
    for words, line in (
        (("--only", "eps,epss"), "only has 'epss'; allowed: eps, "),
        (("--max-steps", 0), "--max-steps is 0; allowed"),
        (("--num-samples", 1), "--num-samples is 1; allowed"),
        (("--jobs", 0), "--jobs is 0; allowed"),
        ((), "--max-steps is 6, but out .* holds a study with 5; allowed"),
        (("--out", tmp_path / "file"), "out .* can't be written"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command(study, tmp_path / "out", *words)
        error = capsys.readouterr().err
        assert re.search(line, error) and error.count("\n") == 1, error


def test_the_comparison_asks_for_numbers_that_there_are(scripts):
    _, page, _ = scripts
    failed = {"train": {"failed": "diverged at step 1", "images": 0, "seconds": 0.0}}
    entry = {"changes": {}, "T": 1000, "variance_type": "fixed_large", **failed}
    results = {"runs": {"eps": entry}}
    text = page.comparison(results, page.COMPARISON.read_text(encoding="utf-8"))
    assert "Here `eps` has FD diverged at step 1" in text and "{" not in text
    with pytest.raises(ValueError, match=r"has the key 'bits'; allowed: .*fd_large"):
        page.comparison(results, "{eps[bits]}")


def test_the_page_that_is_shown_is_what_its_results_say(scripts):
    _, page, _ = scripts
    shown = ROOT / "model_cards" / "study-digits"
    results = json.loads((shown / "results.json").read_text(encoding="utf-8"))
    assert page.page_text(results, pictured=True) == (shown / "README.md").read_text(encoding="utf-8")
    script = results["command"].split()[1]
    assert (ROOT / script).is_file()


def test_the_runs_share_all_but_what_they_change(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS / "study")
    runs = runpy.run_path(str(SCRIPTS / "study" / "study.py"))["RUNS"]
    study = importlib.import_module("stages").Study(tmp_path, 100, 12, 3, runs, 0.0)
    configs = {name: dataclasses.asdict(study.config(name)) for name in runs}
    assert len(configs) == 10
    for name, config in configs.items():
        differ = {key for key, value in config.items() if value != configs["eps"][key]}
        assert differ - {"output_dir"} <= set(runs[name]), name


@pytest.mark.slow
def test_two_at_a_time_find_what_one_does(tmp_path):
    words = ["--max-steps", 3, "--num-samples", 12, "--sampling-steps", 2, "--only", "eps,v"]
    found = []
    for jobs in (1, 2):
        out = tmp_path / str(jobs)
        done = start(
            [sys.executable, SCRIPTS / "study" / "study.py", "--out", out, "--jobs", jobs, *words], ROOT
        )
        assert done.returncode == 0, done.stderr
        runs = json.loads((out / "results.json").read_text())["runs"]
        found.append(
            {n: (r["bits"]["by_variance"], r["samples"]["fixed_small"]["samples"]) for n, r in runs.items()}
        )
    assert found[0] == found[1]

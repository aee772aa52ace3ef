"""An evaluation on two processes finds what one finds."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm.cli import main
from hf_ddpm.folders.layout import ERRORS
from tests.evaluation.commands import CLASSIFIER, PICTURES, TENSORS, files, run
from tests.launching import ROOT, forked

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ALONE = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Evaluates, is refused, evaluates every step, measures errors, and trains: each on both processes.
PROBE = """
import os, sys
from pathlib import Path

here, model = Path(sys.argv[1]), sys.argv[2]
import hf_ddpm.evaluation.evaluate
from hf_ddpm.cli import main

for name in ("plot_bits_per_step", "plot_rate_distortion", "plot_reconstruction_levels"):
    # of the main process only
    touch = lambda *what: next(one for one in what if isinstance(one, Path)).open("x").close()
    setattr(hf_ddpm.evaluation.evaluate, name, touch)
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
main(["plan", model, "digits", "--evals", "260", "--batch-size", "20", "--out", str(here / "plan")])
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

    main(
        [
            "plan",
            str(tiny_folder),
            "digits",
            "--evals",
            "260",
            "--batch-size",
            "20",
            "--out",
            str(tmp_path / "p"),
        ]
    )
    both, one = (load_file(tmp_path / name / ERRORS) for name in ("plan", "p"))
    torch.testing.assert_close(both, one, rtol=1e-5, atol=1e-6)
    assert done.stdout.count("predicted bits/dim") == 1

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

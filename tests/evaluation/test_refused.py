"""What `hf-ddpm evaluate` refuses before it writes anything."""

import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ddpm.cli import main
from hf_ddpm.generation.pipeline import DDPMPipeline
from tests.evaluation.commands import CLASSIFIER, FEW, files, grey, refused, run, save_plain, write_images


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--split tset", "no split 'tset' in digits (did you mean 'test'?); it has train, test"),
        ("--num-images 301", "--num-images is 301, but there are 300 images; allowed: 1 to 300"),
        ("--num-images 0", "--num-images is 0; allowed: >= 1"),
        ("--num-imges 3", "unknown argument '--num-imges'; did you mean --num-images?"),
        ("--num-samples 8", "--num-samples is 8, but has no use without --extractor or --nearest-dataset"),
        (
            "--sampling-steps 8",
            "--sampling-steps is 8, but has no use without --extractor or --nearest-dataset",
        ),
        ("--num-reference 8", "--num-reference is 8, but has no use without --extractor"),
        ("--reference file", "--reference is 'file', but has no use without --extractor"),
        ("--nearest-split a", "--nearest-split is 'a', but has no use without --nearest-dataset"),
        ("--first-variance full", "--first-variance is 'full', but has no use without --steps"),
        ("--exact --num-evals-per-image 4", "--num-evals-per-image is 4, but exact evaluates every step"),
        ("--exact --pilot-images 4", "--pilot-images is 4, but exact evaluates every step"),
        ("--num-evals-per-image 1", "--num-evals-per-image is 1; allowed: >= 2"),
        ("--steps 21", "--steps is 21; allowed: <= 20 (T)"),
        ("--steps 1", "--steps is 1; allowed: >= 2"),
        ("--fit random_crop", "allowed: exact, resize, resize_crop, center_crop"),
        ("--decoder tan", "--decoder is 'tan' (did you mean 'tanh'?); allowed: exact, tanh"),
        ("--variance-type learned", "--variance-type is 'learned'; allowed: fixed_large, fixed_small"),
        ("--image-column picture", "no column 'picture'; there are: image, label"),
        ("--compare-with nowhere", "'nowhere' holds no evaluation that can be read: "),
        ("--seed -1", "--seed is -1; allowed: >= 0"),
        (
            f"--extractor {CLASSIFIER} --num-samples 8 --num-reference 299",
            "--num-reference is 299, but the split has 300 images; allowed: 2 to 298",
        ),
        pytest.param(
            "--num-images 4 --extractor /nowhere/model",
            "no folder '/nowhere/model'; it looks like a path",
        ),
        pytest.param(
            f"--extractor {CLASSIFIER} --sampling-steps 21 --num-images 4 --num-reference 4",
            "--sampling-steps is 21; allowed: whole numbers in 1..20",
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
    assert "--variance-type is 'fixed_small', but the network learns its own (learned_range)" in line
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
        (grey(4, 6, 6), "error: 4 images of 6x6, mode L, for a network of {}: add --fit resize_crop"),
        (np.stack([grey(4)] * 3, 3), "4 images of 8x8, mode RGB, for a network of {}: add --channels 1"),
        (grey(4, dtype=np.uint16, top=256), "of 8x8, mode 16-bit L, for a network of {}: add --to-8-bit"),
    ],
    ids=["size", "channels", "16 bits"],
)
def test_images_that_are_refused(images, words, tiny_folder, tmp_path, capfd, evaluations):
    data = write_images(tmp_path / "data", images)
    line = refused(capfd, tiny_folder, data, "--out", tmp_path / "out")
    assert line.endswith(words.format("1x8x8 (CxHxW)"))
    assert not evaluations and not (tmp_path / "out" / "evaluation.json").exists()


def test_values_off_the_grid_are_refused(tiny_folder, tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    values = (grey(4) / 255).tolist()
    pq.write_table(pa.Table.from_pydict({"image": values}), data / "test-00000-of-00001.parquet")
    assert "no image column; there are: image" in refused(capfd, tiny_folder, data, "--out", tmp_path / "out")
    line = refused(capfd, tiny_folder, data, "--out", tmp_path / "out", "--image-column", "image")
    assert line.endswith(
        "4 images of 8x8, 1 channel of float64, for a network of 1x8x8 (CxHxW): add --to-8-bit"
    )


def test_a_few_bad_images_among_good_ones_are_told_at_once(tiny_folder, tmp_path, capfd):
    images = [*grey(3), *grey(1, dtype=np.uint16, top=65536), *grey(2, 6, 6)]
    data = write_images(tmp_path / "data", images)
    line = refused(capfd, tiny_folder, data, "--out", tmp_path / "out", "--num-evals-per-image", 2)
    assert "6 images of 2 sizes (6x6 to 8x8), modes L 5, 16-bit L 1, for a network" in line
    assert line.endswith(": add --fit resize_crop")


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
    assert f"out '{tmp_path}' holds an evaluation already; allowed: another folder, or --overwrite" in line
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
    next(pipeline.unet.parameters()).data.fill_(1e38)
    pipeline.save_pretrained(folder)
    line = refused(capfd, folder, "digits", "--out", tmp_path / "out", *FEW, code=1)
    assert "the bound is not finite for 7 of 7 images" in line
    assert not (tmp_path / "out" / "evaluation.json").exists()

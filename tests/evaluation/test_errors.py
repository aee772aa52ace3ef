"""`hf-ddpm plan`, and evaluations with what it measured: on any batches, resumed, and refused in words."""

import json
import re
import shutil
from importlib import import_module

import diffusers
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import main
from hf_ddpm.decoders import DECODERS
from hf_ddpm.evaluation.config import DECODERS as DECODER_NAMES
from hf_ddpm.evaluation.config import MEASURED as NAMES
from hf_ddpm.evaluation.errors import steps_of_images
from hf_ddpm.evaluation.errors_config import FEWEST_EVALS
from hf_ddpm.folders.layout import ERRORS
from hf_ddpm.likelihood import estimate_bound, evaluate_bound, image_noise
from hf_ddpm.likelihood.errors import DECODER_EVALS, MEASURED, steps_to_measure
from hf_ddpm.publishing.publish import collect
from tests.evaluation import commands
from tests.evaluation.commands import assert_same, digits_at, kill_at, save_plain

T = 60
FEW = ("--evals", 400, "--batch-size", 50)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_plain(folder, diffusers.DDPMScheduler(T, beta_end=0.3, clip_sample=False))


@pytest.fixture(scope="module")
def planned(model, tmp_path_factory):
    """A copy of the model with its table."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("planned") / "model")
    plan(folder)
    return folder


def plan(model, *flags):
    main(["plan", *(str(word) for word in (model, "digits", *FEW, *flags))])


def refused(capfd, command, *words):
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([command, *(str(word) for word in words)])
    line = capfd.readouterr().err.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]
    assert stop.value.code == 2 and line.startswith(f"hf-ddpm {command}: error: ") and len(line) <= 300, line
    return line


def tables(folder):
    found = DDPMPipeline.from_pretrained(folder).errors
    return {name: getattr(found.errors, name) for name in ("squared", "pixels", "decoder_nats", "levels")}


def test_constants_agree():
    assert tuple(DECODERS) == DECODER_NAMES
    assert NAMES == MEASURED and FEWEST_EVALS == DECODER_EVALS + 1


def test_every_evaluation_is_dealt_once():
    process = import_module("tests.oracles").chain("linear")
    steps = steps_to_measure(process, 1000)
    dealt = steps_of_images(steps, 300, seed=3)
    assert {len(t) for t in dealt} == {3, 4} and torch.equal(torch.cat(dealt).sort().values, steps)
    assert any(not torch.equal(a, b) for a, b in zip(dealt, steps_of_images(steps, 300, seed=4), strict=True))


def test_the_plan_says_bits_and_what_to_type(model, tmp_path, capfd):
    folder = shutil.copytree(model, tmp_path / "model")
    plan(folder)
    out = capfd.readouterr().out
    rows = re.findall(r"^ +(\d+)((?: +\d+\.\d+){5}) +(\d+)$", out, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [5, 10, 20, 50, 60]
    for _, optimal, by_value, by_levels in (tuple(map(float, row[1].split()))[1:] for row in rows):
        assert by_levels < by_value <= optimal
    assert f"table: {folder / ERRORS}" in out
    command = re.search(r"next, on images .*:\n\n  hf-ddpm ((.*\\\n)*.*)\n", out).group(1)
    main([*command.replace("\\\n", " ").split(), "--num-images", "5"])
    report = json.loads(next(folder.glob("by-value-*/evaluation.json")).read_text())
    assert report["bits_per_dim"]["variance_type"] == "by-value"
    assert report["method"]["chain"] == "chosen"
    assert len(report["few_steps"]["timesteps"]) == report["method"]["steps"]
    assert report["few_steps"]["errors"]["evaluations"] == 400
    assert "(chosen), from step" in capfd.readouterr().out


def test_the_same_again_measures_nothing_and_another_needs_overwrite(planned, tmp_path, capfd, evaluations):
    folder = shutil.copytree(planned, tmp_path / "model")
    before = (folder / ERRORS).read_bytes()
    evaluations.clear()
    plan(folder)
    assert sum(evaluations) <= 1 and (folder / ERRORS).read_bytes() == before
    line = refused(capfd, "plan", folder, "digits", "--evals", 401, "--seed", 2)
    assert "holds errors.safetensors with another evaluations, seed" in line and "--overwrite" in line
    (folder / ERRORS).write_bytes(b"nothing")
    assert "is damaged" in refused(capfd, "plan", folder, "digits")


@pytest.mark.slow
def test_overwrite_replaces_a_table(planned, tmp_path):
    folder = shutil.copytree(planned, tmp_path / "model")
    before = (folder / ERRORS).read_bytes()
    plan(folder, "--seed", 2, "--overwrite")
    assert (folder / ERRORS).read_bytes() != before


def test_batches_do_not_matter(planned, model, tmp_path):
    out = tmp_path / "out"
    main(["plan", str(model), "digits", "--evals", "400", "--batch-size", "33", "--out", str(out)])
    ours, theirs = DDPMPipeline.from_pretrained(planned).errors, None
    shutil.copytree(model, tmp_path / "copy")
    shutil.copy(out / ERRORS, tmp_path / "copy")
    theirs = DDPMPipeline.from_pretrained(tmp_path / "copy").errors
    assert ours.of == theirs.of and torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.rows, theirs.rows)
    assert torch.equal(ours.errors.levels, theirs.errors.levels)
    assert ours.errors.pixels.sum() == theirs.errors.pixels.sum() == 400 * 64
    torch.testing.assert_close(ours.errors.x0_mse, theirs.errors.x0_mse, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_killed_plan_goes_on(planned, model, tmp_path, evaluations):
    folder = shutil.copytree(model, tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        kill_at(patch, 5)
        plan(folder)
    assert stop.value.code == 130 and not (folder / ERRORS).exists()
    evaluations.clear()
    plan(folder)
    assert sum(evaluations) < 400 - 3 * 50 and not list(folder.glob(".parts-*"))
    for name, table in tables(planned).items():
        assert_same(tables(folder)[name], table)


def test_evaluations_with_the_decoder_by_grey_levels(planned, tmp_path, capsys):
    few = ("--num-images", 6, "--steps", 12, "--chain", "chosen", "--variance", "by-value", "--exact")
    _, plain = commands.run(planned, tmp_path / "plain", *few)
    how = (*few, "--decoder", "levels")
    report, tensors = commands.run(planned, tmp_path / "auto", *how, "--compare-with", tmp_path / "plain")
    last = report["few_steps"]["last_step"]
    assert report["method"]["decoder"] == "levels" and last == report["few_steps"]["timesteps"][0]
    said = capsys.readouterr().out
    assert "bits/dim (by-value, decoder levels)" in said and "12 steps (chosen), decoder levels - 12" in said
    assert (tensors["bpd"] < plain["bpd"]).all()
    report, other = commands.run(planned, tmp_path / "9", *how, "--last-step", 9)
    assert report["few_steps"]["timesteps"][0] == 9
    assert "its decoder starts at step 9" in capsys.readouterr().out
    errors, pipeline = DDPMPipeline.from_pretrained(planned).errors, DDPMPipeline.from_pretrained(planned)
    process = pipeline.process.respaced(report["few_steps"]["timesteps"])
    images = digits_at(other["image_indices"])
    found = evaluate_bound(
        process,
        lambda x, t: pipeline.unet(x, t).sample,
        images,
        noise_fn=image_noise(0, other["image_indices"].tolist(), images),
        variance_type=errors.errors.variance(process, "by-value"),
        decoder=errors.errors.decoder(process, "levels"),
    )
    torch.testing.assert_close(found.total_bpd, other["bpd"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_evaluations_with_every_variance_and_chain(planned, tmp_path):
    few = ("--num-images", 6, "--num-evals-per-image", 4, "--steps", 12)
    for i, (variance, chain) in enumerate(
        [("optimal", "even"), ("by-value", "quadratic"), ("by-value", "chosen"), ("fixed_small", "chosen")]
    ):
        out = tmp_path / str(i)
        report, tensors = commands.run(planned, out, *few, "--variance", variance, "--chain", chain)
        assert report["bits_per_dim"]["variance_type"] == variance
        assert ("other_variance" in report) == (variance == "fixed_small")
        pipeline = DDPMPipeline.from_pretrained(planned)
        process = pipeline.process.respaced(report["few_steps"]["timesteps"])
        assert len(process) == 12 and tensors["bpd"].isfinite().all()
        errors = pipeline.errors.errors
        found = estimate_bound(
            process,
            lambda x, t, pipeline=pipeline: pipeline.unet(x, t).sample,
            digits_at(tensors["image_indices"]),
            num_evals_per_image=4,
            image_indices=tensors["image_indices"],
            variance_type=variance if variance == "fixed_small" else errors.variance(process, variance),
        )
        torch.testing.assert_close(found.per_image_bpd, tensors["bpd"], rtol=1e-5, atol=1e-5)


def test_what_evaluate_refuses(planned, model, tmp_path, capfd):
    out = ("--out", tmp_path / "out", "--num-images", 4)
    by_value, by_levels = ("--variance", "by-value"), ("--decoder", "levels")
    chosen = ("--steps", 5, "--chain", "chosen")
    for words, said in (
        ((planned, "digits", "--split", "train", *by_value), "measured on these images ('digits', 'train')"),
        ((planned, "digits", "--no-clip", *by_value), "unknown argument"),
        (
            (planned, "digits", "--clip-x0", "false", *by_value),
            "--clip-x0 is False, but the errors were meas",
        ),
        ((model, "digits", *by_value), "has no errors.safetensors; allowed: after hf-ddpm plan"),
        ((model, "digits", "--steps", 5, "--chain", "chosen"), "has no errors.safetensors"),
        ((planned, "digits", "--chain", "chosen"), "--chain is 'chosen', but has no use without --steps"),
        ((planned, "digits", "--errors", planned), "--errors is"),
        (
            (planned, "digits", "--errors", planned, "--variance", "fixed_small"),
            "but has no use without --variance-type optimal or by-value, a chosen chain, or decoder levels",
        ),
        (
            (planned, "digits", "--errors", planned, "--steps", 5, "--chain", "quadratic"),
            "but has no use without",
        ),
        ((planned, "digits", "--steps", 5, "--first-variance", "full", *by_value), "has no use with"),
        ((planned, "digits", "--variance", "optimum"), "did you mean 'optimal'?"),
        ((planned, "digits", "--decoder", "level"), "did you mean 'levels'?"),
        ((planned, "digits", "--split", "train", *by_levels), "measured on these images"),
        ((model, "digits", *by_levels), "has no errors.safetensors; allowed: after hf-ddpm plan"),
        (
            (planned, "digits", "--steps", 5, "--first-variance", "full", *by_levels),
            "has no use with decoder",
        ),
        ((planned, "digits", *chosen, "--last-step", 3), "--last-step is 3, but has no use"),
        ((planned, "digits", "--steps", 5, *by_levels, "--last-step", 3), "--last-step is 3, but has no use"),
        (
            (planned, "digits", *chosen, *by_levels, "--last-step", "x"),
            "--last-step is 'x'; allowed: auto",
        ),
        ((planned, "digits", *chosen, *by_levels, "--last-step", -1), "--last-step is '-1'; allowed: auto"),
        ((planned, "digits", *chosen, *by_levels, "--last-step", 1.5), "--last-step is '1.5'; allowed: auto"),
        (
            (planned, "digits", *chosen, *by_levels, "--last-step", 55),
            "--last-step is 55 for 5 steps",
        ),
        ((planned, "digits", "--steps", 61, "--chain", "chosen", *by_value), "--steps is 61; allowed: <= 60"),
        ((planned, "digits", "--errors", tmp_path / "no", *by_value), "there is no file named"),
    ):
        assert said in refused(capfd, "evaluate", *words, *out), words
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_rows_of_another_file_of_the_same_images_are_found(planned, tmp_path, capfd):
    images = commands.grey(4)
    train = torch.stack(
        list(import_module("hf_ddpm.data.stream").load_stream("digits", "train").select([3, 7]))
    )
    images[:2] = train[:, 0].numpy()
    data = commands.write_images(tmp_path / "data", images)
    line = refused(capfd, "evaluate", planned, data, "--variance", "optimal", "--out", tmp_path / "out")
    assert re.search(r"measured on [12] of these 4 images", line)


def test_what_plan_refuses(model, tmp_path, capfd):
    scheduler = diffusers.DDPMScheduler(4097, beta_end=1e-3)
    long = save_plain(tmp_path.parent / "long", scheduler)
    for words, said in (
        ((long, "digits"), "has 4097 steps; allowed: at most 4096"),
        ((model, "digits", "--evals", 200), "--evals is 200; allowed: >= 201"),
        ((model, "digits", "--evals", 10**6), "--evals is 1000000; allowed: >= 201 and <= 200000"),
        ((model, "digits", "--split", "no"), "'no'"),
        (("me/model", "digits"), "--out is not given, and 'me/model' is no folder"),
        ((tmp_path / "none", "digits", "--out", tmp_path / "out"), "none"),
        ((model, "digits", "--out", "/proc/none"), "--out '/proc/none' can't be written"),
    ):
        assert said in refused(capfd, "plan", *words), words
    zero = diffusers.DDPMScheduler(T, beta_end=0.3, rescale_betas_zero_snr=True)
    blind = save_plain(tmp_path.parent / "blind", zero)
    # Before anything is measured, whether an evaluation happens to look at the last step or not
    for command, words in (("plan", ("--evals", 201)), ("evaluate", ("--num-images", 1))):
        line = refused(capfd, command, blind, "digits", *words, "--out", tmp_path / "out")
        assert "'epsilon' says nothing about x_0" in line
    (tmp_path / "photo.png").touch()
    assert "holds other things" in refused(capfd, "plan", model, "digits", "--out", tmp_path)
    assert not (tmp_path / ERRORS).exists()
    (tmp_path / ERRORS).write_bytes(b"a user's own")
    line = refused(capfd, "plan", model, "digits", "--out", tmp_path, "--overwrite")
    assert "holds 'errors.safetensors', which hf_ddpm did not write" in line
    assert "holds other things" in refused(capfd, "evaluate", model, "digits", "--out", tmp_path)
    assert (tmp_path / ERRORS).read_bytes() == b"a user's own"


@pytest.mark.slow
def test_another_folder_for_the_table(model, planned, tmp_path, capfd):
    out = tmp_path / "table"
    plan(model, "--out", out)
    said = capfd.readouterr().out
    assert f"--errors {out}" in said, said
    flags = ("--num-images", 4, "--variance", "by-value", "--steps", 5)
    _, ours = commands.run(model, tmp_path / "a", *flags, "--errors", out)
    _, file = commands.run(model, tmp_path / "c", *flags, "--errors", out / ERRORS)
    assert_same(ours["bpd"], file["bpd"])
    _, theirs = commands.run(planned, tmp_path / "b", *flags)
    assert_same(ours["bpd"], theirs["bpd"])


@pytest.mark.slow
def test_of_a_network_that_learns_variances_the_measured_ones_are_scored(tmp_path, capfd):
    scheduler = diffusers.DDPMScheduler(T, beta_end=0.3, variance_type="learned_range")
    folder = save_plain(tmp_path / "model", scheduler, out_channels=2)
    plan(folder)
    few = ("--num-images", 4, "--steps", 8, "--chain", "chosen")
    for variance in ((), ("--variance", "optimal"), ("--variance", "by-value")):
        report, tensors = commands.run(folder, tmp_path / str(len(variance)), *few, *variance, "--overwrite")
        assert tensors["bpd"].isfinite().all() and report["method"]["steps"] == 8
    line = refused(capfd, "evaluate", folder, "digits", "--variance", "fixed_small", "--out", tmp_path / "x")
    assert "allowed: none, optimal, by-value" in line


# The pipeline, and what is published


def test_a_pipeline_knows_its_errors_until_its_network_changes(planned, model, tmp_path, caplog):
    assert DDPMPipeline.from_pretrained(model).errors is None
    pipeline = DDPMPipeline.from_pretrained(planned)
    assert DDPMPipeline(pipeline.unet, DDPMScheduler(T)).errors is None
    pipeline.save_pretrained(tmp_path / "copy")
    assert DDPMPipeline.from_pretrained(tmp_path / "copy").errors.of == pipeline.errors.of
    images = digits_at([0, 1, 2])
    few = pipeline.bits_per_dim(images, variance_type="by-value")
    assert few.per_image_bpd.isfinite().all() and few.bpd != pipeline.bits_per_dim(images).bpd
    with pytest.raises(ValueError, match="clip_x0 is False, but the errors were measured with True"):
        pipeline.bits_per_dim(images, variance_type="optimal", clip_x0=False)
    with pytest.raises(ValueError, match="after hf-ddpm plan"):
        DDPMPipeline.from_pretrained(model).bits_per_dim(images, variance_type="optimal")
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1)
    with pytest.raises(ValueError, match="is of other weights than the model's"):
        _ = pipeline.errors
    pipeline.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / ERRORS).exists() and "it is left out" in caplog.text


@pytest.mark.slow
def test_in_half_precision_the_errors_are_those_of_the_same_weights(model, tmp_path):
    half = DDPMPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    plan(tmp_path / "half")
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = DDPMPipeline.from_pretrained(tmp_path / "half", torch_dtype=dtype)
        assert pipeline.bits_per_dim(digits_at([0, 1]), variance_type="by-value").bpd > 0


def test_the_table_is_published_with_the_weights_it_is_of(planned, tmp_path, caplog):
    assert ERRORS in collect(planned, "me/model").files
    folder = shutil.copytree(planned, tmp_path / "other")
    pipeline = DDPMPipeline.from_pretrained(folder)
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1)
    pipeline.unet.save_pretrained(folder / "unet")
    assert ERRORS not in collect(folder, "me/model").files
    assert "errors.safetensors is of other weights than these" in caplog.text
    (folder / ERRORS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"errors.safetensors"):
        collect(folder, "me/model")

"""heldout.py: what a run says of images that it doesn't train on; real runs of a tiny network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline, TrainConfig, load_stream, train
from hf_ddpm.data.pixels import to_float
from hf_ddpm.likelihood import estimate_bound
from hf_ddpm.training.heldout import HeldOut
from tests.training.helpers import Conv, kill_at

NAMES = ("heldout_bpd", "heldout_stderr", "heldout_rate_bpd", "heldout_distortion_bpd")


def small(folder: Path, **changes) -> TrainConfig:
    """A run of four quick steps that is evaluated after every second, changed."""
    values = {
        **{"model": "tiny", "batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "shuffle_memory": 0},
        **{"num_train_timesteps": 20, "beta_end": 0.5, "lr_warmup_steps": 0, "log_every": 1},
        **{"sample_every": 0, "output_dir": str(folder), "checkpoint_every": 2, "keep_checkpoints": 9},
        **{"evaluate_every": 2, "evaluate_num_images": 6, "evaluate_num_evals": 5, "seed": 1},
    }
    return TrainConfig(**(values | changes))


def held(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "heldout_bpd" in line]


def noted(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted((folder / "heldout").iterdir())}


def stderr(values) -> float:
    return np.std(np.asarray(values), ddof=1) / np.sqrt(len(values))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(small(folder))
    return folder


def test_lines_and_files(finished):
    lines, files = held(finished), noted(finished)
    assert [line["step"] for line in lines] == [2, 4]
    assert list(files) == ["step-00000002.safetensors", "step-00000004.safetensors"]
    for line, found in zip(lines, files.values(), strict=True):
        assert {name: (x.dtype, tuple(x.shape)) for name, x in found.items()} == {
            **{name: (torch.int64, (6,)) for name in ("rows", "digests")},
            **{name: (torch.float64, (6,)) for name in ("bpd", "rate_bpd", "distortion_bpd")},
        }
        means = [found["bpd"].mean(), stderr(found["bpd"])]
        means += [found["rate_bpd"].mean(), found["distortion_bpd"].mean()]
        np.testing.assert_allclose([line[name] for name in NAMES], means, rtol=1e-12)
        assert line["heldout_images"] == 6
        torch.testing.assert_close(found["bpd"], found["rate_bpd"] + found["distortion_bpd"])
    before, now = files.values()
    assert torch.equal(before["rows"], now["rows"])
    rows = now["rows"]
    assert (rows.diff() > 0).all() and rows.max() > 150 and rows.max() < 300  # of all the split


def test_the_change_is_a_paired_difference(finished):
    (first, second), files = held(finished), noted(finished)
    assert "heldout_change" not in first and "heldout_change_stderr" not in first
    before, now = files.values()
    change = now["bpd"] - before["bpd"]
    np.testing.assert_allclose(second["heldout_change"], change.mean(), rtol=1e-12)
    np.testing.assert_allclose(second["heldout_change_stderr"], stderr(change), rtol=1e-12)
    assert abs(second["heldout_bpd"] - first["heldout_bpd"] - second["heldout_change"]) < 1e-12


def test_numbers_are_the_saved_pipelines(finished):
    """Averaged weights, the run's process and variance, and draws that depend on seed and row alone."""
    pipeline, now = DDPMPipeline.from_pretrained(finished), noted(finished)["step-00000004.safetensors"]
    rows = now["rows"].long()
    images = torch.stack(list(load_stream("digits", "test").images()))[rows]
    unet = pipeline.unet.eval()
    expected = estimate_bound(
        pipeline.scheduler.process,
        lambda x_t, t: unet(x_t, t).sample,
        to_float(images),
        num_evals_per_image=5,
        seed=1,
        image_indices=rows,
        variance_type="fixed_large",
    )
    for name in ("bpd", "rate_bpd", "distortion_bpd"):
        wanted = getattr(expected, f"per_image_{name}")
        torch.testing.assert_close(now[name], wanted, rtol=1e-6, atol=1e-6)


def test_training_is_not_disturbed(finished, tmp_path):
    train(small(tmp_path, evaluate_every=0, dropout=0.0))
    plain = load_file(tmp_path / "checkpoints" / "step-00000004" / "model.safetensors")
    watched = load_file(finished / "checkpoints" / "step-00000004" / "model.safetensors")
    torch.testing.assert_close(plain, watched, rtol=0, atol=0)
    assert not (tmp_path / "heldout").exists() and not held(tmp_path)


def test_a_run_killed_between_says_the_same(finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path), after_step=kill_at(3))
    train(small(tmp_path))
    assert held(tmp_path) == held(finished)
    torch.testing.assert_close(noted(tmp_path), noted(finished), rtol=0, atol=0)


def test_a_run_killed_while_evaluating_says_the_same(finished, tmp_path):
    evaluate = HeldOut.evaluate

    def killed(self, model, process, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        return evaluate(self, model, process, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HeldOut, "evaluate", killed)
        train(small(tmp_path))
    train(small(tmp_path))
    assert held(tmp_path) == held(finished)
    torch.testing.assert_close(noted(tmp_path), noted(finished), rtol=0, atol=0)


def test_a_finished_run_that_goes_on(finished, tmp_path):
    """The last line is compared with the time before it, also over a restart."""
    folder = shutil.copytree(finished, tmp_path / "run")
    train(small(folder, max_steps=6))
    lines = held(folder)
    assert lines[:2] == held(finished) and [line["step"] for line in lines] == [2, 4, 6]
    change = (
        noted(folder)["step-00000006.safetensors"]["bpd"] - noted(folder)["step-00000004.safetensors"]["bpd"]
    )
    np.testing.assert_allclose(lines[2]["heldout_change"], change.mean(), rtol=1e-12)


def test_other_images_are_not_compared(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    train(small(folder, max_steps=6, evaluate_num_images=7))
    assert held(folder)[-1]["heldout_images"] == 7 and "heldout_change" not in held(folder)[-1]


def images(folder, counts, size=(8, 8)):
    """A folder of grey PNG files; of another size where a count is negative."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(abs(count)):
            path = folder / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = size if count > 0 else (6, 6)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return folder


def test_what_is_refused_before_training(tmp_path):
    data = images(tmp_path / "data", {"train": 3, "test": -3})
    for changes, words in (
        ({"evaluate_split": "tset"}, "no split 'tset' in digits (did you mean 'test'?); it has train, test"),
        ({"dataset": str(data)}, "size 6x6 (HxW), wanted 8x8"),
        ({"evaluate_num_images": 1}, "evaluate_num_images is 1; allowed: >= 2"),
        ({"evaluate_num_evals": 1}, "evaluate_num_evals is 1; allowed: >= 2"),
        ({"evaluate_every": -1}, "evaluate_every is -1; allowed: >= 0"),
    ):
        with pytest.raises(ValueError) as error:
            train(small(tmp_path / "run", **changes), after_step=lambda run: pytest.fail("it trained"))
        assert words in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "run").rglob("*.jsonl"))


def test_images_are_fitted_but_never_at_random(tmp_path, caplog):
    """A run of mirrored random crops is evaluated on the middle of each image; here of all that there are."""
    data = images(tmp_path / "data", {"train": 3}, (10, 12))
    flags = {"image_size": 8, "fit": "random_crop", "horizontal_flip": True, "max_steps": 1}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        evaluate = HeldOut.evaluate
        patch.setattr(HeldOut, "evaluate", lambda self, *what: seen.append(self) or evaluate(self, *what))
        train(small(tmp_path / "run", dataset=str(data), evaluate_split="train", **flags))
    shown = torch.stack(seen[0]._images)[:, 0].numpy()
    for i, found in enumerate(shown):
        whole = np.asarray(Image.open(data / "train" / f"{i}.png"))
        np.testing.assert_array_equal(found, whole[1:9, 2:10])
    (line,) = held(tmp_path / "run")
    assert (line["step"], line["heldout_images"]) == (1, 3)  # the last step is evaluated, whatever its number
    assert "evaluate_split 'train' is the split that the run trains on" in caplog.text


def test_trackers_get_them(tmp_path):
    train(small(tmp_path, max_steps=2, evaluate_every=1, trackers="tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(
        path.parent for path in (tmp_path / "hf_ddpm").rglob("events*") if path.parent.name == "hf_ddpm"
    )
    events = EventAccumulator(str(folder)).Reload()
    lines = held(tmp_path)
    for name in (*NAMES, "heldout_change", "heldout_change_stderr"):
        found = {event.step: event.value for event in events.Scalars(name)}
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_a_damaged_file_of_the_last_time_is_named_and_not_compared_with(tmp_path, caplog):
    plan = {"evaluate_every": 2, "evaluate_num_images": 2, "evaluate_num_evals": 2, "checkpoint_every": 2}
    train(small(tmp_path, max_steps=2, **plan), Conv())
    file = tmp_path / "heldout" / "step-00000002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x40
    file.write_bytes(data)
    train(small(tmp_path, max_steps=4, **plan), Conv())
    assert f"'{file}' is missing or damaged: its content is not what its sum says" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "heldout_bpd" in line] == [2, 4]
    assert not any("heldout_change" in line for line in lines)

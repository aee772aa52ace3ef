"""Lines of a log and values of a checkpoint that no run writes, by a power cut, an editor or an attacker."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ddpm import train
from hf_ddpm.folders.numbers import Log, read_log
from hf_ddpm.training.checkpoint import load_checkpoint
from hf_ddpm.training.sharding import check_moments, check_weights
from tests.training.helpers import Conv, again, assert_same, checkpoint, log, refused, weights
from tests.training.test_checkpoint import sealed

LINES = {
    "half": b'{"step": 3, "lo',
    "binary": bytes(range(128, 200)),
    "NUL": bytes(64),
    "a list": b"[1, 2, 3]",
    "a number": b"7",
    "null": b"null",
    "a text": b'"step"',
    "no step": b'{"loss": 1.0}',
    "a step in words": b'{"step": "3", "loss": 1.0}',
    "a step below 0": b'{"step": -1, "loss": 1.0}',
    "a step of 400 digits": b'{"step": 1, "loss": ' + b"9" * 400 + b"}",
    "a step of 5000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "true": b'{"step": true, "loss": 1.0}',
    "not finite": b'{"step": 3, "loss": NaN}',
    "seconds in words": b'{"step": 3, "seconds": "long"}',
    "null values": b'{"step": 3, "loss": null}',
    "deep": b"[" * 100_000,
    "a step again": b'{"step": 1, "loss": 9.0}',
    "empty": b"",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_an_odd_line_is_told_from_the_others(line, tmp_path):
    file = tmp_path / "log.jsonl"
    first, last = {"step": 1, "loss": 2.0}, {"step": 1, "heldout_bpd": 3.0}
    file.write_bytes(json.dumps(first).encode() + b"\n" + line + b"\n" + json.dumps(last).encode() + b"\n")
    assert read_log(file) == Log([first, last], {2: line}, None)
    file.write_bytes(json.dumps(first).encode() + b"\n" + line)
    assert read_log(file) == Log([first], {2: line} if line else {}, 2 if line else None)


def test_odd_lines_are_set_aside_and_named(copied, finished, caplog):
    file = copied / "log.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    odd = [line + b"\n" for line in LINES.values()]
    file.write_bytes(b"".join(lines[:2] + odd + lines[2:]))
    assert train(again(copied)).step == 4
    for number in range(3, 8):
        words = f"line {number} of {file} is damaged or no line of a run's log: moved to log-odd.jsonl"
        assert words in caplog.text
    assert f"{len(odd) - 5} more lines of {file} are so" in caplog.text
    assert log(copied) == log(finished) and log(copied, "step") == [1, 2, 3, 4]
    assert (copied / "log-odd.jsonl").read_bytes() == b"".join(odd)
    assert "was changed, lost or added" not in caplog.text


def test_a_last_line_that_was_cut_is_left_out(copied, finished, caplog):
    file = copied / "log.jsonl"
    file.write_bytes(file.read_bytes() + b'{"step": 5, "lo')
    train(again(copied))
    assert f"line 5 of {file} is damaged or no line of a run's log: left out" in caplog.text
    assert log(copied) == log(finished) and not (copied / "log-odd.jsonl").exists()


@pytest.mark.parametrize("change", ["changed", "lost", "added", "missing"])
def test_a_log_that_is_not_the_runs_is_told(change, copied, caplog):
    file = copied / "log.jsonl"
    lines = file.read_text().splitlines()
    numbers = json.loads(lines[1])
    if change == "changed":
        lines[1] = json.dumps(numbers | {"loss": numbers["loss"] * 2})
    elif change == "lost":
        del lines[1]
    elif change == "added":
        lines.insert(0, '{"step": 0, "loss": 1.0}')
    file.write_text("\n".join(lines) + "\n")
    if change == "missing":
        file.unlink()
    train(again(copied))
    assert "is not as the run wrote it up to step 4: a line was changed, lost or added" in caplog.text


# Checkpoints whose sums are right


def change_state(folder, **changes):
    file = folder / "state.json"
    state = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in state.items() if value is not ...}))
    sealed(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -4),
        ("step", "4"),
        ("step", 4.0),
        ("step", True),
        ("step", 5),
        ("step", 10**30),
        ("images_per_step", 0),
        ("images_per_step", None),
        ("num_processes", "two"),
        ("skipped", -1),
        ("pending", {}),
        ("pending", [["a"]]),
        ("pending", [math.inf]),
        ("data", 7),
        ("versions", ["x" * 5000]),
        ("config", []),
        ("log", {"lines": -1, "sha256": ""}),
        ("own_objective", 7),
    ],
)
def test_an_odd_value_is_named(key, value, finished, tmp_path):
    folder = shutil.copytree(checkpoint(finished, 4), tmp_path / "step-00000004")
    change_state(folder, **{key: value})
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder)
    assert f"state.json' is missing or damaged: its {key} is " in str(error.value)
    assert len(str(error.value)) < 350


def test_of_a_checkpoint_with_odd_values_the_one_before_is_taken(copied, finished, caplog):
    change_state(checkpoint(copied, 4), step=-4)
    assert train(again(copied)).step == 4
    assert "its step is '-4'; going on from step-00000002" in caplog.text
    assert "damaged checkpoint step-00000004 set aside as damaged-step-00000004" in caplog.text
    assert_same(weights(copied, 4), weights(finished, 4))


def test_a_missing_value_is_named(copied):
    change_state(checkpoint(copied, 4), pending=...)
    assert refused(again(copied, max_steps=6)) == "the checkpoint at step 4 lacks 'pending' in its state"


def test_pending_sums_of_another_shape(copied):
    change_state(checkpoint(copied, 4), pending=[[1.0, 2.0]])
    assert "pending" in refused(again(copied, max_steps=6))


@pytest.mark.parametrize("name", ["model", "ema_0.9999"])
def test_odd_weights_are_named(name, copied):
    file = checkpoint(copied, 4) / f"{name}.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] = tensors["conv_in.bias"].to(torch.int32)
    save_file(tensors, file)
    sealed(file.parent)
    text = refused(again(copied, max_steps=6))
    assert text.startswith("the checkpoint at step 4 is of another network or damaged: 'conv_in.bias' is ")
    assert len(text) < 300


def test_averages_that_are_missing_are_named(copied):
    (checkpoint(copied, 4) / "ema_0.9999.safetensors").unlink()
    sealed(checkpoint(copied, 4))
    assert "damaged: it has no average with decay 0.9999" in refused(again(copied, max_steps=6))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"conv.bias": torch.zeros(2)},
            "'conv.bias' is torch.float32 (2,); the network's is torch.float32 (1,)",
        ),
        ({"conv.bias": torch.zeros(1).double()}, "'conv.bias' is torch.float64 (1,); the network's is"),
        ({"conv.bias": torch.tensor([torch.nan])}, "'conv.bias' is not finite"),
        ({"conv.bias": ...}, "'conv.bias' is missing"),
        ({"intruder": torch.zeros(1)}, "'intruder' is not of the network"),
    ],
    ids=["shape", "dtype", "NaN", "missing", "more"],
)
def test_weights_are_compared_with_the_networks(change, words):
    state = {name: weight for name, weight in (Conv().state_dict() | change).items() if weight is not ...}
    with pytest.raises(ValueError) as error:
        check_weights(state, Conv())
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    "change",
    [
        {"exp_avg": torch.ones(2)},
        {"exp_avg_sq": torch.tensor([-1.0])},
        {"exp_avg": torch.tensor([torch.inf])},
        {"step": torch.tensor(-1.0)},
        {"step": torch.tensor([1.0, 2.0])},
        {"exp_avg": "words"},
        {"exp_avg": ...},
    ],
    ids=str,
)
def test_moments_are_compared_with_the_networks(change):
    whole = {"step": torch.tensor(3.0), "exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}
    check_moments({"state": {"conv.bias": whole}}, Conv())
    moments = {key: value for key, value in (whole | change).items() if value is not ...}
    with pytest.raises((ValueError, TypeError, KeyError)):
        check_moments({"state": {"conv.bias": moments}}, Conv())
    with pytest.raises(ValueError, match="no 'intruder'"):
        check_moments({"state": {"intruder": whole}}, Conv())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["optimizer"].pop("state"),
        lambda state: state["optimizer"].pop("param_groups"),
        lambda state: state["optimizer"].update(state=[1]),
        lambda state: state.pop("optimizer"),
        lambda state: state.update(optimizer=7),
    ],
)
def test_an_odd_state_of_the_optimizer_is_one_line(change, copied):
    file = checkpoint(copied, 4) / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    sealed(file.parent)
    text = refused(again(copied, max_steps=6))
    assert text.startswith("the checkpoint at step 4 is of another network or damaged: ") and len(text) < 300

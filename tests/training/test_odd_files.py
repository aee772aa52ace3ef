"""Lines of a log and values of a checkpoint that no run writes, by a power cut, an editor or an attacker."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ddpm import train
from tests.training.helpers import again, assert_same, checkpoint, log, refused, weights
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
@pytest.mark.parametrize("place", [2, 4], ids=["within", "at the end"])
def test_an_odd_line_is_set_aside_and_named(line, place, copied, finished, caplog):
    file = copied / "log.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines.insert(place, line + b"\n")
    file.write_bytes(b"".join(lines))
    assert train(again(copied, max_steps=4)).step == 4
    assert (
        f"line {place + 1} of {file} is damaged or no line of a run's log: moved to log-odd.json"
        in caplog.text
    )
    assert log(copied) == log(finished) and log(copied, "step") == [1, 2, 3, 4]
    assert (copied / "log-odd.jsonl").read_bytes() == line + b"\n"
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
    caplog.clear()
    (line := lines[0]) and file.exists() and file.write_text(file.read_text().replace(line, line))
    train(again(copied, max_steps=6))
    assert json.loads(file.read_text().splitlines()[-1])["step"] == 6


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
        ("row_counts", 7),
        ("row_counts", ["x" * 5000]),
        ("config", []),
        ("log", {"lines": -1, "sha256": ""}),
        ("own_objective", 7),
    ],
)
def test_an_odd_value_is_named_and_the_checkpoint_before_is_taken(key, value, copied, finished, caplog):
    change_state(checkpoint(copied, 4), **{key: value})
    assert train(again(copied)).step == 4
    assert "state.json' is missing or damaged: its " in caplog.text and f"its {key} is " in caplog.text
    assert "set aside as damaged-step-00000004; going on from step-00000002" in caplog.text
    assert all(len(record.getMessage()) < 700 for record in caplog.records)
    assert_same(weights(copied, 4), weights(finished, 4))


@pytest.mark.parametrize("key", ["images_per_step", "row_counts", "pending", "skipped"])
def test_a_missing_value_is_named(key, copied):
    change_state(checkpoint(copied, 4), **{key: ...})
    text = refused(again(copied, max_steps=6))
    assert text == f"the checkpoint at step 4 lacks {key!r} in its state"


def test_pending_sums_of_another_shape(copied):
    change_state(checkpoint(copied, 4), pending=[[1.0, 2.0]])
    assert "pending" in refused(again(copied, max_steps=6))


@pytest.mark.parametrize("name", ["model", "ema_0.9999"])
@pytest.mark.parametrize("change", ["shape", "dtype", "not finite", "missing", "more", "no file"])
def test_odd_weights_are_named(name, change, copied):
    file = checkpoint(copied, 4) / f"{name}.safetensors"
    tensors = load_file(file)
    weight = "conv_in.bias"
    if change == "shape":
        tensors[weight] = tensors[weight][:1].clone()
    elif change == "dtype":
        tensors[weight] = tensors[weight].to(torch.int32)
    elif change == "not finite":
        tensors[weight][0] = torch.nan
    elif change == "missing":
        del tensors[weight]
    else:
        tensors[weight := "intruder"] = torch.ones(1)
    save_file(tensors, file)
    if change == "no file" and name != "model":
        file.unlink()
        weight = "it has no average with decay 0.9999"
    sealed(file.parent)
    text = refused(again(copied, max_steps=6))
    assert text.startswith("the checkpoint at step 4 is of another network or damaged: ") and len(text) < 300
    assert weight in text


@pytest.mark.parametrize(
    "change",
    [
        lambda state, moments: moments.update(exp_avg=torch.ones(1)),
        lambda state, moments: moments.update(exp_avg_sq=-moments["exp_avg_sq"] - 1),
        lambda state, moments: moments["exp_avg"].fill_(torch.inf),
        lambda state, moments: moments.update(step=torch.tensor(-1.0)),
        lambda state, moments: moments.update(step=torch.tensor([1.0, 2.0])),
        lambda state, moments: moments.update(exp_avg="words"),
        lambda state, moments: moments.pop("exp_avg"),
        lambda state, moments: state["optimizer"].pop("state"),
        lambda state, moments: state["optimizer"].pop("param_groups"),
        lambda state, moments: state["optimizer"].update(state=[1]),
        lambda state, moments: state["optimizer"]["state"].update(intruder={}),
        lambda state, moments: state.pop("optimizer"),
        lambda state, moments: state.update(optimizer=7),
    ],
)
def test_an_odd_state_of_the_optimizer_is_named(change, copied):
    file = checkpoint(copied, 4) / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    change(state, state["optimizer"]["state"]["conv_in.bias"])
    torch.save(state, file)
    sealed(file.parent)
    text = refused(again(copied, max_steps=6))
    assert text.startswith("the checkpoint at step 4 is of another network or damaged: ") and len(text) < 300

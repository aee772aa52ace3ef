"""log.py: what the log says is the same however often a run was stopped, and what stops a run."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_ddpm import TrainConfig
from hf_ddpm.training.curve import draw_curve
from hf_ddpm.training.log import RunLog
from tests.launching import TIMES, together

PER_STEP = 8
PER_EPOCH = 100


@pytest.fixture(scope="module")
def alone():
    return Accelerator(cpu=True)


def record(run, accelerator, first=0, state=None, skipped=list, **changes) -> RunLog:
    run.mkdir(exist_ok=True)
    config = TrainConfig(output_dir=str(run), max_steps=100, **changes)
    it = RunLog(run, accelerator, config, first, PER_STEP, PER_EPOCH, state or {}, skipped)
    it.begin()
    return it


def drawn(step):
    """Losses and quartiles of a step's images, in two micro-steps."""
    generator = torch.Generator().manual_seed(step)
    losses = torch.rand(2, PER_STEP // 2, generator=generator)
    return losses, torch.randint(4, losses.shape, generator=generator)


def note(record, losses, quartiles):
    """A micro-step of uniform t, at which answering zero would cost 1."""
    record.add(losses, torch.ones_like(losses), torch.ones_like(losses), quartiles)


def do(record, *steps, change=lambda step, losses, quartiles: None):
    for step in steps:
        losses, quartiles = drawn(step)
        change(step, losses, quartiles)
        for micro in zip(losses, quartiles, strict=True):
            note(record, *micro)
        record.advance(step)


def lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def untimed(line):
    return {key: value for key, value in line.items() if key not in TIMES}


def through_json(state):
    return json.loads(json.dumps(state))


def test_a_line(tmp_path, alone):
    with record(tmp_path, alone) as it:
        it.grad_norm = torch.tensor(0.5)
        do(it, 1, 2, 3)
        it.log(0.25, 0.75)
    losses, quartiles = (torch.cat([drawn(n)[i].flatten() for n in (1, 2, 3)]).numpy() for i in (0, 1))
    (line,) = lines(tmp_path)
    assert line["images_per_second"] > 0
    assert (line["step"], line["images"], line["lr"], line["ema_decay"]) == (3, 24, 0.25, 0.75)
    assert line["grad_norm"] == 0.5 and "skipped" not in line
    np.testing.assert_allclose(line["loss"], losses.mean(dtype=np.float64), rtol=1e-6)
    assert it.loss == line["loss"]
    for n in range(4):
        mean = losses[quartiles == n].mean(dtype=np.float64)
        np.testing.assert_allclose(line[f"loss_quartile_{n + 1}"], mean, rtol=1e-6)


def test_each_line_is_of_its_own_interval(tmp_path, alone):
    with record(tmp_path, alone) as it:
        for step in (1, 2, 3):
            do(it, step)
            it.log(1.0, 0.0)
    means = [drawn(step)[0].mean().item() for step in (1, 2, 3)]
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path)], means, rtol=1e-6)


def test_a_quartile_without_images_has_no_number(tmp_path, alone):
    with record(tmp_path, alone) as it:
        do(it, 1, change=lambda step, losses, quartiles: quartiles.fill_(2))
        it.log(1.0, 0.0)
    (line,) = lines(tmp_path)
    assert line["loss_quartile_3"] == line["loss"]
    assert not {"loss_quartile_1", "loss_quartile_2", "loss_quartile_4", "grad_norm"} & line.keys()


@pytest.mark.parametrize("stops", [(2,), (1, 3), (1, 2, 3, 4), (4,)])
def test_a_line_is_the_same_to_the_last_bit_however_often_it_was_stopped(tmp_path, alone, stops):
    with record(tmp_path / "whole", alone) as it:
        do(it, *range(1, 6))
        it.log(1.0, 0.0)
    first, state = 0, {}
    for stop in (*stops, 5):
        with record(tmp_path / "parts", alone, first, state) as it:
            do(it, *range(first + 1, stop + 1))
            if stop == 5:
                it.log(1.0, 0.0)
            first, state = stop, through_json(it.state())
    assert [untimed(line) for line in lines(tmp_path / "parts")] == [
        untimed(line) for line in lines(tmp_path / "whole")
    ]
    assert state["pending"] == []


def test_asking_for_the_state_changes_nothing(tmp_path, alone):
    for name in ("asked", "not"):
        with record(tmp_path / name, alone) as it:
            for step in range(1, 6):
                do(it, step)
                if name == "asked":
                    assert it.state() == it.state()
            it.log(1.0, 0.0)
    assert untimed(lines(tmp_path / "asked")[0]) == untimed(lines(tmp_path / "not")[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("ask", ["log", "state"])
def test_the_step_of_a_loss_that_is_not_finite_is_named(tmp_path, alone, bad, ask):
    def spoil(step, losses, quartiles):
        if step in (13, 14):
            losses[1, 2] = bad

    with record(tmp_path, alone, 10, {}) as it, pytest.raises(RuntimeError) as error:
        do(it, *range(11, 16), change=spoil)
        it.log(1.0, 0.0) if ask == "log" else it.state()
    assert str(error.value) == f"the loss is {bad} at step 13; checkpoints from before stand"
    assert lines(tmp_path) == []


def test_the_step_is_named_after_pending_ones(tmp_path, alone):
    with record(tmp_path, alone) as it:
        do(it, 1, 2)
        state = through_json(it.state())
    with record(tmp_path, alone, 2, state) as it, pytest.raises(RuntimeError, match="nan at step 4; "):
        do(it, 3, 4, change=lambda step, losses, quartiles: losses.fill_(math.nan if step == 4 else 1))
        it.log(1.0, 0.0)


def test_max_loss(tmp_path, alone):
    def set_loss(value):
        return lambda step, losses, quartiles: losses.fill_(value)

    with record(tmp_path, alone, max_loss=2.0) as it:
        do(it, 1, change=set_loss(2.0))
        it.log(1.0, 0.0)
        do(it, 2, change=set_loss(3.0))  # the interval's mean counts
        do(it, 3, change=set_loss(0.9))
        it.log(1.0, 0.0)
        do(it, 4, change=set_loss(1.0))
        do(it, 5, change=set_loss(3.5))
        with pytest.raises(RuntimeError) as error:
            it.log(1.0, 0.0)
    assert str(error.value) == (
        "the mean loss of steps 4 to 5 is 2.25, above max_loss 2 times the 1 of guessing zero; "
        "checkpoints from before stand"
    )
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_images_that_could_not_be_read_are_counted_across_stops(tmp_path, alone):
    def holes(step, losses, quartiles):
        quartiles[0, :step] = -1
        losses[0, :step] = 1e6  # of an empty slot, and nobody's

    rows = [7]  # however often its place comes round
    with record(tmp_path, alone, skipped=lambda: rows) as it:
        do(it, 1, change=holes)
        it.log(1.0, 0.0)
        do(it, 2, change=holes)
        rows = [3, 7]
        state = through_json(it.state())
    assert state["skipped_rows"] == [3, 7] and state["skipped"] == 2
    with record(tmp_path, alone, 2, state, lambda: rows) as it:
        assert it.skipped == 2
        do(it, 3, change=holes)
        it.log(1.0, 0.0)
    assert [line["skipped"] for line in lines(tmp_path)] == [1, 2] and it.skipped == 2
    kept = np.concatenate([drawn(n)[0].flatten()[n:] for n in (2, 3)])
    np.testing.assert_allclose(lines(tmp_path)[-1]["loss"], kept.mean(dtype=np.float64), rtol=1e-6)


def test_an_epoch_without_any_image_stops_the_run(tmp_path, alone):
    steps = -(-PER_EPOCH // PER_STEP)
    with record(tmp_path, alone) as it, pytest.raises(RuntimeError) as error:
        for step in range(1, steps + 1):
            do(it, step, change=lambda step, losses, quartiles: quartiles.fill_(-1))
            it.log(1.0, 0.0)
    assert str(error.value) == f"no image of an epoch up to step {steps} could be read"
    assert len(lines(tmp_path)) == steps - 1
    assert all("loss" not in line for line in lines(tmp_path))


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_norm_that_is_not_finite_is_left_out(tmp_path, alone, norm):
    with record(tmp_path, alone) as it:
        it.grad_norm = torch.tensor(norm)
        do(it, 1)
        it.log(1.0, 0.0)
    assert "grad_norm" not in lines(tmp_path)[0]


def test_lines_past_the_step_and_half_ones_are_dropped(tmp_path, alone):
    whole = '{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 4, "heldout_bpd": 3}\n'
    half = '{"step": 4, "lo\n12\n[]\nnull\n{"loss": 1}\n\x00\x00\n'
    (tmp_path / "log.jsonl").write_text(whole + half + '{"step": 6, "loss": 1}\n{"step": 6, "lo')
    with record(tmp_path, alone, 4) as it:
        assert (tmp_path / "log.jsonl").read_text() == whole
        do(it, 5)
        it.log(1.0, 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 4, 5]


def test_a_log_that_a_power_cut_spoiled(tmp_path, alone):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 2, "loss": 1}\n\xff\xfe{"st')
    with record(tmp_path, alone, 2) as it:
        assert it.has(2, "loss")
    assert lines(tmp_path) == [{"step": 2, "loss": 1}]


def test_has(tmp_path, alone):
    with record(tmp_path, alone) as it:
        assert not it.has(0, "loss")
        do(it, 1)
        it.log(1.0, 0.0)
        it.note({"heldout_bpd": 3.0, "step": 9})
        assert it.has(1, "loss") and it.has(1, "heldout_bpd")
        assert not it.has(2, "loss") and not it.has(1, "other") and not it.has(9, "heldout_bpd")
        (tmp_path / "log.jsonl").unlink()
        assert not it.has(1, "loss")


def test_the_config_lies_beside_the_log(tmp_path, alone):
    with record(tmp_path, alone, seed=7) as it:
        pass
    assert TrainConfig.load(tmp_path / "train_config.json") == it.config


def test_pauses_are_no_training(tmp_path, alone, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_ddpm.training.log.time.perf_counter", lambda: now[0])
    with record(tmp_path, alone) as it:
        for step in (1, 2):
            do(it, step)
            now[0] += 2
            it.log(1.0, 0.0)
            with it.paused():
                now[0] += 100
    assert [line["images_per_second"] for line in lines(tmp_path)] == [PER_STEP / 2] * 2
    assert it.images_per_second == PER_STEP / 2
    assert [line["seconds"] for line in lines(tmp_path)] == [2, 104]  # of the whole, pauses and all


def test_the_seconds_of_a_run_go_on_where_its_log_stands(tmp_path, alone, monkeypatch):
    now = [50.0]
    monkeypatch.setattr("hf_ddpm.training.log.time.perf_counter", lambda: now[0])
    first, state = 0, {}
    for _ in range(3):  # killed after step 2 of its sitting, whose checkpoint is that of step 1
        with record(tmp_path, alone, first, state) as it:
            now[0] += 10
            do(it, first + 1)
            it.log(1.0, 0.0)
            first, state = first + 1, through_json(it.state())
            now[0] += 10
            do(it, first + 1)
            it.log(1.0, 0.0)
        now[0] += 1000
    assert [(line["step"], line["seconds"]) for line in lines(tmp_path)] == [
        (1, 10),
        (2, 20),
        (3, 30),
        (4, 40),
    ]


def test_the_curve(tmp_path, alone):
    with record(tmp_path, alone) as it:
        (tmp_path / "log.jsonl").touch()
        draw_curve(tmp_path)
        assert not (tmp_path / "training.png").exists()  # the log says nothing yet
        do(it, 1, 2)
        it.log(1.0, 0.0)
        draw_curve(tmp_path)
        narrow = Image.open(tmp_path / "training.png").size
        it.note({"heldout_bpd": 5.0, "heldout_stderr": 0.1})
        it.note({"heldout_bpd": 5.0})  # of one image
        draw_curve(tmp_path)
        wide = Image.open(tmp_path / "training.png").size
    assert wide[0] > narrow[0] and wide[1] == narrow[1]


def half_of_each(run):
    """One of two processes, which has half of each step's images."""
    accelerator = Accelerator(cpu=True)
    with record(run, accelerator) as it:
        for step in (1, 2):
            losses, quartiles = drawn(step)
            note(it, losses[accelerator.process_index], quartiles[accelerator.process_index])
            it.advance(step)
        state = it.state()
        it.log(1.0, 0.0)
    return state, it.loss


@pytest.mark.distributed
def test_two_processes_note_the_sums_of_both(tmp_path, alone):
    first, second = together(tmp_path, half_of_each, tmp_path / "two")
    assert first == second
    with record(tmp_path / "one", alone) as it:
        do(it, 1, 2)
        it.log(1.0, 0.0)
    (two,), (one,) = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert two.keys() == one.keys()
    np.testing.assert_allclose(*(list(untimed(line).values()) for line in (two, one)), rtol=1e-6)

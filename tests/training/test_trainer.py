"""trainer.py and step.py: real runs of a tiny network against a training loop written out by hand."""

import os
import traceback

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ddpm import DDPMPipeline, TrainingStopped, train
from hf_ddpm.training.checkpoint import load_checkpoint
from tests.training.helpers import Conv, assert_rounded, assert_same, by_hand, checkpoint, log, small, weights


@pytest.mark.parametrize(
    "changes",
    [
        {
            "max_grad_norm": 0.5,
            "weight_decay": 0.1,
            "adam_beta1": 0.8,
            "adam_beta2": 0.9,
            "adam_epsilon": 1e-6,
        },
        {"lr_warmup_steps": 2, "ema_decay": "0.2", "seed": 5},
        {"gradient_accumulation_steps": 2, "batch_size": 8, "max_steps": 2},
        {"dropout": 0.2, "horizontal_flip": True, "max_grad_norm": 0.0},
    ],
    ids=["adamw and clip", "warm-up and ema", "accumulation", "dropout and flip"],
)
def test_three_steps_are_those_of_a_bare_loop(tmp_path, changes):
    config = small(tmp_path, **changes)
    train(config)
    losses, model, average, optimizer = by_hand(config)
    step, per_step = config.max_steps, config.batch_size * config.gradient_accumulation_steps
    assert_same(weights(tmp_path, step), dict(model.state_dict()))
    assert_rounded(weights(tmp_path, step, f"ema_{config.ema_decay}"), average)
    saved = load_checkpoint(checkpoint(tmp_path, step)).optimizer["optimizer"]
    by_number = optimizer.state_dict()["state"]
    assert_same(saved["state"], {name: by_number[i] for i, name in enumerate(average)})
    np.testing.assert_allclose(log(tmp_path), np.array(losses).mean(1), rtol=1e-6)
    assert log(tmp_path, "images") == [per_step * (n + 1) for n in range(step)]


@pytest.mark.parametrize("target", ["sample", "v_prediction", "mean", "score"])
def test_other_targets(tmp_path, target):
    config = small(tmp_path, prediction_type=target, max_steps=2)
    train(config)
    losses, *_ = by_hand(config, target=target)
    np.testing.assert_allclose(log(tmp_path), np.array(losses).mean(1), rtol=1e-5)
    assert DDPMPipeline.from_pretrained(tmp_path).scheduler.config["prediction_type"] == target


def test_the_loss_falls(tmp_path):
    train(small(tmp_path, max_steps=40, batch_size=16, learning_rate=4e-3, checkpoint_every=100))
    late = np.array(log(tmp_path))[-20:]
    error = late.std(ddof=1) / np.sqrt(20)
    assert late.mean() + 5 * error < 0.6  # a network that answers 0 has loss 1, and so begins this one
    assert log(tmp_path)[0] > 0.9


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("constant", lambda n: 1),
        ("constant_with_warmup", lambda n: min(1, n / 2)),
        ("linear", lambda n: n / 2 if n < 2 else (6 - n) / 4),
        ("cosine", lambda n: n / 2 if n < 2 else (1 + np.cos(np.pi * (n - 2) / 4)) / 2),
    ],
)
def test_learning_rates(tmp_path, name, factor):
    warmup = 0 if name == "constant" else 2
    train(small(tmp_path, lr_scheduler=name, lr_warmup_steps=warmup, max_steps=6), Conv())
    np.testing.assert_allclose(
        log(tmp_path, "lr"), [1e-3 * factor(n) for n in range(6)], rtol=1e-12, atol=1e-18
    )


def test_a_warm_up_longer_than_the_run_is_pointed_out(tmp_path, caplog):
    train(small(tmp_path, lr_warmup_steps=500), Conv())
    assert "lr_warmup_steps is 500 in a run of max_steps 3" in caplog.text


def test_a_chain_that_ends_short_of_noise_is_pointed_out(tmp_path, caplog):
    train(small(tmp_path, num_train_timesteps=10, max_steps=1), Conv())
    assert "bits/dim short of pure noise" in caplog.text


def test_losses_are_averaged_over_the_logged_interval(tmp_path):
    train(small(tmp_path / "each", max_steps=5), Conv())
    train(small(tmp_path / "some", max_steps=5, log_every=2), Conv())
    each = log(tmp_path / "each")
    assert log(tmp_path / "some", "step") == [2, 4, 5]
    expected = [np.mean(each[:2]), np.mean(each[2:4]), each[4]]
    np.testing.assert_allclose(log(tmp_path / "some"), expected, rtol=1e-6)


def test_buffers_are_those_of_the_last_step_in_the_average(tmp_path):
    class Normed(Conv):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x_t, t):
            return self.norm(self.conv(x_t))

    train(small(tmp_path), Normed())
    model, ema = weights(tmp_path, 3), weights(tmp_path, 3, "ema_0.9999")
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert_same(ema[name], model[name])
    assert model["norm.num_batches_tracked"] == 3


def test_the_environment_does_not_overrule_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    model = Conv()
    train(small(tmp_path, max_steps=1), model)
    assert not torch.equal(model.conv.weight, Conv().conv.weight)


class ReadBacks(TorchDispatchMode):
    """Counts the times that a tensor's value is read by Python, as `.item()`, `float()` and `if` do.

    Left out are those that only ever read tensors of the CPU: AdamW's step counters, the checks of t, which
    trust other devices, and the epoch that `datasets` keeps in shared memory.
    """

    IGNORED = (
        *(f"{os.sep}torch{os.sep}optim{os.sep}", f"hf_ddpm{os.sep}tables.py"),
        *(f"datasets{os.sep}iterable_dataset.py", f"likelihood{os.sep}bound.py"),
    )
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            files = [frame.filename for frame in traceback.extract_stack()]
            self.count += not any(part in file for file in files for part in self.IGNORED)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "bound", "t_sampler": "importance", "variance_type": "learned_range"},
        {"objective": "sddpm", "prediction_type": "mean"},
    ],
    ids=["simple", "bound", "sddpm"],
)
def test_nothing_is_read_back_between_logs(tmp_path, changes):
    mode, counts = ReadBacks(), []

    def watch(run):
        if run.step == 1:
            mode.__enter__()
        if run.step in (3, 4):
            counts.append(mode.count)
        if run.step == 4:
            mode.__exit__(None, None, None)

    plan = {"max_steps": 4, "log_every": 3, "gradient_accumulation_steps": 2, "batch_size": 2}
    train(small(tmp_path, **plan, **changes), after_step=watch)
    between, logged = counts
    assert between == 0 and logged >= 2  # the logging, in between, is seen to read loss and norm


def test_after_step_sees_the_run_at_each_step(tmp_path):
    seen = []

    def look(run):
        model, average = (dict(net.state_dict()) for net in (run.model, run.averages["0.5"]))
        seen.append((run.step, run.config, {name: weight.clone() for name, weight in model.items()}))
        assert model.keys() == average.keys()
        assert len(log(tmp_path) if run.step > 1 else []) == run.step - 1

    config = small(tmp_path, ema_decay="0.5", checkpoint_every=1, mixed_precision="no")
    train(config, after_step=look)
    assert [(step, config) for step, config, _ in seen] == [(n, config) for n in (1, 2, 3)]
    for step, _, model in seen[1:]:
        assert_same(model, weights(tmp_path, step))


def test_what_after_step_raises_ends_the_run(tmp_path):
    def stop(run):
        if run.step == 2:
            raise LookupError("enough")

    config = small(tmp_path, checkpoint_every=1)
    with pytest.raises(LookupError, match="enough"):
        train(config, Conv(), after_step=stop)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert train(config, Conv()).step == 3  # the folder is free, and the run goes on


def test_a_hook_may_raise_what_a_signal_raises(tmp_path):
    """It is handed on as any other error, and nothing claims that the run is saved."""

    def stop(run):
        raise TrainingStopped("enough")

    with pytest.raises(TrainingStopped, match=r"^enough$"):
        train(small(tmp_path), Conv(), after_step=stop)
    assert not (tmp_path / "checkpoints").exists()

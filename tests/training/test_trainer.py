"""trainer.py, build.py, record.py: real runs of a tiny network, and a training loop written out by hand."""

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Array3D, Dataset, Features
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_ddpm.training.exports
import hf_ddpm.training.trainer
from hf_ddpm import DDPMPipeline, TrainConfig, create_model, load_stream, train
from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.training.checkpoint import load_checkpoint
from hf_ddpm.training.log import Record
from tests.launching import forked


def small(folder: Path, **changes) -> TrainConfig:
    """A run of three quick steps, changed."""
    values = {
        **{"model": "tiny", "batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "shuffle_buffer": 32},
        **{"lr_warmup_steps": 0, "log_every": 1, "sample_every": 0, "output_dir": str(folder)},
    }
    return TrainConfig(**(values | changes))


class Conv(nn.Module):
    """The cheapest network: what it learns doesn't matter."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x_t, t):
        return self.conv(x_t)


def log(folder: Path, key: str = "loss") -> list:
    return [json.loads(line)[key] for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def weights(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(checkpoint(folder, step) / f"{name}.safetensors")


def assert_same(a, b) -> None:
    """Equal to the last bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def refused(*args, kind: type[Exception] = ValueError, **kwargs) -> str:
    with pytest.raises(kind) as error:
        train(*args, **kwargs)
    assert type(error.value) is kind and "\n" not in str(error.value)
    return str(error.value)


def kill_at(monkeypatch, step: int) -> None:
    """End the run as Ctrl-C would, right after it has done `step` steps, before it logs or saves them."""
    advance = Record.advance

    def killed(self, done):
        advance(self, done)
        if done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Record, "advance", killed)


# Algorithm 1


def drawn(seed: int, position: int, shape: tuple[int, ...]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """What the run draws for the image at a position: t, ε, and another ε for objectives that take two."""
    block, place = divmod(position, 1024)
    uniform, *words = (np.random.default_rng((use, seed, block)).random(1024)[place] for use in (6, 7, 8))
    generators = (torch.Generator().manual_seed(int(word * 2**53)) for word in words)
    return int(uniform * 1000), *(torch.randn(shape, generator=generator) for generator in generators)


def by_hand(
    config: TrainConfig, target: str = "epsilon", images_per_step: int | None = None, loss=None, outputs=1
):
    """Ho et al. 2020, algorithm 1, written out in PyTorch; (losses, network, averaged weights, optimizer).

    It gives each step's losses; `images_per_step` are split into micro-steps of the config's batch size.
    `loss` is another objective, a function of (model, x_0, t, ε, ε'), for a network of so many `outputs`.
    """
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    a, s = (torch.from_numpy(np.sqrt(table)).float() for table in (alpha_bar, 1 - alpha_bar))
    torch.manual_seed(config.seed)
    model = create_model("tiny", dropout=config.dropout, out_channels=outputs).train()
    average = [weight.detach().clone() for weight in model.parameters()]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    stream = load_stream(
        "digits",
        horizontal_flip=config.horizontal_flip,
        shuffle_buffer=config.shuffle_buffer,
        seed=config.seed,
    ).batches(config.batch_size)
    losses, position, decay = [], 0, float(config.ema_decay)
    per_step = images_per_step or config.batch_size * config.gradient_accumulation_steps
    for n in range(config.max_steps):
        losses.append([])
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, n / max(1, config.lr_warmup_steps))
            group["lr"] = group["lr"] if config.lr_warmup_steps else config.learning_rate
        for micro in range(per_step // config.batch_size):
            x_0 = next(stream).float() / 127.5 - 1
            draws = [drawn(config.seed, position + i, (1, 8, 8)) for i in range(len(x_0))]
            position += len(x_0)
            t, eps, more = (torch.stack([*map(torch.as_tensor, z)]) for z in zip(*draws, strict=True))
            words = (config.seed, n, micro, 0)
            torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1)
            at, st = a[t].view(-1, 1, 1, 1), s[t].view(-1, 1, 1, 1)
            if loss is None:
                output = model(at * x_0 + st * eps, t).sample
                wanted = {"epsilon": eps, "sample": x_0, "v_prediction": at * eps - st * x_0}
                wanted |= {"score": -eps / st, "mean": posterior_mean(x_0, at * x_0 + st * eps, t)}
                each = (output - wanted[target]).square().mean((1, 2, 3))
            else:
                each = loss(as_denoiser(model), x_0, t, eps, more)
            (each.sum() * (1 / per_step)).backward()
            losses[-1] += each.tolist()
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        # the average begins as a copy of the first step's weights, as diffusers' does
        kept = min(decay, (1 + n) / (10 + n)) if n else 0.0
        with torch.no_grad():
            for mean, weight in zip(average, model.parameters(), strict=True):
                mean.lerp_(weight, 1 - kept)
    names = [name for name, _ in model.named_parameters()]
    return losses, model, dict(zip(names, average, strict=True)), optimizer


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
    assert_same(weights(tmp_path, step, f"ema_{config.ema_decay}"), average)
    saved = load_checkpoint(checkpoint(tmp_path, step)).optimizer["optimizer"]
    by_number = optimizer.state_dict()["state"]
    assert_same(saved["state"], {name: by_number[i] for i, name in enumerate(average)})
    np.testing.assert_allclose(log(tmp_path), np.array(losses).mean(1), rtol=1e-6)
    assert log(tmp_path, "images") == [per_step * (n + 1) for n in range(step)]


def posterior_mean(x_0, x_t, t):
    """μ̃_t by the precisions of its two factors, in numpy."""
    beta = np.linspace(1e-4, 0.02, 1000)[t].reshape(-1, 1, 1, 1)
    before = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t].reshape(-1, 1, 1, 1) / (1 - beta)
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (1 - beta) / beta, 1 / (1 - before)
        mean = (one * x_t.numpy() / np.sqrt(1 - beta) + two * np.sqrt(before) * x_0.numpy()) / (one + two)
    first = t.numpy().reshape(-1, 1, 1, 1) == 0
    return torch.from_numpy(np.where(first, x_0.numpy(), mean)).float()


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
        *(f"datasets{os.sep}iterable_dataset.py", f"hf_ddpm{os.sep}bound.py"),
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
def test_nothing_is_read_back_between_logs(tmp_path, monkeypatch, changes):
    mode, (advance, write) = ReadBacks(), (Record.advance, Record.log)

    def entering(self, step):
        advance(self, step)
        if step == 1:
            mode.__enter__()

    def leaving(self, *numbers):
        mode.__exit__(None, None, None)
        seen.append(mode.count)
        with mode:
            write(self, *numbers)

    seen = []
    monkeypatch.setattr(Record, "advance", entering)
    monkeypatch.setattr(Record, "log", leaving)
    train(small(tmp_path, max_steps=3, log_every=3, gradient_accumulation_steps=2, batch_size=2, **changes))
    assert seen == [0] and mode.count >= 2  # and the logging itself is seen to read loss and norm


# Going on


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "dropout": 0.2, "horizontal_flip": True}
        | {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "shuffle_buffer": 16, "channels_last": True},
    ],
    ids=["plain", "everything"],
)
def test_a_killed_run_goes_on_to_the_last_bit(tmp_path, monkeypatch, changes):
    plan = {"max_steps": 8, "checkpoint_every": 4, "batch_size": 2, **changes}
    train(small(tmp_path / "whole", **plan))
    config = small(tmp_path / "parts", **plan)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 6)
        train(config)
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    result = train(config)
    assert (result.step, result.images) == (8, 8 * 2 * config.gradient_accumulation_steps)
    whole, parts = (load_checkpoint(checkpoint(tmp_path / name, 8)) for name in ("whole", "parts"))
    assert_same(dict(parts.model), dict(whole.model))
    assert_same(dict(parts.averages), dict(whole.averages))
    assert_same(parts.optimizer["optimizer"]["state"], whole.optimizer["optimizer"]["state"])
    assert parts.optimizer["optimizer"]["param_groups"] == whole.optimizer["optimizer"]["param_groups"]
    for key in ("step", "images", "loss", "lr", "grad_norm"):
        assert log(tmp_path / "parts", key) == log(tmp_path / "whole", key)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of four steps with checkpoints 2 and 4; treat it as read-only, or copy it."""
    folder = tmp_path_factory.mktemp("finished")
    train(small(folder, max_steps=4, checkpoint_every=2, num_train_timesteps=100, beta_end=0.2))
    return folder


def again(folder: Path, **changes) -> TrainConfig:
    plan = {"max_steps": 4, "checkpoint_every": 2, "num_train_timesteps": 100, "beta_end": 0.2}
    return small(folder, **(plan | changes))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    for path in finished.rglob("*"):
        if path.is_file():
            target = tmp_path / "run" / path.relative_to(finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "run"


def test_a_finished_run_has_nothing_to_do(copied):
    def files():
        skip = ("train_config.json", "state.json")  # they name the folder
        return {p: p.read_bytes() for p in copied.rglob("*") if p.is_file() and p.name not in skip}

    before = files()
    result = train(again(copied))
    assert (result.step, result.images) == (4, 16)
    assert np.isnan(result.loss) and np.isnan(result.images_per_second)
    assert files() == before


def test_a_pipeline_that_a_kill_left_out_is_written(copied):
    weight = copied / "unet" / "diffusion_pytorch_model.safetensors"
    saved = weight.read_bytes()
    weight.write_bytes(b"of step 2")
    train(again(copied))
    assert weight.read_bytes() == saved


def test_a_run_may_be_made_longer(copied, tmp_path):
    result = train(again(copied, max_steps=5, checkpoint_every=1, log_every=1, keep_checkpoints=1))
    assert result.step == 5 and log(copied, "step") == [1, 2, 3, 4, 5]
    assert [path.name for path in (copied / "checkpoints").iterdir()] == ["step-00000005"]
    train(again(tmp_path / "whole", max_steps=5))
    assert_same(weights(copied, 5), weights(tmp_path / "whole", 5))


def test_a_schedule_that_ends_elsewhere_is_pointed_out(tmp_path, caplog):
    train(small(tmp_path, lr_scheduler="linear", max_steps=2), Conv())
    train(small(tmp_path, lr_scheduler="linear", max_steps=4), Conv())
    assert "max_steps 2 -> 4 moves the end of the linear schedule" in caplog.text
    np.testing.assert_allclose(log(tmp_path, "lr"), [1e-3, 5e-4, 5e-4, 2.5e-4])


def test_another_config_is_refused(finished):
    text = refused(again(finished, batch_size=8, dropout=0.1))
    assert f"checkpoint '{checkpoint(finished, 4)}' is of another run" in text
    assert "(dropout None -> 0.1, batch_size 4 -> 8)" in text


def test_never_is_refused_where_a_run_is(finished):
    text = refused(again(finished, resume="never"))
    assert text == f"output_dir '{finished}' holds a run at step 4; resume 'auto' goes on with it"


def test_resume_from_a_named_checkpoint(finished, tmp_path):
    train(again(tmp_path, resume=str(checkpoint(finished, 2))))
    for name in ("model", "ema_0.9999"):
        assert_same(weights(tmp_path, 4, name), weights(finished, 4, name))
    assert log(tmp_path, "loss") == log(finished, "loss")[2:]


def test_a_run_from_a_named_checkpoint_goes_on_with_the_same_command(finished, tmp_path, monkeypatch):
    config = again(tmp_path, resume=str(checkpoint(finished, 2)), max_steps=6, checkpoint_every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 5)
        train(config)
    assert train(config).step == 6
    assert log(tmp_path, "loss")[:2] == log(finished, "loss")[2:]


@pytest.mark.parametrize("extra", [1, 3])
def test_a_data_set_that_has_changed_is_refused(tmp_path, extra):
    data = folder_of_images(tmp_path / "data", 6, (8, 8))
    plan = {"dataset": str(data), "checkpoint_every": 1}
    train(small(tmp_path / "run", **plan, max_steps=1), Conv())
    for number in range(extra):
        shutil.copy(data / "train" / "000.png", data / "train" / f"new{number}.png")
    text = refused(small(tmp_path / "run", **plan, max_steps=2), Conv())
    assert text.startswith(
        f"the data set has {6 + extra} rows in shards of {6 + extra}, the run began with 6 in "
    )


def test_several_averages(tmp_path):
    train(small(tmp_path, ema_decay="0.9,0", max_steps=3))
    first, last = weights(tmp_path, 3, "ema_0.9"), weights(tmp_path, 3, "ema_0")
    assert_same(last, weights(tmp_path, 3))  # decay 0 is the network itself
    assert any(not torch.equal(first[name], last[name]) for name in first)
    for loader in (DDPMPipeline, diffusers.DDPMPipeline):
        assert_same(dict(loader.from_pretrained(tmp_path).unet.state_dict()), first)
        assert_same(dict(loader.from_pretrained(tmp_path, variant="ema_0").unet.state_dict()), last)
    train(small(tmp_path, ema_decay="0.9,0", max_steps=4))
    assert_same(weights(tmp_path, 4, "ema_0"), weights(tmp_path, 4))


def test_a_decay_with_a_point_is_found_as_a_variant(tmp_path):
    train(small(tmp_path, ema_decay="0.9,0.25", max_steps=3))
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path, variant="ema_0_25").unet
    assert_same(dict(loaded.state_dict()), weights(tmp_path, 3, "ema_0.25"))


def test_the_norm_is_logged_where_nothing_is_clipped(tmp_path):
    train(small(tmp_path / "clipped", max_grad_norm=1e9), Conv())
    train(small(tmp_path / "free", max_grad_norm=0.0), Conv())
    assert log(tmp_path / "free", "grad_norm") == log(tmp_path / "clipped", "grad_norm")
    assert_same(weights(tmp_path / "free", 3), weights(tmp_path / "clipped", 3))


def test_one_image_a_step_of_which_one_is_corrupt(tmp_path):
    data = folder_of_images(tmp_path / "data", 4, (8, 8))
    (data / "train" / "001.png").write_bytes(b"no image")
    plan = {"dataset": str(data), "shuffle_buffer": 0, "skip_corrupt": True, "batch_size": 1, "max_steps": 5}
    train(small(tmp_path / "run", **plan, checkpoint_every=1), Conv())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["loss" in line for line in lines] == [True, False, True, True, True]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_log_on_a_full_disk(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    config = small(tmp_path, max_steps=4, checkpoint_every=2, log_every=2)
    begin = Record.__init__

    def filled(self, *args):
        begin(self, *args)
        self._file = Path("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "__init__", filled)
        assert refused(config, Conv(), kind=OSError) == "can't write '/dev/full': No space left on device"
    assert train(config, Conv()).step == 4


def test_an_older_checkpoint_does_not_overwrite_a_run(finished):
    text = refused(again(finished, resume=str(checkpoint(finished, 2))))
    assert f"but output_dir '{finished}' holds a run at step 4; allowed: its newest checkpoint, or" in text
    assert checkpoint(finished, 4).is_dir()


def test_one_training_at_a_time_in_a_folder(tmp_path):
    hold = "import sys, fcntl; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX)"
    script = f"{hold}; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        assert refused(small(tmp_path)) == f"output_dir '{tmp_path}' is in use by another training"
        other.stdin.close()
    assert train(small(tmp_path, max_steps=1), Conv()).step == 1


def test_resume_from_nowhere(tmp_path):
    assert refused(small(tmp_path, resume=str(tmp_path / "none"))) == (
        f"checkpoint '{tmp_path / 'none'}' does not exist"
    )


def test_a_pipeline_without_checkpoints_is_not_overwritten(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "holds a pipeline, but no checkpoint" in refused(small(tmp_path))
    assert (tmp_path / "model_index.json").read_text() == "{}"


@pytest.mark.parametrize(
    "name", ["state.json", "model.safetensors", "ema_0.9999.safetensors", "optimizer.pt", "SHA256SUMS"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(copied, finished, name, caplog):
    file = checkpoint(copied, 4) / name
    file.write_bytes(file.read_bytes()[:20])
    assert train(again(copied)).step == 4
    assert f"checkpoint file '{file}' is missing or damaged" in caplog.text
    assert "set aside as damaged-step-00000004; going on from step-00000002" in caplog.text
    assert_same(weights(copied, 4), weights(finished, 4))
    assert log(copied) == log(finished)


def test_a_checkpoint_of_another_network(copied):
    # max_steps may change, so it gets as far as the weights
    assert "the checkpoint at step 4 is of another network" in refused(again(copied, max_steps=6), Conv())


def test_the_saved_config_repeats_the_run(finished, tmp_path):
    config = TrainConfig.load(finished / "train_config.json", output_dir=str(tmp_path))
    assert config == again(tmp_path, mixed_precision="no")  # what was meant by None, resolved
    train(config)
    assert_same(weights(tmp_path, 4), weights(finished, 4))


# What a run leaves


def test_a_pipeline_at_every_checkpoint(tmp_path, monkeypatch):
    seen, wait = [], hf_ddpm.training.exports.update_folder

    def look(folder, fill, last):
        wait(folder, fill, last)
        step = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
        unet = DDPMPipeline.from_pretrained(folder).unet.state_dict()
        assert_same(dict(unet), weights(folder, step, "ema_0.9999"))
        seen.append(step)

    monkeypatch.setattr(hf_ddpm.training.exports, "update_folder", look)
    train(small(tmp_path, max_steps=5, checkpoint_every=2, keep_checkpoints=2))
    assert seen == [2, 4, 5]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000005",
    ]
    top = {
        ".lock",
        "checkpoints",
        "scheduler",
        "unet",
        "log.jsonl",
        "model_index.json",
        "train_config.json",
        "training.png",
    }
    assert {path.name for path in tmp_path.iterdir()} == top


def test_plain_diffusers_gets_the_same_constant_betas(tmp_path):
    train(small(tmp_path, beta_schedule="constant", beta_start=0.03, max_steps=1, num_train_timesteps=200))
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert_same(scheduler.betas, torch.full((200,), 0.03))
    assert isinstance(pipeline.unet, diffusers.UNet2DModel)


def test_grids_are_png_files_and_repeat(tmp_path):
    plan = {"max_steps": 2, "sample_every": 1, "sample_num_images": 5, "sample_steps": 2}
    train(small(tmp_path / "a", **plan))
    train(small(tmp_path / "b", **plan, batch_size=4, trackers=""))
    names = ["step-00000001.png", "step-00000002.png"]
    assert sorted(path.name for path in (tmp_path / "a" / "samples").iterdir()) == names
    a, b = (np.asarray(Image.open(tmp_path / run / "samples" / names[1])) for run in "ab")
    assert np.array_equal(a, b) and a.std() > 0
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "a")
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    images = pipeline(5, generators, 2, return_dict=False)[0]
    corner = np.asarray(images[0].convert("RGB").resize((96, 96), Image.Resampling.NEAREST))
    assert np.abs(a[4:100, 4:100].astype(int) - corner).max() <= 1  # batches of 4 and 1 there


def test_tensorboard(tmp_path):
    train(
        small(tmp_path, trackers=" tensorboard ", sample_every=3, sample_num_images=2, sample_steps=2), None
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(
        path.parent for path in (tmp_path / "hf_ddpm").rglob("events*") if path.parent.name == "hf_ddpm"
    )
    events = EventAccumulator(str(folder)).Reload()
    quartiles = {f"loss_quartile_{number}" for number in (1, 2, 3, 4)}
    names = {"images", "loss", "lr", "ema_decay", "images_per_second", "seconds", "grad_norm"}
    assert set(events.Tags()["scalars"]) == names | quartiles
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], log(tmp_path), rtol=1e-6)
    picture = next(tag for tag in events.Tags()["images"] if tag.startswith("samples"))
    with Image.open(tmp_path / "samples" / "step-00000003.png") as grid:
        image = events.Images(picture)[0]
        assert (image.step, image.width, image.height) == (3, *grid.size)


def test_an_unknown_tracker(tmp_path):
    text = refused(small(tmp_path / "run", trackers="tensorboard,wandbb"))
    assert text.startswith("tracker 'wandbb' is unknown or not installed; available: ")
    assert not (tmp_path / "run").exists()


def test_an_output_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        text = refused(small(folder))
        assert text.startswith(f"output_dir '{folder}' can't be written: ")
    assert (tmp_path / "file").read_text() == "kept"


def test_progress_is_one_bar(tmp_path, capsys):
    result = train(small(tmp_path, max_steps=2), Conv())
    bar = capsys.readouterr().err.split("\r")[-1]
    assert "train: 100%" in bar and "8/8" in bar  # images
    assert f"step 2, loss {result.loss:.4f}" in bar and "image/s" in bar
    assert result.images_per_second > 0 and result.loss == log(tmp_path)[-1]


# How it runs


def test_bfloat16_keeps_float32_where_it_counts(tmp_path):
    seen = set()

    class Watched(Conv):
        def forward(self, x_t, t):
            answer = self.conv(x_t)
            seen.add((x_t.dtype, answer.dtype))
            return answer

    model = Watched()
    train(small(tmp_path, mixed_precision="bf16"), model)
    assert seen == {(torch.float32, torch.bfloat16)}
    assert model(torch.zeros(1, 1, 8, 8), None).dtype == torch.float32  # given back without the autocast
    saved = load_checkpoint(checkpoint(tmp_path, 3))
    moments = [value for state in saved.optimizer["optimizer"]["state"].values() for value in state.values()]
    for tensor in (*saved.model.values(), *saved.averages["0.9999"].values(), *moments):
        assert tensor.dtype == torch.float32


def test_noise_near_t_0_in_bfloat16(tmp_path):
    """The network sees √ᾱ_t x_0 + √(1 − ᾱ_t) ε in float32, where bfloat16 would round all of ε away."""
    seen = []

    class Watched(Conv):
        def forward(self, x_t, t):
            seen.append((x_t.double(), t))
            return self.conv(x_t)

    config = small(tmp_path, mixed_precision="bf16", batch_size=64, max_steps=20, shuffle_buffer=0)
    train(config, Watched())
    x_t, t = (torch.cat(parts) for parts in zip(*seen, strict=True))
    stream = load_stream("digits").batches(64)
    x_0 = torch.cat([next(stream) for _ in range(20)]).double() / 127.5 - 1
    draws = [drawn(config.seed, position, (1, 8, 8)) for position in range(len(x_0))]
    assert t.tolist() == [step for step, *_ in draws] and (t < 10).sum() > 5
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t].view(-1, 1, 1, 1)
    eps = torch.stack([noise for _, noise, _ in draws]).double()
    wanted = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    torch.testing.assert_close(x_t, wanted, rtol=0, atol=1e-6)


def test_precisions_in_one_process(tmp_path, monkeypatch):
    train(small(tmp_path / "no"), Conv())
    train(small(tmp_path / "bf16", mixed_precision="bf16"), Conv())
    train(small(tmp_path / "none"), Conv())
    assert log(tmp_path / "none") == log(tmp_path / "no") != log(tmp_path / "bf16")
    np.testing.assert_allclose(log(tmp_path / "bf16"), log(tmp_path / "no"), rtol=0.02)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate launch says it
    train(small(tmp_path / "launch"), Conv())
    assert log(tmp_path / "launch") == log(tmp_path / "bf16")
    assert TrainConfig.load(tmp_path / "launch" / "train_config.json").mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "mixed_precision is 'fp8'" in refused(small(tmp_path / "fp8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device can do it")
def test_float16_on_a_cpu_is_refused(tmp_path):
    text = refused(small(tmp_path, mixed_precision="fp16"))
    assert text == "mixed_precision is 'fp16', but the device is a CPU; allowed there: no, bf16"


@pytest.mark.parametrize(
    ("option", "dropout"),
    [("gradient_checkpointing", 0.1), ("channels_last", 0.0)],  # which drops other neurons in its layout
)
def test_options_that_change_nothing_but_cost(tmp_path, option, dropout):
    plan = {"channels": 3, "dropout": dropout}
    train(small(tmp_path / "without", **plan))
    train(small(tmp_path / "with", **plan, **{option: True}))
    np.testing.assert_allclose(log(tmp_path / "with"), log(tmp_path / "without"), rtol=1e-4)
    assert DDPMPipeline.from_pretrained(tmp_path / "with").image_shape == (3, 8, 8)


def test_channels_last_and_checkpointing_are_in_force(tmp_path):
    seen = set()

    class Watched(Conv):
        def enable_gradient_checkpointing(self):
            seen.add("checkpointing")

        def forward(self, x_t, t):
            seen.add(x_t.is_contiguous(memory_format=torch.channels_last) and not x_t.is_contiguous())
            seen.add(self.conv.weight.is_contiguous(memory_format=torch.channels_last))
            return self.conv(x_t)

    train(small(tmp_path, channels=3, channels_last=True, gradient_checkpointing=True), Watched(3))
    assert seen == {"checkpointing", True}


def test_checkpointing_of_a_network_without_it(tmp_path):
    text = refused(small(tmp_path, gradient_checkpointing=True), Conv())
    assert text == "gradient_checkpointing is True, which Conv doesn't have"


def test_compiled_plumbing(tmp_path, monkeypatch):
    """All but the code generator: under autocast, the names of saved weights, going on."""
    plan = {"max_steps": 2, "mixed_precision": "bf16"}
    train(small(tmp_path / "without", **plan), Conv())
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    train(small(tmp_path / "with", **plan, compile=True), Conv())
    np.testing.assert_allclose(log(tmp_path / "with"), log(tmp_path / "without"), rtol=1e-3)
    assert weights(tmp_path / "with", 2).keys() == weights(tmp_path / "without", 2).keys()
    assert train(small(tmp_path / "with", **plan | {"max_steps": 3}, compile=True), Conv()).step == 3


@pytest.mark.slow
def test_compiled_for_real(tmp_path):
    """With generated C++ code, which takes minutes to build for a U-Net and seconds to run."""
    plan = {"max_steps": 2, "batch_size": 2}
    train(small(tmp_path / "without", **plan))
    train(small(tmp_path / "with", **plan, compile=True))
    np.testing.assert_allclose(log(tmp_path / "with"), log(tmp_path / "without"), rtol=1e-4)
    assert DDPMPipeline.from_pretrained(tmp_path / "with").image_shape == (1, 8, 8)


def test_a_worker_process_changes_nothing(tmp_path):
    plan = {"horizontal_flip": True, "max_steps": 4, "checkpoint_every": 2}
    train(small(tmp_path / "0", **plan), Conv())
    train(small(tmp_path / "1", **plan, num_workers=1), Conv())
    assert log(tmp_path / "1") == log(tmp_path / "0")
    assert_same(weights(tmp_path / "1", 4), weights(tmp_path / "0", 4))


def folder_of_images(folder: Path, count: int, shape: tuple[int, ...]) -> Path:
    (folder / "train").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "train" / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images(tmp_path, caplog, num_workers):
    data = folder_of_images(tmp_path / "data", 5, (8, 8))
    (data / "train" / "003.png").write_bytes(b"no image")
    plan = {"dataset": str(data), "shuffle_buffer": 0, "num_workers": num_workers, "max_steps": 3}
    assert "003.png" in refused(small(tmp_path / "stops", **plan), Conv())
    with caplog.at_level(logging.WARNING):
        train(small(tmp_path / "skips", **plan, skip_corrupt=True), Conv())
    assert "2 images could not be read and were skipped" in caplog.text  # the same one in two epochs
    lines = [json.loads(line) for line in (tmp_path / "skips" / "log.jsonl").read_text().splitlines()]
    assert [line.get("skipped", 0) for line in lines] == [1, 1, 2]
    assert [line["images"] for line in lines] == [4, 8, 12]  # positions, holes included


# Networks and data


def test_a_network_that_is_not_of_diffusers(tmp_path):
    model = Conv()
    train(small(tmp_path), model)
    assert_same(weights(tmp_path, 3), dict(model.state_dict()))
    assert not (tmp_path / "model_index.json").exists()
    assert train(small(tmp_path, max_steps=4), Conv()).step == 4


def test_grids_of_a_network_that_is_not_of_diffusers(tmp_path):
    train(small(tmp_path, sample_every=3, sample_steps=2, sample_num_images=2), Conv())
    assert (tmp_path / "samples" / "step-00000003.png").exists()
    assert (tmp_path / "training.png").exists()


class Breaks(Conv):
    """A network that answers NaN from the third call on."""

    calls = 0

    def forward(self, x_t, t):
        self.calls += 1
        return self.conv(x_t) * (np.nan if self.calls > 2 else 1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    text = refused(small(tmp_path, max_steps=9, checkpoint_every=1), Breaks(), kind=RuntimeError)
    assert text == "the loss is nan at step 3; checkpoints from before stand"
    assert log(tmp_path, "step") == [1, 2]


def test_the_step_is_named_where_several_are_logged_at_once(tmp_path):
    text = refused(small(tmp_path, max_steps=9, log_every=5), Breaks(), kind=RuntimeError)
    assert text == "the loss is nan at step 3; checkpoints from before stand"


@pytest.mark.parametrize("last_good", [2, 3])
def test_what_is_not_finite_is_never_saved(tmp_path, monkeypatch, last_good):
    # at step 3 the loss is NaN; or it is not, but the weights are
    class Late(Breaks):
        def forward(self, x_t, t):
            answer = super().forward(x_t, t)
            return answer if last_good == 2 else self.conv(x_t)

    model = Late()
    if last_good == 3:
        advance = Record.advance

        def poisoned(self, step):
            advance(self, step)
            if step == 4:
                model.conv.weight.data[0] = np.inf

        monkeypatch.setattr(Record, "advance", poisoned)
    text = refused(small(tmp_path, max_steps=9, checkpoint_every=1, log_every=5), model, kind=RuntimeError)
    assert f"at step {last_good + 1}; checkpoints from before stand" in text
    assert ("weights" in text) == (last_good == 3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (last_good - 1, last_good)]


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    config = small(tmp_path, max_steps=9, checkpoint_every=1, max_loss=0.01)
    text = refused(config, Conv(), kind=RuntimeError)
    assert text.startswith("the mean loss of steps 1 to 1 is ") and "above max_loss 0.01" in text
    assert not (tmp_path / "checkpoints").exists()


def test_rgb_images_that_are_not_square(tmp_path):
    data = folder_of_images(tmp_path / "data", 6, (16, 8, 3))
    plan = {"dataset": str(data), "sample_every": 2, "sample_num_images": 2, "sample_steps": 2}
    train(small(tmp_path / "run", **plan, max_steps=2, batch_size=4))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.image_shape == (3, 16, 8)
    assert pipeline(1, num_inference_steps=2).images[0].size == (8, 16)
    assert Image.open(tmp_path / "run" / "samples" / "step-00000002.png").size == (2 * (48 + 4) + 4, 96 + 8)


def test_five_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 5), dtype=np.uint8)
    data = Dataset.from_dict(
        {"image": list(pixels)}, features=Features({"image": Array3D((8, 8, 5), "uint8")})
    )
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train-0.parquet")
    plan = {"dataset": str(tmp_path / "data"), "sample_every": 2, "sample_num_images": 5, "sample_steps": 2}
    train(small(tmp_path / "run", **plan, max_steps=2))
    grid = np.load(tmp_path / "run" / "samples" / "step-00000002.npy")
    assert grid.shape == (5, 8, 8, 5) and grid.min() >= 0 and grid.max() <= 1
    assert DDPMPipeline.from_pretrained(tmp_path / "run").image_shape == (5, 8, 8)


def test_fine_tuning_begins_with_the_weights_of_the_pipeline(finished, tmp_path, caplog):
    # with one step of warm-up, the first step has learning rate 0
    train(small(tmp_path, model=str(finished), max_steps=1, lr_warmup_steps=1))
    assert_same(weights(tmp_path, 1), weights(finished, 4, "ema_0.9999"))
    assert f"{finished} was trained with num_train_timesteps 100, this run has 1000" in caplog.text
    assert "beta_end 0.2, this run has 0.02" in caplog.text


def test_a_half_precision_network_is_trained_in_float32(finished, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(finished)
    pipeline.unet.half()
    pipeline.save_pretrained(tmp_path / "half")
    train(small(tmp_path / "run", model=str(tmp_path / "half"), max_steps=1))
    for name in ("model", "ema_0.9999"):
        assert {tensor.dtype for tensor in weights(tmp_path / "run", 1, name).values()} == {torch.float32}


def test_networks_that_do_not_fit(finished, tmp_path):
    text = refused(small(tmp_path, model=str(finished), channels=3))
    assert text == "the network is for images (1, 8, 8) (C, H, W), these are (3, 8, 8)"
    words = "answers 2 channels; allowed with variance_type 'fixed_large': 1"
    assert words in refused(small(tmp_path), create_model("tiny", out_channels=2))
    assert "has its own; allowed: none" in refused(small(tmp_path, model=str(finished), dropout=0.1))
    assert "did you mean 'tiny'" in refused(small(tmp_path, model="tinny"))
    assert "nowhere" in refused(small(tmp_path, dataset=str(tmp_path / "nowhere")))


# Several processes


def test_processes_that_were_not_joined(tmp_path, monkeypatch):
    PartialState(cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")  # accelerate has this process in its books already, as the only one
    text = refused(small(tmp_path / "run"))
    assert text.startswith("the launch started 2 processes, but accelerate sees 1; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_TASKS is 2, but this process works alone"),
        ("OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_SIZE is 2, but this process works alone"),
        (
            "ACCELERATE_MIXED_PRECISION=no MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
            "asked for several processes and started one; add --multi_gpu",
        ),
        ("ACCELERATE_USE_FSDP=true", "the launch asks for FSDP, which accelerate doesn't do here (it is NO)"),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for(tmp_path, monkeypatch, environment, words):
    PartialState(cpu=True)  # alone, as it is in such a launch
    for name, value in (word.split("=") for word in environment.split()):
        monkeypatch.setenv(name, value)
    assert words in refused(small(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


SCRIPT = """
import gc, sys, torch
import hf_ddpm.training.trainer as trainer
from hf_ddpm import TrainConfig, create_model
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

make_batches = trainer.make_batches
seen = []

def watched(*args):
    for batch in make_batches(*args):
        seen.append(batch.images[batch.present])
        yield batch

destroy, left = torch.distributed.destroy_process_group, []

def destroying(*args):
    left.extend(thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel))
    destroy(*args)

trainer.make_batches, torch.distributed.destroy_process_group = watched, destroying
torch.manual_seed(0)
model = create_model("tiny")
trainer.train(TrainConfig.load(sys.argv[1]), model)
facts = {"weights": model.state_dict(), "images": torch.cat(seen), "left": len(left)}
torch.save(facts, f"{sys.argv[2]}/rank{PartialState().process_index}.pt")
"""


@pytest.mark.distributed
def test_two_processes(tmp_path):
    run = tmp_path / "run"
    plan = {"sample_every": 3, "sample_num_images": 3, "sample_steps": 2, "horizontal_flip": True}
    config = small(run, batch_size=4, **plan)
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "script.py").write_text(SCRIPT)
    done = forked([tmp_path / "script.py", tmp_path / "config.json", tmp_path], tmp_path / "launch")
    assert (tmp_path / "rank1.pt").exists(), done.stderr

    assert load_checkpoint(checkpoint(run, 3)).state["num_processes"] == 2, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same(dict(ranks[0]["weights"]), dict(ranks[1]["weights"]))
    assert_same(weights(run, 3), dict(ranks[0]["weights"]))
    both = {image.numpy().tobytes() for rank in ranks for image in rank["images"]}
    assert len(both) == 24  # no image twice
    # DDP as the last owner of its process group destroys it under Python's lock, which now and then deadlocks
    assert [rank["left"] for rank in ranks] == [0, 0]

    losses, model, average, _ = by_hand(config, images_per_step=8)
    np.testing.assert_allclose(log(run), np.array(losses).mean(1), rtol=1e-5)
    # A key's bias shifts all logits alike: its gradient is rounding, which Adam scales up to a whole step.
    moved = [name for name in average if not name.endswith("to_k.bias")]
    for ours, bare in ((weights(run, 3), model.state_dict()), (weights(run, 3, "ema_0.9999"), average)):
        pairs = ({name: side[name] for name in moved} for side in (ours, bare))
        torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-6)
    assert log(run, "images") == [8, 16, 24]

    pipeline = DDPMPipeline.from_pretrained(run)
    images = [pipeline(1, [torch.Generator().manual_seed(i)], 2).images[0] for i in range(3)]
    grid = np.asarray(Image.open(run / "samples" / "step-00000003.png")).astype(int)
    for place, image in zip(((4, 4), (4, 104), (104, 4)), images, strict=True):
        large = np.asarray(image.convert("RGB").resize((96, 96), Image.Resampling.NEAREST))
        assert np.abs(grid[place[0] : place[0] + 96, place[1] : place[1] + 96] - large).max() <= 1
    assert done.stderr.count("train: 100%") == 1  # one bar

"""What tests of training share: a quick run, what it left, and algorithm 1 written out by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from hf_ddpm import TrainConfig, create_model, load_stream, train
from hf_ddpm.denoiser import as_denoiser


def small(folder: Path, **changes) -> TrainConfig:
    """A run of three quick steps, changed."""
    values = {
        **{"model": "tiny", "batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "shuffle_memory": 32},
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


def assert_rounded(average, exact) -> None:
    """The float32 next to a float64 average, or the one beside it."""
    torch.testing.assert_close(average, {k: v.float() for k, v in exact.items()}, rtol=1.2e-7, atol=1e-9)


def refused(*args, kind: type[Exception] = ValueError, **kwargs) -> str:
    with pytest.raises(kind) as error:
        train(*args, **kwargs)
    assert type(error.value) is kind and "\n" not in str(error.value)
    return str(error.value)


def kill_at(step: int) -> Callable:
    """An `after_step` that ends the run as Ctrl-C would, before it logs or saves this step."""

    def killed(run) -> None:
        if run.step == step:
            raise KeyboardInterrupt

    return killed


def again(folder: Path, **changes) -> TrainConfig:
    plan = {"max_steps": 4, "checkpoint_every": 2, "num_train_timesteps": 100, "beta_end": 0.2}
    return small(folder, **(plan | changes))


def folder_of_images(folder: Path, count: int, shape: tuple[int, ...]) -> Path:
    (folder / "train").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "train" / f"{i:03d}.png")
    return folder


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
    average = [weight.detach().double() for weight in model.parameters()]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    stream = load_stream(
        "digits",
        horizontal_flip=config.horizontal_flip,
        shuffle_memory=config.shuffle_memory,
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
                mean.lerp_(weight.double(), 1 - kept)
    names = [name for name, _ in model.named_parameters()]
    return losses, model, dict(zip(names, average, strict=True)), optimizer


def posterior_mean(x_0, x_t, t):
    """μ̃_t by the precisions of its two factors, in numpy."""
    beta = np.linspace(1e-4, 0.02, 1000)[t].reshape(-1, 1, 1, 1)
    before = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t].reshape(-1, 1, 1, 1) / (1 - beta)
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (1 - beta) / beta, 1 / (1 - before)
        mean = (one * x_t.numpy() / np.sqrt(1 - beta) + two * np.sqrt(before) * x_0.numpy()) / (one + two)
    first = t.numpy().reshape(-1, 1, 1, 1) == 0
    return torch.from_numpy(np.where(first, x_0.numpy(), mean)).float()

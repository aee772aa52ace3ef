"""What a run says when it ends: how to sample and measure its model, or how to go on with it.

The commands can be typed as they are: paths are quoted as a shell needs it.
"""

import shlex
from contextlib import suppress
from pathlib import Path

from diffusers.models.modeling_utils import ModelMixin

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.sources import open_source
from hf_ddpm.folders.layout import EVALUATION, RECORD
from hf_ddpm.generation.pipeline import PIL_CHANNELS
from hf_ddpm.runtime.disk import free_path
from hf_ddpm.runtime.messages import LIMIT
from hf_ddpm.training.run import Run


def next_steps(run: Run) -> tuple[str, ...]:
    """Lines to type next: commands, or Python for a network that only its owner's program can make.

    Args:
        run: it is done, and its folder is there.
    """
    folder, config = run.folder, run.config
    if not isinstance(run.averaged, ModelMixin):
        kind = type(run.averaged).__name__
        return (
            f"pipeline = hf_ddpm.load_run({str(folder)!r}, model=...)  # a {kind}, made as before",
            "pipeline(16).images",
            "pipeline.bits_per_dim(images)",
        )
    return (*_sample_command(config, folder, run.shape[0]), _evaluate_command(config, folder))


def go_on(run: Run) -> str:
    """How to go on with a run that was stopped: the command, where there is one that needs no program."""
    same = "the same command goes on"
    if run.is_own:
        return same
    words = ["train", "--config", _word(run.folder / RECORD)]
    if run.config.resume == "never":  # which would refuse to go on
        words += ["--resume", "auto"]
    several = run.accelerator.num_processes > 1
    before = "with the same launcher -m hf_ddpm" if several else "hf-ddpm"
    longer = f"{same}, or {before} {' '.join(words)}"
    return longer if len(longer) < LIMIT // 2 else same


def _sample_command(config: TrainConfig, folder: Path, channels: int) -> list[str]:
    if channels not in PIL_CHANNELS:
        return []
    place = folder.resolve()
    out = free_path(folder.with_name(f"{folder.name}-samples") if folder.name else Path(f"{place}-samples"))
    steps = "" if config.sample_steps is None else f" --steps {config.sample_steps}"
    return [f"hf-ddpm sample {_word(folder)} --num-images 16{steps} --out {_word(out)}"]


def _evaluate_command(config: TrainConfig, folder: Path) -> str:
    words = ["hf-ddpm evaluate", _word(folder), _word(config.dataset)]
    split = _heldout_split(config)
    words += [] if split in (None, "test") else ["--split", shlex.quote(split)]
    words += [] if config.image_column is None else ["--image-column", shlex.quote(config.image_column)]
    words += ["--overwrite"] if (folder / EVALUATION).exists() else []
    return " ".join(words) + ("  # images that it was trained on" if split == config.split else "")


def _heldout_split(config: TrainConfig) -> str | None:
    """The split to measure: one that was not trained on, if there is one; None for what `evaluate` takes."""
    if getattr(config, "holdout", None) is not None:
        return None
    if config.evaluate_every:
        return config.evaluate_split
    with suppress(ValueError):
        return open_source(config.dataset, "test").split
    return config.split


def _word(path: Path | str) -> str:
    """A path as a word of a command line, which is no flag."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)

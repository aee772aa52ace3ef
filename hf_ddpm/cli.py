"""The `hf-ddpm` console command; the scripts in train_scripts/ call the same functions.

It knows words on a command line: it turns them into calls, and a `ValueError` into one line and exit code 2.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers.utils.torch_utils import get_device
from PIL import Image

from hf_ddpm.config import TrainConfig
from hf_ddpm.pipeline import PIL_CHANNELS, DDPMPipeline
from hf_ddpm.plots import image_grid, save_image
from hf_ddpm.record import REFRESH
from hf_ddpm.samplers import SCHEDULERS, swap_scheduler
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.seeds import derive_seed
from hf_ddpm.trainer import train

GRID_IMAGES = 100  # a grid shows at most so many of the samples
OURS = re.compile(r"\d{5,}\.png|grid\.png")  # what `sample` writes, and may replace


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line that names the nearest flag."""

    def error(self, message: str) -> typing.NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; `-` and `_` inside a flag's name mean the same."""
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-4 and -8x8 are values too, bad ones
        words = [_dashed(word) for word in argv]
        values, unknown = self.parse_known_args(words)
        if unknown:
            flags = [
                flag for action in self._actions for flag in action.option_strings if flag.startswith("--")
            ]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
            self.error(
                f"unknown argument {unknown[0]!r}"
                + (f"; did you mean {near[0]}?" if near else "; see --help")
            )
        return values


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def main(argv: Sequence[str] | None = None) -> None:
    """`hf-ddpm COMMAND ...`."""
    argv = sys.argv[1:] if argv is None else argv
    usage = "usage: hf-ddpm COMMAND [options]; `hf-ddpm COMMAND --help` tells more\n\ncommands:\n"
    usage += "".join(
        f"  {name:10} {(command.__doc__ or '').splitlines()[0]}\n" for name, command in COMMANDS.items()
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, end="")
    elif argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(COMMANDS)}"
        print(f"hf-ddpm: error: unknown command {argv[0]!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    else:
        run(COMMANDS[argv[0]], argv[1:], f"hf-ddpm {argv[0]}")


def run(
    command: Callable[[Sequence[str], str], None], argv: Sequence[str] | None = None, prog: str = ""
) -> None:
    """Call a command; bad input is one line on stderr and exit code 2, a failed run one line and 1."""
    prog = prog or Path(sys.argv[0]).name
    try:
        command(sys.argv[1:] if argv is None else argv, prog)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("HF_DDPM_TRACEBACK"):
            raise
        bad_input = isinstance(error, ValueError)
        words = "error:" if bad_input else "failed (HF_DDPM_TRACEBACK=1 shows where):"
        print(f"{prog}: {words} {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if bad_input else 1)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)


def train_command(argv: Sequence[str], prog: str) -> None:
    """Train a model on a stream of images, or go on with a run."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--key value ...]",
        description="Train a DDPM. Values come from the defaults, then the file, then the flags; '-' and '_' "
        "in a flag's name mean the same. Start it with `accelerate launch` to use several processes.",
        epilog="example: %(prog)s --dataset photos/ --image-size 64 --model cifar10 --output-dir runs/photos",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of the keys below, or a run's train_config.json"
    )
    for option in dataclasses.fields(TrainConfig):
        rules, kind = option.metadata, option.type
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        text = rules["help"] + (f" ({', '.join(map(str, rules['choices']))})" if "choices" in rules else "")
        default = "" if option.default in (None, "") else f" [{option.default}]"
        if bool in kinds:
            default = default.lower()  # as it is typed
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar={bool: "true|false", int: "N", float: "X", str: "TEXT"}[kinds[0]],
            help=(text + default).replace("%", "%%"),
            nargs="?" if bool in kinds else None,  # a bare flag means true
            const="true" if bool in kinds else None,
        )
    values = vars(parser.parse(argv))
    config = TrainConfig.load(values.pop("config"), **values)
    result = train(config)
    if PartialState().is_main_process:
        done = f"step {result.step}, {result.images} images seen"
        this_time = f", loss {result.loss:.4f}, {result.images_per_second:.1f} images/s"
        print(done + ("; nothing left to do" if math.isnan(result.loss) else this_time))
        print(f"pipeline: {result.output_dir}")


def sample_command(argv: Sequence[str], prog: str) -> None:
    """Draw images from a model: numbered PNG files and a grid."""
    parser = _Parser(
        prog=prog,
        description="Draw images from a model. Image i depends on the seed and i only, not on the batch or "
        "the number of processes; start it with `accelerate launch` to use several.",
        epilog="example: %(prog)s runs/photos --num-images 16 --scheduler ddim --steps 50 --out samples",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="pipeline folder or Hub id")
    parser.add_argument("--num-images", type=_count, default=64, metavar="N", help="how many [64]")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for 00000.png, ..., grid.png")
    parser.add_argument("--steps", type=_count, metavar="K", help="sampling steps, by default all T")
    parser.add_argument(
        "--scheduler", metavar="NAME", help=f"sampler, by default the model's ({', '.join(SCHEDULERS)})"
    )
    parser.add_argument(
        "--variance-type", metavar="NAME", help="for the sampler ddpm (fixed_small, fixed_large)"
    )
    parser.add_argument("--seed", type=_whole, default=0, metavar="S", help="of the noise [0]")
    parser.add_argument(
        "--batch-size", type=_count, default=64, metavar="N", help="images at once in each process [64]"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the samples that DIR holds, and nothing else in it"
    )
    args = parser.parse(argv)
    sample(**vars(args))


def sample(
    model: str,
    num_images: int,
    out: str,
    steps: int | None = None,
    scheduler: str | None = None,
    variance_type: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    overwrite: bool = False,
) -> Path:
    """Write `num_images` numbered PNG files and a grid of the first hundred; returns the grid's path.

    Everything is checked before the folder is touched, and old samples go when their successors are there.

    Raises:
        ValueError: a number out of range, a folder that can't be written or holds samples already, a bad
            model, a sampler that is unknown or can't do this.
    """
    for name, value, least in (
        ("num_images", num_images, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; allowed: whole numbers >= {least}")
    if variance_type not in (None, "fixed_small", "fixed_large"):
        raise ValueError(f"variance_type is {variance_type!r}; allowed: fixed_small, fixed_large")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or get_device() == "cpu"
    state, folder = PartialState(cpu=on_cpu), Path(out)  # else two processes on CPUs each believe to be alone
    pipeline = DDPMPipeline.from_pretrained(model).to(state.device)
    if scheduler is not None:
        swap_scheduler(pipeline, scheduler)
    if variance_type is not None:
        if not isinstance(pipeline.scheduler, DDPMScheduler):
            raise ValueError(f"variance_type is {variance_type!r}; allowed: only with the sampler ddpm")
        pipeline.scheduler.variance_type = variance_type
    if (channels := pipeline.image_shape[0]) not in PIL_CHANNELS:
        raise ValueError(f"model {model!r} makes images of {channels} channels; allowed in a PNG: 1, 3, 4")
    try:
        pipeline.check_inputs(num_inference_steps=steps)
    except ValueError as error:
        raise ValueError(str(error).replace("num_inference_steps", "steps")) from error  # its name here
    _prepare_folder(folder, overwrite)  # every process looks before any of them writes
    state.wait_for_everyone()

    pipeline.set_progress_bar_config(
        desc="sample", leave=False, disable=not state.is_main_process, mininterval=REFRESH
    )
    mine = range(state.process_index, num_images, state.num_processes)
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        generators = [torch.Generator().manual_seed(derive_seed(seed, i)) for i in indices]
        images: Any = pipeline(len(indices), generators, steps, return_dict=False)[0]
        for i, image in zip(indices, images, strict=True):
            save_image(image, folder / f"{i:05d}.png")
    state.wait_for_everyone()

    grid = folder / "grid.png"
    if state.is_main_process:
        names = [f"{i:05d}.png" for i in range(num_images)]
        save_image(image_grid([Image.open(folder / name) for name in names[:GRID_IMAGES]]), grid)
        for name in _samples_in(folder) - {*names, grid.name}:
            (folder / name).unlink()
        print(f"{num_images} images and grid.png in {folder}")
    return grid


def _prepare_folder(folder: Path, overwrite: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise ValueError(f"out {str(folder)!r} can't be written: {error.strerror}") from None
    if not overwrite and _samples_in(folder):
        raise ValueError(
            f"out {str(folder)!r} holds samples already; allowed: another folder, or --overwrite"
        )


def _samples_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if OURS.fullmatch(path.name)}


def _count(word: str) -> int:
    """A flag's value as a positive whole number."""
    return _whole(word, 1)


def _whole(word: str, least: int = 0) -> int:
    if not word.isdecimal() or int(word) < least:
        raise argparse.ArgumentTypeError(f"{word!r}; allowed: whole numbers >= {least}")
    return int(word)


COMMANDS: dict[str, Callable[[Sequence[str], str], None]] = {"train": train_command, "sample": sample_command}

if __name__ == "__main__":
    main()

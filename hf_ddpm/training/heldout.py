"""The bound of held-out images while a network trains: the same images, steps and noise every time.

    RUN/heldout/step-00000500.safetensors     rows, digests, bpd, rate_bpd, distortion_bpd: (N,)

The draws depend on the seed and an image's row alone, so the change since the last time is a paired
difference, whose error is far below that of either estimate.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.holdout import BEFORE, name_of_split, rows_before
from hf_ddpm.data.pixels import image_digest, to_float
from hf_ddpm.data.sources import same_place
from hf_ddpm.data.stream import ImageStream, load_stream
from hf_ddpm.denoiser import Counted, Denoiser, as_denoiser, scoring_device
from hf_ddpm.folders.layout import HELDOUT, RECORD, STEP, TRAINED_ON, step_name
from hf_ddpm.guidance import Conditioned
from hf_ddpm.likelihood import default_proposal, estimate_bound, mean_and_stderr
from hf_ddpm.models.presets import names_preset
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.runtime.disk import load_tensors, save_tensors
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.runtime.progress import progress
from hf_ddpm.runtime.untrusted import read_json
from hf_ddpm.seeds import Use, derive_seed

logger = logging.getLogger(__name__)

ENDING = ".safetensors"
COLUMNS = ("rows", "digests", "bpd", "rate_bpd", "distortion_bpd")


def open_heldout(
    config: TrainConfig, shape: tuple[int, int, int], class_names: Sequence[str] | None = None
) -> ImageStream:
    """The images that a run doesn't train on: of its holdout, or of the split that its config names.

    Args:
        config: the run; its images are fitted as the run's, but never mirrored or cropped at random.
        shape: (C, H, W) of the run's images.
        class_names: of the run's classes.

    Raises:
        ValueError: no such split, or images of another shape.
    """
    own = config.evaluate_split is None and config.holdout is not None
    split = config.split if own else config.evaluate_split or "test"
    try:
        stream = load_stream(
            config.dataset,
            split,
            shape[1:],
            config.channels,
            column=config.image_column,
            label_column=config.label_column,
            label_names=class_names,
            fit="center_crop" if config.fit == "random_crop" else config.fit,
            background=config.background,
            to_8_bit=config.to_8_bit,
            seed=config.seed,
            skip_corrupt=config.skip_corrupt,
            holdout=config.holdout if own else None,
            part="held-out" if own else "all",
        )
    except ValueError as error:
        raise error if own else ValueError(f"evaluate_split {split!r}: {error}") from error
    if stream.shape != shape:
        raise ValueError(
            f"images of evaluate_split {split!r} are {stream.shape} (C, H, W); allowed: the run's {shape}"
        )
    return stream


def trained_before(config: TrainConfig, folder: Path, going_on: bool) -> list[dict[str, Any]]:
    """Which images of the run's split its network had been trained on before the run began.

    Args:
        config: the run, whose `model` may be the folder of another run.
        folder: the run's folder.
        going_on: whether the run goes on, and so has a record of this.

    Returns:
        "split" (or a slice), "holdout" and "seed" of each run that it had been trained in, the last first.

    Raises:
        ValueError: there is a `train_data.json` that can't be read.
    """
    if going_on and (folder / TRAINED_ON).is_file():
        return read_json(folder / TRAINED_ON).get(BEFORE, [])
    model = Path(config.model).expanduser()
    if names_preset(config.model) or not (model / RECORD).is_file():
        return []
    try:
        was = TrainConfig.of_run(model / RECORD)
    except ValueError:  # of another version, or of another program
        return []
    split = name_of_split(config.split) == name_of_split(was.split)
    if not split or not same_place(config.dataset, was.dataset):
        return []
    known = read_json(model / TRAINED_ON) if (model / TRAINED_ON).is_file() else {}
    return [{"split": was.split, "holdout": was.holdout, "seed": was.seed}, *known.get(BEFORE, [])]


def count_seen_before(before: list[dict[str, Any]], stream: ImageStream) -> int:
    """How many of the images that a run holds out its network was trained on before.

    Args:
        before: as `trained_before` says.
        stream: the images that the run trains on.
    """
    held = stream.chosen.others.all
    seen = [rows.has(held) for rows in rows_before(before, stream.num_rows_of_split)]
    return int(np.any(seen, axis=0).sum()) if seen else 0


class HeldOut:
    """This process's share of the held-out images, in memory as uint8.

    Args:
        config: the run; its images are fitted as the run's, but never mirrored or cropped at random.
        folder: the run's folder.
        accelerator: the processes that share the images.
        trained: the images that the run trains on.

    Raises:
        ValueError: no such split, images of another shape, or one that can't be read and isn't skipped.
    """

    def __init__(self, config: TrainConfig, folder: Path, accelerator: Accelerator, trained: ImageStream):
        stream = open_heldout(config, trained.shape, trained.class_names)
        common = len(stream.chosen.both(trained.chosen)) if stream.split == trained.split else 0
        if common and accelerator.is_main_process:
            what = "is the split that the run trains on"
            if common < stream.num_rows():
                what = f"has {common:,} images of {stream.num_rows():,} that the run trains on"
            logger.warning("evaluate_split %r %s", config.evaluate_split, what)
        order = np.random.default_rng(derive_seed(Use.SCORED_ROWS, config.seed)).permutation(
            stream.num_rows()
        )
        chosen = np.sort(order[: config.evaluate_num_images])
        if config.skip_corrupt:
            chosen = np.setdiff1d(chosen, stream.unreadable(chosen))
        # Every process gets as many, the first image again where they don't divide: FSDP needs every process
        # at every call of a network that it shares out
        world = accelerator.num_processes
        chosen = np.concatenate([chosen, np.repeat(chosen[:1], -len(chosen) % world)])
        mine = np.sort(chosen[accelerator.process_index :: world]).tolist()
        selected = dict(zip(dict.fromkeys(mine), stream.select(sorted(set(mine))), strict=True))
        self._images = [selected[place] for place in mine]
        self._rows: list[int] = stream.chosen.of(mine).tolist()
        self._labels = None if stream.labels is None else stream.labels[mine].tolist()
        self._folder, self._accelerator, self._config = folder / HELDOUT, accelerator, config

    def evaluate(
        self,
        model: nn.Module,
        process: DiffusionProcess,
        step: int,
        options: dict[str, Any],
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Estimate the bound, write down each image's, and compare with the last time.

        All processes call it together and share the images.

        Args:
            model: the network with its averaged weights, in eval mode.
            process: the run's.
            step: optimizer steps done.
            options: `variance_type` and `prediction_type`, as in `bound_term`.
            check: called at each call of the network; it may raise.

        Returns:
            For log.jsonl, on every process: means over all images in bits/dim, with standard errors.

        Raises:
            OSError: the file of this step can't be written.
        """
        accelerator, evals = self._accelerator, self._config.evaluate_num_evals
        found: dict[str, list] = {name: [] for name in COLUMNS}
        with progress(
            "evaluate", evals * len(self._rows), "eval", accelerator.is_main_process, leave=False
        ) as bar:

            def checked(x_t: torch.Tensor, t: torch.Tensor, network: Denoiser) -> torch.Tensor:
                check()
                return network(x_t, t)

            for piece, label in self._pieces():
                network = model if label is None else Conditioned(model, label)
                counted = Counted(as_denoiser(network, accelerator.device), bar)
                denoiser = functools.partial(checked, network=counted)
                estimate = estimate_bound(
                    process,
                    denoiser,
                    to_float(torch.stack(self._images[piece])).to(scoring_device(accelerator.device)),
                    num_evals_per_image=evals,
                    seed=self._config.seed,
                    image_indices=self._rows[piece],
                    proposal=default_proposal(process),
                    batch_size=self._config.batch_size,
                    **options,
                )
                found["rows"] += self._rows[piece]
                found["digests"] += [image_digest(image) for image in self._images[piece]]
                found["bpd"] += estimate.per_image_bpd.tolist()
                found["rate_bpd"] += estimate.per_image_rate_bpd.tolist()
                found["distortion_bpd"] += estimate.per_image_distortion_bpd.tolist()

        every = gather_object(list(zip(*found.values(), strict=True)))
        rows = sorted({line[0]: line for line in reversed(every)}.values())
        types = (torch.int64, torch.int64, *[torch.float64] * 3)
        columns = zip(COLUMNS, types, zip(*rows, strict=True), strict=True)
        now = {name: torch.tensor(column, dtype=kind) for name, kind, column in columns}
        line: dict[str, float] = {"heldout_images": len(rows)}
        line["heldout_bpd"], line["heldout_stderr"] = mean_and_stderr(now["bpd"])
        for name in ("rate_bpd", "distortion_bpd"):
            line[f"heldout_{name}"] = mean_and_stderr(now[name])[0]
        before = self._last_before(step)
        if before is not None and all(torch.equal(before[name], now[name]) for name in ("rows", "digests")):
            change = now["bpd"] - before["bpd"]
            line["heldout_change"], line["heldout_change_stderr"] = mean_and_stderr(change)
        # Process 0 writes this step's file when all have read the one before
        accelerator.wait_for_everyone()
        on_main_process(accelerator, lambda: self._write(step, now))
        # A single image has no standard error: NaN, which JSON doesn't have
        return {name: value for name, value in line.items() if value == value}

    def _pieces(self) -> Iterator[tuple[slice, int | None]]:
        """Which images are scored together, and their class: of a run with classes one by one.

        So every process makes as many calls of the network, which FSDP needs.
        """
        size = self._config.batch_size if self._labels is None else 1
        for start in range(0, len(self._rows), size):
            yield slice(start, start + size), None if self._labels is None else self._labels[start]

    def _write(self, step: int, found: dict[str, torch.Tensor]) -> None:
        save_tensors(self._folder / f"{step_name(step)}{ENDING}", found)

    def _last_before(self, step: int) -> dict[str, torch.Tensor] | None:
        """What was written the last time before `step`; None if that is the first time."""
        files = self._folder.glob(f"*{ENDING}")
        steps = [(int(m[1]), path) for path in files if (m := STEP.fullmatch(path.stem))]
        earlier = [path for at, path in sorted(steps) if at < step]
        if not earlier:
            return None
        try:
            return load_tensors(earlier[-1])[0]
        except ValueError as error:
            if self._accelerator.is_main_process:
                logger.warning("%s; there is nothing to compare step %d with", error, step)
            return None

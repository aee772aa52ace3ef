"""Which sampler, how many steps? A model and real images become `sweep.json` and a picture.

    prepare ─► Preparation   everything is looked at, and refused if it can't be done; nothing is written
    measure ─► Sweep         the work, in parts that processes share and that a killed run finds again

Every sampler with every number of steps is a cell. All cells draw equally many images from the same noise,
and a feature network compares them with the same real images, so that cells compare in pairs. What of a sweep
is there already, of the same model, images and numbers, is kept, and only the cells that it lacks are drawn.
What the file holds and what follows from it, folders/sweep.py knows.
"""

import dataclasses
import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_ddpm.data.stream import ImageStream
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.images import digest_rows, fingerprint, open_images
from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.evaluation.plots import plot_sweep
from hf_ddpm.evaluation.quality import SampleQuality
from hf_ddpm.evaluation.report import versions
from hf_ddpm.evaluation.samples import Drawing
from hf_ddpm.evaluation.scored_model import ScoredModel, load_scored_model
from hf_ddpm.evaluation.sweep_config import SweepConfig
from hf_ddpm.folders.errors import network_digest, process_digest
from hf_ddpm.folders.footprint import check_batch
from hf_ddpm.folders.layout import PARTS, SWEEP, SWEEP_PLOT
from hf_ddpm.folders.output import check_sweep_folder, output_folder, results_folder
from hf_ddpm.folders.sweep import Cell, Sweep, SweepOf, read_sweep
from hf_ddpm.generation.quality import Sampler, kept_scheduler, plain_config
from hf_ddpm.generation.samplers import Diverged
from hf_ddpm.metrics import Extractor, Features, FrechetDistance, frechet_distance, frechet_label
from hf_ddpm.runtime.disk import delete_partials, whole_file, why_not_writable
from hf_ddpm.runtime.messages import one_line, redact, shown
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import Bar, progress
from hf_ddpm.shown import fields_line
from hf_ddpm.spelling import suggest_keywords

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)  # in which a network is used too
LONGEST_REASON = 220  # characters


@dataclass(frozen=True, eq=False)
class Planned:
    """A cell to be measured.

    Attributes:
        sampler: the sampler.
        drawing: of its samples, with the number of steps.
    """

    sampler: Sampler
    drawing: Drawing

    __repr__ = fields_line

    @property
    def key(self) -> tuple[str, int]:
        """Sampler and steps, as a `Cell` has them."""
        return str(self.sampler), self.drawing.num_steps


@dataclass(frozen=True, eq=False)
class Preparation:
    """A sweep whose inputs have been checked.

    Attributes:
        config: what was asked for.
        reading: which images, and how they are read, settled.
        out: folder of the results.
        model: what draws.
        stream: real images, in the order of their source.
        quality: the feature network, and which of these images are the reference and the floor.
        planned: the cells that were asked for and can be done, those that are there already too.
        passed_over: sampler, steps and reason of the others.
        of: what all cells have in common.
        there: the sweep that the folder holds already, of the same; None if it holds none.
    """

    config: SweepConfig
    reading: EvaluationConfig
    out: Path
    model: ScoredModel
    stream: ImageStream
    quality: SampleQuality
    planned: Sequence[Planned]
    passed_over: Sequence[dict[str, Any]]
    of: SweepOf
    there: Sweep | None

    __repr__ = fields_line

    @property
    def missing(self) -> list[Planned]:
        """The cells that have to be drawn."""
        known = {(cell.sampler, cell.steps) for cell in self.there.cells} if self.there else set()
        return [planned for planned in self.planned if planned.key not in known]


@suggest_keywords
def sweep(config: SweepConfig, command: str = "", *, network: nn.Module | None = None) -> Sweep:
    """Compare samplers and numbers of steps, and leave `sweep.json` and `sweep.png` in a folder.

    Cells that the folder's sweep of the same model, images and numbers holds already are not drawn again.

    Args:
        config: what to do.
        command: the command line, for the record.
        network: for a run of a module of your own, whose folder `config.model` is: such a module, as
            `load_run` takes it.

    Returns:
        What was found, on every process.

    Raises:
        ValueError: bad input: model, data set, extractor or folder, or nothing that can be done; nothing has
            been written then.
        OSError: a file can't be written.
    """
    out, state = results_folder(config.model, config.out, "the results"), process_state()
    with output_folder(out, "out", lambda out: check_sweep_folder(out, config.overwrite), state) as lock:
        prepared = prepare(config, network)
        if prepared.there is not None and not prepared.missing:
            return prepared.there
        if state.is_main_process:
            delete_partials(out, {SWEEP, SWEEP_PLOT}.__contains__)
        found = measure(prepared, command)
        lock.check()
        if state.is_main_process:
            plot_sweep(found, out / SWEEP_PLOT)
            with whole_file(out / SWEEP) as file:
                file.write_text(found.text(), encoding="utf-8")
            Parts.clear(out)
        state.wait_for_everyone()
        return found


def prepare(config: SweepConfig, network: nn.Module | None = None) -> Preparation:
    """Look at the model, the images, the samplers and the folder, before anything is drawn or written.

    Args:
        config: what to do.
        network: as in `sweep`.

    Raises:
        ValueError: something can't be done; the message names the culprit.
    """
    out, state = results_folder(config.model, config.out, "the results"), process_state()
    if reason := why_not_writable(out):
        raise ValueError(f"out {str(out)!r} can't be written: {reason}; allowed: another folder as out")
    model = load_scored_model(config.model, state.device or torch.device("cpu"), network=network)
    planned, passed_over = plan_cells(config, model)
    images = open_images(config.reading, model, scored=True)
    reading, stream = images.config, images.stream
    check_enough(config, stream.num_rows())
    if state.device is None or state.device.type == "cpu":
        at_once = min(config.batch_size, config.num_samples)
        check_batch("batch_size", at_once, model.pipeline.unet, stream.shape)
    quality = SampleQuality(reading, stream)
    real = [digest_rows(stream, rows) for rows in (quality.reference_rows, quality.floor_rows)]
    unet = model.pipeline.unet
    of = SweepOf(
        weights=model.weights_digest,
        rounded=[network_digest(unet, dtype) for dtype in HALF],
        process=process_digest(model.pipeline.process),
        prediction_type=model.prediction_type,
        scheduler=plain_config(model.pipeline),
        extractor=quality.extractor.name,
        num_samples=config.num_samples,
        num_reference=len(quality.reference_rows),
        images=fingerprint(torch.cat(real)),
        seed=config.seed,
    )
    there = _there(out, of, config.overwrite)
    prepared = Preparation(config, reading, out, model, stream, quality, planned, passed_over, of, there)
    state.wait_for_everyone()
    return prepared


def plan_cells(config: SweepConfig, model: ScoredModel) -> tuple[list[Planned], list[dict[str, Any]]]:
    """The cells that can be done, and the others with the reason, which are told.

    Raises:
        ValueError: none can be done.
    """
    planned, passed_over = [], []
    with kept_scheduler(model.pipeline):
        for sampler in config.samplers:
            for steps in config.step_numbers:
                try:
                    sampler.give_to(model.pipeline)
                    reading = dataclasses.replace(config.reading, sampling_steps=steps)
                    planned.append(Planned(sampler, Drawing(model.pipeline, reading)))
                except ValueError as error:
                    words = str(error).replace("a sampling_steps", "a number of steps")
                    words = words.replace("sampling_steps", "steps")
                    reason = one_line(words.replace("sampling_spacing", "spacing"), LONGEST_REASON)
                    passed_over.append({"sampler": str(sampler), "steps": steps, "reason": reason})
    if not planned:
        first = passed_over[0]
        raise ValueError(
            f"steps is {shown(config.steps)}, of which no sampler can do any; {first['sampler']}, "
            f"{first['steps']} steps: {first['reason']}"
        )
    for passed in passed_over:
        _tell(passed)
    return planned, passed_over


def _tell(passed: dict[str, Any]) -> None:
    if process_state().is_main_process:
        logger.warning("passed over: %(sampler)s, %(steps)s steps: %(reason)s", passed)


def check_enough(config: SweepConfig, total: int) -> None:
    """Refuse a split of too few images for the reference and as many others as there are samples.

    Raises:
        ValueError: the message says how many samples there can be.
    """
    wanted = config.num_reference or config.num_samples
    if wanted + config.num_samples <= total:
        return
    most = total // 2 if config.num_reference is None else total - config.num_reference
    allowed = f"num_samples <= {most}, or a larger split" if most >= 10 else "a larger split"
    raise ValueError(
        f"num_samples is {config.num_samples}, but the split has {total} images: too few for {wanted} of the "
        f"reference and {config.num_samples} others; allowed: {allowed}"
    )


def measure(prepared: Preparation, command: str = "") -> Sweep:
    """Draw and compare the cells that are missing, on every process; only parts of the work are written.

    Args:
        prepared: what to do.
        command: the command line, for the record.

    Raises:
        ValueError: the images of every cell are not finite.
        OSError: a part can't be written.
    """
    model, out, there = prepared.model, prepared.out, prepared.there
    extractor, state = prepared.quality.extractor, process_state()
    stopped = set(out.glob(f"{PARTS}*"))
    missing = prepared.missing
    parts = [planned.drawing.parts(model.weights_digest, out, extractor) for planned in missing]
    if stopped and not any(one.folder in stopped for one in parts) and state.is_main_process:
        logger.warning("what was begun in %r is of something else: it is not gone on with", str(out))
    reference = prepared.quality.reference()
    floor = frechet_distance(prepared.quality.floor(), reference) if there is None else there.floor
    cells = {} if there is None else {(cell.sampler, cell.steps): cell for cell in there.cells}
    passed_over = list(prepared.passed_over)
    mine = [one.absent(len(p.drawing.batches)) for one, p in zip(parts, missing, strict=True)]
    total = sum(
        planned.drawing.num_calls * len(planned.drawing.batches[number])
        for planned, numbers in zip(missing, mine, strict=True)
        for number in numbers
    )
    with kept_scheduler(model.pipeline), progress("sweep", total, "evaluation", state.is_main_process) as bar:
        model.pipeline.set_progress_bar_config(disable=True)
        for planned, place in zip(missing, parts, strict=True):
            bar.what = f"{planned.key[0]}, {planned.key[1]} steps"
            model.pipeline.scheduler = planned.drawing.scheduler
            found = _draw(model.pipeline, planned, place, extractor, bar)
            seconds = found.pop("seconds").sum().item() / prepared.of.num_samples
            if not found["features"].isfinite().all():
                sampler, steps = planned.key
                reason = "the images are not finite"
                passed_over.append({"sampler": sampler, "steps": steps, "reason": reason})
                _tell(passed_over[-1])
                continue
            distance = frechet_distance(Features(extractor.name, **found), reference)
            cells[planned.key] = Cell(*planned.key, planned.drawing.num_calls, seconds, distance)
        bar.what = "sweep"
    if not cells:
        raise ValueError("the images of every sampler are not finite: bad weights?")
    return _as_found(prepared, floor, cells, passed_over, command)


def _draw(pipeline: Any, planned: Planned, parts: Parts, extractor: Extractor, bar: Bar) -> dict[str, Tensor]:
    """The features of a cell's samples, and the seconds that each part took, on every process.

    Of images that are not finite the features are NaN, so that all processes hear of it together.
    """
    drawing, shape = planned.drawing, pipeline.image_shape

    def count(pipeline: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        bar.update(len(tensors["sample"]))

    def work(numbers: Sequence[int]) -> Generator[dict[str, Tensor], None, None]:
        for number in numbers:
            began = time.perf_counter()
            try:
                images, good = drawing.draw(number, count), True
            except Diverged:
                images = torch.zeros((len(drawing.batches[number]), *shape), dtype=torch.uint8)
                good = False
            seconds = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            features = extractor(images).features
            yield {"features": features if good else features * torch.nan, "seconds": seconds}

    return parts.complete(len(drawing.batches), work)


def _as_found(
    prepared: Preparation,
    floor: FrechetDistance,
    cells: dict[tuple[str, int], Cell],
    passed_over: list[dict[str, Any]],
    command: str,
) -> Sweep:
    """All that is known now: cells in the order that was asked for, before them those of earlier sweeps."""
    state, reading, there = process_state(), prepared.reading, prepared.there
    samplers = list(dict.fromkeys(sampler for sampler, _ in cells))
    earlier = [] if there is None else list(there.passed_over)
    passed = {(one["sampler"], one["steps"]): one for one in (*earlier, *passed_over)}
    return Sweep(
        label=frechet_label(prepared.of.extractor),
        of=prepared.of,
        data={
            "dataset": redact(reading.dataset),
            "split": str(reading.split),
            "part": str(reading.part),
            "fit": str(reading.fit),
        },
        floor=floor,
        cells=sorted(cells.values(), key=lambda cell: (samplers.index(cell.sampler), cell.steps)),
        passed_over=[one for key, one in passed.items() if key not in cells],
        record={
            "model": prepared.config.model,
            "command": command,
            "device": str(state.device),
            "processes": state.num_processes,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
        },
    )


def _there(out: Path, of: SweepOf, overwrite: bool) -> Sweep | None:
    """The sweep of the same that the folder holds already.

    Raises:
        ValueError: it holds another one, which is not to be replaced.
    """
    if not (out / SWEEP).exists():
        return None
    try:
        found = read_sweep(out)
        if found.of == of:
            return found
        other = [name for name, value in vars(of).items() if getattr(found.of, name) != value]
        words = f"with another {', '.join(other)}"
    except ValueError:
        words = "that is damaged"
    if not overwrite:
        raise ValueError(
            f"out {str(out)!r} holds {SWEEP} {words}; allowed: another folder as out, or overwrite"
        )
    return None

"""`sweep.json`: which sampler, how many steps? What was measured, what it is of, and what follows from it.

    label            of the distance, as "FD (fashion-mnist@393ad369)"
    of               what all cells have in common, see `SweepOf`
    data             dataset, split, part and fit of the real images
    floor            value, stderr, left_out: the distance of as many other real images
    cells            for each sampler and number of steps: sampler, steps, evaluations (of the network, for an
                     image), seconds_per_image, value, stderr, left_out
    passed_over      sampler, steps, reason: what a sampler can't do
    fast, best       sampler, steps: what `choose` says of the cells
    recommendation   the same in words
    model, command, device, processes, date, versions

`left_out` are the distances without each group of samples (metrics/frechet.py), of which all errors are made.
The file may come from a stranger: everything is checked that is read, and what follows from the numbers is
computed anew. Measuring is evaluation/sweep.py's business.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from hf_ddpm.folders.layout import SWEEP
from hf_ddpm.folders.values import MAX_STEPS, fits, words_of
from hf_ddpm.metrics import FrechetDistance
from hf_ddpm.runtime.messages import redact, shorten
from hf_ddpm.runtime.untrusted import read_json, shown
from hf_ddpm.shown import count, fields_line

REMEDY = "allowed: measure it anew with hf-ddpm sweep"
LONGEST_NAME = 120  # characters of the file in an error
MOST_CELLS = 1000
MOST_GROUPS = 10_000
DIGITS = 10  # of a number in `left_out`
SAME = 1e-6  # how much the error that a file says may differ from that of its numbers, relative


@dataclass(frozen=True)
class SweepOf:
    """What all cells of a sweep have in common: cells of another one are not compared with them.

    Attributes:
        weights: digest of the network's weights and config, see `folders.errors.network_digest`.
        rounded: the same of the weights in float16 and in bfloat16.
        process: digest of the process, see `folders.errors.process_digest`.
        prediction_type: what the network predicts.
        scheduler: plain values of the config of the model's own scheduler, of which all samplers are made.
        extractor: name of the feature network.
        num_samples: samples of each cell.
        num_reference: real images that they are compared with.
        images: digest of these and of the floor's images.
        seed: of the samples and the chosen images.
    """

    weights: str
    rounded: list[str]
    process: str
    prediction_type: str
    scheduler: dict[str, Any]
    extractor: str
    num_samples: int
    num_reference: int
    images: str
    seed: int

    __repr__ = fields_line

    def is_of(self, weights: str) -> bool:
        """Whether a digest is that of the weights, or of the same in half precision."""
        return weights in (self.weights, *self.rounded)


@dataclass(frozen=True)
class Cell:
    """A sampler with a number of steps, measured.

    Attributes:
        sampler: its name, and what is chosen of it, as "ddim" or "ddim:trailing".
        steps: K.
        evaluations: network evaluations for an image.
        seconds_per_image: that one process took, drawing the batches that were asked for.
        distance: of its samples from the reference.
    """

    sampler: str
    steps: int
    evaluations: int
    seconds_per_image: float
    distance: FrechetDistance

    __repr__ = fields_line

    @property
    def name(self) -> str:
        """As "unipc, 10 steps"."""
        return f"{self.sampler}, {count(self.steps, 'step')}"

    @property
    def words(self) -> str:
        """The distance with its error, as "2.54 ± 0.31"."""
        return with_error(self.distance)


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        label: of the distance, with the feature network's name.
        of: what all cells have in common.
        data: dataset, split, part and fit of the real images.
        floor: the distance of as many other real images from the reference.
        cells: at least one.
        passed_over: sampler, steps and reason of what could not be done.
        record: when, where and by which command.
    """

    label: str
    of: SweepOf
    data: Mapping[str, Any]
    floor: FrechetDistance
    cells: Sequence[Cell]
    passed_over: Sequence[Mapping[str, Any]]
    record: Mapping[str, Any]

    __repr__ = fields_line

    def report(self) -> dict[str, Any]:
        """The content of `sweep.json`."""
        fast, best = choose(self.cells)
        return {
            "label": self.label,
            "of": dataclasses.asdict(self.of),
            "data": dict(self.data),
            "floor": _numbers(self.floor),
            "cells": [
                {name: getattr(cell, name) for name in _CELL} | _numbers(cell.distance) for cell in self.cells
            ],
            "passed_over": list(self.passed_over),
            "fast": {"sampler": fast.sampler, "steps": fast.steps},
            "best": {"sampler": best.sampler, "steps": best.steps},
            "recommendation": recommendation(self),
            **self.record,
        }

    def text(self) -> str:
        """The same as JSON, a list of numbers in one line."""
        text = json.dumps(self.report(), indent=2)
        return re.sub(r"\[[-+\d.,e\s]+\]", lambda found: " ".join(found[0].split()), text) + "\n"


# The types of what is read of the file
_CELL = {"sampler": str, "steps": int, "evaluations": int, "seconds_per_image": float}
_DISTANCE = {"value": float, "stderr": float, "left_out": list[float]}
_DATA = {"dataset": str, "split": str, "part": str, "fit": str}
_PASSED = {"sampler": str, "steps": int, "reason": str}
_RECORD = ("model", "command", "device", "processes", "date", "versions")


def with_error(distance: FrechetDistance) -> str:
    """A distance with its error, both with as many digits as the error's first two say: "2.54 ± 0.31"."""
    error = distance.stderr
    digits = 2 if not 0 < error < math.inf else min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{distance.value:.{digits}f} ± {error:.{digits}f}"


def choose(cells: Sequence[Cell]) -> tuple[Cell, Cell]:
    """The two cells that a sweep recommends, by the one-standard-error rule of Breiman et al. 1984.

    Args:
        cells: of equal numbers of samples.

    Returns:
        fast: the fewest network evaluations whose distance is above the lowest by no more than the standard
            error of the difference; of several the lowest.
        best: the lowest distance; of equal ones that of the fewest evaluations.

    Raises:
        ValueError: no cell has a finite distance.
    """
    finite = [cell for cell in cells if math.isfinite(cell.distance.value)]
    if not finite:
        raise ValueError("no sampler has a distance that is finite")
    best = min(finite, key=lambda cell: (cell.distance.value, cell.evaluations))
    near = [cell for cell in finite if is_near(cell, best)]
    return min(near, key=lambda cell: (cell.evaluations, cell.distance.value)), best


def is_near(cell: Cell, best: Cell) -> bool:
    """Whether a cell's distance is above the lowest one by no more than the error of the difference."""
    difference, error = cell.distance.minus(best.distance)
    return difference <= error  # not where the error is NaN, but for the best itself


def recommendation(sweep: Sweep) -> str:
    """What to take, in a few sentences."""
    fast, best = choose(sweep.cells)
    kind = sweep.label.partition(" ")[0]
    each = f"{count(fast.evaluations, 'network evaluation')} an image"
    words = f"Take {fast.name}: {kind} {fast.words}, {each}"
    if fast is best:
        words += "; no other is lower."
    else:
        difference, error = fast.distance.minus(best.distance)
        apart = f"{difference:.2g} ± {error:.2g}"
        words += f". The lowest is {best.name}: {best.words}; the difference, {apart}, is within its error."
    if len(sweep.cells) > 1 and all(is_near(cell, best) for cell in sweep.cells):
        words += " All differences are within their errors: more samples would tell more."
    elif best.evaluations == max(cell.evaluations for cell in sweep.cells) and len(sweep.cells) > 1:
        words += " The lowest has the most evaluations: with more steps it may be lower still."
    return words


def describe_sweep(sweep: Sweep) -> str:
    """A sweep in a table for a terminal."""
    fast, best = choose(sweep.cells)
    width = max(7, *(len(cell.sampler) for cell in sweep.cells))
    kind = sweep.label.partition(" ")[0]
    lines = [
        f"{sweep.label} of {sweep.of.num_samples:,} samples each, ± its standard error",
        "",
        f"{'sampler':{width}}  steps  evaluations  s/image  {kind}",
    ]
    for cell in sweep.cells:
        marks = [name for name, chosen in (("fast", fast), ("best", best)) if cell is chosen]
        mark = f"  <- {', '.join(marks)}" if marks else ""
        lines.append(
            f"{cell.sampler:{width}}  {cell.steps:5}  {cell.evaluations:11}  {cell.seconds_per_image:7.2g}  "
            f"{cell.words}{mark}"
        )
    real = f"as many real images ({shorten(str(sweep.data['dataset']), 45)}, {sweep.data['split']})"
    lines += ["", f"{real}: {with_error(sweep.floor)}", ""]
    return "\n".join([*lines, recommendation(sweep)])


def sweep_words(sweep: Sweep, call: Callable[[str], str | None]) -> dict[str, Any]:
    """What a card says of a sweep.

    Args:
        sweep: whose texts are written as they are.
        call: what the card calls a data set, by its name.

    Returns:
        columns and rows of a table, and words beside it.
    """
    fast, _ = choose(sweep.cells)
    steps = sorted({cell.steps for cell in sweep.cells})
    found = {(cell.sampler, cell.steps): cell for cell in sweep.cells}
    samplers = dict.fromkeys(cell.sampler for cell in sweep.cells)

    def written(cell: Cell | None) -> str:
        if cell is None:
            return "–"
        more = f" ({cell.evaluations} evaluations)" if cell.evaluations != cell.steps else ""
        return f"**{cell.words}**{more}" if cell is fast else f"{cell.words}{more}"

    return {
        "columns": [count(number, "step") for number in steps],
        "rows": [[f"`{s}`", *(written(found.get((s, number))) for number in steps)] for s in samplers],
        "label": sweep.label,
        "num_samples": f"{sweep.of.num_samples:,}",
        "num_reference": f"{sweep.of.num_reference:,}",
        "floor": with_error(sweep.floor),
        "dataset": call(str(sweep.data["dataset"])),
        "split": sweep.data["split"],
        "recommendation": recommendation(sweep),
    }


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder, whose numbers are checked.

    Raises:
        ValueError: it is missing, damaged, or no sweep; the message names the file, the key and the value.
    """
    name = repr(shorten(redact(str(folder / SWEEP)), LONGEST_NAME))
    return sweep_of(read_json(folder / SWEEP, name=name), name)


def sweep_of(report: Mapping[str, Any], name: str = SWEEP) -> Sweep:
    """The sweep of a report, which may be a stranger's.

    Args:
        report: the content of `sweep.json`.
        name: what an error calls the file.

    Raises:
        ValueError: something that is read is missing, of another type, out of range, or contradicts the rest.
    """
    sections = {"label": str, "of": {}, "data": {}, "floor": {}, "cells": list, "passed_over": list}
    _check(report, sections, name, "")
    of, data = report["of"], report["data"]
    _check(of, get_type_hints(SweepOf), name, "of.")
    _check(data, _DATA, name, "data.")
    number = of["num_samples"]
    if not (3 <= number and 2 <= of["num_reference"]):
        raise ValueError(f"{name}: num_samples is {number}, num_reference {of['num_reference']}; {REMEDY}")
    if not 1 <= len(report["cells"]) <= MOST_CELLS or len(report["passed_over"]) > MOST_CELLS:
        raise ValueError(f"{name} has {len(report['cells'])} cells; allowed: 1 to {MOST_CELLS}")
    cells = [_cell(cell, number, name, f"cells[{i}]") for i, cell in enumerate(report["cells"])]
    if len({(cell.sampler, cell.steps) for cell in cells}) < len(cells):
        raise ValueError(f"{name} has a sampler with equal steps twice; {REMEDY}")
    for i, passed in enumerate(report["passed_over"]):
        _check(passed, _PASSED, name, f"passed_over[{i}].")
    floor = _distance(report["floor"], number, name, "floor")
    if len({len(distance.left_out) for distance in (floor, *(cell.distance for cell in cells))}) > 1:
        raise ValueError(f"{name}: left_out has several lengths; {REMEDY}")
    return Sweep(
        label=report["label"],
        of=SweepOf(**{field.name: of[field.name] for field in dataclasses.fields(SweepOf)}),
        data=data,
        floor=floor,
        cells=cells,
        passed_over=report["passed_over"],
        record={key: report[key] for key in _RECORD if key in report},
    )


def _cell(found: Any, num_samples: int, name: str, where: str) -> Cell:
    _check(found, _CELL, name, f"{where}.")
    for key in ("steps", "evaluations"):
        if not 1 <= found[key] <= 10 * MAX_STEPS:
            raise ValueError(f"{name}: {where}.{key} is {shown(found[key])}; allowed: >= 1")
    if not 0 <= found["seconds_per_image"] < math.inf:
        raise ValueError(f"{name}: {where}.seconds_per_image is below 0; {REMEDY}")
    distance = _distance(found, num_samples, name, where)
    return Cell(**{key: found[key] for key in _CELL}, distance=distance)


def _distance(found: Any, num_samples: int, name: str, where: str) -> FrechetDistance:
    _check(found, _DISTANCE, name, f"{where}.")
    numbers = [found["value"], found["stderr"], *found["left_out"]]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name}: {where} holds numbers that are not finite; {REMEDY}")
    if not 2 <= len(found["left_out"]) <= min(num_samples, MOST_GROUPS):
        raise ValueError(f"{name}: {where}.left_out has {len(found['left_out'])} numbers; {REMEDY}")
    left_out = torch.tensor(found["left_out"], dtype=torch.float64)
    distance = FrechetDistance(float(found["value"]), left_out, num_samples)
    if not math.isclose(distance.stderr, found["stderr"], rel_tol=SAME, abs_tol=SAME):
        raise ValueError(f"{name}: {where}.stderr is not that of its left_out; {REMEDY}")
    return distance


def _check(found: Any, wanted: Mapping[str, Any], name: str, where: str) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: {where.rstrip('.')} is {shown(found)}; allowed: keys and values")
    for key, kind in wanted.items():
        if key not in found:
            raise ValueError(f"{name} has no {where}{key}; {REMEDY}")
        value = found[key]
        if isinstance(kind, dict) or kind == dict[str, Any]:
            good, words = isinstance(value, Mapping), "keys and values"
        elif kind is list:
            good, words = isinstance(value, list), "a list"
        elif kind is int and key == "seed":
            good, words = type(value) is int and 0 <= value < 2**63, "a whole number >= 0"
        else:
            good, words = fits(value, kind), words_of(kind)
        if not good:
            raise ValueError(f"{name}: {where}{key} is {shown(value)}; allowed: {words}")


def _numbers(distance: FrechetDistance) -> dict[str, Any]:
    """A distance as it is written; the error is that of the numbers as they are rounded."""
    left_out = [float(f"{value:.{DIGITS}g}") for value in distance.left_out.tolist()]
    rounded = dataclasses.replace(distance, left_out=torch.tensor(left_out, dtype=torch.float64))
    return {"value": distance.value, "stderr": rounded.stderr, "left_out": left_out}

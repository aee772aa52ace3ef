"""The pictures of a study: bits/dim and FD of each run, and its first samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image
from results import SIDES, bits_of, bits_value, fd_of, variance_in

from hf_ddpm.generation.grids import image_grid
from hf_ddpm.variances import FIXED


def figure(results: Mapping[str, Any], path: Path) -> Path:
    """Two panels, a line for each run: bits/dim as rate + L_0 with error bars, and FD; returns the path."""
    runs = results["runs"]
    picture = Figure(figsize=(10, 0.55 * len(runs) + 1.6), layout="constrained")
    left, right = picture.subplots(1, 2, sharey=True)
    totals = [n for e in runs.values() for c in FIXED if (n := bits_value(e, variance_in(e, c))) is not None]
    limit = min(max(totals), 2 * float(np.median(totals))) * 1.2 if totals else 1.0
    for number, entry in enumerate(runs.values()):
        bars = [("fixed_large", -0.2, "C0"), ("fixed_small", 0.2, "C1")]
        if entry["variance_type"] not in FIXED:
            bars = [(entry["variance_type"], 0, "C2")]
        for variance, shift, color in bars:
            y = number + shift
            if (total := bits_of(entry, variance)) is not None:
                rate = (bits_of(entry, variance, "rate_bpd") or total)["value"]
                left.barh(y, rate, 0.36, color=color)
                left.barh(y, total["value"] - rate, 0.36, left=rate, color=color, alpha=0.4)
                left.errorbar(total["value"], y, xerr=total["stderr"], color="black", capsize=2, lw=1)
                end = min(total["value"] + 0.02 * limit, 0.9 * limit)
                inside = "white" if total["value"] > limit else "black"  # a bar that is cut off
                left.text(end, y, f" {total['value']:.2f}", va="center", fontsize=8, color=inside)
            if (distance := fd_of(entry, variance)) is not None:
                right.plot(distance, y, "o", color=color)
                right.annotate(
                    f"{distance:.1f}",
                    (distance, y),
                    (6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        for axes, entries in ((left, [entry["train"], entry.get("bits", {})]), (right, [entry["train"]])):
            if failed := next((e["failed"] for e in entries if "failed" in e), None):
                axes.text(0.02, number, failed, va="center", fontsize=8, transform=axes.get_yaxis_transform())
    floor = next((f for e in runs.values() for c in FIXED if (f := fd_of(e, c, "floor")) is not None), None)
    if floor is not None:
        right.axvline(floor, color="grey", ls="--", lw=1)
    left.set_yticks(range(len(runs)), [f"{name}, T = {entry['T']}" for name, entry in runs.items()])
    left.invert_yaxis()
    left.set(xlim=(0, limit), xlabel="bits/dim of held-out digits: rate (dark) + L₀ (light)")
    right.set(xscale="log", xlabel="FD of samples (dashed: of real images)")
    for which in (right.xaxis.set_major_formatter, right.xaxis.set_minor_formatter):
        which(LogFormatter(minor_thresholds=(2, 0.5)))
    right.margins(x=0.15)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    for label, color in (("fixed_large", "C0"), ("fixed_small", "C1"), ("its own", "C2")):
        left.barh(0, 0, color=color, label=label)
    picture.legend(loc="outside upper center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)
    return path


def samples_picture(results: Mapping[str, Any], out: Path, path: Path) -> Path | None:
    """First samples of each run, fixed_large left and fixed_small right; None if no run has any."""
    rows: list[tuple[str, list[Image.Image]]] = []
    for name, entry in results["runs"].items():
        row: list[Image.Image] = []
        for column in SIDES:
            file = out / name / f"samples-{variance_in(entry, column)}.png"
            if file.exists() and (column == "fixed_large" or entry["variance_type"] in FIXED):
                with Image.open(file, formats=["PNG"]) as strip:
                    side = strip.height
                    row += [Image.new("L", (side, side), 127)] if row else []  # a gap between the two
                    row += [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
        if row:
            rows.append((name, row))
    if not rows:
        return None
    columns = max(len(row) for _, row in rows)
    blank = Image.new("L", rows[0][1][0].size, 127)
    grid = image_grid([i for _, row in rows for i in row + [blank] * (columns - len(row))], columns, scale=5)
    picture = Figure(figsize=(grid.width / 110 + 1, grid.height / 110 + 0.4), layout="constrained")
    axes = picture.add_subplot()
    axes.imshow(grid, interpolation="nearest")
    axes.set_yticks(
        [grid.height / len(rows) * (i + 0.5) for i in range(len(rows))], [name for name, _ in rows]
    )
    axes.set_xticks([grid.width / 4, grid.width * 3 / 4], ["fixed_large (or its own)", "fixed_small"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)
    return path

"""A run's log.jsonl as a picture: the loss, and the bits/dim of held-out images, over the optimizer steps."""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure  # never pyplot: no window, no global state

from hf_ddpm.folders.layout import CURVE, LOG
from hf_ddpm.folders.numbers import read_log
from hf_ddpm.generation.grids import save_figure
from hf_ddpm.runtime.disk import named


def draw_curve(run: Path) -> None:
    """Draw what the log of a run's folder says so far, as `CURVE` in it; nothing if it has no loss yet.

    Raises:
        OSError: the picture can't be written.
    """
    lines = read_log(run / LOG).lines
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    # A single image has no standard error
    heldout = [
        (line["step"], line["heldout_bpd"], line.get("heldout_stderr", 0.0))
        for line in lines
        if "heldout_bpd" in line
    ]
    if losses:
        with named(run / CURVE):
            plot_training(losses, heldout, run / CURVE)


def plot_training(
    losses: Sequence[tuple[int, float]],
    heldout: Sequence[tuple[int, float, float]],
    path: str | os.PathLike[str],
) -> Path:
    """The loss over the optimizer steps, and beside it the bound of held-out images; returns the path.

    Args:
        losses: step and mean loss since the entry before.
        heldout: step, bits/dim and its standard error; may be empty.
        path: the file, as in `save_figure`.
    """
    figure = Figure(figsize=(10 if heldout else 7, 4.2), layout="constrained")
    axes = figure.add_subplot(1, 2 if heldout else 1, 1)
    steps, values = zip(*losses, strict=True)
    axes.plot(steps, values, linewidth=1)
    axes.set(xlabel="optimizer steps", title="Loss")
    # An objective that is a log density may be negative
    if min(values) > 0:
        axes.set(yscale="log")
    axes.grid(alpha=0.3, which="both")
    if heldout:
        axes = figure.add_subplot(1, 2, 2)
        steps, values, errors = zip(*heldout, strict=True)
        axes.errorbar(steps, values, errors, marker=".", capsize=2)
        axes.set(xlabel="optimizer steps", title="Bits/dim of held-out images ± standard error")
        axes.grid(alpha=0.3)
    return save_figure(figure, path)

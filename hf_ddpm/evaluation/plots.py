"""Pictures of an evaluation: the curves of the bound, and reconstructions from each noise level."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Never pyplot: no window is opened, and no global state is kept
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hf_ddpm.data.pixels import to_float, to_uint8
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.evaluation.scored_model import ScoredModel
from hf_ddpm.folders.sweep import Sweep, choose
from hf_ddpm.generation.grids import figure_png, plot_reconstructions, save_figure, to_pil
from hf_ddpm.likelihood import RateDistortion, image_noise
from hf_ddpm.parametrization import to_x0

# Noise levels that are shown, as shares of the chain's last step
LEVELS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.99)


def plot_bits_per_step(curve: RateDistortion, path: str | os.PathLike[str]) -> Path:
    """Bits/dim of a step over t, both logarithmic, and their sum from t up; returns the path.

    Args:
        curve: of `rate_distortion`.
        path: the file, as in `save_figure`.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    _draw_bits(figure.add_subplot(), curve)
    return save_figure(figure, path)


def plot_rate_distortion(curve: RateDistortion, path: str | os.PathLike[str]) -> Path:
    """Error of x̂_0 on 0..255 over the bits received, Ho et al. 2020, figure 5; returns the path.

    Args:
        curve: of `rate_distortion`.
        path: the file, as in `save_figure`.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    _draw_rate(figure.add_subplot(), curve)
    return save_figure(figure, path)


def curve_png(curve: RateDistortion) -> bytes:
    """Both pictures of a curve side by side, as the content of a PNG file: what a notebook shows of it."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    _draw_rate(figure.add_subplot(1, 2, 1), curve)
    _draw_bits(figure.add_subplot(1, 2, 2), curve)
    for axes in figure.axes:
        axes.title.set_fontsize(9)  # half a figure is narrow
    return figure_png(figure)


def _draw_bits(axes: Axes, curve: RateDistortion) -> None:
    t = curve.t.numpy() + 1
    axes.plot(t, curve.step_bpd, color="C0", marker="." if len(t) < 100 else "", label="one step")
    axes.plot(t, curve.step_bpd + curve.bpd, color="C1", label="this step and all above, with the prior")
    axes.set(xscale="log", yscale="log", xlabel="t + 1 (noise grows to the right)", ylabel="bits/dim")
    axes.set_title(
        f"{curve.rate_bpd + curve.distortion_bpd:.3f} bits/dim = {curve.rate_bpd:.3f} rate + "
        f"{curve.distortion_bpd:.3f} distortion (L₀, the point at the left)"
    )
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_rate(axes: Axes, curve: RateDistortion) -> None:
    axes.plot(curve.bpd, curve.rmse_255, marker="." if len(curve.t) < 100 else "")
    axes.set(
        xlabel="bits/dim received", ylabel="RMSE of the predicted x₀, 0..255", ylim=(0, None), xlim=(0, None)
    )
    axes.set_title("Progressive code: from pure noise (left) to x at t = 0 (right)")
    axes.grid(alpha=0.3)


def plot_sweep(sweep: Sweep, path: str | os.PathLike[str]) -> Path:
    """The distance of every sampler over its network evaluations, both logarithmic; returns the path.

    Args:
        sweep: what was measured.
        path: the file, as in `save_figure`.
    """
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for i, sampler in enumerate(dict.fromkeys(cell.sampler for cell in sweep.cells)):
        cells = [cell for cell in sweep.cells if cell.sampler == sampler]
        evaluations = [cell.evaluations for cell in cells]
        values = [cell.distance.value for cell in cells]
        errors = [cell.distance.stderr for cell in cells]
        style: Any = {"marker": "osD^vPX<>"[i % 9], "color": f"C{i % 10}", "capsize": 3, "markersize": 5}
        axes.errorbar(evaluations, values, errors, label=sampler, **style)
    fast, _ = choose(sweep.cells)
    chosen: Any = {"s": 220, "facecolors": "none", "edgecolors": "black", "label": f"take {fast.name}"}
    axes.scatter([fast.evaluations], [fast.distance.value], **chosen)
    floor = sweep.floor
    axes.axhline(floor.value, color="grey", linestyle="--", label="as many real images")
    axes.axhspan(floor.value - floor.stderr, floor.value + floor.stderr, color="grey", alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations for an image", ylabel=sweep.label)
    ticks = sorted({cell.evaluations for cell in sweep.cells})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    marks = [m * 10.0**k for k in range(-6, 9) for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_title(f"{sweep.of.num_samples:,} samples of each, ± standard error")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return save_figure(figure, path)


@torch.no_grad()
def plot_reconstruction_levels(
    model: ScoredModel,
    stream: ImageStream,
    rows: list[int],
    seed: int,
    path: str | os.PathLike[str],
    labels: Tensor | None = None,
) -> Path:
    """Rows of x_t above the predicted x_0, a pair for each image and a column for each noise level.

    Args:
        model: what predicts.
        stream: the images, in the order of their source.
        rows: which of them, ascending.
        seed: of the noise; an image's depends on (seed, row).
        path: a PNG file; returned.
        labels: the class that each is given, (N,), int64; None of a model without classes.
    """
    network = model.denoiser if labels is None else model.given(labels)
    process, device = model.process, model.device
    x_0 = to_float(torch.stack(list(stream.select(rows)))).to(device)
    noise = image_noise(seed, stream.chosen.of(rows).tolist(), x_0)(0)
    levels = np.unique(np.round(np.array(LEVELS) * (len(process) - 1))).astype(int).tolist()
    columns, predictions = [x_0], [x_0]
    for t in levels:
        x_t = process.q_sample(x_0, noise, t)
        output = network(x_t, process.timesteps_at(torch.full((len(x_t),), t, device=device)))
        predicted = to_x0(process, model.prediction_type, output[:, : x_0.shape[1]], x_t, t)
        columns.append(x_t)
        predictions.append(predicted.clamp(-1, 1))
    pictures = [
        [to_pil(to_uint8(column[i])) for column in kind]
        for i in range(len(rows))
        for kind in (columns, predictions)
    ]
    names = ["image", *(f"t = {process.timesteps[t]}" for t in levels)]
    return plot_reconstructions(pictures, names, path, ["x_t", "x̂_0"] * len(rows))

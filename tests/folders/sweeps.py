"""Made-up sweeps: cells with the distances and errors that a test says."""

import math

import torch

from hf_ddpm.folders.sweep import Cell, Sweep, SweepOf
from hf_ddpm.metrics import FrechetDistance

GROUPS = 8
# Rows that are orthogonal to each other and to a constant one
WALSH = [[(-1.0) ** bin(i & k).count("1") for i in range(GROUPS)] for k in range(GROUPS)]
OF = SweepOf(
    weights="0" * 16,
    rounded=["1" * 16, "2" * 16],
    process="3" * 16,
    prediction_type="epsilon",
    scheduler={"class": "DDPMScheduler", "clip_sample": True},
    extractor="toy@12345678",
    num_samples=GROUPS,
    num_reference=20,
    images="4" * 16,
    seed=0,
)


def distance(value, error, row=1):
    """A distance with this error; those of two rows have independent errors, of one row equal ones."""
    left_out = value + error / math.sqrt(GROUPS - 1) * torch.tensor(WALSH[row], dtype=torch.float64)
    return FrechetDistance(value, left_out, GROUPS)


def cell(sampler, evaluations, value, error, row=1, steps=None):
    return Cell(sampler, steps or evaluations, evaluations, 0.01 * evaluations, distance(value, error, row))


def sweep(*cells, of=OF, **more):
    return Sweep(
        label=f"FD ({of.extractor})",
        of=of,
        data={"dataset": "digits", "split": "test", "part": "all", "fit": "exact"},
        floor=distance(0.5, 0.1),
        cells=cells or (cell("unipc", 10, 2.5, 0.25, 1), cell("ddpm", 250, 2.5, 0.25, 2)),
        passed_over=[],
        record={"model": "model", "command": "hf-ddpm sweep model digits"},
        **more,
    )

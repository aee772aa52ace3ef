"""A run's log.jsonl as a picture: the loss, and the bits/dim of held-out images, over the optimizer steps."""

import json
from pathlib import Path

from hf_ddpm.card import CURVE
from hf_ddpm.checkpoint import named
from hf_ddpm.plots import plot_training
from hf_ddpm.publication import LOG


def draw_curve(run: Path) -> None:
    """Draw what the log says so far; nothing if it says no loss."""
    lines = [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    heldout = [
        (line["step"], line["heldout_bpd"], line.get("heldout_stderr", 0.0))  # a single image has no error
        for line in lines
        if "heldout_bpd" in line
    ]
    if losses:
        with named(run / CURVE):
            plot_training(losses, heldout, run / CURVE)

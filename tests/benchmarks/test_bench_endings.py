"""Do measured variances, spacings and endings make better pictures? Fréchet distances at equal numbers.

A cell is SAMPLER:SPACING:VARIANCE:STEPS; "-" is the sampler's or the model's own. All cells begin with the
same noise, and the three endings of a cell are of the same predicted images. The model has to be one that
`hf-ddpm plan` has measured. Printed are the distance from training images with its jackknife error, and that
of "mode" and "draw" less that of "mean", paired. PICTURES is a folder for a grid of each.

    ENDINGS_MODEL=runs/digits ENDINGS_CELLS="ddpm:leading:optimal:10 unipc:-:-:10" \
        .venv/bin/python -m pytest -n 0 -m bench -s tests/benchmarks/test_bench_endings.py
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_ddpm.data.pixels import to_uint8
from hf_ddpm.data.stream import load_stream
from hf_ddpm.generation.grids import image_grid, to_pil
from hf_ddpm.generation.measured import ENDINGS, ended, ending_decoder
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import respace, swap_scheduler
from hf_ddpm.metrics import Features, frechet_distance, load_extractor
from hf_ddpm.seeds import image_generators

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]
MODEL = os.environ.get("ENDINGS_MODEL", "runs/digits")
DATA = os.environ.get("ENDINGS_DATA", "digits")
NETWORK = os.environ.get("ENDINGS_NETWORK", str(ROOT / "train_scripts" / "classifiers" / "digits"))
CELLS = os.environ.get("ENDINGS_CELLS", "ddpm:leading:fixed_small:10 unipc:-:-:10").split()
PICTURES = os.environ.get("PICTURES")
SAMPLES, REFERENCE, BATCH = int(os.environ.get("ENDINGS_SAMPLES", "1000")), 10_000, 100


def features(extractor, images):
    return Features.cat([extractor(part) for part in images.split(250)])


def pipeline_of(cell):
    sampler, spacing, variance, steps = cell.split(":")
    pipeline: Any = DDPMPipeline.from_pretrained(MODEL)
    if sampler != "ddpm":
        swap_scheduler(pipeline, sampler)
    if spacing != "-":
        respace(pipeline, spacing)
    if variance != "-":
        pipeline.scheduler.variance_type = variance
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, int(steps)


def endings(pipeline, steps):
    """The same predicted images, ended in each way; the pipeline's own draw comes after the steps' noise."""
    found = {ending: [] for ending in ENDINGS}
    pipeline.check_inputs(num_inference_steps=steps)
    decoder = ending_decoder(pipeline, "mode")
    for start in range(0, SAMPLES, BATCH):
        generators = image_generators(0, range(start, min(start + BATCH, SAMPLES)))
        x_0 = 2 * pipeline(len(generators), generators, steps, "pt").images - 1
        for ending in ENDINGS:
            images = ended(x_0, None if ending == "mean" else decoder, ending, generators)
            found[ending].append(to_uint8(images))
    return {ending: torch.cat(images) for ending, images in found.items()}


def test_endings(capsys):
    extractor = load_extractor(NETWORK)
    train, test = (load_stream(DATA, split) for split in ("train", "test"))
    rows = np.sort(np.random.default_rng(0).permutation(train.num_rows())[:REFERENCE])
    reference = features(extractor, torch.stack(list(train.select(rows))))
    others = torch.stack(list(test.select(range(min(SAMPLES, test.num_rows())))))
    floor = frechet_distance(features(extractor, others), reference)
    with capsys.disabled():
        line = {"floor": f"{floor.value:.2f} ± {floor.stderr:.2f}", "real images": len(others)}
        print(json.dumps(line | {"reference": len(reference)}, ensure_ascii=False), flush=True)
        for cell in CELLS:
            images = endings(*pipeline_of(cell))
            distances = {
                name: frechet_distance(features(extractor, x), reference) for name, x in images.items()
            }
            mean = distances["mean"]
            line = {"cell": cell, "mean": f"{mean.value:.2f} ± {mean.stderr:.2f}"}
            for name in ("mode", "draw"):
                value, error = distances[name].minus(mean)
                line[f"{name} less mean"] = f"{value:+.3f} ± {error:.3f}"
            print(json.dumps(line, ensure_ascii=False), flush=True)
            for name, x in images.items() if PICTURES else ():
                grid = image_grid([to_pil(image) for image in x[:64]])
                grid.save(Path(str(PICTURES)) / f"{cell.replace(':', ' ')} {name}.png")

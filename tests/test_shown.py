"""shown.py: every result says in one line what it is, whatever it holds, and shows itself in a notebook."""

import collections
import copy
import dataclasses
import importlib
import inspect
import io
import math
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hf_ddpm
from hf_ddpm import DDPMScheduler, load_stream
from hf_ddpm.evaluation.memorisation import NearestFound
from hf_ddpm.evaluation.quality import QualityFound
from hf_ddpm.folders.layout import CURVE
from hf_ddpm.generation.outputs import MOST_SHOWN, DDPMPipelineOutput
from hf_ddpm.likelihood import bound_term, estimate_bound, evaluate_bound, rate_distortion
from hf_ddpm.metrics.distances import SampleMetrics
from hf_ddpm.metrics.extractors import Features
from hf_ddpm.pictures import Sheet
from hf_ddpm.training.checkpoint import Checkpoint
from hf_ddpm.training.trainer import TrainResult
from hf_ddpm.visited import visit

# Settings are made to be read field by field, and copied from a terminal
SETTINGS = {"TrainConfig", "EvaluationConfig", "CardFacts", "StepShare", "Retry", "Published", "Rule", "UNet"}
SETTINGS |= {"ErrorsConfig", "SweepConfig", "Sampler", "Reading", "Choice"}
SETTINGS |= {"Head", "Named", "Place", "Stretch"}  # a few numbers or words


def is_record(cls):
    return dataclasses.is_dataclass(cls) or (issubclass(cls, tuple) and hasattr(cls, "_fields"))


def records():
    """Every public dataclass and named tuple of the package."""
    found = {}
    for module in pkgutil.walk_packages(hf_ddpm.__path__, "hf_ddpm."):
        if module.name.endswith("__main__"):
            continue
        for name, cls in vars(importlib.import_module(module.name)).items():
            ours = inspect.isclass(cls) and cls.__module__ == module.name and not name.startswith("_")
            if ours and is_record(cls):
                found[name] = cls
    return found


RECORDS = records()


def line(value):
    text = repr(value)
    assert text.startswith(f"{type(value).__name__}(") and text.endswith(")")
    assert len(text) < 200 and "\n" not in text and "object at 0x" not in text
    return text


def process(steps=20):
    return DDPMScheduler(steps, beta_end=0.5).process


def pixels(count=4):
    return torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1


def zero(x_t, t):
    return torch.zeros_like(x_t)


def bound(count=4):
    return evaluate_bound(process(), zero, pixels(count), generator=torch.Generator().manual_seed(0))


def estimate(count=4):
    return estimate_bound(process(), zero, pixels(count), num_evals_per_image=5, seed=3)


METRICS = SampleMetrics("inception-v3", 12.3456, 0.01, 0.002, None, 5000, 10000)

MADE = [
    (process, "DiffusionProcess(T=20, betas 0.0001 to 0.5, alphas_cumprod down to 0.00207)"),
    (lambda: process().respaced([0, 9, 19]), "DiffusionProcess(T=3 of 20, timesteps 0..19, betas 0.0001 to"),
    (lambda: visit(process(), torch.tensor([19, 9, 0])), "Visited(3 steps, 19..0)"),
    (bound, r"Bound\(\d\.\d+ ± 0\.\d+ bits/dim, 4 images, T=20\)"),
    (lambda: bound(1), r"Bound\(\d\.\d+ bits/dim, 1 image, T=20\)"),
    (estimate, r"Estimate\(\d\.\d+ ± 0\.\d+ bits/dim, 4 images, 5 evaluations each, T=20, seed=3\)"),
    (lambda: estimate(1), r"Estimate\(\d\.\d+ bits/dim, 1 image, 5 evaluations each, T=20, seed=3\)"),
    (
        lambda: bound_term(process(), zero, pixels(), 3, torch.zeros(4, 1, 4, 4)),
        r"BoundTerm\([\d.]+ ± [\d.e-]+ nats, 4 examples\)",
    ),
    (
        lambda: rate_distortion(bound()),
        r"RateDistortion\([\d.]+ bits/dim = [\d.]+ rate \+ [\d.]+ distortion, 20 points in t=0\.\.19\)",
    ),
    (
        lambda: Sheet(torch.zeros(2, 3, 1, 28, 20), list("abc"), list("de")),
        "Sheet(2 rows of 3, images (1, 28, 20) (C, H, W))",
    ),
    (
        lambda: DDPMPipelineOutput([Image.new("RGB", (8, 6))]),
        "DDPMPipelineOutput(1 image, PIL RGB, 8x6)",
    ),
    (
        lambda: DDPMPipelineOutput(torch.zeros(2, 1, 8, 8), {0: torch.zeros(2, 1, 8, 8)}),
        "DDPMPipelineOutput(2 images, float32 (2, 1, 8, 8), x̂_0 at 1 position)",
    ),
    (
        lambda: DDPMPipelineOutput(np.zeros((2, 8, 8, 1))),
        "DDPMPipelineOutput(2 images, float64 (2, 8, 8, 1))",
    ),
    (
        lambda: METRICS,
        "SampleMetrics(FID (inception-v3) 12.35, KID (inception-v3) 0.01, 5,000 samples against 10,000)",
    ),
    (lambda: QualityFound(METRICS, METRICS), "QualityFound(samples=SampleMetrics, floor=SampleMetrics)"),
    (
        lambda: Features("mine", torch.zeros(3, 5)),
        "Features(extractor='mine', features=float32 (3, 5), logits=None)",
    ),
    (lambda: load_stream("digits", "train"), "ImageStream(digits (train), images of (1, 8, 8) (C, H, W))"),
    (
        lambda: TrainResult(Path("runs/x"), 1200, 38400, 0.0312, 1.0),
        "TrainResult(step 1,200, 38,400 images, loss 0.0312, output_dir='runs/x')",
    ),
    (
        lambda: Checkpoint(3, {"a": torch.zeros(2)}, {}, {}, {}),
        "Checkpoint(step=3, model=dict of 1, averages=dict of 0,",
    ),
    (
        lambda: NearestFound(*[torch.zeros(3, 1, 8, 8)] * 6, 1.0, 50, "abc"),
        "NearestFound(samples=float32 (3, 1, 8, 8), rows=float32 (3, 1, 8, 8),",
    ),
]


@pytest.mark.parametrize(("make", "words"), MADE, ids=range(len(MADE)))
def test_a_result_says_what_it_is(make, words):
    found = line(make())
    assert found.startswith(words) or re.fullmatch(words, found)


def test_a_stream_says_how_many_images_it_has_once_that_is_known(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    assert ", 3 images of (1, 8, 8)" in line(load_stream(str(tmp_path), "train"))
    stream = load_stream("digits", "test")
    rows = stream.num_rows()
    assert f", {rows:,} images of (1, 8, 8) (C, H, W)" in line(stream)


class Wicked:
    """Fails at whatever it is asked."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise RuntimeError

    def __len__(self):
        raise RuntimeError


ODD = {
    "None": None,
    "empty": torch.zeros(0),
    "no images": torch.zeros(0, 4, dtype=torch.float64),
    "no steps": torch.zeros(4, 0, dtype=torch.float64),
    "zero-dim": torch.tensor(1.0),
    "one": torch.ones(1, 1),
    "NaN": torch.full((3, 4), math.nan),
    "infinite": torch.full((3, 4), math.inf),
    "half": torch.ones(3, 4, dtype=torch.float16),
    "bfloat16": torch.ones(3, 4, 1, 2, 2, dtype=torch.bfloat16),
    "meta": torch.ones(3, 4, device="meta"),
    "gradient": torch.ones(3, 4, requires_grad=True),
    "sparse": torch.eye(3).to_sparse(),
    "wide": torch.zeros([1] * 60),
    "array": np.zeros((2, 8, 8, 1)),
    "objects": np.array([None, 1]),
    "text": "x\n\x1b[31m" * 1000,
    "number": 10**5000,
    "list": [torch.zeros(3)] * 100,
    "dict": {"a" * 1000: torch.zeros(9)},
    "wicked": Wicked(),
}


@pytest.mark.parametrize("name", sorted(set(RECORDS) - SETTINGS))
def test_no_content_makes_a_line_fail(name):
    cls = RECORDS[name]
    for odd in ODD.values():
        if dataclasses.is_dataclass(cls):
            made = cls.__new__(cls)
            for field in dataclasses.fields(cls):
                object.__setattr__(made, field.name, odd)
        else:
            made = cls._make([odd] * len(cls._fields))
        line(made)
    if dataclasses.is_dataclass(cls):
        line(cls.__new__(cls))  # half made, as an error in its constructor leaves it to a debugger


def test_equality_and_hash_are_as_before():
    first, other = process(), process()
    assert first == first and first != other and hash(first) != hash(other)
    term = estimate()
    assert term == term and term != copy.copy(term) and {term: 1}[term] == 1
    assert METRICS == dataclasses.replace(METRICS) and hash(METRICS) == hash(dataclasses.replace(METRICS))
    assert collections.Counter([METRICS])[dataclasses.replace(METRICS)] == 1


# Pictures


def opened(png):
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return picture.convert("RGB")


def test_a_sheet_and_a_curve_show_themselves():
    sheet = Sheet(torch.rand(2, 3, 3, 8, 8) * 2 - 1, list("abc"), list("de"))
    assert np.array_equal(np.asarray(opened(sheet._repr_png_())), np.asarray(sheet.picture()))
    for made in (bound(), estimate()):
        assert np.asarray(opened(rate_distortion(made)._repr_png_())).std() > 1


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_an_output_shows_its_images_whatever_their_type(kind):
    array = np.linspace(0, 1, 6 * 8 * 8, dtype=np.float32).reshape(6, 8, 8, 1)
    pil = [Image.fromarray((image[:, :, 0] * 255).round().astype(np.uint8)) for image in array]
    images = {"pil": pil, "np": array, "pt": torch.from_numpy(array).permute(0, 3, 1, 2)}
    shown = np.asarray(opened(DDPMPipelineOutput(images[kind])._repr_png_()))
    assert np.array_equal(shown, np.asarray(opened(DDPMPipelineOutput(images["pil"])._repr_png_())))
    assert shown.min() == 0 and shown.max() == 255


def test_of_very_many_images_the_first_are_shown():
    output = DDPMPipelineOutput([Image.new("L", (8, 8), i) for i in range(200)])
    size = opened(output._repr_png_()).size
    assert size == opened(DDPMPipelineOutput(output.images[:MOST_SHOWN])._repr_png_()).size


def test_a_run_shows_its_curve(tmp_path):
    result = TrainResult(tmp_path, 3, 12, 0.5, math.nan)
    assert result._repr_png_() is None
    Image.new("L", (8, 8)).save(tmp_path / CURVE)
    assert opened(result._repr_png_()).size == (8, 8)


@pytest.mark.parametrize("odd", ODD)
def test_what_can_not_be_drawn_is_left_to_the_line(odd):
    curve = rate_distortion(bound())
    for made in (
        Sheet(ODD[odd], ["a"], ["b"]),
        DDPMPipelineOutput(ODD[odd]),
        dataclasses.replace(curve, bpd=ODD[odd], t=ODD[odd]),
    ):
        png = made._repr_png_()
        assert png is None or opened(png)


@pytest.mark.parametrize(
    ("images", "columns", "rows", "words"),
    [
        (torch.zeros(2, 3, 1, 8, 8), list("ab"), list("de"), "columns is 2 labels; allowed: a list of 3"),
        (torch.zeros(2, 3, 1, 8, 8), list("abc"), list("def"), "rows is 3 labels; allowed: a list of 2"),
        (torch.zeros(2, 3, 1, 8, 8), "abc", list("de"), "columns is 'abc'; allowed: a list of 3"),
        (
            torch.zeros(2, 1, 8, 8),
            ["a"],
            ["b"],
            r"images are a float32 tensor of shape \(2, 1, 8, 8\); allowed",
        ),
    ],
    ids=["few columns", "many rows", "text", "images"],
)
def test_a_sheet_of_other_labels_is_not_drawn(images, columns, rows, words, tmp_path):
    sheet = Sheet(images, columns, rows)
    assert sheet._repr_png_() is None
    with pytest.raises(ValueError, match=words):
        sheet.save(tmp_path / "sheet.png")


def test_a_notebook_uses_these():
    display = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    for made in (rate_distortion(bound()), DDPMPipelineOutput([Image.new("L", (8, 8))])):
        found, _ = display.format(made)
        assert set(found) == {"text/plain", "image/png"} and found["text/plain"] == repr(made)
    assert display.format(process())[0] == {"text/plain": repr(process())}

"""What `study.py` does with a run: train, score, sample, each stage once, its findings in a file.

A stage may fail by itself, because the loss explodes or samples are not finite: then that is its finding.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_ddpm import DDPMPipeline, TrainConfig, train
from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import load_stream
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.evaluation.quality import SampleQuality
from hf_ddpm.evaluation.report import sample_metrics_section
from hf_ddpm.evaluation.samples import Drawing
from hf_ddpm.evaluation.scored_model import load_scored_model
from hf_ddpm.gaussian import bits_per_dim, discretized_gaussian_log_likelihood
from hf_ddpm.generation.grids import save_image
from hf_ddpm.runtime.disk import whole_file
from hf_ddpm.seeds import image_generators
from hf_ddpm.variances import FIXED

HERE = Path(__file__).parents[1]
CONFIG = HERE / "configs" / "digits.toml"  # data, batch size, optimizer, averaging: the same for all
CLASSIFIER = HERE / "classifiers" / "digits"
NUM_REFERENCE = 749  # the training split has 1,497, of which half is the floor's
NUM_EVALS = 100  # network evaluations per image of the bound
NUM_PICTURES = 12
BATCH_SIZE = 128  # of scoring and sampling

# The error of a training run that ended because its loss or its weights were not finite or far too large, and
# where its words name the step
DIVERGED = re.compile(
    r"the loss is \S+ at step (\d+)|the mean loss of steps \d+ to (\d+)|finite at step (\d+)"
)


@dataclass(frozen=True)
class Study:
    """What is done with every run, and where.

    Attributes:
        out: the study's folder.
        max_steps: optimizer steps of each training.
        num_samples: images drawn with each variance.
        sampling_steps: steps of drawing them, at most; None for all T.
        runs: what each run changes in digits.toml, by name.
        started: time of the command's start, seconds since the epoch.
    """

    out: Path
    max_steps: int
    num_samples: int
    sampling_steps: int | None
    runs: Mapping[str, dict[str, Any]]
    started: float

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's findings depend on, besides what the run changes in digits.toml."""
        keys = ("max_steps", "num_samples", "sampling_steps")
        return {key: getattr(self, key) for key in keys}

    def config(self, name: str) -> TrainConfig:
        """The training run of that name."""
        quiet = {"sample_every": 0, "sample_steps": None, "evaluate_every": 0, "checkpoint_every": 500}
        where = {"output_dir": self.out / name, "max_steps": self.max_steps}
        return TrainConfig.load(CONFIG, **where, **quiet, **self.runs[name])

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The findings of a stage: those in its file, or else those of `work`, which are then written there.

        Beside them stands "seconds", the time of the last attempt, and "interrupted", whether there was an
        earlier one.
        """
        file = self.out / "stages" / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        begun = file.with_suffix(".begun")
        interrupted, start = begun.exists(), time.perf_counter()
        begun.touch()
        found = work()
        found = {"seconds": time.perf_counter() - start, "interrupted": interrupted} | found
        write_json(file, found)
        print(f"{name}: {found.get('failed', 'done')}, {found['seconds']:.0f} s", flush=True)
        sitting = self.out / "sittings" / f"{self.started:.0f}.json"
        write_json(sitting, {"seconds": time.time() - self.started})
        return found


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all, making its folder."""
    with whole_file(file) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def do_run(study: Study, name: str) -> dict[str, Any]:
    """Train, score and sample one run, as far as it isn't done yet: its entry in the results."""
    config, folder = study.config(name), study.out / name
    entry: dict[str, Any] = {"changes": study.runs[name], "T": config.num_train_timesteps}
    entry["variance_type"] = config.variance_type
    entry["train"] = study.stage(f"{name}.train", lambda: train_run(config))
    if "failed" in entry["train"]:
        return entry
    entry["bits"] = study.stage(f"{name}.bits", lambda: score_run(folder))
    entry["samples"] = {
        variance: study.stage(f"{name}.samples-{variance}", lambda v=variance: sample_run(study, folder, v))
        for variance in (FIXED if config.variance_type in FIXED else (config.variance_type,))
    }
    Parts.clear(folder)
    return entry


def train_run(config: TrainConfig) -> dict[str, Any]:
    """Train to the end, or to where it diverges."""
    found: dict[str, Any] = {}
    try:
        train(config)
        unet: Any = DDPMPipeline.from_pretrained(config.output_dir).unet
        found["parameters"] = sum(weights.numel() for weights in unet.parameters())
    except RuntimeError as error:
        match = DIVERGED.search(str(error))
        if match is None:
            raise
        step = next(step for step in match.groups() if step)
        found |= {"failed": f"diverged at step {step}", "message": str(error)}
    lines = (Path(config.output_dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return found | trained(map(json.loads, lines))


def trained(log: Iterable[dict[str, float]]) -> dict[str, Any]:
    """The images that a run trained on, and the seconds spent on them, from its log.

    A line has the speed since the line before it. So starting, saving and what a killed run did again are
    left out, however often it was stopped.
    """
    seconds, images = 0.0, 0
    for line in log:
        if "images_per_second" in line:
            # The speed is rounded to 0.1
            seconds += (line["images"] - images) / max(line["images_per_second"], 0.05)
            images = int(line["images"])
    return {"images": images, "seconds": seconds}


def score_run(folder: Path) -> dict[str, Any]:
    """Bits/dim of the held-out digits, with what a perfect network would still pay for L_0."""
    config = EvaluationConfig(
        model=str(folder),
        dataset="digits",
        num_evals_per_image=NUM_EVALS,
        batch_size=BATCH_SIZE,
        overwrite=True,
    )
    try:
        report = evaluate(config)
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        return {"failed": "not finite", "message": str(error)}
    numbers = [report["bits_per_dim"], *([report["other_variance"]] if "other_variance" in report else [])]
    return {
        "by_variance": {found["variance_type"]: found for found in numbers},
        "num_images": report["data"]["num_images"],
        "evaluations_per_image": report["method"]["evaluations_per_image"],
        "floor_of_l_0": floor_of_l_0(folder) if "other_variance" in report else None,
    }


def floor_of_l_0(folder: Path) -> float:
    """Bits/dim of L_0 on the held-out digits if x̂_0 is x_0 itself; both fixed variances have this σ_0."""
    images = to_float(torch.cat(list(load_stream("digits", "test").batches(256, epochs=1))))
    log_variance = load_scored_model(str(folder), torch.device("cpu")).process.log_variance("fixed_small")[0]
    return float(bits_per_dim(-discretized_gaussian_log_likelihood(images, images, log_variance).mean(), 1))


def sample_run(study: Study, folder: Path, variance_type: str) -> dict[str, Any]:
    """Sample with a variance, measure against real digits, and leave a picture of the first samples."""
    model, stream = load_scored_model(str(folder), torch.device("cpu")), load_stream("digits", "train")
    pipeline = model.pipeline
    pipeline.scheduler.variance_type = variance_type
    steps = min(study.sampling_steps or len(model.process), len(model.process))
    config = EvaluationConfig(
        model=str(folder),
        dataset="digits",
        split="train",
        extractor=str(CLASSIFIER),
        num_samples=study.num_samples,
        num_reference=NUM_REFERENCE,
        sampling_steps=steps,
        batch_size=BATCH_SIZE,
    )
    quality, drawing = SampleQuality(config, stream), Drawing(pipeline, config)
    try:
        features = drawing.run(model.weights_digest, folder, quality.extractor, keep=False)
        found = sample_metrics_section(quality.run(features), drawing)
        pictures: Any = pipeline(
            NUM_PICTURES, image_generators(0, range(NUM_PICTURES)), steps, return_dict=False
        )[0]
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        return {"failed": "samples not finite", "message": str(error)}
    save_image(
        Image.fromarray(np.hstack([np.asarray(one) for one in pictures])), strip(folder, variance_type)
    )
    return found


def strip(folder: Path, variance_type: str) -> Path:
    """Where the picture of a run's first samples is, side by side."""
    return folder / f"samples-{variance_type}.png"

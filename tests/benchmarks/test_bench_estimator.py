"""The error of a few evaluations per image against that of all steps: the toy of docs/maths.md; digits."""

import math
import os
import time
from pathlib import Path

import pytest
import torch

from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import load_stream
from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.likelihood import (
    Bound,
    estimate_bound,
    evaluate_bound,
    image_noise,
    mean_and_stderr,
    paired_difference,
    pilot_proposal,
    with_variance,
)
from tests.oracles import chain
from tests.toy import mixture_denoiser, mixture_images

pytestmark = pytest.mark.bench

OPTIONS = {"variance_type": "fixed_large", "prediction_type": "sample"}
COUNTS = (5, 9, 13, 16, 20, 33)
PILOT_IMAGES, PILOT_STEPS = 16, 20
REPLICATES = 20


def figures(estimates, full):
    """Ratios to the full loop, from replicates (R, N) of each on the same images; precision is one σ.

    The standard error of the mean: √ of the ratio of variances over images, each averaged over replicates.
    Monte Carlo alone: √ of the ratio of variances over replicates, averaged over images.
    """
    ours, whole = estimates.var(1), full.var(1)
    ratio = (ours.mean() / whole.mean()).sqrt().item()
    spread = [z.std() / z.mean() / (2 * math.sqrt(len(z))) for z in (ours, whole)]
    monte_carlo = (estimates.var(0).mean() / full.var(0).mean()).sqrt().item()
    drawn = mean_and_stderr(estimates.mean(1) - full.mean())
    return {
        "stderr_ratio": round(ratio, 4),
        "precision": round(ratio * math.hypot(*spread), 4),
        "monte_carlo_ratio": round(monte_carlo, 3),
        "bias_in_its_sigmas": round(drawn[0] / math.hypot(drawn[1], mean_and_stderr(full.mean(1))[1]), 1),
    }


@pytest.fixture(scope="module")
def toy_full_loops():
    """Six runs of every step on the toy, and seconds of one."""
    process, x_0, start = chain("linear"), mixture_images(512), time.perf_counter()
    bounds = []
    for seed in range(6):
        noise = image_noise(seed, range(512), x_0)
        bounds.append(evaluate_bound(process, mixture_denoiser(), x_0, noise_fn=noise, **OPTIONS))
    return bounds, (time.perf_counter() - start) / 6


def each_variance(results):
    """Name of a fixed variance, and the total of each image in each of the results under it, (R, N)."""
    for name in ("fixed_large", "fixed_small"):
        scored = [with_variance(result, chain("linear"), name) for result in results]
        totals = [one.total_bpd if isinstance(one, Bound) else one.per_image_bpd for one in scored]
        yield name, torch.stack(totals)


@pytest.mark.parametrize("kind", ["default", "pilot", "uniform"])
def test_error_on_the_toy(kind, toy_full_loops, report):
    process, model, x_0 = chain("linear"), mixture_denoiser(), mixture_images(512)
    bounds, seconds = toy_full_loops
    full = dict(each_variance(bounds))
    for name, totals in full.items() if kind == "default" else ():
        report(
            benchmark="evaluate_bound: toy",
            variance_type=name,
            images=512,
            replicates=len(totals),
            stderr=round(totals.std(1).mean().item() / math.sqrt(512), 5),
            monte_carlo_sd=round(totals.var(0).mean().sqrt().item(), 4),
            seconds_each=round(seconds, 2),
        )
    pilot = pilot_proposal(process, model, mixture_images(PILOT_IMAGES, 1), num_steps=PILOT_STEPS, **OPTIONS)
    proposal = {"default": None, "pilot": pilot, "uniform": torch.ones(1000)}[kind]
    within = {name: [] for name in full}
    for count in COUNTS:
        options = {"num_evals_per_image": count, "proposal": proposal, "batch_size": 512, **OPTIONS}
        estimates = [estimate_bound(process, model, x_0, seed=seed, **options) for seed in range(REPLICATES)]
        for name, values in each_variance(estimates):
            found = figures(values, full[name])
            within[name] += [count] if found["stderr_ratio"] < 1.02 else []
            report(
                benchmark="estimate_bound: toy, error against the full loop",
                variance_type=name,
                proposal=kind,
                evals_per_image=count,
                pilot_evals=PILOT_IMAGES * len(pilot_steps()) if kind == "pilot" else 0,
                replicates=REPLICATES,
                **found,
            )
    report(
        benchmark="estimate_bound: toy, least evaluations within 2 %",
        proposal=kind,
        of=COUNTS,
        evals_per_image={name: min(counts, default=None) for name, counts in within.items()},
    )


def pilot_steps():
    """The steps that a pilot of `PILOT_STEPS` visits; small ones coincide."""
    seen = set()

    def model(x_t, steps):
        seen.update(steps.tolist())
        return x_t

    pilot_proposal(chain("linear"), model, mixture_images(1), num_steps=PILOT_STEPS, **OPTIONS)
    return seen


@pytest.mark.parametrize("count", [20, 33])
def test_comparison_of_two_models_on_the_toy(count, report):
    # The exact denoiser against 0.99 of it.
    process, models = chain("linear"), [mixture_denoiser(factor=factor) for factor in (1, 0.99)]
    sets, replicates = (mixture_images(512), mixture_images(512, 1)), 20

    def estimate(model, seed, images=0):
        options = {"num_evals_per_image": count, "batch_size": 512, **OPTIONS}
        return estimate_bound(process, models[model], sets[images], seed=seed, **options)

    rows = []
    for r in range(replicates):
        a, b, redrawn = estimate(0, r), estimate(1, r), estimate(1, r + replicates)
        others = estimate(1, r, images=1)
        mean, paired = paired_difference(a, b)
        same_images = mean_and_stderr(a.per_image_bpd - redrawn.per_image_bpd)[1]
        rows.append([mean, paired, same_images, math.hypot(a.stderr, others.stderr)])
    table = torch.tensor(rows, dtype=torch.float64)
    mean, paired, same_images, unpaired = table.mean(0).tolist()
    report(
        benchmark="paired_difference: toy, x̂_0 against 0.99 x̂_0",
        evals_per_image=count,
        images=512,
        replicates=replicates,
        difference=round(mean, 4),
        replicate_spread=round(table[:, 0].std().item(), 4),
        stderr_paired=round(paired, 4),
        stderr_same_images=round(same_images, 4),
        stderr_unpaired=round(unpaired, 4),
        images_for_the_same_error={
            "paired": 512,
            "same_images": round(512 * (same_images / paired) ** 2),
            "unpaired": round(512 * (unpaired / paired) ** 2),
        },
    )


@torch.no_grad()
def test_error_on_digits(report):
    folder = Path(os.environ.get("DIGITS_MODEL", "runs/digits"))
    if not (folder / "model_index.json").exists():
        pytest.skip(f"no trained pipeline in {folder}: `hf-ddpm train` one, or set DIGITS_MODEL")
    pipeline = DDPMPipeline.from_pretrained(folder)
    process, config = pipeline.scheduler.process, pipeline.scheduler.config
    model = as_denoiser(pipeline.unet.eval())
    options = {
        "variance_type": config["variance_type"],
        "prediction_type": config["prediction_type"],
        "clip_x0": config["clip_sample"],
    }
    x_0 = to_float(next(iter(load_stream("digits", "test").batches(100, epochs=1))))
    images, start, full = len(x_0), time.perf_counter(), []
    for seed in range(2):
        noise = image_noise(seed, range(images), x_0)
        full.append(evaluate_bound(process, model, x_0, noise_fn=noise, **options).total_bpd)
    seconds, full = (time.perf_counter() - start) / 2, torch.stack(full)
    report(
        benchmark="evaluate_bound: digits, twice",
        images=images,
        evals_per_image=len(process),
        bpd=[round(mean_and_stderr(one)[0], 4) for one in full],
        stderr=[round(mean_and_stderr(one)[1], 4) for one in full],
        monte_carlo_stderr=round((full.var(0).mean() / images).sqrt().item(), 4),
        seconds_each=round(seconds, 1),
    )
    pilot_images = to_float(next(iter(load_stream("digits", "train").batches(PILOT_IMAGES, epochs=1))))
    pilot = pilot_proposal(process, model, pilot_images, num_steps=PILOT_STEPS, **options)
    proposals = {"default": None, "pilot": pilot, "uniform": torch.ones(len(process))}
    for kind, count in [("default", 16), ("default", 20), ("pilot", 20), ("uniform", 20)]:
        start, settings = time.perf_counter(), {"num_evals_per_image": count, "batch_size": 100, **options}
        estimates = [
            estimate_bound(process, model, x_0, seed=seed, proposal=proposals[kind], **settings)
            for seed in range(10)
        ]
        each = (time.perf_counter() - start) / len(estimates)
        values = torch.stack([estimate.per_image_bpd for estimate in estimates])
        report(
            benchmark="estimate_bound: digits, error against the full loop",
            proposal=kind,
            images=images,
            evals_per_image=count,
            pilot_evals=PILOT_IMAGES * len(pilot_steps()) if kind == "pilot" else 0,
            replicates=len(estimates),
            bpd=round(values.mean().item(), 4),
            stderr=round(values.std(1).mean().item() / math.sqrt(images), 4),
            monte_carlo_stderr=round((values.var(0).mean() / images).sqrt().item(), 4),
            **figures(values, full),
            seconds_each=round(each, 2),
        )

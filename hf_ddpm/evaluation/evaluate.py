"""A model and a data set become `evaluation.json`: bits/dim, sample metrics, memorisation, and pictures.

    prepare ─► Plan      everything is looked at, and refused if it can't be done; nothing is written
    measure ─► Results   the work, in parts that processes share and that a killed run finds again
    write   ─► files     the report, its tensors and the pictures

The numbers themselves are likelihood's and metrics'. What the files hold is report.py's.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_ddpm.evaluation.bits_per_dim import check_fair, check_scorable, make_proposal, score
from hf_ddpm.evaluation.classes import check_given, classify, given_classes
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.images import choose_rows, digest_rows, fingerprint, open_images, open_nearest
from hf_ddpm.evaluation.memorisation import Memorisation
from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.evaluation.plan import Plan, Results
from hf_ddpm.evaluation.plots import plot_bits_per_step, plot_rate_distortion, plot_reconstruction_levels
from hf_ddpm.evaluation.quality import SampleQuality
from hf_ddpm.evaluation.report import (
    build_evaluation,
    check_comparable,
    foresee,
    read_evaluation,
    write_evaluation,
)
from hf_ddpm.evaluation.samples import Drawing
from hf_ddpm.evaluation.scored_model import load_scored_model
from hf_ddpm.folders.footprint import check_batch
from hf_ddpm.folders.layout import BITS_PLOT, EVALUATION, LEVELS_PLOT, MEASURED, NEAREST, RATE_PLOT
from hf_ddpm.folders.output import check_evaluation_folder, output_folder, results_folder
from hf_ddpm.likelihood import rate_distortion, with_variance
from hf_ddpm.runtime.disk import delete_partials, why_not_writable
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.spelling import suggest_keywords

logger = logging.getLogger(__name__)

PREVIEWS = 6  # images in the picture of reconstructions


@suggest_keywords
def evaluate(
    config: EvaluationConfig, command: str = "", *, network: nn.Module | None = None
) -> dict[str, Any]:
    """Score a model, and leave `evaluation.json`, `evaluation.safetensors` and pictures in a folder.

    Args:
        config: what to do.
        command: the command line, for the record.
        network: for a run of a module of your own, whose folder `config.model` is: such a module, as
            `load_run` takes it.

    Returns:
        The content of `evaluation.json`, on every process.

    Raises:
        ValueError: bad input: model, data set, folder, or an extractor; nothing has been written then. Only
            an image of `nearest_dataset` that can't be read shows when it is looked at.
        RuntimeError: the bound is not finite.
        OSError: a file can't be written.
    """
    out, state = results_folder(config.model, config.out, "the results"), process_state()
    with output_folder(out, "out", lambda out: check_evaluation_folder(out, config.overwrite), state) as lock:
        plan = prepare(config, network)
        if state.is_main_process:
            delete_partials(out, MEASURED.__contains__)
        results = measure(plan)
        lock.check()
        return write(plan, results, command)


def prepare(config: EvaluationConfig, network: nn.Module | None = None) -> Plan:
    """Look at the model, the images, the extractor and the folder, before anything is made or written.

    What was asked for is looked at first, and the folder in which the answer may stand already comes last.

    Args:
        config: what to do.
        network: as in `evaluate`.

    Raises:
        ValueError: something can't be done; the message names the culprit.
    """
    started, state = time.perf_counter(), process_state()
    out = results_folder(config.model, config.out, "the results")
    if reason := why_not_writable(out):
        raise ValueError(f"out {str(out)!r} can't be written: {reason}")
    other = None if config.compare_with is None else read_evaluation(Path(config.compare_with).expanduser())
    model = load_scored_model(
        config.model,
        state.device or torch.device("cpu"),
        config.variance_type,
        config.steps,
        config.first_variance,  # type: ignore[arg-type]
        config.chain,
        config.errors,
        network,
        config.decoder,
        config.chosen_last_step,
    )
    images = open_images(check_given(config, model), model)
    config, stream = images.config, images.stream
    rows = choose_rows(stream.num_rows(), config.num_images, config.seed)
    if state.device is None or state.device.type == "cpu":
        at_once = min(config.batch_size, len(rows) * config.num_evals_per_image)
        check_batch("batch_size", at_once, model.pipeline.unet, stream.shape)
    check_scorable(config, model, stream, rows[0])
    wanted = config.extractor is not None, config.nearest_dataset is not None
    drawing = Drawing(model.pipeline, config) if any(wanted) else None
    if drawing is not None and model.class_names is not None and state.is_main_process:
        logger.warning("the samples that are measured are drawn without a class (w = 0)")
    quality = SampleQuality(config, stream) if wanted[0] else None
    memorisation = Memorisation(config, stream, *open_nearest(config, model, images)) if wanted[1] else None
    refused_later = other is not None or model.errors is not None
    if not refused_later:
        _check_free(out, config)  # before what takes time
    digests = digest_rows(stream, rows)
    given = given_classes(config, model, stream, rows)
    check_fair(config, model, stream, rows, digests, None if given is None else given.what)
    proposal, pilot_evaluations = make_proposal(config, model, stream, rows)
    if other is not None:
        numbers = stream.chosen.of(rows).tolist()
        known = foresee(config, len(model.process), numbers, digests, proposal)
        check_comparable(known, other, str(config.compare_with))
    if refused_later:
        _check_free(out, config)
    plan = Plan(
        config=config,
        out=out,
        model=model,
        images=images,
        stream=stream,
        rows=rows,
        digests=digests,
        given=given,
        proposal=proposal,
        pilot_evaluations=pilot_evaluations,
        other=other,
        drawing=drawing,
        quality=quality,
        memorisation=memorisation,
        started=started,
    )
    state.wait_for_everyone()
    return plan


def measure(plan: Plan) -> Results:
    """Score the images, draw the samples and measure them; only parts of the work are written.

    Raises:
        RuntimeError: the bound is not finite.
        ValueError: an image of `nearest_dataset` that can't be read.
        OSError: a part can't be written.
    """
    model = plan.model
    images = fingerprint(plan.digests)
    what = (plan.config, model, plan.stream, plan.rows, images, plan.proposal, plan.out)
    bound = score(*what, None if plan.given is None else plan.given.labels)
    classified = classify(*what) if plan.config.classify else None
    swapped = model.other_variance
    other_bound = None if swapped is None else with_variance(bound, model.process, swapped)
    quality = nearest = None
    if plan.drawing is not None:
        extractor = None if plan.quality is None else plan.quality.extractor
        keep = plan.memorisation is not None
        samples = plan.drawing.run(model.weights_digest, plan.out, extractor, keep)
        drawn = samples.pop("images", None)
        if plan.quality is not None:
            quality = plan.quality.run(samples)
        if plan.memorisation is not None and drawn is not None:
            nearest = plan.memorisation.run(drawn, plan.out)
    return Results(bound, other_bound, quality, nearest, classified)


def write(plan: Plan, results: Results, command: str = "") -> dict[str, Any]:
    """Write the report, its tensors and the pictures, on the main process, and delete the parts.

    Returns:
        The content of `evaluation.json`, on every process.

    Raises:
        OSError: a file can't be written.
    """
    evaluation, state = build_evaluation(plan, results, command), process_state()
    if state.is_main_process:
        curve = rate_distortion(results.bound)
        plot_bits_per_step(curve, plan.out / BITS_PLOT)
        plot_rate_distortion(curve, plan.out / RATE_PLOT)
        plot_reconstruction_levels(
            plan.model,
            plan.stream,
            plan.rows[:PREVIEWS],
            plan.config.seed,
            plan.out / LEVELS_PLOT,
            None if plan.given is None else plan.given.labels[:PREVIEWS],
        )
        if plan.memorisation is not None and results.nearest is not None:
            plan.memorisation.plot(results.nearest, plan.out / NEAREST)
        else:
            # A picture that is there belongs to an evaluation that is replaced
            (plan.out / NEAREST).unlink(missing_ok=True)
        write_evaluation(plan.out, evaluation)
        Parts.clear(plan.out)
    state.wait_for_everyone()
    return evaluation.report


def _check_free(out: Path, config: EvaluationConfig) -> None:
    """Refuse a folder whose evaluation is not to be replaced.

    Raises:
        ValueError: there is one.
    """
    if (out / EVALUATION).exists() and not config.overwrite:
        raise ValueError(
            f"out {str(out)!r} holds an evaluation already; allowed: another folder, or overwrite"
        )

"""The bound of a data set's rows, in parts of one batch that processes share and a killed run finds again.

An image's numbers depend on the seed and its row in the whole split alone, not on the batch, the number of
processes, or which other images are scored.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.denoiser import Counted, Denoiser
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.images import data_digest
from hf_ddpm.evaluation.parts import Parts, pieces
from hf_ddpm.evaluation.scored_model import ScoredModel
from hf_ddpm.folders.labels import NO_CLASS
from hf_ddpm.likelihood import (
    Bound,
    Estimate,
    decoder_evals,
    default_proposal,
    estimate_bound,
    evaluate_bound,
    image_noise,
    pilot_proposal,
)
from hf_ddpm.likelihood.bound import bound_term
from hf_ddpm.parametrization import to_x0
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import progress
from hf_ddpm.runtime.untrusted import shown

MOST_SHARED = 0.01  # of the scored images, as data sets hold a few images twice
SHARED = ("proposal", "seed")  # fields of an Estimate that are the same for all images


def scoring_options(config: EvaluationConfig, model: ScoredModel) -> dict[str, Any]:
    """The options of `bound_term`."""
    return {
        "variance_type": model.variance,
        "prediction_type": model.prediction_type,
        "clip_x0": config.clip_x0,
        "decoder": model.decoder,
    }


@torch.no_grad()
def check_scorable(config: EvaluationConfig, model: ScoredModel, stream: ImageStream, row: int) -> None:
    """Score one image at one step, and look at the last step, where the noise may hide the image wholly.

    Raises:
        ValueError: the network's answer does not fit the image or the variance, or as in `check_last_step`.
    """
    check_last_step(model)
    x_0 = on_device(stream.select([row]), model)
    noise = torch.zeros_like(x_0)
    bound_term(model.process, model.denoiser, x_0, 0, noise, **scoring_options(config, model))


def check_last_step(model: ScoredModel) -> None:
    """Refuse a network whose prediction says nothing about x_0 at the last step, before any work is done.

    Raises:
        ValueError: ᾱ_t is 0 there, and the network predicts the noise.
    """
    nothing = torch.zeros(1, 1, 1, 1)
    to_x0(model.process, model.prediction_type, nothing, nothing, len(model.process) - 1)


def check_fair(
    config: EvaluationConfig,
    model: ScoredModel,
    stream: ImageStream,
    rows: list[int],
    digests: Tensor,
    classes: str | None = None,
) -> None:
    """Refuse errors that were measured in another way, or on the images that are scored.

    Args:
        config: how the images are scored.
        model: with the errors; without them there is nothing to refuse.
        stream: the images.
        rows: which of them are scored, ascending places.
        digests: of these, (N,), int64.
        classes: what class they are given, in the words of `ErrorsOf`.

    Raises:
        ValueError: they are refused.
    """
    if model.errors is None:
        return
    of = model.errors.of
    if of.clip_x0 != config.clip_x0:
        raise ValueError(
            f"clip_x0 is {config.clip_x0}, but the errors were measured with {of.clip_x0}; allowed: equal"
        )
    if classes is not None and classes != (given := of.classes or NO_CLASS):
        raise ValueError(
            f"the class of each image is {shown(classes)}, but was {shown(given)} when the errors were "
            f"measured; allowed: equal (class_label), or errors measured so with hf-ddpm plan"
        )
    measured = torch.isin(digests, model.errors.images)
    same_data = of.data == data_digest(stream)
    if same_data:
        measured |= torch.isin(torch.from_numpy(stream.chosen.of(rows)), model.errors.rows)
    same_rows = same_data and of.chosen == stream.chosen.digest
    if same_rows or measured.sum() > MOST_SHARED * len(digests):
        which = "these images" if same_rows else f"{int(measured.sum())} of these {len(digests)} images"
        raise ValueError(
            f"the errors were measured on {which} ({shown(of.dataset)}, {shown(of.split)}): the score would "
            "flatter; allowed: images that were not measured"
        )


def make_proposal(
    config: EvaluationConfig, model: ScoredModel, stream: ImageStream, rows: list[int]
) -> tuple[Tensor, int]:
    """The proposal of every part, the same on every process, and the evaluations that it cost."""
    process, denoiser = model.process, Counted(model.denoiser)
    if not config.pilot_images:
        return default_proposal(process), 0
    proposal = pilot_proposal(
        process,
        denoiser,
        on_device(stream.select(rows[: config.pilot_images]), model),
        seed=config.seed,
        batch_size=config.batch_size,
        **scoring_options(config, model),
    )
    return proposal, denoiser.count


def estimate(
    config: EvaluationConfig,
    model: ScoredModel,
    denoiser: Denoiser,
    x_0: Tensor,
    numbers: Sequence[int],
    proposal: Tensor,
) -> dict[str, Tensor]:
    """The tensors of a batch's `Bound` or `Estimate`, but for those that are the same for all images.

    Args:
        config: how.
        model: what is scored.
        denoiser: the network as it is called, (x_t, t) → output.
        x_0: images, (B, C, H, W).
        numbers: their rows in the whole split, which with the seed say the draws.
        proposal: of `make_proposal`.
    """
    options = scoring_options(config, model)
    if config.exact:
        noise = image_noise(config.seed, list(numbers), x_0)
        return vars(evaluate_bound(model.process, denoiser, x_0, noise_fn=noise, **options))
    found = estimate_bound(
        model.process,
        denoiser,
        x_0,
        num_evals_per_image=config.num_evals_per_image,
        seed=config.seed,
        image_indices=numbers,
        proposal=proposal,
        batch_size=config.batch_size,
        **options,
    )
    return {name: value for name, value in vars(found).items() if name not in SHARED}


def per_image(config: EvaluationConfig, tensors: Mapping[str, Tensor], proposal: Tensor) -> Tensor:
    """Each image's bits/dim, of what `estimate` gave, (B,), float64."""
    if config.exact:
        return Bound(**tensors).total_bpd
    return Estimate(**tensors, proposal=proposal, seed=config.seed).per_image_bpd


def _by_class(labels: Tensor | None, count: int) -> Iterator[tuple[int | None, Tensor]]:
    """The classes of a batch, each with the places of its images; without labels all images together."""
    if labels is None:
        yield None, torch.arange(count)
        return
    for y in labels.unique().tolist():
        yield y, (labels == y).nonzero().flatten()


def score(
    config: EvaluationConfig,
    model: ScoredModel,
    stream: ImageStream,
    rows: list[int],
    images: str,
    proposal: Tensor,
    out: Path,
    labels: Tensor | None = None,
) -> Bound | Estimate:
    """The bound of the rows, on every process.

    Args:
        config: how.
        model: what is scored.
        stream: the images, in the order of their source.
        rows: which of them, ascending places.
        images: their fingerprint, as parts on disk are of these images only.
        proposal: of `make_proposal`.
        out: folder of the parts.
        labels: the class that each row is given, (N,), int64; None of a model without classes.

    Raises:
        RuntimeError: the bound of an image is not finite.
    """
    options = scoring_options(config, model)
    batches = [rows[piece.start : piece.stop] for piece in pieces(len(rows), config.batch_size)]
    per_image = len(model.process) if config.exact else config.num_evals_per_image

    def score_batches(numbers: Sequence[int]) -> Generator[dict[str, Tensor], None, None]:
        pixels = stream.select([row for number in numbers for row in batches[number]])
        total = per_image * sum(len(batches[number]) for number in numbers)
        with progress("evaluate", total, "eval", process_state().is_main_process) as bar:
            for number in numbers:
                batch = batches[number]
                x_0 = on_device((next(pixels) for _ in batch), model)
                numbers_in_split = stream.chosen.of(batch)
                at = number * config.batch_size
                mine = None if labels is None else labels[at : at + len(batch)]
                found, order = [], []
                for y, places in _by_class(mine, len(batch)):
                    network = Counted(model.denoiser if y is None else model.given(y), bar)
                    numbers_of = numbers_in_split[places.numpy()].tolist()
                    found.append(estimate(config, model, network, x_0[places], numbers_of, proposal))
                    order.append(places)
                back = torch.cat(order).argsort()
                yield {name: torch.cat([one[name] for one in found])[back] for name in found[0]}

    facts = {
        "what": "bits_per_dim",
        "scored_as": options | {"variance_type": model.variance_type, "decoder": model.decoder_name},
        "errors": None if model.errors is None else vars(model.errors.of),
        "rows": stream.chosen.of(rows).tolist(),
        "images": images,
        "evaluations_of_l_0": decoder_evals(config.num_evals_per_image),
        "weights": model.weights_digest,
        "process": model.process_digest,
        **({} if labels is None else {"labels": labels.tolist()}),
    }
    tensors = Parts(out, config, facts).complete(len(batches), score_batches)
    if config.exact:
        result = Bound(**tensors)
        totals = result.total_bpd
    else:
        result = Estimate(**tensors, proposal=proposal, seed=config.seed)
        totals = result.per_image_bpd
    if bad := int((~totals.isfinite()).sum()):
        raise RuntimeError(f"the bound is not finite for {bad} of {len(rows)} images")
    return result


def on_device(images: Any, model: ScoredModel) -> Tensor:
    """The images as one batch in [-1, 1], where the bound is computed."""
    return to_float(torch.stack(list(images))).to(model.device)

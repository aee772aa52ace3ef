"""Classes in an evaluation: which one each image is given, and the Bayes classifier that a model is.

    log p(y | x) ≈ log π_y − B(x | y) − log Σ_y' π_y' e^(−B(x | y'))
    −log p(x)    ≤ −log Σ_y π_y e^(−B(x | y))

B(x | y) is the bound of x given the class y, in nats, and π_y how often y was trained on. The draws of an
image depend on the seed and its row alone, so all classes of an image see the same steps and the same noise,
and what they share of the error is gone from the difference (Li et al. 2023, "Your diffusion model is
secretly a zero-shot classifier"; the paired strata are ours). The bound is one of p(x | y) for the
conditional model and of p(x) for the one without a class; any other guidance is a model of nothing, and has
none.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.data.stream import ImageStream
from hf_ddpm.denoiser import Counted
from hf_ddpm.evaluation.bits_per_dim import estimate, on_device, per_image
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.parts import Parts, pieces
from hf_ddpm.evaluation.scored_model import ScoredModel
from hf_ddpm.folders.labels import NO_CLASS, OWN_CLASSES, label_id
from hf_ddpm.likelihood import mean_and_stderr
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import progress
from hf_ddpm.shown import fields_line

logger = logging.getLogger(__name__)

LEAST_EVALS = 2  # of a round of successive halving
FEW = 2  # classes that are left at its end
COUNTS = "class_counts"  # key of a run's record of its data


@dataclass(frozen=True, eq=False)
class GivenClasses:
    """The class that each scored image is given.

    Attributes:
        labels: 0 to C, where C is no class, (N,), int64.
        own: the class of each image by the data, (N,), int64; None where that isn't known.
        names: of the C classes.
        what: "its own", the name of one class for all, or "none".
    """

    labels: Tensor
    own: Tensor | None
    names: tuple[str, ...]
    what: str

    __repr__ = fields_line


@dataclass(frozen=True, eq=False)
class Classified:
    """What the Bayes classifier says of images.

    Attributes:
        nats: B(x | y), (N, C), float64; of a class that successive halving left, as far as it was known.
        log_prior: log π_y, (C,), float64.
        evaluations: of the network, over all images.
        halving: whether classes were left early.
    """

    nats: Tensor
    log_prior: Tensor
    evaluations: int
    halving: bool

    __repr__ = fields_line

    @property
    def log_probabilities(self) -> Tensor:
        """log p(y | x) of each image and class, (N, C), float64."""
        return (self.log_prior - self.nats).log_softmax(1)


def check_given(config: EvaluationConfig, model: ScoredModel) -> EvaluationConfig:
    """The config with the column of the labels, where the model's classes ask for one.

    Raises:
        ValueError: classes of a model that has none, no column where there has to be one, or no such class.
    """
    names = model.class_names
    if names is None:
        for name in ("label_column", "class_label", "classify"):
            if getattr(config, name) not in (None, False):
                raise ValueError(
                    f"{name} is {getattr(config, name)!r}, but {config.model!r} has no classes; allowed: none"
                )
        return config
    if config.class_label is not None:
        label_id(config.class_label, len(names), dict(enumerate(names)))
    column = config.label_column or (None if model.record is None else model.record.label_column)
    if config.class_label is None or config.classify or config.label_column is not None:
        if column is None:
            raise ValueError(
                f"{config.model!r} has classes, and nothing says those of the images; allowed: a "
                f"label_column, or class_label {NO_CLASS}"
            )
        return dataclasses.replace(config, label_column=column)
    return config


def given_classes(
    config: EvaluationConfig, model: ScoredModel, stream: ImageStream, rows: Sequence[int]
) -> GivenClasses | None:
    """The class that each row is given; None of a model without classes."""
    names = model.class_names
    if names is None:
        return None
    own = None if stream.labels is None else torch.from_numpy(stream.labels[list(rows)])
    if config.class_label is None:
        assert own is not None
        return GivenClasses(own, own, names, OWN_CLASSES)
    label = label_id(config.class_label, len(names), dict(enumerate(names)))
    what = NO_CLASS if label == len(names) else names[label]
    return GivenClasses(torch.full((len(rows),), label), own, names, what)


def rounds(num_classes: int, evals: int, halving: bool) -> Iterator[tuple[int, int]]:
    """How many classes are asked in each round, and with how many evaluations each.

    With halving the better half of the classes goes on with twice the evaluations, until two are left with
    all of them. Without it there is one round.
    """
    last = math.ceil(math.log2(num_classes / FEW)) if halving and num_classes > FEW else 0
    left = num_classes
    for number in range(last + 1):
        yield left, max(LEAST_EVALS, evals >> (last - number))
        left = max(FEW, -(-left // 2))


def classify(
    config: EvaluationConfig,
    model: ScoredModel,
    stream: ImageStream,
    rows: list[int],
    images: str,
    proposal: Tensor,
    out: Path,
) -> Classified:
    """B(x | y) of the rows for all classes, on every process, and what it costs, said first.

    Arguments and errors as in `bits_per_dim.score`.
    """
    names = model.class_names
    assert names is not None
    evals = len(model.process) if config.exact else config.num_evals_per_image
    plan = list(rounds(len(names), evals, config.halving))
    per_image_evals = sum(count * each for count, each in plan)
    log_prior = _log_prior(model, len(names))
    batches = [rows[piece.start : piece.stop] for piece in pieces(len(rows), config.batch_size)]
    _tell_cost(config, model, stream, rows, len(names), per_image_evals)

    def classify_batches(numbers: Sequence[int]) -> Generator[dict[str, Tensor], None, None]:
        pixels = stream.select([row for number in numbers for row in batches[number]])
        total = per_image_evals * sum(len(batches[number]) for number in numbers)
        with progress("classify", total, "eval", process_state().is_main_process) as bar:
            for batch in (batches[number] for number in numbers):
                x_0 = on_device((next(pixels) for _ in batch), model)
                places = stream.chosen.of(batch)
                nats = torch.full((len(batch), len(names)), math.inf, dtype=torch.float64)
                asked = torch.ones_like(nats, dtype=torch.bool)
                for number, (left, each) in enumerate(plan):
                    if number:
                        against = torch.where(asked, nats - log_prior, math.inf)
                        keep = against.sort(dim=1, stable=True).indices[:, :left]
                        asked = torch.zeros_like(asked).scatter_(1, keep, True)
                    how = config if config.exact else dataclasses.replace(config, num_evals_per_image=each)
                    for y in range(len(names)):
                        mine = asked[:, y].nonzero().flatten()
                        if not len(mine):
                            continue
                        network = Counted(model.given(y), bar)
                        found = estimate(
                            how, model, network, x_0[mine], places[mine.numpy()].tolist(), proposal
                        )
                        bpd = per_image(how, found, proposal)
                        nats[mine, y] = bpd * (math.log(2) * x_0[0].numel())
                    # A class that was left is no likelier, by Bayes' rule, than any that went on
                    if number:
                        last = torch.where(asked, nats - log_prior, -math.inf).amax(1, keepdim=True)
                        nats = torch.where(asked, nats, torch.maximum(nats, last + log_prior))
                yield {"nats": nats}

    facts = {
        "what": "classes",
        "rows": stream.chosen.of(rows).tolist(),
        "images": images,
        "names": names,
        "weights": model.weights_digest,
        "process": model.process_digest,
        "scored_as": model.variance_type,
    }
    found = Parts(out, config, facts).complete(len(batches), classify_batches)
    if not found["nats"].isfinite().all():
        raise RuntimeError("the bound given a class is not finite")
    return Classified(found["nats"], log_prior, per_image_evals * len(rows), config.halving)


def _log_prior(model: ScoredModel, classes: int) -> Tensor:
    """log π_y by the images that the run was trained on, (C,), float64; even where that isn't known."""
    counts = (model.data_record or {}).get(COUNTS)
    if not isinstance(counts, list) or len(counts) != classes:
        return torch.full((classes,), -math.log(classes), dtype=torch.float64)
    if not all(type(n) is int and n > 0 for n in counts):
        return torch.full((classes,), -math.log(classes), dtype=torch.float64)
    return (torch.tensor(counts, dtype=torch.float64) / sum(counts)).log()


@torch.no_grad()
def _tell_cost(
    config: EvaluationConfig,
    model: ScoredModel,
    stream: ImageStream,
    rows: Sequence[int],
    classes: int,
    evaluations: int,
) -> None:
    """Say what classifying takes, before it begins: by one batch, which is timed."""
    if not process_state().is_main_process:
        return
    x_0 = on_device(stream.select(rows[:1]), model)
    x_t = x_0.expand(min(config.batch_size, 16), *x_0.shape[1:])
    steps = torch.zeros(len(x_t), dtype=torch.int64, device=x_0.device)
    model.given(0)(x_t, steps)
    started = time.perf_counter()
    model.given(0)(x_t, steps)
    each = (time.perf_counter() - started) / len(x_t)
    minutes = each * evaluations * len(rows) / process_state().num_processes / 60
    logger.warning(
        "classify: %s images, %d classes, %s evaluations of the network each, %s in all: about %s minutes%s",
        *(f"{len(rows):,}", classes, f"{evaluations:,}", f"{evaluations * len(rows):,}"),
        f"{minutes:,.0f}" if minutes >= 10 else f"{minutes:.1f}",
        "" if config.halving or classes <= FEW else "; halving takes fewer",
    )


def classes_section(
    given: GivenClasses, bpd: Tensor, classified: Classified | None, column: str | None, dims: int
) -> dict[str, Any]:
    """Section "classes" of the report.

    Args:
        given: the class of each image.
        bpd: of each image given it, (N,).
        classified: what the classifier says, None where it was not asked.
        column: of the labels.
        dims: C·H·W of the images.
    """
    found: dict[str, Any] = {"given": given.what, "names": list(given.names), "label_column": column}
    if given.own is not None:
        found["per_class"] = {
            name: {"num_images": int((given.own == y).sum()), "bpd": _number(bpd[given.own == y])}
            for y, name in enumerate(given.names)
            if (given.own == y).any()
        }
    if classified is None or given.own is None:
        return found
    log_p = classified.log_probabilities
    right = (log_p.argmax(1) == given.own).double()
    of_own = log_p.gather(1, given.own[:, None]).flatten()
    mixture = -(classified.log_prior - classified.nats).logsumexp(1) / (dims * math.log(2))
    found["classifier"] = {
        "accuracy": _number(right),
        "log_probability": _number(of_own),
        "per_class": {
            name: float(right[given.own == y].mean())
            for y, name in enumerate(given.names)
            if (given.own == y).any()
        },
        "evaluations": classified.evaluations,
        "halving": classified.halving,
        # Classes that were left early have no bound of their own
        **({} if classified.halving else {"mixture_bpd": _number(mixture)}),
    }
    return found


def _number(values: Tensor) -> dict[str, float | None]:
    mean, stderr = mean_and_stderr(values.double())
    return {"value": mean, "stderr": stderr if len(values) > 1 else None}

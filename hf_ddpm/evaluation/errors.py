"""A model and training images become a table of errors: what variances and chains of few steps are made of.

    prepare ─► Measurement   everything is looked at, and refused if it can't be done; nothing is written
    measure ─► StoredErrors  the work, in parts that processes share and that a killed run finds again

What is measured at which step, likelihood.errors knows; what the file holds, folders/errors.py.
"""

import dataclasses
import math
import shlex
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_ddpm.data.pixels import image_digest, to_float
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.decoders import LEVELS, smoothed_levels
from hf_ddpm.denoiser import Counted
from hf_ddpm.evaluation.bits_per_dim import check_last_step
from hf_ddpm.evaluation.classes import check_given, given_classes
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.errors_config import ErrorsConfig
from hf_ddpm.evaluation.images import choose_rows, data_digest, open_images
from hf_ddpm.evaluation.parts import Parts, pieces
from hf_ddpm.evaluation.scored_model import ScoredModel, load_scored_model
from hf_ddpm.folders.errors import ErrorsOf, StoredErrors, process_digest, read_errors, write_errors
from hf_ddpm.folders.footprint import check_batch
from hf_ddpm.folders.layout import ERRORS
from hf_ddpm.folders.output import check_errors_folder, output_folder, results_folder
from hf_ddpm.likelihood.chains import MOST_STEPS, best_chains, chain_nats
from hf_ddpm.likelihood.errors import MEASURED, Errors, error_sums, steps_to_measure
from hf_ddpm.likelihood.levels import LevelSums, decoder_steps
from hf_ddpm.runtime.disk import delete_partials, why_not_writable
from hf_ddpm.runtime.messages import redact
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import progress
from hf_ddpm.seeds import Use, derive_seed
from hf_ddpm.shown import fields_line
from hf_ddpm.spelling import suggest_keywords
from hf_ddpm.variances import FIXED

COUNTS = (5, 10, 20, 50, 100, 200)  # numbers of steps for which a plan tells the bits/dim
# What has to be said to an evaluation again, if it was said to the measurement
AS_MEASURED = (
    *("image_column", "label_column", "class_label", "channels", "background", "fit", "to_8_bit"),
    *("skip_corrupt", "clip_x0"),
)
AT_ONCE = 512  # images of one part of the work that only reads them
ROUGH = 2000  # evaluations, with which predictions were within 0.03 bits/dim of those with 50,000
ENOUGH = 0.05  # bits/dim above those of all steps, at which the number of steps is that to try first


@dataclass(frozen=True, eq=False)
class Measurement:
    """A measurement whose inputs have been checked.

    Attributes:
        config: what was asked for.
        reading: which images, and how they are read, settled.
        out: folder of the table.
        model: what is measured.
        stream: the images, in the order of their source.
        places: which of them, ascending.
        rows: the rows of the whole split that these are, (N,), int64.
        steps: at which steps each is measured, by its number among `places`.
        labels: the class that each image is given, (N,), int64; None of a model without classes.
        of: what the table will be of.
    """

    config: ErrorsConfig
    reading: EvaluationConfig
    out: Path
    model: ScoredModel
    stream: ImageStream
    places: list[int]
    rows: Tensor
    steps: list[Tensor]
    labels: Tensor | None
    of: ErrorsOf

    __repr__ = fields_line


@suggest_keywords
def measure_errors(config: ErrorsConfig, *, network: nn.Module | None = None) -> StoredErrors:
    """Measure the errors of a model's x̂_0, and leave `errors.safetensors` in a folder.

    A table of the same model, images and choices that is there already is read instead.

    Args:
        config: what to do.
        network: for a run of a module of your own, whose folder `config.model` is: such a module, as
            `load_run` takes it.

    Returns:
        The table, on every process.

    Raises:
        ValueError: bad input: model, data set or folder; nothing has been written then.
        RuntimeError: the network's answers are not finite.
        OSError: a file can't be written.
    """
    out, state = results_folder(config.model, config.out, "the table"), process_state()
    with output_folder(out, "out", lambda out: check_errors_folder(out, config.overwrite), state) as lock:
        measurement = prepare(config, network)
        if (there := _there(measurement)) is not None:
            return there
        if state.is_main_process:
            delete_partials(out, ERRORS.__eq__)
        found = measure(measurement)
        lock.check()
        if state.is_main_process:
            write_errors(out, found)
            Parts.clear(out)
        state.wait_for_everyone()
        return found


def prepare(config: ErrorsConfig, network: nn.Module | None = None) -> Measurement:
    """Look at the model, the images and the folder, before anything is measured or written.

    Args:
        config: what to do.
        network: as in `measure_errors`.

    Raises:
        ValueError: something can't be done; the message names the culprit.
    """
    out, state = results_folder(config.model, config.out, "the table"), process_state()
    if reason := why_not_writable(out):
        raise ValueError(f"out {str(out)!r} can't be written: {reason}; allowed: another folder as out")
    model = load_scored_model(config.model, state.device or torch.device("cpu"), network=network)
    if len(model.process) > MOST_STEPS:
        raise ValueError(
            f"the process of {config.model!r} has {len(model.process)} steps; allowed: at most {MOST_STEPS}"
        )
    images = open_images(check_given(config.reading, model), model, scored=False)
    reading, stream = images.config, images.stream
    num_rows = stream.num_rows()
    places = choose_rows(num_rows, min(num_rows, config.evals), config.seed)
    if state.device is None or state.device.type == "cpu":
        check_batch("batch_size", min(config.batch_size, config.evals), model.pipeline.unet, stream.shape)
    given = given_classes(reading, model, stream, places)
    of = ErrorsOf(
        weights=model.weights_digest,
        process=process_digest(model.process),
        prediction_type=model.prediction_type,
        clip_x0=config.clip_x0,
        dataset=redact(reading.dataset),  # the table may be published
        split=str(reading.split),
        part=str(reading.part),
        holdout=reading.holdout,
        holdout_seed=reading.holdout_seed,
        data=data_digest(stream),
        chosen=stream.chosen.digest,
        num_rows=num_rows,
        evaluations=config.evals,
        seed=config.seed,
        classes=None if given is None else given.what,
    )
    steps = steps_of_images(steps_to_measure(model.process, config.evals), len(places), config.seed)
    rows = torch.from_numpy(stream.chosen.of(places))
    labels = None if given is None else given.labels
    measurement = Measurement(config, reading, out, model, stream, places, rows, steps, labels, of)
    image = next(stream.select(places[:1]))[None]
    once = dataclasses.replace(measurement, steps=[torch.zeros(1, dtype=torch.int64)])
    sums_of(once, [0], image)  # refuses a network that does not fit
    check_last_step(model)
    state.wait_for_everyone()
    return measurement


def steps_of_images(steps: Tensor, num_images: int, seed: int) -> list[Tensor]:
    """Deal the steps out to images at random, as evenly as can be.

    Args:
        steps: the step of each evaluation, (E,).
        num_images: N, at most E.
        seed: of the draw.

    Returns:
        The steps of each image, ascending; E in all.
    """
    generator = torch.Generator().manual_seed(derive_seed(Use.ERROR_STEPS, seed))
    dealt = steps[torch.randperm(len(steps), generator=generator)]
    return [dealt[i::num_images].sort().values for i in range(num_images)]


def measure(measurement: Measurement) -> StoredErrors:
    """Measure the images, on every process; only parts of the work are written.

    Raises:
        RuntimeError: the network's answers are not finite.
        OSError: a part can't be written.
    """
    model, config, of = measurement.model, measurement.config, measurement.of
    per_image = -(-config.evals // len(measurement.places))
    parts = pieces(len(measurement.places), max(1, config.batch_size // per_image))

    def work(numbers: Sequence[int]) -> Generator[dict[str, Tensor], None, None]:
        mine = [i for number in numbers for i in parts[number]]
        images = measurement.stream.select([measurement.places[i] for i in mine])
        total = sum(len(measurement.steps[i]) for i in mine)
        with progress("measure", total, "eval", process_state().is_main_process) as bar:
            for number in numbers:
                found = [next(images) for _ in parts[number]]
                yield sums_of(measurement, parts[number], torch.stack(found), level_sums, bar)

    seen = look_at_images(measurement)
    levels = seen["levels"].sum(0)
    level_sums = LevelSums(smoothed_levels(levels))
    facts = {"what": "errors", "of": vars(of), "rows": measurement.rows.tolist()}
    found = Parts(measurement.out, measurement.reading, facts).complete(len(parts), work)
    sums = {"levels": levels, "decoder_nats": found["decoder_nats"].sum(0)}
    for name in ("squared", "pixels"):
        zeros = found[name].new_zeros(len(model.process), found[name].shape[1])
        sums[name] = zeros.index_add_(0, found["t"], found[name])
    ends = decoder_steps(model.process)
    at, nats = torch.searchsorted(ends, found["ends"]), found["levels_nats"].double()
    sums["levels_nats"] = nats.new_zeros(len(ends), *nats.shape[1:]).index_add_(0, at, nats)
    if not all(table.isfinite().all() for table in sums.values()):
        raise RuntimeError("the network's answers are not finite for some images: nothing can be measured")
    return StoredErrors(Errors(process=model.process, **sums), measurement.rows, seen["images"], of)


def look_at_images(measurement: Measurement) -> dict[str, Tensor]:
    """What is known of the images without the network, on every process: the decoder needs it first.

    Returns:
        levels, how often each channel has each grey level, (n, C, 256), of which the sum counts; and images,
        the digest of each.

    Raises:
        OSError: a part can't be written.
    """
    parts = pieces(len(measurement.places), AT_ONCE)

    def work(numbers: Sequence[int]) -> Generator[dict[str, Tensor], None, None]:
        mine = [i for number in numbers for i in parts[number]]
        images = measurement.stream.select([measurement.places[i] for i in mine])
        with progress("read", len(mine), "image", process_state().is_main_process) as bar:
            for number in numbers:
                counts, digests = 0, []
                for _ in parts[number]:
                    image = next(images)
                    counts += torch.stack(
                        [torch.bincount(z.flatten().int(), minlength=LEVELS) for z in image]
                    )
                    digests.append(image_digest(image))
                    bar.update()
                yield {"levels": torch.as_tensor(counts)[None], "images": torch.tensor(digests)}

    facts = {"what": "levels", "of": vars(measurement.of), "rows": measurement.rows.tolist()}
    return Parts(measurement.out, measurement.reading, facts).complete(len(parts), work)


def sums_of(
    measurement: Measurement,
    numbers: Sequence[int],
    images: Tensor,
    level_sums: LevelSums | None = None,
    bar: Any = None,
) -> dict[str, Tensor]:
    """What is found of some images, at each of their steps.

    Args:
        measurement: says these steps, and the network.
        numbers: the numbers of the images among `measurement.places`.
        images: uint8, (N, C, H, W).
        level_sums: knows the grey levels, to measure the decoder by them too.
        bar: shows the evaluations, if there is one.

    Returns:
        t, squared and pixels, a row for each evaluation; ends and levels_nats, a row for each at a step where
        a chain may end; and decoder_nats, summed, with an axis in front.
    """
    model, config = measurement.model, measurement.config
    steps = [measurement.steps[i] for i in numbers]
    owner = torch.arange(len(steps)).repeat_interleave(torch.tensor([len(t) for t in steps]))
    t, x_0 = torch.cat(steps), to_float(images)
    rows = measurement.rows[list(numbers)].tolist()
    seeds = [derive_seed(Use.ERRORS, config.seed, row) for row in rows]
    noise = torch.cat(
        [
            torch.randn((len(own), *x_0.shape[1:]), generator=torch.Generator().manual_seed(seed))
            for own, seed in zip(steps, seeds, strict=True)
        ]
    )
    labels, sums = None if measurement.labels is None else measurement.labels[list(numbers)][owner], []
    for chunk in torch.arange(len(t)).split(config.batch_size):
        x, own, eps = (z.to(model.device) for z in (x_0[owner[chunk]], t[chunk], noise[chunk]))
        how = {"prediction_type": model.prediction_type, "clip_x0": config.clip_x0, "level_sums": level_sums}
        network = model.denoiser if labels is None else model.given(labels[chunk])
        sums.append(error_sums(model.process, Counted(network, bar), x, own, eps, **how))
    return {
        "t": t,
        "squared": torch.cat([one.squared for one in sums]),
        "pixels": torch.cat([one.pixels for one in sums]),
        "decoder_nats": torch.stack([one.decoder_nats for one in sums]).sum(0, keepdim=True),
        "ends": t[torch.isin(t, decoder_steps(model.process))],
        "levels_nats": torch.cat([one.levels_nats for one in sums]).float(),
    }


def describe_plan(config: ErrorsConfig, found: StoredErrors) -> str:
    """The table of predicted bits/dim for a terminal, and what to type next.

    Args:
        config: what was measured.
        found: the table of errors.
    """
    errors, total = found.errors, len(found.errors.process)
    kinds = (*FIXED, *MEASURED)
    counts = [count for count in COUNTS if count < total]
    predicted: dict[int, dict[str, float]] = {count: {} for count in (*counts, total)}
    ends: dict[int, int] = dict.fromkeys(predicted, 0)
    for kind in (*kinds, "levels"):
        # The costs take a while for thousands of steps
        costs = errors.costs("by-value", "levels") if kind == "levels" else errors.costs(kind)
        best = best_chains(*costs, max([1, *counts]))
        for count in counts:
            predicted[count][kind] = best.nats[count - 1].item() / math.log(2)
            if kind == "levels":
                ends[count] = best.steps(count)[0]
        predicted[total][kind] = chain_nats(range(total), *costs) / math.log(2)
    whole = predicted[total]
    part = {"train": " (those to train on)", "held-out": " (held-out images)"}.get(found.of.part, "")
    images = f"{found.of.dataset}, {found.of.split}{part}"
    lines = [
        f"predicted bits/dim of new images like {images}, for the best steps:",
        "",
        f"{'steps':>8}" + "".join(f"{kind:>13}" for kind in kinds) + f"{'levels':>10}{'from':>6}",
        *(
            f"{n:>8}"
            + "".join(f"{row[kind]:>13.3f}" for kind in kinds)
            + f"{row['levels']:>10.3f}{ends[n]:>6}"
            for n, row in predicted.items()
        ),
        "",
        "levels: variance by-value and --decoder levels, which knows how often each grey level occurs; its",
        "chain ends at the step of the last column. Papers report the decoder of the other columns",
        f"measured with {found.of.evaluations} evaluations, predicted x_0 "
        + ("clipped" if found.of.clip_x0 else "not clipped"),
    ]
    if found.of.evaluations < ROUGH:
        lines.append(f"with fewer than {ROUGH:,} evaluations these bits/dim are rough, and may be far off")
    enough = [n for n, row in predicted.items() if row["by-value"] <= whole["by-value"] + ENOUGH]
    out = results_folder(config.model, config.out, "the table")
    words = [["hf-ddpm", "evaluate", config.model, *_other_images(config, found.of)]]
    words += [["--steps", str(enough[0]), "--chain", "chosen", "--variance", "by-value"]]
    if out.resolve() != Path(config.model).expanduser().resolve():
        words += [["--errors", str(out)]]
    words += [["--out", str(out / f"by-value-{enough[0]}")]]
    command = " \\\n    ".join(
        redact(shlex.join(part)) for part in words
    )  # a line for each, as paths are long
    other = "next, on images that were not measured" + ("" if _is_known(found.of) else ", if there are such")
    return "\n".join([*lines, f"{other}:", "", f"  {command}", ""])


def _other_images(config: ErrorsConfig, of: ErrorsOf) -> list[str]:
    """The words by which `hf-ddpm evaluate` finds other images like those that were measured."""
    words = [config.dataset] if config.dataset else []
    for name in AS_MEASURED:
        value = getattr(config, name)
        if value != type(config).__dataclass_fields__[name].default:
            words += [
                f"--{name.replace('_', '-')}",
                str(value).lower() if isinstance(value, bool) else str(value),
            ]
    if of.holdout is None or of.part != "train":
        return [*words, "--split", _other_split(of)]
    words += ["--split", config.split] if config.split is not None else []
    if config.holdout is not None:  # else evaluate knows it from the run, as this did
        words += ["--holdout", str(of.holdout), "--holdout-seed", str(of.holdout_seed)]
    return words


def _is_known(of: ErrorsOf) -> bool:
    """Whether other images are known to be there: a holdout, or the rest of a slice."""
    return (of.holdout is not None and of.part == "train") or _other_split(of) not in ("test", "validation")


def _other_split(of: ErrorsOf) -> str:
    """A split of other images: the rest of one that was measured in part, or one that may be there."""
    name, _, inner = of.split.partition("[")
    start, colon, stop = inner.removesuffix("]").partition(":")
    if colon and bool(start) != bool(stop):
        return f"{name}[:{start}]" if start else f"{name}[{stop}:]"
    return "validation" if name == "test" else "test"


def _there(measurement: Measurement) -> StoredErrors | None:
    """The table of just this that the folder holds already.

    Raises:
        ValueError: it holds another one, which is not to be replaced.
    """
    out, config, model = measurement.out, measurement.config, measurement.model
    if not (out / ERRORS).exists():
        return None
    try:
        found = read_errors(out, model.process, model.prediction_type, measurement.of.weights)
        if found.of == measurement.of and found.errors.levels_nats is not None:
            return found
        other = ", ".join(
            key for key, value in vars(measurement.of).items() if getattr(found.of, key) != value
        )
        words = f"with another {other}" if other else "of an earlier version"
    except ValueError:
        words = "that is damaged, or of another model"
    if not config.overwrite:
        raise ValueError(
            f"out {str(out)!r} holds {ERRORS} {words}; allowed: another folder as out, or overwrite"
        )
    return None

"""The images that a model is scored on: opened, chosen, and told apart from others by their pixels.

What is read how, and which images of the model's own data set were not trained on, is known from the record
that its training run left.
"""

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.advice import Needs, Reading, check_images
from hf_ddpm.data.fingerprint import digest_of
from hf_ddpm.data.holdout import BEFORE, Rows, name_of_split, rows_before
from hf_ddpm.data.listing import SPLITS
from hf_ddpm.data.pixels import WHITE, image_digest, parse_background
from hf_ddpm.data.sources import NoSplit, same_place
from hf_ddpm.data.stream import ImageStream, load_stream
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.scored_model import ScoredModel
from hf_ddpm.folders.layout import TRAINED_ON
from hf_ddpm.runtime.messages import one_line, shown
from hf_ddpm.runtime.processes import held_back, on_main_process, process_state
from hf_ddpm.runtime.progress import progress
from hf_ddpm.seeds import Use, derive_seed
from hf_ddpm.shown import fields_line

logger = logging.getLogger(__name__)

UNKNOWN = "nobody knows on which of its images the model was trained"


def settle_reading(config: EvaluationConfig, model: ScoredModel) -> EvaluationConfig:
    """The config with the data set, and with all that says how its images are read.

    What isn't given is what the model's training run had. Without its record the ground is white, nothing is
    resized or converted, and alpha is kept only where the model has 2 or 4 channels.

    Raises:
        ValueError: no data set is given, and the run recorded none.
    """
    record, channels = model.record, model.pipeline.image_shape[0]
    if not config.dataset and record is None:
        raise ValueError(
            f"DATASET is not given, and {config.model!r} has no record of a training run that names one; "
            "allowed: a Hub id, a folder, or 'digits'"
        )
    had = record or TrainConfig()
    trained = had.background
    other = parse_background(config.background or trained) != parse_background(trained)
    if record is not None and other and process_state().is_main_process:
        logger.warning("background is %s, the model was trained on %s", config.background, trained)
    if config.channels is None and record is not None:
        config = dataclasses.replace(config, channels=record.channels)
    if config.channels is None and channels not in (1, 3):
        config = dataclasses.replace(config, channels=channels)
    own = not config.dataset or same_place(config.dataset, had.dataset)
    fit = "center_crop" if had.fit == "random_crop" else had.fit
    return dataclasses.replace(
        config,
        dataset=config.dataset or had.dataset,
        image_column=config.image_column or (had.image_column if own else None),
        background=config.background or trained,
        fit=config.fit or fit,
        to_8_bit=had.to_8_bit if config.to_8_bit is None else config.to_8_bit,
        skip_corrupt=had.skip_corrupt if config.skip_corrupt is None else config.skip_corrupt,
    )


def _overlap(one: str, other: str) -> bool:
    """Whether the folder or file of one data set lies in the folder of the other."""
    places = [os.path.realpath(os.path.expanduser(name)) for name in (one, other)]
    if not all(map(os.path.exists, places)):
        return False
    return os.path.commonpath(places) in places


@dataclass(frozen=True, eq=False)
class Trained:
    """What of a data set a model was trained on.

    Attributes:
        stream: the images that its run trained on, or would train on if it began now; None if they are gone,
            or where images of another split are looked for.
        split: the name of their split.
        held: whether the run held other images of their split, or of its slice, out.
        changed: how the data set is not the one that the run began with, in words; None if it is the same, as
            far as the run left a record of that.
        before: rows of the split that the network had been trained on when the run began.
    """

    stream: ImageStream | None
    split: str
    held: bool
    changed: str | None
    before: Sequence[Rows] = ()

    __repr__ = fields_line

    def shares(self, stream: ImageStream) -> bool:
        """Whether another stream of the data set is of their split."""
        return _known(stream.split) == _known(self.split)

    def count(self, stream: ImageStream) -> int | None:
        """How many images of another stream of the data set are among these, or were trained on before.

        None if nobody knows, as the data set has changed.
        """
        if not self.shares(stream):
            return 0
        if self.stream is None or self.changed is not None:
            return None
        rows = stream.chosen.all
        return int(np.any([some.has(rows) for some in (self.stream.chosen, *self.before)], axis=0).sum())


def _known(split: str) -> str:
    """The name of a split, without a slice, as data sets have it: "validation" for "val"."""
    name = name_of_split(split)
    return SPLITS.get(name.lower(), name)


def default_split(config: EvaluationConfig, record: TrainConfig | None, own: bool, scored: bool) -> str:
    """The split that is scored, or measured.

    Args:
        config: the evaluation.
        record: of the model's training run.
        own: whether the data set is the run's.
        scored: as in `open_images`.
    """
    if config.split is not None:
        return config.split
    if not scored:
        return record.split if record is not None and own else "train"
    if record is None or not own:
        return "test" if config.holdout is None else "train"
    if config.holdout is not None or record.holdout is not None:
        return record.split
    return record.evaluate_split or "test"


def find_trained(config: EvaluationConfig, model: ScoredModel, dataset: str, split: str) -> Trained | None:
    """What of a data set the model was trained on; None if it is another data set, or nobody knows.

    A data set is the run's if it has the run's name for it, or the same files and images in another place.

    Args:
        config: how images are read, settled.
        model: with the records of its run.
        dataset: its name.
        split: the split that is looked at, or a slice.
    """
    record, known = model.record, model.data_record
    if record is None:
        return None
    named = same_place(dataset, record.dataset)
    if not named and (known is None or not os.path.exists(os.path.expanduser(dataset))):
        return None
    held = record.holdout is not None
    if _known(split) != _known(record.split):
        return Trained(None, record.split, held, None) if named else None
    # Which rows they are doesn't depend on whether these can be read
    as_trained = dataclasses.replace(config, holdout=record.holdout, part="train", skip_corrupt=True)
    as_trained = dataclasses.replace(as_trained, holdout_seed=record.seed if held else None)
    try:
        stream = load_images(as_trained, dataset, record.split, _sides(config, model))
        facts = stream.facts()
    except ValueError as error:
        # What is asked for may be there all the same
        return Trained(None, record.split, held, one_line(error, 120)) if named else None
    if known is None or facts == {key: known.get(key) for key in facts}:
        return Trained(
            stream, record.split, held, None, rows_before((known or {}).get(BEFORE), facts["num_rows"])
        )
    was, now = known.get("num_rows"), facts["num_rows"]
    what = f"{shown(was)} images then, {now:,} now" if was != now else "other names, sizes or images"
    return Trained(stream, record.split, held, what) if named else None


def _sides(config: EvaluationConfig, model: ScoredModel) -> tuple[int, int] | None:
    """The (height, width) that images are fitted to; None if they are to have the model's already."""
    _, height, width = model.pipeline.image_shape
    return None if config.fit == "exact" else (height, width)


def load_images(
    config: EvaluationConfig,
    dataset: str,
    split: str,
    size: tuple[int, int] | None,
    check: Callable[[ImageStream], object] | None = None,
    label_names: Sequence[str] | None = None,
) -> ImageStream:
    """A data set's images in their source's order, read as `settle_reading` has said.

    Args:
        config: the evaluation.
        dataset: the data set.
        split: its split.
        size: (H, W); None for the first image's.
        check: as in `load_stream`.
        label_names: of the model's classes; None where no labels are read.

    Raises:
        ValueError: a bad data set.
    """
    return load_stream(
        dataset,
        split,
        size,
        config.channels,
        column=config.image_column,
        label_column=None if label_names is None else config.label_column,
        label_names=label_names,
        fit=config.fit or "exact",
        background=config.background or WHITE,
        to_8_bit=bool(config.to_8_bit),
        skip_corrupt=bool(config.skip_corrupt),
        holdout=config.holdout,
        part=config.part or "all",  # type: ignore[arg-type]
        seed=config.holdout_seed or 0,
        check=check,
    )


@dataclass(frozen=True, eq=False)
class Images:
    """The images to score a model on.

    Attributes:
        config: the evaluation, in which all that says which images these are is settled.
        stream: the images, in their source's order.
        trained: what of their data set the model was trained on; None if nothing is known of that.
        seen: how many of them the model was trained on; None if nobody knows, as the data set has changed.
        skipped: how many more there would be, had they been readable.
    """

    config: EvaluationConfig
    stream: ImageStream
    trained: Trained | None
    seen: int | None
    skipped: int

    __repr__ = fields_line


def open_images(config: EvaluationConfig, model: ScoredModel, scored: bool = True) -> Images:
    """The images to score the model on, in their source's order; nothing is resized unless `fit` says so.

    Args:
        config: how they are read, and which they are.
        model: says their shape.
        scored: whether the model will be scored on them, which it should not have been trained on. Else they
            are by default those that it was trained on.

    Raises:
        ValueError: a bad data set, images of another shape than the model's, or held-out images that are not
            known or no longer those that the run held out.
    """
    given, asked = config.dataset, config.split
    config = settle_reading(config, model)
    split = default_split(config, model.record, own=True, scored=scored)
    trained = find_trained(config, model, config.dataset, split)
    try:
        config, stream = _open_part(config, model, trained, scored)
    except ValueError as error:
        own = "" if given else "the run's own data set, as DATASET is not given: "
        hint = f"; add --split {error.splits[0]}" if isinstance(error, NoSplit) and asked is None else ""
        if not own + hint:
            raise
        raise ValueError(f"{own}{error}{hint}") from error
    is_main = process_state().is_main_process
    if is_main:
        logger.warning("%s", stream.survey(show=True))
        record = model.record
        if trained is None and record is not None:
            if record.holdout is not None or _overlap(config.dataset, record.dataset):
                words = "%s is not the data set of the run (%s), or has changed: %s"
                logger.warning(words, config.dataset, record.dataset, UNKNOWN)
    _check_shape(config, stream, model)
    stream, skipped = _readable(config, stream)
    seen = 0 if trained is None else trained.count(stream)
    if is_main and trained is not None and seen is None:
        logger.warning(
            "%s has changed since the run began (%s): %s", config.dataset, trained.changed, UNKNOWN
        )
    if is_main and seen and scored:
        which = f"{seen:,} of these {stream.num_rows():,} images: their"
        if seen == stream.num_rows():
            which = "these images: their" if config.part == "train" else "this split: its"
        logger.warning("the model was trained on %s bits/dim here say nothing about new images", which)
    return Images(config, stream, trained, seen, skipped)


def _check_reading(config: EvaluationConfig, shape: tuple[int, int, int], stream: ImageStream) -> None:
    """Refuse images of which some can't be read as they are to be; all processes call it together."""
    reading = Reading(
        shape[1:],
        config.channels,
        config.fit or "exact",
        config.background or WHITE,
        bool(config.to_8_bit),
        bool(config.skip_corrupt),
    )
    needs = Needs(shape=shape)
    on_main_process(process_state(), lambda: check_images(stream.survey(show=True), reading, needs))


def _check_shape(config: EvaluationConfig, stream: ImageStream, model: ScoredModel) -> None:
    channels, shape = model.pipeline.image_shape[0], model.pipeline.image_shape
    if stream.shape != shape:
        hint = f"; add channels={channels} to convert them" if config.channels is None else ""
        if stream.shape[0] == channels:
            hint = "; a `fit` would resize them, and the record says so"
        raise ValueError(
            f"images of {config.dataset!r} are {stream.shape} (C, H, W); allowed: the model's {shape}{hint}"
        )


def _open_part(
    config: EvaluationConfig, model: ScoredModel, trained: Trained | None, scored: bool
) -> tuple[EvaluationConfig, ImageStream]:
    """The config with split, part and holdout settled, and the images that it then means."""
    record, sides = model.record, _sides(config, model)
    check = functools.partial(_check_reading, config, model.pipeline.image_shape)
    names = None if config.label_column is None else model.class_names
    held, mine = trained is not None and trained.held, "held-out" if scored else "train"
    split = default_split(config, record, trained is not None, scored)
    if config.holdout is not None:
        seed = config.holdout_seed if config.holdout_seed is not None else record.seed if record else 0
        config = dataclasses.replace(config, split=split, part=config.part or mine, holdout_seed=seed)
        return config, load_images(config, config.dataset, split, sides, check, names)
    config, part = dataclasses.replace(config, split=split, part="all"), config.part
    # Of the run's own split an image that can't be read matters only if it is in the part
    own = held and record is not None and split == record.split
    whole = None if own and part != "all" else load_images(config, config.dataset, split, sides, check, names)
    if part is None:
        seen = 0 if trained is None or whole is None else trained.count(whole)
        some = held and seen != 0
        if not scored and seen is not None and whole is not None:
            some = 0 < seen < whole.num_rows()
        part = mine if own or some else "all"
    if whole is not None and part == "all":
        return config, whole
    if (
        record is None
        or trained is None
        or _known(split) != _known(record.split)
        or (part != "train" and not held)
    ):
        raise ValueError(
            f"part is {part!r}, but no record says that the model's training had such images of "
            f"{shown(split)}; allowed: all, or the same with a holdout"
        )
    if trained.changed is not None or trained.stream is None:
        raise ValueError(
            f"{shown(config.dataset)} has changed since the run began ({trained.changed}), so nobody knows "
            f"which of its images are {'held out' if part == 'held-out' else 'trained on'}; give the data as "
            "they were, or add part=all"
        )
    if model.data_record is None and process_state().is_main_process:
        logger.warning("no %s says whether %s is as it was when the run began", TRAINED_ON, config.dataset)
    if held:
        config = dataclasses.replace(config, part=part, holdout=record.holdout, holdout_seed=record.seed)
    config = dataclasses.replace(config, part=part)
    if whole is None:
        return config, load_images(config, config.dataset, split, sides, None, names)
    rows = whole.chosen.both(trained.stream.chosen if part == "train" else trained.stream.chosen.others)
    if not len(rows):
        raise ValueError(f"part is {part!r}, which none of the images of {shown(split)} are; allowed: all")
    return config, whole.only(rows, f", {'held-out images' if part == 'held-out' else 'those trained on'}")


def _readable(config: EvaluationConfig, stream: ImageStream) -> tuple[ImageStream, int]:
    """The stream without images that are skipped, and how many these are."""
    if not config.skip_corrupt:
        return stream, 0
    if process_state().is_main_process:
        bad = stream.unreadable(range(stream.num_rows()))
    else:  # where all processes find the same, the first one tells of it
        with held_back("hf_ddpm.data"):
            bad = stream.unreadable(range(stream.num_rows()))
    return (stream.only(stream.chosen.without(bad)) if bad else stream), len(bad)


def open_nearest(config: EvaluationConfig, model: ScoredModel, images: Images) -> tuple[ImageStream, bool]:
    """The images that samples may have been learned from, and whether the model was trained on all of them.

    Of a split that the model's run held images out of, these are the ones that it trained on.

    Raises:
        ValueError: a bad data set, or images that can't be told from those that are evaluated.
    """
    dataset, split = str(config.nearest_dataset), config.nearest_split
    plain = dataclasses.replace(config, holdout=None, holdout_seed=None, part="all")
    stream = load_images(plain, dataset, split, None if config.fit == "exact" else images.stream.shape[1:])
    same = same_place(dataset, config.dataset)
    trained = find_trained(config, model, dataset, split)
    if trained is not None and trained.held and trained.stream is not None and trained.count(stream):
        stream = stream.only(stream.chosen.both(trained.stream.chosen), ", those trained on")
    elif same and config.part == "held-out" and stream.split == images.stream.split:
        evaluated = stream.chosen.both(images.stream.chosen)
        stream = stream.only(stream.chosen.without(stream.chosen.count_before(evaluated.all)))
    if same and stream.split == images.stream.split and len(stream.chosen.both(images.stream.chosen)):
        raise ValueError(
            f"nearest_split {split!r} of {dataset!r} has the images that are evaluated; allowed: the model's "
            "training images, and others to evaluate"
        )
    stream, _ = _readable(config, stream)
    if trained is not None and trained.count(stream) is None and process_state().is_main_process:
        logger.warning("%s has changed since the run began (%s): %s", dataset, trained.changed, UNKNOWN)
    return stream, trained is not None and trained.count(stream) == stream.num_rows()


def describe_source(config: EvaluationConfig, stream: ImageStream) -> dict[str, Any]:
    """Where the images come from, and what was done to them: for the report, and for files of features."""
    held = {"holdout": config.holdout, "holdout_seed": config.holdout_seed} if config.holdout else {}
    return {
        "dataset": config.dataset,
        "split": config.split,
        **({"part": config.part, **held} if config.part != "all" else {}),
        "fit": config.fit,
        "channels": config.channels,
        "background": config.background,
        "to_8_bit": config.to_8_bit,
        "shape": list(stream.shape),
    }


def data_digest(stream: ImageStream) -> str:
    """Sixteen hex digits of the data of a split, whichever of its rows are read; see data/fingerprint.py.

    Raises:
        ValueError: a shard that can't be read.
    """
    return digest_of({key: value for key, value in stream.fingerprint().items() if key != "chosen"})


def choose_rows(total: int, num_images: int | None, seed: int) -> list[int]:
    """Rows to score, ascending: all, or a random subset, as a data set may be sorted by class.

    Raises:
        ValueError: there are fewer.
    """
    if num_images is None or num_images == total:
        return list(range(total))
    if num_images > total:
        raise ValueError(f"num_images is {num_images}, but there are {total} images; allowed: 1 to {total}")
    order = np.random.default_rng(derive_seed(Use.SCORED_ROWS, seed)).permutation(total)
    return sorted(order[:num_images].tolist())


def digest_rows(stream: ImageStream, rows: Sequence[int] | np.ndarray) -> Tensor:
    """A 64-bit digest of each image's pixels, (N,) int64; it also finds images that can't be read.

    Raises:
        ValueError: an image that can't be read or has another shape; the message names its row.
    """
    found = []
    with progress("read", len(rows), "image", process_state().is_main_process, leave=False) as bar:
        for image in stream.select(rows):
            found.append(image_digest(image))
            bar.update()
    return torch.tensor(found, dtype=torch.int64)


def fingerprint(digests: Tensor) -> str:
    """Sixteen hex digits of images, in their order."""
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()[:16]

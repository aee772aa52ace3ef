"""The images that a model is scored on: opened, chosen, and told apart from others by their pixels."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.data.pixels import WHITE, image_digest, parse_background
from hf_ddpm.data.stream import ImageStream, load_stream
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.scored_model import ScoredModel
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import progress
from hf_ddpm.seeds import Use, derive_seed

logger = logging.getLogger(__name__)


def settle_reading(config: EvaluationConfig, model: ScoredModel) -> EvaluationConfig:
    """The config with `channels` and `background` as the images will be read.

    What isn't given is what the model's training run had. Without its record the ground is white, and alpha
    is kept only where the model has 2 or 4 channels.
    """
    record, channels = model.record, model.pipeline.image_shape[0]
    trained = WHITE if record is None else record.background
    other = parse_background(config.background or trained) != parse_background(trained)
    if record is not None and other and process_state().is_main_process:
        logger.warning("background is %s, the model was trained on %s", config.background, trained)
    if config.channels is None and record is not None:
        config = dataclasses.replace(config, channels=record.channels)
    if config.channels is None and channels not in (1, 3):
        config = dataclasses.replace(config, channels=channels)
    return dataclasses.replace(config, background=config.background or trained)


def load_images(
    config: EvaluationConfig, dataset: str, split: str, size: tuple[int, int] | None
) -> ImageStream:
    """A data set's images in their source's order, read as `settle_reading` has said.

    Raises:
        ValueError: a bad data set.
    """
    return load_stream(
        dataset,
        split,
        size,
        config.channels,
        column=config.image_column,
        fit=config.fit,
        background=config.background or WHITE,
        to_8_bit=config.to_8_bit,
    )


def open_images(config: EvaluationConfig, model: ScoredModel, scored: bool = True) -> ImageStream:
    """The images to score the model on, in their source's order; nothing is resized unless `fit` says so.

    Args:
        config: how they are read, after `settle_reading`.
        model: says their shape.
        scored: whether the model will be scored on them, which it should not have been trained on.

    Raises:
        ValueError: a bad data set, or images of another shape than the model's.
    """
    channels, height, width = shape = model.pipeline.image_shape
    size = None if config.fit == "exact" else (height, width)
    stream = load_images(config, config.dataset, config.split, size)
    if process_state().is_main_process:
        logger.warning("%s", stream.survey(show=True))
    if stream.shape != shape:
        hint = f"; add channels={channels} to convert them" if config.channels is None else ""
        if stream.shape[0] == channels:
            hint = "; a `fit` would resize them, and the record says so"
        raise ValueError(
            f"images of {config.dataset!r} are {stream.shape} (C, H, W); allowed: the model's {shape}{hint}"
        )
    if scored and model.trained_on(config.dataset, config.split) and process_state().is_main_process:
        logger.warning("the model was trained on this split: its bits/dim here say nothing about new images")
    return stream


def describe_source(config: EvaluationConfig, stream: ImageStream) -> dict[str, Any]:
    """Where the images come from, and what was done to them: for the report, and for files of features."""
    return {
        "dataset": config.dataset,
        "split": config.split,
        "fit": config.fit,
        "channels": config.channels,
        "background": config.background,
        "to_8_bit": config.to_8_bit,
        "shape": list(stream.shape),
    }


def data_digest(stream: ImageStream) -> str:
    """Sixteen hex digits of a data set's fingerprint, see data/fingerprint.py.

    Raises:
        ValueError: a shard that can't be read.
    """
    text = json.dumps(stream.fingerprint(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choose_rows(total: int, num_images: int | None, seed: int) -> list[int]:
    """Rows to score, ascending: all, or a random subset, as a data set may be sorted by class.

    Raises:
        ValueError: there are fewer.
    """
    if num_images is None or num_images == total:
        return list(range(total))
    if num_images > total:
        raise ValueError(f"num_images is {num_images}, but the split has {total}; allowed: 1 to {total}")
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

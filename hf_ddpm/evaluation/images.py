"""The images that a model is scored on."""

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from hf_ddpm.data.pixels import image_digest
from hf_ddpm.data.stream import ImageStream, load_stream
from hf_ddpm.evaluation.scored_model import Subject
from hf_ddpm.runtime.progress import progress

logger = logging.getLogger(__name__)


def open_images(
    subject: Subject, dataset: str, split: str, image_column: str | None = None, fit: str = "exact"
) -> ImageStream:
    """The images to score the model on, in their source's order; nothing is resized unless `fit` says so.

    Raises:
        ValueError: a bad data set, or images of another shape than the model's.
    """
    channels, *size = shape = subject.pipeline.image_shape
    stream = load_stream(
        dataset,
        split,
        None if fit == "exact" else (size[0], size[1]),
        column=image_column,
        fit=fit,
    )
    if stream.shape != shape:
        hint = "; a `fit` would resize them, and the record says so" if stream.shape[0] == channels else ""
        raise ValueError(
            f"images of {dataset!r} are {stream.shape} (C, H, W); allowed: the model's {shape}{hint}"
        )
    if subject.trained_on(dataset, split) and PartialState().is_main_process:
        logger.warning("the model was trained on this split: its bits/dim here say nothing about new images")
    return stream


def digest_rows(stream: ImageStream, rows: Sequence[int] | np.ndarray) -> Tensor:
    """A 64-bit digest of each image's pixels, (N,) int64; it also finds images that can't be read.

    Raises:
        ValueError: an image that can't be read or has another shape; the message names its row.
    """
    found = []
    with progress("read", len(rows), "image", PartialState().is_main_process, leave=False) as bar:
        for image in stream.select(rows):
            found.append(image_digest(image))
            bar.update()
    return torch.tensor(found, dtype=torch.int64)


def fingerprint(digests: Tensor) -> str:
    """Sixteen hex digits of images, in their order."""
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()[:16]

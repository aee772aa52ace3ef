"""The table of errors beside a model's weights: what it holds, what it is of, and whether it is this model's.

The file holds sums over images (`likelihood.errors.Errors`), rows and digests of the images that were
measured, and in its header what they are of. It may come from a stranger: names, shapes and types are looked
at before anything of it is read, a sum of the content must fit, and no number is believed before it is
checked.

Measuring is evaluation/errors.py's business.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from hf_ddpm.decoders import LEVELS
from hf_ddpm.folders.layout import ERRORS
from hf_ddpm.folders.values import fits, words_of
from hf_ddpm.likelihood.chains import MOST_STEPS
from hf_ddpm.likelihood.curves import LOG_SIGMAS
from hf_ddpm.likelihood.errors import Errors
from hf_ddpm.models import weights_digest
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.runtime.disk import load_tensors, save_tensors
from hf_ddpm.runtime.messages import one_line, redact, shorten
from hf_ddpm.runtime.untrusted import parse_json, shown, tensor_headers
from hf_ddpm.shown import fields_line
from hf_ddpm.variances import VALUE_BINS

OF = "of"  # key of the header's text
ADDED = frozenset({"levels_nats"})  # what files of earlier versions lack
ADDED_OF: dict[str, Any] = {"classes": None}  # what their headers lack, and what it is then
MOST_CHANNELS, MOST_IMAGES = 1024, 10**7
LONGEST_NAME = 120  # characters of the file in an error
REMEDY = "allowed: measure it anew with hf-ddpm plan"


@dataclass(frozen=True)
class ErrorsOf:
    """What a table of errors is of.

    Attributes:
        weights: digest of the network's weights and config, see `network_digest`.
        process: digest of the process, see `process_digest`.
        prediction_type: what the network predicts.
        clip_x0: whether its x̂_0 was clipped.
        dataset: name of the data set that was measured.
        split: its split, or a slice of it.
        part: which images of these: "train", "held-out" or "all".
        holdout: the share of the images that was held out, or how many, which says which these are, or null.
        holdout_seed: with the seed that chose them, or null.
        data: digest of the data of the whole split.
        chosen: digest of the rows of the split that they were drawn from.
        num_rows: how many these are.
        evaluations: how often the network was asked.
        seed: of the images and the noise.
        classes: the class that each image was given: "its own", the name of one class for all, or "none";
            null of a model without classes, and in files of earlier versions, which gave none.
    """

    weights: str
    process: str
    prediction_type: str
    clip_x0: bool
    dataset: str
    split: str
    part: str
    holdout: float | None
    holdout_seed: int | None
    data: str
    chosen: str
    num_rows: int
    evaluations: int
    seed: int
    classes: str | None = None

    __repr__ = fields_line


@dataclass(frozen=True, eq=False)
class StoredErrors:
    """A table of errors with what it is of.

    Attributes:
        errors: the table.
        rows: the rows of the whole split that were measured, ascending, (N,), int64.
        images: digests of their images, (N,), int64.
        of: what it is of.
    """

    errors: Errors
    rows: Tensor
    images: Tensor
    of: ErrorsOf

    __repr__ = fields_line


def process_digest(process: DiffusionProcess) -> str:
    """Sixteen hex digits of a process; of β_t nine digits count, which every machine computes alike."""
    numbers = ",".join(f"{beta:.8e}" for beta in process.betas.tolist())
    return hashlib.sha256(f"{numbers};{process.timesteps.tolist()}".encode()).hexdigest()[:16]


def network_digest(network: Any, dtype: torch.dtype | None = None) -> str:
    """Sixteen hex digits of a network's config and weights, as they are in float32.

    DDP and torch.compile are taken off, as neither changes what the network answers.

    Args:
        network: the network.
        dtype: to which the weights are rounded first; by default they are not.
    """
    if isinstance(network, nn.Module):
        network = extract_model_from_parallel(network, keep_torch_compile=False)
    weights: Mapping[str, Tensor] = network.state_dict() if isinstance(network, nn.Module) else {}
    floats = {name: z.to(dtype).float() if z.is_floating_point() else z for name, z in weights.items()}
    return weights_digest(getattr(network, "config", {}), floats)


def errors_digest(errors: Errors) -> str:
    """Sixteen hex digits of what was measured."""
    found = hashlib.sha256()
    for name in _shapes(len(errors.process)):
        table = getattr(errors, name)
        found.update(b"" if table is None else table.numpy().tobytes())
    return found.hexdigest()[:16]


def write_errors(folder: Path, stored: StoredErrors) -> None:
    """Write the table into a model's folder, whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    errors = stored.errors
    found = {name: getattr(errors, name) for name in _shapes(len(errors.process))}
    tensors = {name: table for name, table in found.items() if table is not None}
    save_tensors(
        folder / ERRORS,
        tensors | {"rows": stored.rows, "images": stored.images},
        {OF: json.dumps(dataclasses.asdict(stored.of))},
    )


def errors_of(folder: Path) -> ErrorsOf:
    """What the table in a folder is of; its numbers are not looked at, but that they are whole.

    Raises:
        ValueError: it is missing, damaged, or no such table.
    """
    return _load(folder)[1]


def read_errors(folder: Path, process: DiffusionProcess, prediction_type: Any, weights: str) -> StoredErrors:
    """The table in a folder, of a network that is known.

    Args:
        folder: holds it.
        process: the whole process of the network.
        prediction_type: what the network predicts.
        weights: digest of the network, by `network_digest`.

    Raises:
        ValueError: it is missing, damaged, no such table, or of another network or process.
    """
    tensors, of = _load(folder)
    ours = {"weights": weights, "process": process_digest(process), "prediction_type": prediction_type}
    for key, value in ours.items():
        if getattr(of, key) != value:
            other = {"weights": "other weights", "process": "another process"}.get(
                key, "another prediction type"
            )
            raise ValueError(f"{_name(folder)} is of {other} than the model's; {REMEDY}")
    try:
        rows, images = tensors.pop("rows"), tensors.pop("images")
        return StoredErrors(Errors(process=process, **tensors), rows, images, of)
    except ValueError as error:
        raise ValueError(f"{_name(folder)}: {one_line(error, limit=160)}") from None


def _shapes(steps: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """The dtype in the words of safetensors and the shape of each tensor of the table; None is any number."""
    return {
        "squared": ("F64", (steps, VALUE_BINS)),
        "pixels": ("I64", (steps, VALUE_BINS)),
        "decoder_nats": ("F64", (VALUE_BINS, len(LOG_SIGMAS))),
        "levels": ("I64", (None, LEVELS)),
        "levels_nats": ("F64", (None, VALUE_BINS, len(LOG_SIGMAS))),
    }


def _load(folder: Path) -> tuple[dict[str, Tensor], ErrorsOf]:
    """The tensors and the header of a file whose shapes, types and sum are as they should be."""
    name = _name(folder)
    headers = tensor_headers(folder / ERRORS, name)
    steps = (headers.get("squared", ("", ()))[1] or (0,))[0]
    wanted = _shapes(steps) | {name: ("I64", (None,)) for name in ("rows", "images")}
    wanted = {key: kind for key, kind in wanted.items() if key in headers or key not in ADDED}
    if headers.keys() != wanted.keys() or not 0 < steps <= MOST_STEPS:
        raise ValueError(f"{name} is no table of errors: it holds {shown(sorted(headers))}; {REMEDY}")
    for key, (dtype, shape) in wanted.items():
        found, size = headers[key]
        most = {"levels": MOST_CHANNELS, "levels_nats": steps}.get(key, MOST_IMAGES)
        fit = len(size) == len(shape) and all(
            n <= most if m is None else n == m for n, m in zip(size, shape, strict=True)
        )
        if found != dtype or not fit:
            raise ValueError(f"{name}: {key} is of {found} {shown(size)}; {REMEDY}")
    if headers["rows"] != headers["images"]:
        raise ValueError(f"{name} has {shown(headers['rows'][1])} rows, but other images; {REMEDY}")
    try:
        tensors, texts = load_tensors(folder / ERRORS)
    except ValueError as error:
        reason = one_line(error.__cause__ or error, limit=100)
        raise ValueError(f"{name} is damaged: {reason}; {REMEDY}") from None
    return tensors, _read_of(texts, name)


def _read_of(texts: Mapping[str, str], name: str) -> ErrorsOf:
    """What a file's header says that it is of."""
    found = ADDED_OF | parse_json(texts.get(OF, "").encode(), f"the header of {name}")
    hints = get_type_hints(ErrorsOf)
    if lacks := sorted(hints.keys() - found.keys()):
        raise ValueError(f"{name} does not say its {', '.join(lacks)}; {REMEDY}")
    for key, kind in hints.items():
        if not _fits(found[key], kind):
            raise ValueError(f"{name}: {key} is {shown(found[key])}; allowed: {words_of(kind)}")
    return ErrorsOf(**{key: found[key] for key in hints})


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of the header is of this type; whole numbers are counts, and seeds up to 2^63."""
    whole = kind is int or (int in get_args(kind) and float not in get_args(kind))
    return 0 <= value < 2**63 if whole and type(value) is int else fits(value, kind)


def _name(folder: Path) -> str:
    return repr(shorten(redact(str(folder / ERRORS)), LONGEST_NAME))

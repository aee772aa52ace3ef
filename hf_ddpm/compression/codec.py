"""Compress and decompress: a pipeline and images become a file, and a pipeline and a file become the images.

What is chosen for whoever compresses, the steps, the variances and the decoder, is made of the errors that
`hf-ddpm plan` measured. Without them it is the published Gaussian chain, which takes more bits. The file says
which weights, process, errors and tables it was made with. Whoever decompresses must have the same, and is
told what differs.
"""

import copy
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ddpm.checks import check_count, described
from hf_ddpm.compression.chunks import MOST_IMAGES, decode_chunk, encode_chunk
from hf_ddpm.compression.coder import load_constriction
from hf_ddpm.compression.container import (
    DTYPES,
    MOST_BATCH,
    MOST_CHAIN,
    Header,
    Side,
    check_names,
    read_content,
    write_content,
)
from hf_ddpm.compression.scheme import BIN_WIDTH, PARTS, Chain
from hf_ddpm.data.pixels import to_uint8
from hf_ddpm.decoders import AnyDecoder
from hf_ddpm.denoiser import as_denoiser, num_classes, scoring_device
from hf_ddpm.folders.errors import StoredErrors, network_digest, process_digest
from hf_ddpm.folders.footprint import check_batch
from hf_ddpm.folders.labels import NO_CLASS, OWN_CLASSES
from hf_ddpm.folders.layout import ERRORS
from hf_ddpm.gaussian import check_levels
from hf_ddpm.generation.given import as_images
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.guidance import Conditioned
from hf_ddpm.likelihood.errors import COSTED
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.runtime.disk import named
from hf_ddpm.runtime.messages import one_line, shown
from hf_ddpm.runtime.progress import Bar, progress
from hf_ddpm.shown import fields_line
from hf_ddpm.variances import LEARNED, AnyVariance, plain_name

logger = logging.getLogger(__name__)
STEPS = 50  # of a chain, where nobody says how many
MEASURED = "by-value"  # the variance where errors were measured


@dataclass(frozen=True)
class Sizes:
    """What a file came to.

    Attributes:
        images: how many it holds.
        dims: C·H·W of an image.
        file: bytes of the whole file.
        names: bytes of it that are names and labels.
        net_bits: of the images that were coded by the model, without what their first bits were drawn from.
        net_images: how many these are.
        seconds: how long it took.
    """

    images: int
    dims: int
    file: int
    names: int
    net_bits: int
    net_images: int
    seconds: float

    __repr__ = fields_line

    @property
    def bpd(self) -> float:
        """Bits per dimension of the whole file without names and labels."""
        return 8 * (self.file - self.names) / (self.images * self.dims)

    @property
    def net_bpd(self) -> float:
        """Bits per dimension of the images that were coded by the model; NaN if there are none."""
        return self.net_bits / (self.net_images * self.dims) if self.net_images else float("nan")


def compress(
    pipeline: DDPMPipeline,
    images: Any,
    path: str | os.PathLike[str],
    *,
    steps: int | None = None,
    batch: int = 8,
    dtype: str = "float64",
    names: list[str] | None = None,
    labels: list[int] | None = None,
    classes: list[str] | None = None,
    overwrite: bool = False,
) -> Sizes:
    """Compress images without loss.

    Args:
        pipeline: the model. Its folder should have what `hf-ddpm plan` measured.
        images: of the model's shape, in any form that `DDPMPipeline.bits_per_dim` takes: uint8, PIL images,
            or floating point on the levels u/127.5 − 1.
        path: the file to write.
        steps: K of the chain, and so how often the network is asked for each image; by default 50, or all T
            where these are fewer.
        batch: images at once, at most 4096; who decompresses takes the same batches.
        dtype: "float64", or "float32", which is faster and decodes on the same machine alone.
        names: of the images, relative paths that end in .png.
        labels: of the images, whole numbers.
        classes: the labels' names.
        overwrite: whether a file that is there may be replaced.

    Returns:
        The sizes.

    Raises:
        ValueError: an argument is not as above, a network whose answers are not finite, or constriction is
            not installed.
        OSError: the file can't be written.
    """
    if steps is not None:
        check_count("steps", steps)
    check_count("batch", batch)
    _allow(batch <= MOST_BATCH, "batch", batch, f"at most {MOST_BATCH}")
    _allow(dtype in DTYPES, "dtype", dtype, ", ".join(DTYPES))
    load_constriction()  # refused before any work
    place = Path(path).expanduser()
    if place.exists() and not overwrite:
        raise ValueError(f"out {str(path)!r} is there already; allowed: another file, or overwrite")
    _check_pipeline(pipeline)
    steps = min(STEPS, len(pipeline.process)) if steps is None else steps
    levels = _as_levels(images, pipeline.image_shape)
    side = Side(names, labels, classes)
    _check_side(side, len(levels))
    began, chunks = time.perf_counter(), []
    plan = _chosen_plan(pipeline, steps)
    with _codec(pipeline, plan, None, dtype, side, len(levels)) as codec:
        _compare_classes(pipeline, codec.classes is not None)
        for start in range(0, len(levels), MOST_IMAGES):
            some = slice(start, start + MOST_IMAGES)
            chunks.append(encode_chunk(codec.chain, levels[some], batch, codec.labels_of(some)))
            codec.bar.n = min(start + MOST_IMAGES, len(levels))
        sizes = sorted({size for chunk in chunks for size in chunk.batches})
        header = codec.header(sizes)
    with named(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    side_bytes, total = write_content(place, header, side, chunks)
    return Sizes(
        images=len(levels),
        dims=codec.chain.dims,
        file=total,
        names=side_bytes,
        net_bits=sum(chunk.net_bits for chunk in chunks),
        net_images=sum(sum(chunk.batches) for chunk in chunks),
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, eq=False)
class Decompressed:
    """What a file held.

    Attributes:
        images: grey levels, (N, C, H, W), uint8.
        names: of the images, or None.
        labels: of the images, or None.
        classes: the labels' names, or None.
        seconds: how long it took.
    """

    images: Tensor
    names: list[str] | None
    labels: list[int] | None
    classes: list[str] | None
    seconds: float

    __repr__ = fields_line


def decompress(pipeline: DDPMPipeline, path: str | os.PathLike[str], *, force: bool = False) -> Decompressed:
    """The images of a file, to the last bit.

    Args:
        pipeline: the model that they were compressed with.
        path: the file.
        force: try it although the network answers otherwise on this machine, or tables have other last bits.
            Images that come out wrong are found all the same, and refused.

    Raises:
        ValueError: the file is not ours, damaged, or of a newer version; another model; a network that
            answers otherwise; or constriction is not installed.
    """
    load_constriction()
    _check_pipeline(pipeline)
    content = read_content(Path(path).expanduser())
    header, name = content.header, repr(one_line(str(path), 80))
    shape = pipeline.image_shape
    _same(name, "images of the shape", tuple(header.shape), tuple(shape))
    _same(name, "the weights", header.weights, network_digest(pipeline.unet))
    _same(name, "the process", header.process, process_digest(pipeline.process))
    check_batch("batch", max(header.sizes, default=1), pipeline.unet, shape)
    began, found = time.perf_counter(), []
    try:
        plan = _plan_of(pipeline, header)
    except ValueError as error:
        raise ValueError(f"{name}: {one_line(error, 150)}") from None
    _same(name, "x̂_0 clipped:", header.clip_x0, plan.clip_x0)
    with _codec(pipeline, plan, header, header.dtype, content.side, content.images) as codec:
        ours = codec.header(header.sizes)
        _same(name, "the errors table", header.errors, ours.errors)
        told = ("no labels", "labels")
        _same(name, "a network told", told[header.conditioned], told[ours.conditioned])
        if not force:
            how = "; add force=True to try it all the same"
            _same(name, "the coder tables", header.tables, ours.tables, how)
            _same(name, "the network's answers", header.answers, ours.answers, how)
        for chunk in content.chunks:
            start = sum(len(images) for images in found)
            try:
                found.append(
                    decode_chunk(codec.chain, chunk, codec.labels_of(slice(start, start + chunk.images)))
                )
            except ValueError as error:
                which = f"images {start} to {start + chunk.images - 1}"
                raise ValueError(
                    f"{name}: {which} can't be decoded here: {one_line(error, 100)}; the network or this "
                    f"machine differs from {header.made_with.get('cpu', 'the one')} that made it"
                ) from None
            codec.bar.n = start + chunk.images
    side = content.side
    return Decompressed(
        torch.from_numpy(np.concatenate(found)),
        side.names,
        side.labels,
        side.classes,
        time.perf_counter() - began,
    )


@dataclass(frozen=True, eq=False)
class _Codec:
    """A chain that is ready, and what the file says of it.

    Attributes:
        chain: it codes.
        facts: the header, but for the answers.
        classes: of the images for the network, (N,), int64; None if it is not told them.
        bar: of the progress.
    """

    chain: Chain
    facts: dict[str, Any]
    classes: np.ndarray | None
    bar: Bar

    __repr__ = fields_line

    def labels_of(self, some: slice) -> np.ndarray | None:
        """The classes of some images, for the chain."""
        return None if self.classes is None else self.classes[some]

    def header(self, sizes: list[int]) -> Header:
        """What the file says, after the network has been asked in batches of these sizes."""
        answers = self.chain.answers_digest(sizes, self.classes is not None)
        return Header(**self.facts, answers=answers, sizes=sizes, made_with=_made_with())


@contextmanager
def _codec(
    pipeline: DDPMPipeline, plan: "_Plan", header: Header | None, dtype: str, side: Side, number: int
) -> Iterator[_Codec]:
    """A chain as planned, for a new file or one with that header, while the network is in that dtype."""
    classes = _classes(pipeline, side)
    with (
        progress("compress" if header is None else "decompress", number, "image", True) as bar,
        _network_in(pipeline, dtype) as network,
    ):
        chain = Chain(
            process=plan.process,
            model=network,
            shape=pipeline.image_shape,
            prediction_type=pipeline.prediction_type,
            variance=plan.variance,
            decoder=plan.decoder,
            clip_x0=plan.clip_x0,
            dtype=getattr(torch, dtype),
            bin_width=BIN_WIDTH if header is None else header.bin_width,
            parts=PARTS if header is None else header.parts,
            asked=lambda images: bar.update(images / len(plan.process)),
        )
        facts = {
            "shape": list(pipeline.image_shape),
            "steps": plan.process.timesteps.tolist(),
            "variance": plan.variance_name,
            "decoder": plan.decoder_name,
            "clip_x0": plan.clip_x0,
            "conditioned": classes is not None,
            "dtype": dtype,
            "bin_width": chain.bin_width,
            "parts": chain.parts,
            "weights": network_digest(pipeline.unet),
            "process": process_digest(pipeline.process),
            "errors": plan.errors,
            "tables": chain.digest,
        }
        yield _Codec(chain, facts, classes, bar)


@dataclass(frozen=True, eq=False)
class _Plan:
    """The chain's process, variance and decoder, their names, and a digest of the errors they are made of."""

    process: DiffusionProcess
    variance: AnyVariance
    variance_name: str
    decoder: AnyDecoder
    decoder_name: str
    clip_x0: bool
    errors: str | None

    __repr__ = fields_line


def _chosen_plan(pipeline: DDPMPipeline, steps: int) -> _Plan:
    """The best chain of so many steps by the measured errors; else the published one, evenly spaced."""
    total = len(pipeline.process)
    if not steps <= min(total, MOST_CHAIN):
        raise ValueError(f"steps is {steps}; allowed: 1 to {min(total, MOST_CHAIN)}")
    stored = pipeline.errors
    if stored is None:
        own = plain_name(pipeline.trained_scheduler.variance_type)
        name = own if own in LEARNED else "fixed_large"
        logger.warning(
            "the model has no %s, so that its published variance is taken (%s): hf-ddpm plan makes the file "
            "much smaller",
            ERRORS,
            name,
        )
        if steps < 2:
            raise ValueError(f"steps is {steps}; allowed: 2 to {min(total, MOST_CHAIN)} without {ERRORS}")
        kept = np.linspace(0, total - 1, steps).round().astype(int).tolist()
        return _plan(pipeline, kept, name, "exact")
    decoders = ("exact",) if stored.errors.levels_nats is None else COSTED
    chains = {name: stored.errors.best_chains(MEASURED, steps, name) for name in decoders}
    best = min(chains, key=lambda name: float(chains[name].nats[steps - 1]))
    return _plan(pipeline, chains[best].steps(steps), MEASURED, best)


def _plan_of(pipeline: DDPMPipeline, header: Header) -> _Plan:
    """The chain that a file names.

    Raises:
        ValueError: this model has no such chain.
    """
    allowed = {MEASURED: COSTED, **dict.fromkeys(("fixed_large", *LEARNED), ("exact",))}
    if header.decoder not in allowed.get(header.variance, ()):
        raise ValueError(
            f"it says variance {shown(header.variance, 40)} and decoder {shown(header.decoder, 40)}, "
            "which this version doesn't know"
        )
    if header.variance == MEASURED and pipeline.errors is None:
        raise ValueError(
            f"it was made with measured errors ({header.errors}), and the model has no {ERRORS}; allowed: "
            "the folder that it was made with"
        )
    return _plan(pipeline, header.steps, header.variance, header.decoder)


def _plan(pipeline: DDPMPipeline, steps: list[int], variance: str, decoder: str) -> _Plan:
    process = pipeline.process.respaced(steps)
    if variance != MEASURED:
        return _Plan(process, variance, variance, "exact", "exact", True, None)
    stored: Any = pipeline.errors
    return _Plan(
        process,
        stored.errors.variance(process, MEASURED),
        MEASURED,
        stored.errors.decoder(process, decoder) if decoder == "levels" else decoder,
        decoder,
        stored.of.clip_x0,
        errors_digest(stored),
    )


def errors_digest(stored: StoredErrors) -> str:
    """Sixteen hex digits of a table of errors."""
    found = hashlib.sha256(f"{stored.of.clip_x0}".encode())
    for name in ("squared", "pixels", "decoder_nats", "levels", "levels_nats"):
        if (table := getattr(stored.errors, name)) is not None:
            found.update(np.ascontiguousarray(table.numpy()).tobytes())
    return found.hexdigest()[:16]


def _classes(pipeline: DDPMPipeline, side: Side) -> np.ndarray | None:
    """The class of each image for the network; None where it knows none, or others than the images have."""
    number, labels = num_classes(pipeline.unet), side.labels
    if number is None or labels is None:
        return None
    names = getattr(pipeline, "id2label", None) or {}
    same = all(names.get(y, name) == name for y, name in enumerate(side.classes or ()))
    if not same or not all(0 <= label < number for label in labels):
        logger.warning("the labels of the images are not the network's classes: it is told no class")
        return None
    return np.array(labels, np.int64)


def _compare_classes(pipeline: DDPMPipeline, conditioned: bool) -> None:
    """Say so if the network is told other classes than when its errors were measured; the file is right."""
    if num_classes(pipeline.unet) is None or (stored := pipeline.errors) is None:
        return
    ours, measured = OWN_CLASSES if conditioned else NO_CLASS, stored.of.classes or NO_CLASS
    if ours != measured:
        logger.warning(
            "the class of each image is %s, but was %s when %s was measured: the file gets larger",
            *(shown(ours), shown(measured), ERRORS),
        )


@contextmanager
def _network_in(pipeline: DDPMPipeline, dtype: str) -> Iterator[Callable[..., Tensor]]:
    """The network as a function of CPU tensors in a dtype, in eval mode; the pipeline's stays as it is."""
    network, device, wanted = pipeline.unet, scoring_device(pipeline.device), getattr(torch, dtype)

    def ask(x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        model = as_denoiser(network) if labels is None else Conditioned(network, labels.to(device))
        return model(x_t.to(device), t.to(device)).cpu()

    if not isinstance(network, nn.Module):
        yield ask
        return
    weights = [weight for weight in network.parameters() if weight.is_floating_point()]
    training = network.training
    if any(weight.dtype != wanted for weight in weights) or device != pipeline.device:
        network = copy.deepcopy(network).to(device)
        network = network.double() if dtype == "float64" else network.float()
        training = False
    try:
        network.eval()
        yield ask
    finally:
        network.train(training)


def _made_with() -> dict[str, Any]:
    """Versions of programs, and what the machine is: for people."""
    return {
        "torch": torch.__version__,
        "constriction": version("constriction"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _same(name: str, what: str, theirs: Any, ours: Any, hint: str = "") -> None:
    """Refuse a file that was made with something else than what is here.

    Raises:
        ValueError: the message names both.
    """
    if theirs != ours:
        words = [value if isinstance(value, str) else str(value) for value in (theirs, ours)]
        raise ValueError(
            f"{name} was made with {what} {words[0]}, here are {words[1]}; allowed: the same{hint}"
        )


def _check_pipeline(pipeline: Any) -> None:
    if not isinstance(pipeline, DDPMPipeline):
        raise ValueError(
            f"pipeline is {described(pipeline)}; allowed: a DDPMPipeline; the order is compress(pipeline, "
            "images, path) and decompress(pipeline, path)"
        )


def _allow(allowed: bool, name: str, value: Any, words: str) -> None:
    if not allowed:
        raise ValueError(f"{name} is {described(value)}; allowed: {words}")


def _as_levels(images: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Images in any usual form as grey levels, (N, C, H, W), uint8."""
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == tuple(shape):
        found = images
    else:
        x_0 = as_images(images, shape)
        check_levels("images", x_0)
        found = to_uint8(x_0).cpu().numpy()
    if not len(found):
        raise ValueError("there are no images; allowed: at least one")
    return np.ascontiguousarray(found)


def _check_side(side: Side, number: int) -> None:
    if side.names is not None:
        check_names(side.names, number)
    if side.labels is not None:
        whole = isinstance(side.labels, list) and all(type(label) is int for label in side.labels)
        _allow(
            whole and len(side.labels) == number, "labels", side.labels, f"a list of {number} whole numbers"
        )
    if side.classes is not None:
        texts = isinstance(side.classes, list) and all(isinstance(name, str) for name in side.classes)
        _allow(texts and side.labels is not None, "classes", side.classes, "a list of names, beside labels")

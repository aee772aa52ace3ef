"""Chunks: up to a thousand images on one stack, in batches that the stack has bits enough for.

    words of a chunk:  spare words | own code of the first images | the others, batch after batch

The first batch has one image, and batches grow as the stack does, up to the largest size. Who decodes takes
the batches off in reverse order, finds the own code at the bottom, and compares the spare words, which are
always the same. This file knows stacks and batches. What is done to a batch is scheme.py's business.
"""

import hashlib
import math
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from hf_ddpm.compression.coder import SPARE_WORDS, Exhausted, Stack
from hf_ddpm.compression.plain import decode_plain, encode_plain
from hf_ddpm.compression.scheme import Chain
from hf_ddpm.shown import fields_line

MOST_IMAGES = 1000  # of a chunk: what one damaged word can spoil
MOST_OWN = 8  # images with a code of their own, before spare words are added
SPARE_BITS = 2.0  # for each number of an image, at a time
MARGIN = 1.1  # that a batch gets more words than the one before would have needed


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some images as words.

    Attributes:
        own: how many of the first images have a code of their own.
        kind: which code, see plain.py.
        own_bytes: how long it is.
        spare: how many spare words lie below.
        batches: how many images each batch of the others has, in the order in which they were coded.
        words: of the stack, (n,), uint32.
        pixels: digest of the grey levels, 32 hex digits.
    """

    own: int
    kind: str
    own_bytes: int
    spare: int
    batches: list[int]
    words: np.ndarray
    pixels: str

    __repr__ = fields_line

    @property
    def images(self) -> int:
        """How many images it holds."""
        return self.own + sum(self.batches)

    @property
    def net_bits(self) -> int:
        """What the images took that are in batches."""
        return 32 * (len(self.words) - self.spare - math.ceil(self.own_bytes / 4))

    @property
    def runs(self) -> list[list[int]]:
        """The batches as [size, how many of it in a row]."""
        return [[size, len(list(some))] for size, some in groupby(self.batches)]


def pixels_digest(images: np.ndarray) -> str:
    """Thirty-two hex digits of grey levels, (n, C, H, W), uint8."""
    found = hashlib.sha256(f"{images.shape}".encode())
    found.update(np.ascontiguousarray(images).data)
    return found.hexdigest()[:32]


def spare_words(number: int) -> np.ndarray:
    """Words that are always the same; the first of more words are new, and the last stay what they were."""
    raw = np.random.PCG64(0).random_raw(number)
    return np.asarray(raw & np.uint64(0xFFFFFFFF), np.uint64).astype(np.uint32).reshape(number)[::-1]


def encode_chunk(chain: Chain, images: np.ndarray, most: int, labels: np.ndarray | None = None) -> Chunk:
    """Code some images.

    Args:
        chain: it codes a batch.
        images: (n, C, H, W), uint8, at least one.
        most: the largest batch.
        labels: of the images, (n,), int64, where the chain's model takes them.

    Raises:
        ValueError: as in `Chain.encode`, but for a stack with too few bits, which gets more.
    """
    own, spare = 1, 0
    batches: list[int] = []
    kind, code = encode_plain(images[:own])
    stack = Stack(_as_words(code), sealed=True)
    need = 0.0  # words that an image of the last batch needed to draw from
    while left := len(images) - own - sum(batches):
        size = max(1, int((len(stack) - SPARE_WORDS) / (MARGIN * need))) if batches else 1
        done = _encode_batch(chain, stack, images[-left:], min(size, most, left), _last(labels, left))
        if done is not None:
            need = max(len(stack) - done.lowest, 1) / done.size
            stack = done.stack
            batches.append(done.size)
        elif not batches and own < min(MOST_OWN, len(images)):
            own += 1
            kind, code = encode_plain(images[:own])
            stack = Stack(_as_words(code), sealed=True)
        else:  # they go below what is there, so that nothing above is changed
            more = spare + math.ceil(chain.dims * SPARE_BITS / 32)
            added = spare_words(more)[: more - spare]
            stack, spare = Stack(np.concatenate([added, stack.words]), sealed=False), more
    return Chunk(own, kind, len(code), spare, batches, stack.words, pixels_digest(images))


class _Done(NamedTuple):
    """A batch on a stack: the stack, the batch's size, and the fewest words that the stack had meanwhile."""

    stack: Stack
    size: int
    lowest: int


def _last(labels: np.ndarray | None, number: int) -> np.ndarray | None:
    return None if labels is None else labels[-number:]


def _encode_batch(
    chain: Chain, stack: Stack, images: np.ndarray, size: int, labels: np.ndarray | None
) -> _Done | None:
    """The first `size` images on a copy of the stack, or, if it has too few bits, the first half of these.

    Returns:
        What has been done; None if the stack has too few bits for one image.
    """
    while size:
        attempt = stack.copy()
        attempt.lowest = len(attempt)
        try:
            chain.encode(attempt, images[:size], None if labels is None else labels[:size])
            return _Done(attempt, size, attempt.lowest)
        except Exhausted:
            size //= 2
    return None


def decode_chunk(chain: Chain, chunk: Chunk, labels: np.ndarray | None = None) -> np.ndarray:
    """The images of a chunk, (n, C, H, W), uint8; labels as in `encode_chunk`.

    Raises:
        ValueError: the words, the network or the tables are others than when it was coded.
    """
    stack, found = Stack(chunk.words, sealed=False), []
    end = chunk.images
    for size in reversed(chunk.batches):
        mine = None if labels is None else labels[end - size : end]
        found.append(chain.decode(stack, size, mine))
        end -= size
    words = stack.initial_words()
    if len(words) != chunk.spare + math.ceil(chunk.own_bytes / 4):
        raise ValueError("the stack does not end at its initial words")
    if not np.array_equal(words[: chunk.spare], spare_words(chunk.spare)):
        raise ValueError("the stack does not end at its initial words")
    code = words[chunk.spare :].astype("<u4").tobytes()[: chunk.own_bytes]
    found.append(decode_plain(chunk.kind, code, (chunk.own, *chain.shape)))
    images = np.concatenate(found[::-1])
    if pixels_digest(images) != chunk.pixels:
        raise ValueError("the pixels are not those that were coded")
    return images


def _as_words(data: bytes) -> np.ndarray:
    """Bytes as little-endian words, with zeros up to the last one's end."""
    return np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)

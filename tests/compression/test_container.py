"""container.py: what is written is read, and what can't be is refused in a line before it is believed."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from hf_ddpm.cli import MOST_TOGETHER
from hf_ddpm.compression.chunks import Chunk
from hf_ddpm.compression.container import (
    MAGIC,
    MOST_BATCH,
    MOST_HEADER,
    START,
    VERSION,
    Header,
    Side,
    check_names,
    of_bytes,
    read_content,
    to_bytes,
    write_content,
)

HEADER = Header(
    shape=[1, 8, 8],
    steps=[0, 20, 400],
    variance="by-value",
    decoder="levels",
    clip_x0=True,
    conditioned=False,
    dtype="float64",
    bin_width=1.0,
    parts=32,
    weights="0" * 16,
    process="1" * 16,
    errors="2" * 16,
    tables="3" * 16,
    answers="4" * 16,
    sizes=[1, 2, 8],
    made_with={"torch": "2.13"},
)
SIDE = Side(["a.png", "b/c.png"] + [f"{i}.png" for i in range(10)], list(range(12)), ["zero", "one"])


def chunk(batches=(1, 2, 8), words=20):
    return Chunk(1, "zlib", 33, 2, list(batches), np.arange(1, words + 1, dtype=np.uint32), "a" * 32)


DATA, SIDE_BYTES = to_bytes(HEADER, SIDE, [chunk()])


def forged(change=None, text=None, rest=b"", **values):
    """A file with a right sum, whose header says something else."""
    length = int.from_bytes(DATA[10:14], "little")
    header = json.loads(DATA[START : START + length])
    header |= values
    if change:
        change(header)
    text = json.dumps(header).encode() if text is None else text
    numbers = VERSION.to_bytes(2, "little") + len(text).to_bytes(4, "little")
    body = text + (rest or DATA[START + length :])
    return MAGIC + numbers + hashlib.sha256(numbers + body).digest() + body


def test_there_and_back(tmp_path):
    content = of_bytes(DATA)
    assert dataclasses.asdict(content.header) == dataclasses.asdict(HEADER)
    assert dataclasses.asdict(content.side) == dataclasses.asdict(SIDE)
    assert content.images == 12 and np.array_equal(content.chunks[0].words, chunk().words)
    assert content.chunks[0].batches == [1, 2, 8] and content.side_bytes == SIDE_BYTES
    side_bytes, total = write_content(tmp_path / "x.hfdc", HEADER, SIDE, [chunk()])
    assert (tmp_path / "x.hfdc").read_bytes() == DATA and (side_bytes, total) == (SIDE_BYTES, len(DATA))


def test_the_header_is_canonical_and_small():
    length = int.from_bytes(DATA[10:14], "little")
    text = DATA[START : START + length]
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode()
    assert length < 700


def test_runs_of_equal_batches_take_little_room():
    many = chunk([1, 2, *[8] * 120])
    assert many.runs == [[1, 1], [2, 1], [8, 120]]
    assert of_bytes(to_bytes(HEADER, Side(), [many])[0]).chunks[0].batches == many.batches


def test_cut_at_every_byte():
    for length in range(len(DATA)):
        with pytest.raises(ValueError, match=r"cut off|no file of hf-ddpm compress") as error:
            of_bytes(DATA[:length])
        assert len(str(error.value)) < 200


def test_one_flipped_bit_anywhere():
    rng = np.random.default_rng(0)
    for place in range(len(DATA)):
        data = bytearray(DATA)
        data[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError, match=r"no file of|version|damaged"):
            of_bytes(bytes(data))


def test_more_bytes_behind():
    with pytest.raises(ValueError, match="damaged"):
        of_bytes(DATA + b"x")


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000)], ids=["empty", "png", "0"]
)
def test_other_files(data):
    with pytest.raises(ValueError, match=r"no file of hf-ddpm compress|cut off after 0"):
        of_bytes(data)


def test_a_newer_version_names_both():
    data = DATA[:8] + (VERSION + 3).to_bytes(2, "little") + DATA[10:]
    with pytest.raises(ValueError, match=f"is of version {VERSION + 3}; allowed: up to {VERSION}"):
        of_bytes(data)


@pytest.mark.parametrize(
    "key, values",
    {
        "shape": [[1, 8], [1, 8, 0], [2**20, 2**20, 1], "1x8x8", [1.0, 8, 8], None],
        "steps": [[], [3, 2], [1, 1], [-1, 2], [0.5], list(range(5000)), "0", [True]],
        "variance": [3, "x" * 1000, None],
        "decoder": [None, ["levels"]],
        "clip_x0": [1, None, "true"],
        "conditioned": [0, None],
        "dtype": ["int8", None, "float16", ["float64"]],
        "bin_width": [0.0, -1.0, 1e9, 1, None, float("nan"), float("inf")],
        "parts": [0, 1.5, 2**40, None],
        "weights": ["", "x" * 16, None, "0" * 17],
        "errors": ["", 3],
        "sizes": [[2, 1], [8], [2**40], None, [1, 2, 8, 9]],
        "made_with": [None, []],
        "side": [-1, 10**9, 3, None],
        "chunks": [[], None, [[1]], {}],
    }.items(),
)
def test_what_a_header_can_not_say(key, values):
    for value in values:
        with pytest.raises(ValueError, match=r"can't be|which says|can't be read|JSON") as error:
            of_bytes(forged(**{key: value}))
        assert len(str(error.value)) < 250


CHUNK = [1, "zlib", 33, 2, [[1, 1], [2, 1], [8, 1]], 20, "a" * 32]


@pytest.mark.parametrize(
    "place, values",
    {
        0: [0, 10**9, "1", None, True],
        1: ["bzip2", None, 3],
        2: [0, 10**9, None],
        3: [-1, 21, None],
        4: [[[1, 10**9]], [[10**9, 1]], [[0, 1]], [[1]], None, [[8, 200]], "x", [[1, 1, 1]]],
        5: [0, -3, 10**12, 19, 21],
        6: ["", "A" * 32, None],
    }.items(),
)
def test_what_a_chunk_can_not_say(place, values):
    for value in values:
        odd = [value if i == place else was for i, was in enumerate(CHUNK)]
        with pytest.raises(ValueError, match=r"can't be|which says"):
            of_bytes(forged(chunks=[odd]))


def test_other_keys_and_other_texts():
    with pytest.raises(ValueError, match="other keys"):
        of_bytes(forged(more=1))
    with pytest.raises(ValueError, match="other keys"):
        of_bytes(forged(lambda header: header.pop("parts")))
    for text in (b"", b"[]", b"\xff", b"{" * 30, b'{"a":1,"a":2}'):
        with pytest.raises(ValueError, match=r"JSON|holds|other keys"):
            of_bytes(forged(text=text))
    with pytest.raises(ValueError, match=f"allowed: at most {MOST_HEADER}"):
        of_bytes(forged(text=b" " * (MOST_HEADER + 1)))


def test_names_and_labels_that_unpack_to_too_much(monkeypatch):
    monkeypatch.setattr("hf_ddpm.compression.container.MOST_SIDE", 1000)
    side = Side([f"{'x' * 150}{i}.png" for i in range(12)])
    with pytest.raises(ValueError, match="can't be"):
        of_bytes(to_bytes(HEADER, side, [chunk()])[0])


ELSEWHERE = [
    *("../a.png", "/a.png", "a/../b.png", "./a.png", "a//b.png", "", "a\n.png", "a\0.png", "a\\b.png"),
    *("a.exe", "x" * 300 + ".png", "/".join("x" * 30) + ".png", "\ud800.png", " /a.png", 3, None, ".."),
]


@pytest.mark.parametrize(
    "name",
    ELSEWHERE,
    ids=lambda name: ascii(name)[:20],
)
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match="allowed: of files within a folder"):
        check_names([name], 1)


def test_names_that_would_be_one_file():
    with pytest.raises(ValueError, match=r"two images of the name .a\.png."):
        check_names(["a.png", "b.png", "a.png"], 3)
    with pytest.raises(ValueError, match="for an image and for a folder"):
        check_names(["a.png", "a.png/b.png"], 2)
    with pytest.raises(ValueError, match="one for each of its 3 images"):
        check_names(["a.png"], 3)
    check_names(["a.png", "A.png", "ä b/c: d?.png", "a.jpg.png", ".hidden.PNG"], 5)


@pytest.mark.parametrize(
    "side",
    [
        Side(None, [1, 2]),
        Side(None, ["1"] * 12),
        Side(None, [1] * 12, [3]),
        Side(None, None, ["a"]),
        Side(["a.png"]),
    ],
    ids=["few labels", "text", "classes", "no labels", "few names"],
)
def test_names_and_labels_that_do_not_go_with_the_images(side):
    with pytest.raises(ValueError, match=r"can't be|other names"):
        of_bytes(to_bytes(HEADER, side, [chunk()])[0])


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(ValueError, match="can't read"):
        read_content(tmp_path / "none.hfdc")
    with pytest.raises(ValueError, match="no regular file"):
        read_content(tmp_path)


def test_the_command_line_allows_the_same_batches():
    assert MOST_TOGETHER == MOST_BATCH

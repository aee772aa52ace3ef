"""Held-out images and slices: which rows are read, whatever holds them and in whatever order."""

import io
import tarfile

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image as PILImage
from torch.utils.data import DataLoader, IterableDataset

from hf_ddpm.data.holdout import Choice, Rows, held_out, slice_of
from hf_ddpm.data.stream import load_stream
from tests.data.pictures import png, write_parquet

N = 200


def numbered(count=N):
    """Images (3, 2) whose pixels are all the number of their row."""
    return [np.full((3, 2), row, np.uint8) for row in range(count)]


def write_folder(folder):
    folder.mkdir()
    for row, image in enumerate(numbered()):
        PILImage.fromarray(image).save(folder / f"{row:03d}.png")
    return folder


def write_tar(folder):
    folder.mkdir()
    with tarfile.open(folder / "train.tar", "w") as tar:
        for row, image in enumerate(numbered()):
            data = png(image)
            info = tarfile.TarInfo(f"{row:03d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same 200 images: as files, in one parquet file, in many of uneven row groups, and in an archive."""
    root, values = tmp_path_factory.mktemp("sources"), [png(image) for image in numbered()]
    return {
        "files": write_folder(root / "files"),
        "one parquet file": write_parquet(root / "one", values),
        "parquet files": write_parquet(root / "many", values, [1, 0, 70, 29, 100], row_group_size=7),
        "archive": write_tar(root / "tar"),
    }


KINDS = ["files", "one parquet file", "parquet files", "archive"]


def rows_of(images):
    """The rows that images say they are."""
    return [int(image[0, 0, 0]) for image in images]


# Which rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [0, 0.001, 32])
def test_the_same_rows_are_held_out_of_any_source_in_any_order(sources, kind, memory):
    expected = held_out(range(N), 0.1, 3).tolist()
    options = {"holdout": 0.1, "seed": 3, "shuffle_memory": memory}
    held = load_stream(sources[kind], part="held-out", **options)
    train = load_stream(sources[kind], **options)
    assert (held.num_rows(), train.num_rows(), train.chosen.left_out) == (20, 180, 20)
    for epoch in (0, 1):
        assert sorted(rows_of(held.images(epoch))) == expected
        assert sorted(rows_of(train.images(epoch))) == sorted(set(range(N)) - set(expected))
    assert rows_of(train.images(1, start=170)) == rows_of(train.images(1))[170:]
    if memory == 0:
        assert rows_of(held.select([0, 7, 19])) == [expected[i] for i in (0, 7, 19)]
    everything = load_stream(sources[kind], part="all", **options)
    assert sorted(rows_of(everything.images())) == list(range(N))


class Slots(IterableDataset):
    def __init__(self, stream, slots):
        self.stream, self.slots = stream, slots

    def __iter__(self):
        wanted = np.array([position for slot in self.slots for position in slot])
        yield from (item.images for item in self.stream.slots(self.slots, lambda at: np.isin(at, wanted)))


@pytest.mark.parametrize("kind", ["files", "parquet files"])
def test_what_a_worker_process_reads_of_its_share(sources, kind):
    """Every second position, in another process: the rows that one process reads there."""
    stream = load_stream(sources[kind], holdout=0.3, shuffle_memory=0.003, seed=1)
    positions = list(range(1, 280, 2))
    (found,) = DataLoader(Slots(stream, [positions]), batch_size=None, num_workers=1)
    whole = rows_of(stream.images(0)) + rows_of(stream.images(1))
    assert rows_of(found) == [whole[position] for position in positions]


def test_the_choice_is_a_function_of_seed_and_row():
    """More images at the end change sides of hardly any, and a larger holdout contains the smaller one."""
    held = set(held_out(range(1000), 50, 0).tolist())
    assert len(held) == 50 and held == set(held_out(range(1000), 0.05, 0).tolist())
    assert held < set(held_out(range(1000), 0.2, 0).tolist())
    more = set(held_out(range(1010), 50, 0).tolist())
    assert len(held - more) == len(more & set(range(1000, 1010))) <= 5
    # Of two seeds, independent: 50 · 50 / 1000 = 2.5 rows are common, with a standard error of about 1.5
    assert len(held & set(held_out(range(1000), 50, 1).tolist())) <= 2.5 + 5 * 1.5
    # Held-out rows lie evenly: 20 in each tenth, give or take √(20 · 0.9)
    counts = np.histogram(held_out(range(10**4), 200, 7), 10, (0, 10**4))[0]
    assert counts.sum() == 200 and np.abs(counts - 20).max() <= 5 * np.sqrt(18)


def test_blocks_of_rows_are_one_choice(monkeypatch):
    whole = held_out(range(5, 1000), 0.3, 2)
    monkeypatch.setattr("hf_ddpm.data.holdout._AT_ONCE", 64)
    assert held_out(range(5, 1000), 0.3, 2).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("holdout", "rows", "count"), [(0.05, 3000, 150), (0.05, 303, 15), (0.5, 3, 2), (7, 9, 7)]
)
def test_how_many(holdout, rows, count):
    assert len(held_out(range(rows), holdout, 0)) == count


# Slices

SLICES = [
    *("train[:90%]", "train[90%:]", "train[:100]", "train[100:150]", "train[-50:]", "train[:-50]"),
    *("train[33%:67%]", "train[-10%:]", "train[:1]", "train[5:9999]", "train[:33%](pct1_dropremainder)"),
]


@pytest.mark.parametrize("split", SLICES)
def test_slices_are_those_of_datasets(sources, split):
    theirs = load_dataset(
        "parquet", data_files={"train": str(sources["one parquet file"] / "*")}, split=split
    )
    expected = [int(np.asarray(row["image"])[0, 0]) for row in theirs]
    for kind in KINDS:
        stream = load_stream(sources[kind], split)
        assert rows_of(stream.images()) == expected and stream.num_rows() == len(expected)
        assert stream.chosen.all.tolist() == expected


def test_a_holdout_of_a_slice_is_taken_in_the_slice(sources):
    for kind in KINDS:
        found = [
            load_stream(sources[kind], "train[50:150]", holdout=0.1, part=p) for p in ("train", "held-out")
        ]
        train, held = (rows_of(stream.images()) for stream in found)
        assert len(held) == 10 and sorted(train + held) == list(range(50, 150))
        survey = found[1].survey()
        assert survey.looked_at == 10 and "(train[50:150], held-out images): " in str(survey)


def test_an_unreadable_image_is_named_by_its_own_row(tmp_path):
    values = [png(image) for image in numbered(20)]
    values[13] = b"no image"
    write_parquet(tmp_path, values, [8, 12])
    with pytest.raises(ValueError, match=r"^row 5 of .*train-00001-of-00002.parquet"):
        list(load_stream(tmp_path, "train[10:]").images())
    stream = load_stream(tmp_path, "train[10:]", skip_corrupt=True)
    assert stream.unreadable(range(10)) == [3] and stream.skipped == 1
    assert stream.survey().named == ["row 5 of train-00001-of-00002.parquet"]
    left = stream.only(stream.chosen.without([3]))
    assert rows_of(left.images()) == [10, 11, 12, *range(14, 20)]
    assert left.chosen.all.tolist() == rows_of(left.images())


def test_the_fingerprint_tells_choices_apart(sources):
    for kind in KINDS:
        streams = [
            load_stream(sources[kind], split, **options)
            for split in ("train", "train[:50%]")
            for options in ({}, {"holdout": 0.1}, {"holdout": 0.1, "seed": 1}, {"holdout": 30})
        ]
        facts = [stream.facts() for stream in streams]
        assert len({fact["fingerprint"] for fact in facts}) == len(facts)
        assert {fact["num_rows"] for fact in facts} == {N}
        assert "chosen" not in streams[0].fingerprint()  # as it was before there were holdouts
        again = load_stream(sources[kind], holdout=0.1, shuffle_memory=32)
        assert again.facts() == facts[1]  # whatever the order


# Words


@pytest.mark.parametrize(
    ("split", "words"),
    [
        *(
            (text, "allowed: a split's name, or a slice: train[:90%]")
            for text in (
                "train[",
                "train[]",
                "train[:]",
                "train[5]",
                "train[2.5%:]",
                "train[:150%]",
                "train[::2]",
                "train[:5]x",
                "train[10:50%]",
                "train[:9]+train[90:]",
                "[:9]",
                "train[:9](up)",
            )
        ),
        *(
            (text, "which is none of the 1,497 rows of 'train'")
            for text in ("train[:0]", "train[9:9]", "train[2000:]")
        ),
        ("tarin[:9]", "no split 'tarin' in digits"),
    ],
)
def test_what_is_no_slice(split, words):
    with pytest.raises(ValueError) as error:
        load_stream("digits", split)
    assert words in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_rounding_for_few_rows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^split is 'a\[:5%\]\(pct1_dropremainder\)': .*less than 100"):
        slice_of("a[:5%](pct1_dropremainder)", 20)


@pytest.mark.parametrize(
    ("holdout", "words"),
    [
        *((value, "allowed: a share of the images, above 0 and below 1, or how many") for value in (
            0, 1, 1.0, -0.5, 1.5, True, "5%", float("nan"), float("inf"),
        )),
        (1e-6, "holdout is 1e-06, none of the 1,497 images; allowed: what makes 1 to 1,496 of them"),
        (0.9999, "holdout is 0.9999, not fewer than the 1,497 images"),
        (1497, "holdout is 1497, not fewer than the 1,497 images"),
        (10**6, "holdout is 1e+06, not fewer than the 1,497 images"),
    ],
)  # fmt: skip
def test_what_is_no_holdout(holdout, words):
    with pytest.raises(ValueError) as error:
        load_stream("digits", holdout=holdout).num_rows()
    assert str(error.value).startswith("holdout is") and words in str(error.value)


def test_parts():
    with pytest.raises(ValueError, match="part is 'held-out', but without holdout no image is"):
        load_stream("digits", part="held-out")
    with pytest.raises(ValueError, match="part is 'test'; allowed: train, held-out, all"):
        load_stream("digits", part="test")  # type: ignore[arg-type]
    assert Choice("train", 0.5, "all").whole and not Choice("train[:5]").whole


# Numbers


def test_rows_by_definition():
    """Every question that can be asked of some rows, against lists."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, stop = np.sort(rng.integers(0, 40, 2))
        span = range(start, stop + 1)
        some = np.sort(rng.permutation(np.arange(start, stop + 1))[: rng.integers(0, len(span) + 1)])
        for listed in (False, True):
            rows, expected = Rows(span, some, listed), sorted(some if listed else set(span) - set(some))
            assert rows.all.tolist() == expected and len(rows) == len(expected)
            assert rows.others.all.tolist() == sorted(set(span) - set(expected))
            at = np.arange(50)
            assert rows.count_before(at).tolist() == [sum(row < i for row in expected) for i in at]
            assert rows.has(at).tolist() == [i in expected for i in at]
            other = Rows(range(45), np.arange(0, 45, 3), listed)
            assert rows.both(other).all.tolist() == sorted(set(expected) & set(other.all.tolist()))
            if expected:
                assert rows.without([0]).all.tolist() == expected[1:]
    assert torch.is_tensor(torch.from_numpy(Rows(range(3)).all))

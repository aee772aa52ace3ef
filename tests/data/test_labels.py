"""labels.py: the same name has the same number, whatever the order of files; what has no label is refused."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Value
from PIL import Image

from hf_ddpm.data.fingerprint import compare_fingerprints
from hf_ddpm.data.stream import load_stream

NAMES = ["boot", "bag", "coat"]


def png(tmp_path, level):
    path = tmp_path / f"{level}.png"
    Image.new("L", (8, 8), level).save(path)
    return {"bytes": path.read_bytes(), "path": None}


def write(tmp_path, name, labels, kind=None, folder="data"):
    """A parquet file whose image i is wholly of the grey level i."""
    (tmp_path / folder).mkdir(exist_ok=True)
    kind = kind or ClassLabel(names=NAMES)
    schema = Features({"image": datasets.Image(), "label": kind}).arrow_schema
    rows = [png(tmp_path, i) for i in range(len(labels))]
    table = pa.table({"image": rows, "label": labels}).cast(schema.remove_metadata())
    pq.write_table(table.replace_schema_metadata(schema.metadata), tmp_path / folder / name, row_group_size=4)
    return tmp_path / folder


def image_files(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(root / name)
    return root


def opened(source, **options):
    return load_stream(source, label_column="label", **options)


def labels_by_level(stream, epochs=2):
    """The label of each image that `slots` gives, by its grey level."""
    total = epochs * stream.num_rows()
    found = {}
    for slot in stream.slots([range(i, min(i + 3, total)) for i in range(0, total, 3)]):
        for image, label in zip(slot.images, slot.labels.tolist(), strict=True):
            assert found.setdefault(int(image[0, 0, 0]), label) == label
    return found


# Kinds of labels


def test_a_class_label_keeps_its_numbers(tmp_path):
    stream = opened(write(tmp_path, "train.parquet", [2, 0, 0, 2]))
    assert stream.class_names == tuple(NAMES) and stream.class_counts == [2, 0, 2]
    assert stream.labels.tolist() == [2, 0, 0, 2]


@pytest.mark.parametrize(
    ("values", "kind", "names", "ids"),
    [
        (["b", "a", "c", "a"], "string", ("a", "b", "c"), [1, 0, 2, 0]),
        ([10, 7, 10, 100], "int64", ("7", "10", "100"), [1, 0, 1, 2]),
        ([1, 0, 1, 1], "uint8", ("0", "1"), [1, 0, 1, 1]),
        ([True, False, True, True], "bool", ("false", "true"), [1, 0, 1, 1]),
        (["b", "a", "b", "b"], "large_string", ("a", "b"), [1, 0, 1, 1]),
    ],
    ids=["text", "numbers", "bytes", "truth", "large text"],
)
def test_other_kinds(tmp_path, values, kind, names, ids):
    stream = opened(write(tmp_path, "train.parquet", values, Value(kind)))
    assert (stream.class_names, stream.labels.tolist()) == (names, ids)


def test_the_number_does_not_depend_on_the_order_of_files(tmp_path):
    one = write(tmp_path, "train-0.parquet", ["b", "c"], Value("string"))
    write(tmp_path, "train-1.parquet", ["a"], Value("string"))
    other = write(tmp_path, "train-0.parquet", ["a"], Value("string"), "other")
    write(tmp_path, "train-1.parquet", ["b", "c"], Value("string"), "other")
    assert opened(one).class_names == opened(other).class_names == ("a", "b", "c")


def test_folders_of_images(tmp_path):
    image_files(tmp_path, "train/boot/0.png", "train/bag/1.png", "train/x/boot/2.png", "test/boot/3.png")
    stream = opened(tmp_path)
    assert stream.class_names == ("bag", "boot")
    assert labels_by_level(stream) == {0: 1, 1: 0, 2: 1}
    assert opened(tmp_path, split="test", label_names=stream.class_names).labels.tolist() == [1]


def test_a_class_may_be_named_as_a_split(tmp_path):
    image_files(tmp_path, "train/0.png", "car/1.png", "bus/2.png")
    assert opened(tmp_path).class_names == ("bus", "car", "train")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_beside_images(tmp_path, kind):
    image_files(tmp_path, "a/0.png", "a/1.png")
    rows = [{"file_name": "a/1.png", "label": "boot"}, {"file_name": "a/0.png", "label": "bag"}]
    text = "\n".join(map(json.dumps, rows))
    if kind == "csv":
        text = "file_name,label\n" + "\n".join(",".join(row.values()) for row in rows)
    (tmp_path / f"metadata.{kind}").write_text(text)
    assert labels_by_level(opened(tmp_path)) == {0: 0, 1: 1}


# Orders, choices, processes


@pytest.mark.parametrize("memory", [0, 0.001, 64], ids=["in order", "windows", "whole"])
def test_labels_stay_with_their_images(tmp_path, memory):
    ids = [i * 7 % 3 for i in range(50)]
    folder = write(tmp_path, "train-0.parquet", ids)
    assert labels_by_level(opened(folder, shuffle_memory=memory, seed=3)) == dict(enumerate(ids))


def test_choices_keep_labels_and_classes(tmp_path):
    ids = [i * 7 % 3 for i in range(50)]
    folder, slice_of = write(tmp_path, "train.parquet", ids), "train[10:40]"
    train = opened(folder, split=slice_of, holdout=0.3, seed=1)
    held = opened(folder, split=slice_of, holdout=0.3, seed=1, part="held-out")
    assert train.class_names == held.class_names
    found = labels_by_level(train) | labels_by_level(held)
    assert found == {i: ids[i] for i in range(10, 40)}
    assert labels_by_level(train.only(train.chosen.without([0]))).items() < found.items()


def test_what_cannot_be_read_keeps_others_in_place(tmp_path):
    root = image_files(tmp_path, *(f"{'ab'[i % 2]}/{i}.png" for i in range(6)))
    (root / "a/2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    stream = opened(root, skip_corrupt=True, shuffle_memory=1, seed=2)
    (slots,) = stream.slots([[*range(6), -1]])
    assert slots.labels[-1] == 2 and slots.present.sum() == 5  # an empty slot is of no class
    found = {
        int(x[0, 0, 0]): y
        for x, y, p in zip(*slots[:1], slots.labels.tolist(), slots.present, strict=False)
        if p
    }
    assert found == {0: 0, 1: 1, 3: 1, 4: 0, 5: 1}


def test_without_labels_nothing_changes(tmp_path):
    stream = load_stream(write(tmp_path, "train.parquet", [0, 1]))
    assert stream.class_names is stream.labels is stream.class_counts is None
    (slots,) = stream.slots([[0, 1]])
    _images, present = slots
    assert present.all() and "labels" not in stream.fingerprint()


def test_another_split_has_the_same_numbers(tmp_path):
    write(tmp_path, "train.parquet", ["b", "a", "c"], Value("string"))
    test = write(tmp_path, "test.parquet", [0, 1], ClassLabel(names=["c", "b"]))
    stream = opened(test, split="test", label_names=opened(test).class_names)
    assert stream.labels.tolist() == [2, 1]


def test_changed_labels_are_other_data(tmp_path):
    prints = []
    for labels in ([0, 1, 2], [0, 2, 2]):
        prints.append(opened(write(tmp_path, "train.parquet", labels)).fingerprint())
    prints[1]["sample"] = prints[0]["sample"]
    for key in ("files", "all_files", "layout"):
        prints[1][key] = prints[0][key]
    assert compare_fingerprints(prints[0], prints[0]) is None
    assert compare_fingerprints(*prints) == "the labels of its images"


# What is refused


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([0, None, 1], None, r"row 1 of .*train.parquet has no label in column 'label'$"),
        ([0, -1, None], None, r"row 1 of .* has no label in column 'label' \(nor have 1 more\)"),
        ([0, 3], None, r"row 1 of .* has the label 3; allowed in column 'label': 0 to 2"),
        (["a", "", "b"], Value("string"), r"row 1 of .* has no label"),
        (["a", " b"], Value("string"), r"row 1 of .* has the label ' b'; allowed: text of 1 to"),
        (["a", "x\ny"], Value("string"), r"row 1 of .* has the label 'x\\ny'; allowed: text"),
        ([5, -7], Value("int64"), r"row 1 of .* has the label -7; allowed: whole numbers >= 0"),
        ([0.5, 1.0], Value("float64"), r"column 'label' of .* holds double; allowed: a ClassLabel, whole"),
        ([None, None], Value("null"), r"row 0 of .* has no label"),
    ],
    ids=["none", "-1", "above", "empty", "spaces", "lines", "negative", "float", "nulls"],
)
def test_bad_labels_are_refused_by_their_row(tmp_path, values, kind, message):
    folder = write(tmp_path, "train.parquet", values, kind)
    with pytest.raises(ValueError, match=message) as error:
        opened(folder)
    assert len(str(error.value)) <= 300 and str(error.value).isprintable()


def test_rows_outside_of_the_slice_may_lack_one(tmp_path):
    folder = write(tmp_path, "train.parquet", [0, 1, 2, -1])
    assert opened(folder, split="train[:3]").labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3"):
        opened(folder, split="train[1:]")


def test_an_unknown_class_is_refused_by_its_row(tmp_path):
    folder = write(tmp_path, "train.parquet", ["bot", "boot"], Value("string"))
    with pytest.raises(
        ValueError, match=r"row 0 of .* has the label 'bot' \(did you mean 'boot'\?\); allowed"
    ):
        opened(folder, label_names=["boot", "bag"])


def test_files_with_other_classes_are_refused(tmp_path):
    write(tmp_path, "train-0.parquet", [0, 1])
    folder = write(tmp_path, "train-1.parquet", [0, 1], ClassLabel(names=["bag", "boot", "coat"]))
    with pytest.raises(ValueError, match=r"train-1.parquet has other classes in column 'label'"):
        opened(folder)


def test_no_such_column(tmp_path):
    folder = write(tmp_path, "train.parquet", [0, 1])
    with pytest.raises(ValueError, match=r"no column 'lable' of labels \(did you mean 'label'\?\)"):
        load_stream(folder, label_column="lable")
    image_files(tmp_path / "files", "a/0.png")
    with pytest.raises(ValueError, match=r"no column 'species' of labels; there are: label, the names of"):
        load_stream(tmp_path / "files", label_column="species")


def test_a_file_outside_of_the_folders_of_classes(tmp_path):
    image_files(tmp_path, "train/boot/0.png", "train/1.png", "test/boot/2.png")
    with pytest.raises(ValueError, match=r"train/1.png has no label in column 'label'$"):
        opened(tmp_path)


def test_names_need_a_column(tmp_path):
    with pytest.raises(ValueError, match="label_names without a label_column"):
        load_stream(write(tmp_path, "train.parquet", [0]), label_names=["boot"])


def test_labels_of_the_digits():
    stream = opened("digits")
    assert stream.class_names == tuple("0123456789")
    assert np.bincount(stream.labels).tolist() == stream.class_counts

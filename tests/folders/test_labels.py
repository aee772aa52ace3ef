"""labels.py: the names of classes, written and read back; what a stranger's file may hold; who is meant."""

import json

import pytest

from hf_ddpm.folders.labels import check_labels, label_id, read_labels, write_labels
from hf_ddpm.folders.layout import LABELS

NAMES = {0: "boot", 1: "bag", 2: "T-shirt/top ✓"}


def test_names_there_and_back(tmp_path):
    write_labels(tmp_path, {2: NAMES[2], 0: "boot", 1: "bag"})
    assert list(read_labels(tmp_path, 3).items()) == list(NAMES.items())
    assert json.loads((tmp_path / LABELS).read_text("utf-8"))["id2label"]["0"] == "boot"
    assert [path.name for path in tmp_path.iterdir()] == [LABELS]


def test_a_model_without_names(tmp_path):
    assert read_labels(tmp_path) is None


BAD = {
    "no JSON": "{",
    "a list": '["boot"]',
    "no names": "{}",
    "a list of names": '{"id2label": ["boot", "bag"]}',
    "none at all": '{"id2label": {}}',
    "another key": '{"id2label": {"zero": "boot"}}',
    "one key in two ways": '{"id2label": {"0": "boot", "00": "bag"}}',
    "a negative number": '{"id2label": {"-1": "boot"}}',
    "a gap": '{"id2label": {"0": "boot", "2": "bag"}}',
    "a number for a name": '{"id2label": {"0": 7}}',
    "no text": '{"id2label": {"0": ""}}',
    "spaces around": '{"id2label": {"0": " boot"}}',
    "two lines": json.dumps({"id2label": {"0": "bo\not"}}),
    "what moves the cursor": json.dumps({"id2label": {"0": "bo\x1b[2Kot"}}),
    "a long text": json.dumps({"id2label": {"0": "x" * 121}}),
    "the same name twice": '{"id2label": {"0": "boot", "1": "boot"}}',
}


@pytest.mark.parametrize("name", BAD)
def test_a_strangers_file_is_refused_in_a_line(tmp_path, name):
    (tmp_path / LABELS).write_text(BAD[name], encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{LABELS}") as error:
        read_labels(tmp_path)
    assert len(str(error.value)) <= 300 and str(error.value).isprintable()


def test_names_of_another_network_are_refused(tmp_path):
    write_labels(tmp_path, NAMES)
    with pytest.raises(ValueError, match=r"names 3 classes; allowed for this network: 10"):
        read_labels(tmp_path, 10)


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / LABELS).mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_labels(tmp_path)


def test_bad_names_are_not_written(tmp_path):
    for bad in ({1: "boot"}, {0: "a", 1: "a"}, {}, ["boot"]):
        with pytest.raises(ValueError, match="id2label"):
            write_labels(tmp_path, bad)
    assert not list(tmp_path.iterdir())


def test_who_is_meant():
    assert [label_id(given, 3, NAMES) for given in (0, "bag", "2", "none")] == [0, 1, 2, 3]
    assert [label_id(given, 3) for given in (2, "0", "none")] == [2, 0, 3]
    years = {0: "1", 1: "2", 2: "none"}
    assert [label_id(given, 3, years) for given in (1, "1", "2", "0", 3)] == [1, 0, 1, 0, 3]
    with pytest.raises(ValueError, match="may be the one of that name or no class at all"):
        label_id("none", 3, years)


@pytest.mark.parametrize("bad", [-1, 3, True, 1.0, None, "boots", "", "3", "-1", "9" * 500], ids=range(10))
def test_nobody_is_meant(bad):
    with pytest.raises(ValueError, match=r"allowed: 0 to 2, none, boot, bag, T-shirt") as error:
        label_id(bad, 3, NAMES)
    assert len(str(error.value)) <= 300


def test_numbers_of_any_integer_type_are_refused_or_kept():
    assert check_labels({0: "a"}, 1) == {0: "a"}
    with pytest.raises(ValueError, match="allowed for this network: 2"):
        check_labels({0: "a"}, 2)

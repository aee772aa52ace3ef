"""beside.py: metadata files add no row and take none away, and a card chooses among the folder's files."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ddpm.data.stream import load_stream
from tests.data.test_listing import fill


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_metadata_file_that_names_one_of_three_images(tmp_path, ending, caplog):
    fill(tmp_path, ["a.png", "b.png", "c.png"])
    file = tmp_path / f"metadata.{ending}"
    if ending == "csv":
        file.write_text('file_name,text\nb.png,"two\nlines"\n', encoding="utf-8-sig")
    elif ending == "jsonl":
        file.write_text('{"file_name": "b.png", "text": "x"}\n\n')
    else:
        pq.write_table(pa.table({"file_name": ["b.png"], "text": ["x"]}), file)
    assert load_stream(tmp_path).num_rows() == 3
    assert f"2 of 3 images have no line in metadata.{ending}, and are read all the same" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "csv",
            "file_name\na.png\nlost.png\n",
            r"^line 3 of metadata.csv names 'lost.png', and no such image",
        ),
        (
            "csv",
            "file_name\n../a.png\n/etc/passwd\n",
            r"^line 2 of .* names '../a.png'.* \(and 1 more such line",
        ),
        ("csv", "file_name\nfile:///etc/passwd\n", r"^line 2 of metadata.csv names 'file:///etc/passwd'"),
        ("jsonl", '{"file_name": "a.png"}\n{"file_name": null}\n', r"^line 2 of metadata.jsonl names ''"),
        ("csv", "name\na.png\n", r"metadata.csv has no column file_name"),
        ("csv", "file_name\n\x00\n", r"metadata.csv"),
        ("jsonl", "[1]\n", r"^can't read .*metadata.jsonl: line 1 is no object"),
        ("jsonl", '{"a": ' + "[" * 5000 + "\n", r"^can't read .*metadata.jsonl: "),
        ("parquet", "PAR1", r"^can't read .*metadata.parquet: "),
    ],
)
def test_bad_metadata(tmp_path, name, text, words):
    fill(tmp_path, ["a.png"])
    (tmp_path / f"metadata.{name}").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_stream(tmp_path)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_lost_images_are_passed_over_if_asked(tmp_path, caplog):
    fill(tmp_path, ["a.png", "b.png"])
    (tmp_path / "metadata.csv").write_text("file_name\na.png\nlost.png\nb.png\n")
    assert load_stream(tmp_path, skip_corrupt=True).num_rows() == 2
    assert "lines without an image, passed over: 1 (line 3 of metadata.csv names 'lost.png'" in caplog.text


def test_metadata_of_each_split(tmp_path):
    fill(tmp_path, ["train/a.png", "train/b.png", "test/a.png"])
    for split, names in {"train": "a.png\nb.png", "test": "a.png"}.items():
        (tmp_path / split / "metadata.csv").write_text(f"file_name\n{names}\n")
    assert [load_stream(tmp_path, split).num_rows() for split in ("train", "test")] == [2, 1]


def test_metadata_with_several_images_in_a_line(tmp_path, caplog):
    fill(tmp_path, ["photos/1.png", "photos/2.png", "masks/1.png", "masks/2.png", "other.png"])
    (tmp_path / "metadata.csv").write_text(
        "photo_file_name,mask_file_name\nphotos/2.png,masks/2.png\nphotos/1.png,masks/1.png\n"
    )
    with pytest.raises(ValueError, match="several image columns, choose one with column=: photo, mask"):
        load_stream(tmp_path)
    stream = load_stream(tmp_path, column="mask")
    assert stream.num_rows() == 2
    assert "without a line in the metadata: 1 (other.png)" in caplog.text


# Cards


def write_card(folder, text, name="README.md"):
    (folder / name).write_text(f"---\n{text}\n---\n# A data set\n" if name == "README.md" else text)


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_names_the_files_of_each_split(tmp_path, card, caplog):
    fill(tmp_path, ["one/1.png", "two/1.png", "two/deep/2.png", "three.png"])
    files = "[{split: train, path: two/**}, {split: extra, path: [one/*.png, ./three.png]}]"
    write_card(tmp_path, f"license: mit\nconfigs: [{{config_name: default, data_files: {files}}}]", card)
    assert [load_stream(tmp_path, split).num_rows() for split in ("train", "extra")] == [2, 2]
    write_card(tmp_path, "configs: [{config_name: default, data_files: one/*}]", card)
    assert load_stream(tmp_path).num_rows() == 1
    assert "not named by the card's data_files: 3 (three.png, two/1.png, two/deep/2.png)" in caplog.text


@pytest.mark.parametrize(
    "text", ["license: mit", "configs: [{config_name: default}]", "configs: 3", "- a\n- b"]
)
def test_a_card_without_data_files(tmp_path, text):
    write_card(fill(tmp_path, ["a.png"]), text)
    assert load_stream(tmp_path).num_rows() == 1


@pytest.mark.parametrize("pattern", [
    "/etc/passwd", "../secret.png", "a/../../secret.png", "http://127.0.0.1:9/a.png", "hf://datasets/a/b/c.png",
    "file:///etc/passwd", "zip://a.png::b.zip", "C:/a.png", "..\\\\a.png",
])  # fmt: skip
def test_a_cards_data_files_stay_in_the_folder(tmp_path, pattern):
    fill(tmp_path, ["set/a.png", "secret.png"])
    write_card(tmp_path / "set", f'configs: [{{config_name: x, data_files: "{pattern}"}}]')
    with pytest.raises(ValueError, match=r"README.md names data files outside of the folder: '"):
        load_stream(tmp_path / "set")


NESTED = "\n".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("configs: [{data_files: lost.png}]", "names data files that are not there: 'lost.png'"),
        ("configs: [{data_files: a.png}, {data_files: a.png}]", "describes 2 data sets; give the folder"),
        ("configs: [{data_files: {train: {a: b}}}]", "must name a path, or a list of paths, for each split"),
        (f"a: &a [x]\n{NESTED}\nconfigs: [{{data_files: *i}}]", "must name a path, or a list of paths"),
        (f"configs: [{{data_files: '{'*a' * 60}*b'}}]", "names data files that are not there"),
        (f"configs: [{{data_files: '{'**/' * 60}b'}}]", r"has '\*\*' more than 3 times"),
        ("configs: [", r"^can't read .*README.md: "),
        ("configs: " + "[" * 400, r"^can't read .*README.md: "),
    ],
)
def test_bad_cards(tmp_path, text, words):
    write_card(fill(tmp_path, ["a.png", "a" * 200 + ".png"]), text)
    with pytest.raises(ValueError, match=words) as caught:
        load_stream(tmp_path)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_a_script_in_the_folder_is_not_run(tmp_path):
    fill(tmp_path / "set", ["a.png"])
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    assert load_stream(tmp_path / "set").num_rows() == 1 and not (tmp_path / "mark").exists()

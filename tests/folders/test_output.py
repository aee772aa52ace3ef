"""output.py: a folder of somebody's photos is no place for a run, and nothing in it is touched."""

import json
import os

import pytest
from accelerate import PartialState

from hf_ddpm.folders.output import check_evaluation_folder, check_run_folder, output_folder


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("mine")
    return folder


def refused(check, *args):
    with pytest.raises(ValueError) as error:
        check(*args)
    return str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        (),
        (".DS_Store",),
        ("job.sh", "slurm-17.out", "notes.md", "requirements.txt"),
        ("train_config.json", "holiday.jpg", "sub/deep.png"),
        ("model_index.json", "unet/config.json", "a.jpg"),
        ("checkpoints/step-00000004/state.json", "a.jpg"),
    ],
)
def test_folders_that_a_run_may_have(names, tmp_path):
    check_run_folder(fill(tmp_path, *names))


@pytest.mark.parametrize(
    "name", ["a.jpg", "00000.png", "photos/a.jpg", "thesis.docx", "data.parquet", "x.json"]
)
def test_a_folder_of_other_things_is_refused_by_name(name, tmp_path):
    text = refused(check_run_folder, fill(tmp_path, name, "notes.txt"))
    assert (
        f"output_dir '{tmp_path}' holds other things, such as '{name.split('/')[0]}'; allowed: an em" in text
    )
    text = refused(check_evaluation_folder, tmp_path, False)
    assert text.endswith("or --overwrite, which replaces none of them")
    check_evaluation_folder(tmp_path, True)


@pytest.mark.parametrize("name", ["log.jsonl", "samples/a.png", "unet/mine", "training.png"])
def test_a_file_that_a_run_would_replace(name, tmp_path):
    text = refused(check_run_folder, fill(tmp_path, name))
    assert f"holds '{name.split('/')[0]}', which hf_ddpm did not write; allowed: another folder" in text


def test_an_evaluation_that_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "evaluation.json")
    assert "did not write" in refused(check_evaluation_folder, tmp_path, True)
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "evaluation.json").symlink_to("/dev/zero")
    assert "did not write" in refused(check_evaluation_folder, tmp_path, True)


@pytest.mark.parametrize("name", ["nearest.png", "evaluation.json", "bits-per-step.png"])
def test_a_file_that_an_evaluation_would_replace(name, tmp_path):
    fill(tmp_path, name)
    for overwrite in (False, True):
        assert f"holds '{name}', which hf_ddpm did not" in refused(
            check_evaluation_folder, tmp_path, overwrite
        )
    fill(tmp_path, ".parts-0123456789abcdef/")  # an evaluation that was killed while it drew
    check_evaluation_folder(tmp_path, False)


@pytest.mark.parametrize("report", ["[]", "{}", '"bits"', "3", "[" * 100_000, "\x00"])
def test_an_evaluation_of_something_else(report, tmp_path):
    (tmp_path / "evaluation.json").write_text(report)
    assert "did not write" in refused(check_evaluation_folder, tmp_path, True)
    (tmp_path / "evaluation.json").write_text(json.dumps({"bits_per_dim": {}}))
    check_evaluation_folder(fill(tmp_path, "a.jpg"), False)


def test_a_refused_folder_is_as_it_was(tmp_path):
    def no(folder):
        raise ValueError("no")

    for folder in (tmp_path / "new" / "deep", fill(tmp_path / "old", "a.jpg")):
        with pytest.raises(ValueError, match=r"^no$"), output_folder(folder, "out", no, PartialState()):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "a.jpg"]


def test_the_option_is_named(tmp_path):
    with output_folder(tmp_path, "out", lambda folder: None, PartialState()):
        text = refused(output_folder(tmp_path, "output_dir", check_run_folder, PartialState()).__enter__)
    assert text.startswith(f"output_dir '{tmp_path}' is in use by process ")
    assert text.endswith("; allowed: another folder, or later")
    text = refused(
        output_folder(tmp_path / "a" / ("b" * 300), "out", check_run_folder, PartialState()).__enter__
    )
    assert "can't be written: File name too long" in text and not (tmp_path / "a").exists()

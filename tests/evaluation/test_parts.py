"""parts.py: a part is there whole or not at all, and only the same work finds it again."""

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import hf_ddpm.evaluation.parts
from hf_ddpm.evaluation.parts import Parts


def part(number):
    return {"x": torch.full((number + 1, 2), float(number)), "row": torch.arange(number + 1)}


def test_parts_come_back_in_their_order(tmp_path):
    parts = Parts(tmp_path / "new" / "folder", {"seed": 1})
    for number in (2, 0, 1):
        assert number not in parts
        parts.save(number, part(number))
        assert number in parts
    found = parts.load(3)
    assert found["row"].tolist() == [0, 0, 1, 0, 1, 2] and found["row"].dtype == torch.int64
    assert found["x"][:, 0].tolist() == [0, 1, 1, 2, 2, 2]
    assert Parts(tmp_path / "new" / "folder", {"seed": 1}).load(2)["row"].tolist() == [0, 0, 1]


def test_strided_tensors_are_saved(tmp_path):
    parts = Parts(tmp_path, {})
    columns = torch.arange(6).view(2, 3).T
    parts.save(0, {"all": columns, "piece": columns[:, :1]})
    assert torch.equal(parts.load(1)["all"], columns) and torch.equal(parts.load(1)["piece"], columns[:, :1])


def test_only_the_same_settings_find_them(tmp_path):
    settings = {"seed": 1, "exact": False, "steps": None, "name": "a"}
    Parts(tmp_path, settings).save(0, part(0))
    assert 0 in Parts(tmp_path, dict(reversed(settings.items())))
    for change in ({"seed": 2}, {"exact": True}, {"steps": 1}, {"name": "b"}, {"more": 0}):
        assert 0 not in Parts(tmp_path, settings | change), change
    assert 0 not in Parts(tmp_path / "else", settings)


def test_a_part_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    parts, save = Parts(tmp_path, {}), hf_ddpm.evaluation.parts.save_file

    def broken(tensors, path):
        save(tensors, path)
        assert 0 not in parts
        path.write_bytes(path.read_bytes()[:20])
        raise error

    monkeypatch.setattr(hf_ddpm.parts, "save_file", broken)
    error = SafetensorError("No space left on device")
    with pytest.raises(OSError, match=r"^can't write '.*00000\.\d+\.tmp': No space left on device$"):
        parts.save(0, part(0))
    assert 0 not in parts and not list(tmp_path.rglob("*.tmp"))
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        parts.save(0, part(0))
    assert 0 not in parts
    monkeypatch.undo()
    parts.save(0, part(0))
    assert 0 in parts and not list(tmp_path.rglob("*.tmp"))  # what the killed one left is written over


def test_two_processes_do_not_write_the_same_file(tmp_path, monkeypatch):
    seen, replace = [], os.replace
    monkeypatch.setattr(
        hf_ddpm.evaluation.parts.os, "replace", lambda a, b: (seen.append(a.name), replace(a, b))
    )
    parts = Parts(tmp_path, {})
    for process in (11, 12):
        monkeypatch.setattr(hf_ddpm.evaluation.parts.os, "getpid", lambda process=process: process)
        parts.save(0, part(0))
    assert len(set(seen)) == 2


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_missing_or_damaged_part_is_named(damage, tmp_path):
    parts = Parts(tmp_path, {})
    for number in range(3):
        parts.save(number, part(number))
    (file,) = tmp_path.rglob("00001.safetensors")
    file.write_bytes({"cut": file.read_bytes()[:-1], "empty": b"", "missing": b""}[damage])
    if damage == "missing":
        file.unlink()
    with pytest.raises(RuntimeError) as error:
        parts.load(3)
    assert str(error.value).startswith(f"{file} is missing or damaged (") and "\n" not in str(error.value)


def test_clear_takes_all_parts_and_nothing_else(tmp_path):
    for seed in (1, 2):
        Parts(tmp_path, {"seed": seed}).save(0, part(0))
    Parts(tmp_path / "below", {}).save(0, part(0))
    (tmp_path / "evaluation.json").write_text("{}")
    Parts.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "evaluation.json"]
    (kept,) = tmp_path.rglob("*.safetensors")
    assert load_file(kept)["row"].tolist() == [0]
    Parts.clear(tmp_path / "nowhere")

"""parts.py: a part is there whole or not at all, and only the same work finds it again."""

import dataclasses

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hf_ddpm.runtime.disk
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.parts import Parts, pieces


def parts(folder, config=None, facts=None):
    return Parts(folder, config or EvaluationConfig(), facts or {})


def part(number):
    return {"x": torch.full((number + 1, 2), float(number)), "row": torch.arange(number + 1)}


def test_parts_come_back_in_their_order(tmp_path):
    made = parts(tmp_path / "new" / "folder")
    for number in (2, 0, 1):
        assert number not in made
        made.save(number, part(number))
        assert number in made
    found = made.load(3)
    assert found["row"].tolist() == [0, 0, 1, 0, 1, 2] and found["row"].dtype == torch.int64
    assert found["x"][:, 0].tolist() == [0, 1, 1, 2, 2, 2]
    assert parts(tmp_path / "new" / "folder").load(2)["row"].tolist() == [0, 0, 1]


def test_strided_tensors_are_saved(tmp_path):
    made = parts(tmp_path)
    columns = torch.arange(6).view(2, 3).T
    made.save(0, {"all": columns, "piece": columns[:, :1]})
    found = made.load(1)
    assert torch.equal(found["all"], columns) and torch.equal(found["piece"], columns[:, :1])


def test_only_the_same_facts_find_them(tmp_path):
    facts = {"weights": "ab", "steps": None, "rows": [1, 2]}
    parts(tmp_path, facts=facts).save(0, part(0))
    assert 0 in parts(tmp_path, facts=dict(reversed(facts.items())))
    for change in ({"weights": "cd"}, {"steps": 1}, {"rows": [2, 1]}, {"more": 0}):
        assert 0 not in parts(tmp_path, facts=facts | change), change
    assert 0 not in parts(tmp_path / "else", facts=facts)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EvaluationConfig)])
def test_every_option_is_in_the_key_or_an_exception(name, tmp_path):
    """Also an option that doesn't exist yet: whoever adds it and can't reuse parts has nothing to do."""
    parts(tmp_path).save(0, part(0))
    changed = EvaluationConfig()
    # past its checks, so that one value serves every option
    object.__setattr__(changed, name, "another")
    exceptions = {"model", "out", "overwrite", "compare_with", "reference"}
    assert (0 in parts(tmp_path, changed)) == (name in exceptions)


def test_only_missing_parts_are_made(tmp_path):
    asked = []

    def work(numbers):
        asked.append(list(numbers))
        yield from map(part, numbers)
        asked.append("at its end")

    parts(tmp_path).save(1, part(1))
    found = parts(tmp_path).complete(4, work)
    assert found["row"].tolist() == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]
    again = parts(tmp_path).complete(4, work)
    assert torch.equal(again["x"], found["x"])
    assert asked == [[0, 2, 3], "at its end", [], "at its end"]


def test_parts_that_were_made_before_a_failure_are_kept(tmp_path):
    closed = []

    def fails(numbers):
        try:
            yield part(0)
            raise ValueError("bad image")
        finally:
            closed.append(numbers)

    with pytest.raises(ValueError, match="bad image"):
        parts(tmp_path).complete(3, fails)
    assert [number in parts(tmp_path) for number in range(3)] == [True, False, False] and len(closed) == 1


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (6, 3), (7, 3), (7, 1), (7, 100)])
def test_pieces(count, size):
    found = pieces(count, size)
    assert [number for piece in found for number in piece] == list(range(count))
    assert [len(piece) for piece in found[:-1]] == [size] * (len(found) - 1) and all(map(len, found))


def test_a_part_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    made, save = parts(tmp_path), hf_ddpm.runtime.disk.save_file

    def broken(tensors, path, metadata):
        save(tensors, path)
        assert 0 not in made
        path.write_bytes(path.read_bytes()[:20])
        raise error

    monkeypatch.setattr(hf_ddpm.runtime.disk, "save_file", broken)
    error = SafetensorError("No space left on device")
    with pytest.raises(OSError, match=r"^can't write '.*00000\.safetensors': No space left on device$"):
        made.save(0, part(0))
    assert 0 not in made and not list(tmp_path.rglob("*.tmp"))
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        made.save(0, part(0))
    assert 0 not in made and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    made.save(0, part(0))
    assert 0 in made


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "of another number", "no sum"])
def test_a_missing_or_damaged_part_is_named_and_made_anew(damage, tmp_path, caplog):
    made = parts(tmp_path)
    for number in range(3):
        made.save(number, part(number))
    (file,) = tmp_path.rglob("00001.safetensors")
    file.write_bytes({"cut": file.read_bytes()[:-1]}.get(damage, b""))
    if damage == "missing":
        file.unlink()
    elif damage == "of another number":
        file.write_bytes(file.with_name("00002.safetensors").read_bytes())
    elif damage == "no sum":
        save_file(part(1), file)
    with pytest.raises(RuntimeError) as error:
        made.load(3)
    words = "is another part, '2 of " if damage == "of another number" else "is missing or damaged: "
    assert str(error.value).startswith(f"'{file}' {words}") and "\n" not in str(error.value)
    asked = []

    def work(numbers):
        asked.extend(numbers)
        yield from map(part, numbers)

    assert parts(tmp_path).complete(3, work)["row"].tolist() == [0, 0, 1, 0, 1, 2] and asked == [1]
    assert (f"'{file}' {words}" in caplog.text) == (damage != "missing")


def test_any_flipped_bit_of_a_part_is_noticed_or_changes_nothing(tmp_path):
    """Of its length, its header, its padding, its sum, and its numbers."""
    made = parts(tmp_path)
    made.save(0, part(1))
    (file,) = tmp_path.rglob("00000.safetensors")
    whole, harmless = file.read_bytes(), 0
    # Every third one, so that each place of a byte is met
    for bit in range(0, 8 * len(whole), 3):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        if 0 in made:
            harmless += 1
            found = made.load(1)
            assert all(torch.equal(found[name], tensor) for name, tensor in part(1).items()), bit
    assert harmless < 10


def test_clear_takes_all_parts_and_nothing_else(tmp_path):
    for seed in (1, 2):
        parts(tmp_path, EvaluationConfig(seed=seed)).save(0, part(0))
    parts(tmp_path / "below").save(0, part(0))
    (tmp_path / "evaluation.json").write_text("{}")
    Parts.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "evaluation.json"]
    (kept,) = tmp_path.rglob("*.safetensors")
    assert load_file(kept)["row"].tolist() == [0]
    Parts.clear(tmp_path / "nowhere")

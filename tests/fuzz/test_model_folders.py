"""Model folders with one thing changed draw, or are refused in one line, in little time and memory."""

import random
import sys

import pytest

from tests.fuzz.folders import REFUSED, attack, files, tensors, values

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
]


def test_a_few_changes(tiny_folder, tmp_path):
    chosen = random.Random(0)
    changes = chosen.sample([*values(tiny_folder)], 60) + chosen.sample([*files(), *tensors()], 30)
    assert attack(tiny_folder, changes, tmp_path) == []


def test_a_guard_that_looks_at_nothing_is_found(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ddpm.generation.portable.check_folder", lambda *given: None)
    changes = [
        change for change in values(tiny_folder) if change[2] == REFUSED and ": norm_eps: " in change[0]
    ]
    assert "unet/config.json: norm_eps: NaN: it was loaded" in attack(tiny_folder, changes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_change(part, tiny_folder, tmp_path):
    changes = [*values(tiny_folder), *files(), *tensors()][part::8]
    assert attack(tiny_folder, changes, tmp_path) == []

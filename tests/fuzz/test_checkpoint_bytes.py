"""A run's files are damaged, and the run goes on to the weights that it would have had, or is refused.

It goes on from the older checkpoint where the newer is damaged. Where the sums of a checkpoint have been made
right again, its content is an attacker's, and only the way in which the run ends is looked at.
"""

import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm import train
from tests.fuzz.attack import attack_call
from tests.fuzz.data_folders import damaged
from tests.training.helpers import Conv, again, checkpoint
from tests.training.test_checkpoint import sealed

pytestmark = [
    pytest.mark.usefixtures("no_hub"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
]
STEPS = 5  # where the run ends that goes on
# What another run's files, an editor or a power cut put in the place of a file
CONTENTS = [
    b"",
    bytes(1000),
    b"{}",
    b"[]",
    b"null",
    b"[" * 100_000,
    b"\x80\x04\x95\xff",
    b"9" * 5000,
    b"\xff\xfe",
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of four steps, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(again(folder), Conv())
    return folder


@pytest.fixture(scope="module")
def goal(begun, tmp_path_factory):
    """The weights of the run that was not damaged."""
    folder = shutil.copytree(begun, tmp_path_factory.mktemp("goal") / "run")
    train(again(folder, max_steps=STEPS), Conv())
    return load_file(checkpoint(folder, STEPS) / "model.safetensors")


def break_file(draw, file):
    """Change a file, or put something else in its place; a word for what was done."""
    kind = draw.choice(["bytes"] * 6 + ["content", "content", "gone", "pipe", "folder", "zeros", "other"])
    data = file.read_bytes()
    if kind == "other":
        others = [path for path in file.parent.parent.glob("*/*") if path.is_file() and path != file]
        same = [path for path in others if path.name == file.name]
        shutil.copyfile(draw.choice(sorted(same or others)), file)
        return kind
    file.unlink()
    if kind == "bytes":
        file.write_bytes(damaged(draw, data))
    elif kind == "content":
        file.write_bytes(draw.choice(CONTENTS))
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "zeros":
        file.symlink_to("/dev/zero")
    return kind


def attempt(scratch, begun, goal, seed):
    """Damage one to three files of a run, go on, and say what was wrong, if anything."""
    draw = random.Random(seed)
    folder = shutil.copytree(begun, scratch / "run")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    inside = [path for path in files if "checkpoints" in path.parts]
    done, seal = [], draw.random() < 0.3
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        file = draw.choice(inside if draw.random() < 0.8 else files)
        if file.is_file() and not file.is_symlink():
            done.append(f"{file.relative_to(folder)}: {break_file(draw, file)}")
    if seal:
        for place in {path.parent for path in inside}:
            if all(path.is_file() and not path.is_symlink() for path in place.iterdir()):
                sealed(place)
    config = again(folder, max_steps=STEPS)
    outcome = attack_call(lambda: train(config, Conv()) and None, scratch, seconds=60)
    # A run that can't write one of its pictures fails, with code 1, when all else is saved
    found = outcome.faults({0, 1, 2} if "can't write" in outcome.err else {0, 2})
    end = checkpoint(folder, STEPS) / "model.safetensors"
    if outcome.code == 0 and not seal and not same(end, goal):
        found.append("other weights")
    shutil.rmtree(folder)
    return [(seed, seal, done, found, outcome.err[-600:])] if found else []


def same(file: Path, goal) -> bool:
    """Whether a file holds these weights, to the last bit."""
    weights = load_file(file)
    return weights.keys() == goal.keys() and all(torch.equal(weights[name], goal[name]) for name in goal)


def test_some_runs(begun, goal, tmp_path):
    assert [fault for seed in range(4) for fault in attempt(tmp_path, begun, goal, seed)] == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 9))
def test_many_runs(begun, goal, part, tmp_path):
    seeds = range(part * 1000, part * 1000 + 100)
    assert [fault for seed in seeds for fault in attempt(tmp_path, begun, goal, seed)] == []

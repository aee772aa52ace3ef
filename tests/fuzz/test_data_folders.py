"""Data folders that nobody means are read, or refused in one short line, in little time and memory.

A picture that is whole is read as it was written, whatever lies beside it. A failure prints the seed that
made it: `attempt(tmp_path, seed)` does it again.
"""

import os
import random
import shutil
import sys
from collections import Counter

import pytest
import torch

from hf_ddpm import load_stream
from tests.fuzz.attack import LONGEST_LINE, attack_call
from tests.fuzz.data_folders import HEIGHT, WIDTH, write_folder

pytestmark = [
    pytest.mark.usefixtures("no_hub"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
]


def read(folder, whole, **options):
    """Read every picture; whole ones must be among them where damaged ones are passed over."""
    stream = load_stream(folder, **options)
    images = list(stream.images())
    assert all(image.dtype == torch.uint8 and image.shape == stream.shape for image in images)
    assert len(images) + stream.skipped == stream.num_rows()
    if options.get("skip_corrupt"):
        found = Counter(image.numpy().tobytes() for image in images)
        lost = Counter(pixels.transpose(2, 0, 1).tobytes() for pixels in whole) - found
        assert not lost, f"{lost.total()} of {len(whole)} whole pictures were not read"


def attempt(scratch, seed):
    """Read a folder in two ways; what was wrong, if anything."""
    draw, folder = random.Random(seed), scratch / "folder"
    whole = write_folder(draw, folder)
    odd = {
        "fit": draw.choice(["exact", "resize", "resize_crop", "random_crop"]),
        "channels": draw.choice([None, 1, 2, 3, 4]),
        "skip_corrupt": draw.random() < 0.5,
        "shuffle_memory": draw.choice([0, 1]),
    }
    odd["image_size"] = draw.choice([(HEIGHT, WIDTH), None]) if odd["fit"] == "exact" else 8

    def both():
        try:
            read(folder, whole, image_size=(HEIGHT, WIDTH), channels=3, skip_corrupt=True)
        except ValueError as error:
            assert len(str(error)) <= LONGEST_LINE and "\n" not in str(error), error
        read(folder, [], **odd)

    outcome = attack_call(both, scratch, seconds=20)
    shutil.rmtree(os.fsencode(folder))
    faults = outcome.faults()
    return [(seed, odd, faults, outcome.err[-600:])] if faults else []


def test_some_folders(tmp_path):
    assert [fault for seed in range(20) for fault in attempt(tmp_path, seed)] == []


def test_a_file_that_the_disk_cannot_read_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to("/proc/self/mem")
    outcome = attack_call(lambda: read(tmp_path, []), tmp_path)
    assert outcome.faults({1}) == [] and f"Input/output error: '{tmp_path}/a.png'" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 9))
def test_many_folders(tmp_path, part):
    seeds = range(part * 1000, part * 1000 + 500)
    assert [fault for seed in seeds for fault in attempt(tmp_path, seed)] == []

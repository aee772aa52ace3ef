"""sweep.json: what follows from made-up numbers, and files that are damaged, foreign or lie."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from hf_ddpm.folders.layout import SWEEP
from hf_ddpm.folders.sweep import (
    choose,
    describe_sweep,
    read_sweep,
    recommendation,
    sweep_of,
    sweep_words,
    with_error,
)
from hf_ddpm.metrics import FrechetDistance
from tests.folders.sweeps import cell, distance, sweep


def chosen(*cells):
    fast, best = choose(cells)
    return cells.index(fast), cells.index(best)


# The recommendation


def test_made_up_errors():
    assert distance(2.5, 0.25).stderr == pytest.approx(0.25, rel=1e-12)
    value, error = distance(2.5, 0.3, 1).minus(distance(2.0, 0.4, 2))
    assert value == pytest.approx(0.5) and error == pytest.approx(0.5)  # independent: √(0.3² + 0.4²)
    assert distance(2.5, 0.3, 1).minus(distance(2.0, 0.3, 1))[1] == pytest.approx(0, abs=1e-9)


def test_the_fewest_evaluations_within_the_error_of_the_best():
    few, many = cell("unipc", 10, 2.5, 0.3, 1), cell("ddpm", 250, 2.1, 0.4, 2)
    assert chosen(few, many) == (0, 1)  # 0.4 apart, with an error of 0.5
    assert chosen(few, cell("ddpm", 250, 1.9, 0.4, 2)) == (1, 1)  # 0.6 apart
    # Each error is as large as the difference, but the two are errors of the same images
    assert chosen(few, cell("ddpm", 250, 2.1, 0.3, 1)) == (1, 1)
    # Nothing beside it has as few evaluations
    assert chosen(many, few, cell("ddim", 20, 2.2, 0.1, 3)) == (1, 0)
    assert chosen(cell("ddim", 5, 9.0, 0.5, 3), few, many) == (1, 2)


def test_ties():
    a, b = cell("ddim", 10, 2.5, 0.3, 1), cell("unipc", 10, 2.4, 0.3, 2)
    assert chosen(a, b) == (1, 1) and chosen(b, a) == (0, 0)  # of equal evaluations the lower one
    a, b = cell("ddim", 20, 2.5, 0.3, 1), cell("unipc", 10, 2.5, 0.3, 1)
    assert chosen(a, b) == (1, 1)  # of equal distances the one of fewer evaluations
    assert chosen(a) == (0, 0)
    heun = cell("heun", 19, 2.0, 0.5, 1, steps=10)
    assert chosen(heun, cell("ddim", 15, 2.1, 0.5, 2)) == (1, 0)  # evaluations count, not steps
    exact = cell("unipc", 10, 2.0, 0.0)
    assert chosen(exact, cell("ddpm", 50, 2.0, 0.0)) == (0, 0)


def test_not_finite():
    good = cell("ddpm", 250, 9.0, 1.0)
    for bad in (math.nan, math.inf):
        assert chosen(cell("unipc", 5, bad, 0.1), good) == (1, 1)
        with pytest.raises(ValueError, match="no sampler has a distance that is finite"):
            choose([cell("unipc", 5, bad, 0.1)])
    odd = cell("unipc", 5, 9.0, 1.0)
    odd = dataclasses.replace(odd, distance=FrechetDistance(9.5, odd.distance.left_out * math.nan, 8))
    assert chosen(odd, good) == (1, 1)  # an error that is not known does not make it near


def test_unequal_numbers_are_never_compared():
    other = FrechetDistance(1.0, torch.zeros(8, dtype=torch.float64), 9)
    with pytest.raises(ValueError, match=r"[89] and [89] samples are not compared"):
        choose([cell("ddim", 5, 9.0, 1.0), dataclasses.replace(cell("unipc", 5, 1.0, 0.1), distance=other)])


def test_words_of_the_recommendation():
    few, many = cell("unipc", 10, 2.5, 0.3, 1), cell("ddpm", 250, 2.1, 0.4, 2)
    poor = cell("ddim", 5, 9.0, 0.5, 3)
    assert recommendation(sweep(poor, few, many)) == (
        "Take unipc, 10 steps: FD 2.50 ± 0.30, 10 network evaluations an image. The lowest is ddpm, 250 "
        "steps: 2.10 ± 0.40; the difference, 0.4 ± 0.5, is within its error. The lowest has the most "
        "evaluations: with more steps it may be lower still."
    )
    words = recommendation(sweep(few, poor))
    assert words.startswith("Take unipc, 10 steps: FD 2.50 ± 0.30, 10 network evaluations an image; no other")
    assert recommendation(sweep(few, cell("ddim", 20, 7.0, 0.2))).endswith("; no other is lower.")
    assert recommendation(sweep(few, many)).endswith(
        "All differences are within their errors: more samples would tell more."
    )
    assert recommendation(sweep(few)).endswith("; no other is lower.")


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (2.5431, 0.312, "2.54 ± 0.31"),
        (25.43, 3.12, "25.4 ± 3.1"),
        (254.3, 31.2, "254 ± 31"),
        (0.54321, 0.01234, "0.543 ± 0.012"),
        (2.5, 0.0, "2.50 ± 0.00"),
        (1e-9, 1e-9, "0.000000 ± 0.000000"),
    ],
)
def test_digits(value, error, words):
    assert with_error(distance(value, error)) == words


def test_the_table():
    heun = cell("heun", 19, 3.0, 0.2, 3, steps=10)
    found = sweep(cell("unipc", 10, 2.5, 0.25, 1), heun, cell("ddpm", 250, 2.5, 0.25, 2))
    lines = describe_sweep(found).splitlines()
    assert lines[0] == "FD (toy@12345678) of 8 samples each, ± its standard error"
    assert lines[2].split() == ["sampler", "steps", "evaluations", "s/image", "FD"]
    assert lines[3].split() == "unipc 10 10 0.1 2.50 ± 0.25 <- fast, best".split()
    assert lines[4].split() == "heun 10 19 0.19 3.00 ± 0.20".split()
    assert "as many real images (digits, test): 0.50 ± 0.10" in lines
    words = sweep_words(found, lambda name: f"the {name}")
    assert words["columns"] == ["10 steps", "250 steps"]
    assert words["rows"] == [
        ["`unipc`", "**2.50 ± 0.25**", "–"],
        ["`heun`", "3.00 ± 0.20 (19 evaluations)", "–"],
        ["`ddpm`", "–", "2.50 ± 0.25"],
    ]
    assert words["dataset"] == "the digits" and words["floor"] == "0.50 ± 0.10"


# The file


def test_written_and_read_again(tmp_path):
    found = sweep(cell("unipc", 10, 2.543219876543, 0.3, 1), cell("ddpm", 250, 1 / 3, 0.4, 2))
    (tmp_path / SWEEP).write_text(found.text(), encoding="utf-8")
    report, again = json.loads(found.text()), read_sweep(tmp_path)
    assert again.of == found.of and again.text() == found.text()
    assert [one.name for one in again.cells] == ["unipc, 10 steps", "ddpm, 250 steps"]
    assert again.cells[0].distance.value == found.cells[0].distance.value
    assert report["fast"] == report["best"] == {"sampler": "ddpm", "steps": 250}
    assert report["recommendation"] == recommendation(found)
    # A list of numbers is one line
    assert sum("left_out" in line and "]" in line for line in found.text().splitlines()) == 3


def set_at(report, value, *place):
    for key in place[:-1]:
        report = report[key]
    report[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("cells",), [], "has 0 cells; allowed: 1 to 1000"),
        (("cells",), {}, "cells is {}; allowed: a list"),
        (("cells", 0), 7, r"cells\[0\] is 7; allowed: keys and values"),
        (("cells", 0, "sampler"), None, r"cells\[0\].sampler is None; allowed: text"),
        (("cells", 0, "steps"), 0, r"cells\[0\].steps is 0; allowed: >= 1"),
        (("cells", 0, "steps"), True, r"cells\[0\].steps is True; allowed: a whole number"),
        (("cells", 0, "evaluations"), -4, r"evaluations is -4; allowed: >= 1"),
        (("cells", 0, "seconds_per_image"), -1.0, "seconds_per_image is below 0"),
        (("cells", 0, "value"), "2.5", r"cells\[0\].value is '2.5'; allowed: a number"),
        (("cells", 0, "value"), math.nan, r"cells\[0\].value is nan; allowed: a number"),
        (("cells", 0, "value"), -math.inf, r"cells\[0\] holds numbers that are not finite"),
        (("cells", 0, "stderr"), 0.01, r"cells\[0\].stderr is not that of its left_out"),
        (("cells", 0, "left_out"), [1.0], "left_out has 1 numbers"),
        (("cells", 0, "left_out"), [1.0, "x"], r"left_out is \[1.0, 'x'\]; allowed: a list of numbers"),
        (("cells", 0, "left_out"), [2.5] * 9, "left_out has 9 numbers"),
        (("floor", "left_out"), [], "left_out has 0 numbers"),
        (("of", "num_samples"), 2, "num_samples is 2"),
        (("of", "weights"), 5, "of.weights is 5; allowed: text"),
        (("of", "rounded"), "x", "of.rounded is 'x'; allowed: a list of text"),
        (("of", "scheduler"), [], r"of.scheduler is \[\]; allowed: keys and values"),
        (("of", "seed"), -1, "of.seed is -1; allowed: a whole number >= 0"),
        (("data", "dataset"), None, "data.dataset is None; allowed: text"),
        (("passed_over",), [{"sampler": "x"}], r"has no passed_over\[0\].steps"),
        (("label",), None, "label is None; allowed: text"),
    ],
    ids=lambda value: None if not isinstance(value, tuple) else ".".join(map(str, value)),
)
def test_foreign_numbers(place, value, said):
    report = json.loads(sweep().text())
    set_at(report, value, *place)
    with pytest.raises(ValueError, match=said) as error:
        sweep_of(report)
    assert len(str(error.value)) <= 300 and SWEEP in str(error.value)


def test_lacks_and_repeats():
    whole = json.loads(sweep().text())
    for key in ("label", "of", "data", "floor", "cells", "passed_over"):
        report = {name: value for name, value in whole.items() if name != key}
        with pytest.raises(ValueError, match=f"has no {key}"):
            sweep_of(report)
    twice = copy.deepcopy(whole)
    twice["cells"].append(twice["cells"][0])
    with pytest.raises(ValueError, match="a sampler with equal steps twice"):
        sweep_of(twice)
    uneven = copy.deepcopy(whole)
    uneven["floor"] = {"value": 1.0, "stderr": 0.0, "left_out": [1.0, 1.0]}
    with pytest.raises(ValueError, match="left_out has several lengths"):
        sweep_of(uneven)


def test_what_the_file_recommends_is_not_believed():
    report = json.loads(sweep().text()) | {"fast": {"sampler": "evil", "steps": 1}, "recommendation": "evil"}
    found = sweep_of(report)
    assert "evil" not in found.text() and choose(found.cells)[0].sampler == "unipc"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"cells": 1}', b"{" * 50], ids=str)
def test_no_sweep_at_all(content, tmp_path):
    (tmp_path / SWEEP).write_bytes(content)
    with pytest.raises(ValueError, match=SWEEP):
        read_sweep(tmp_path)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no file named"):
        read_sweep(tmp_path)
    (tmp_path / SWEEP).mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_sweep(tmp_path)

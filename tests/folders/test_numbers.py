"""numbers.py: evaluations and logs of strangers are refused in one line, or read where they make sense."""

import copy
import json
import os
from pathlib import Path

import pytest

from hf_ddpm.folders.numbers import (
    card_words,
    check_report,
    describe,
    hub_results,
    last_numbers,
    training_words,
)

SHIPPED = Path(__file__).parents[2] / "model_cards" / "fashion-mnist-28"


@pytest.fixture
def report():
    return json.loads((SHIPPED / "evaluation.json").read_text())


def test_the_shipped_evaluation_passes(report):
    check_report(report)


@pytest.mark.parametrize("value", ["x", None, [], {}, True, float("nan"), 10**400], ids=repr)
@pytest.mark.parametrize(
    "path",
    [
        ("bits_per_dim", "bpd", "value"),
        ("other_variance", "rate_bpd", "value"),
        ("method", "steps"),
        ("data", "num_images"),
        ("memorisation", "samples", "share_near"),
    ],
    ids=".".join,
)
def test_a_value_of_another_type_is_named(path, value, report):
    changed = copy.deepcopy(report)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=rf"^evaluation\.json: {'.'.join(path)} is .*; allowed: a ") as error:
        check_report(changed)
    assert len(str(error.value)) < 200


def test_metrics_of_samples_are_numbers_beside_those_of_real_images(report):
    for key in ("samples", "floor"):
        changed = copy.deepcopy(report)
        label = next(iter(changed["sample_metrics"][key]))
        changed["sample_metrics"][key][label] = [1]
        with pytest.raises(ValueError, match=r"is \[1\]; allowed: a number"):
            check_report(changed)
    del report["sample_metrics"]["floor"][label]
    with pytest.raises(ValueError, match="has other labels in samples than in floor"):
        check_report(report)


def test_bits_of_another_decoder_are_labelled_wherever_they_are_told(report):
    def told(report):
        bits = card_words(report, str)["bits"]
        results = [one.metric_name for one in hub_results(report, str) or []]
        return bits["columns"], bits["method"], results, describe(report).splitlines()

    columns, method, results, lines = told(report)
    assert columns[0] == "variance `fixed_large`" and "exact discretised decoder." in method
    assert not any("decoder" in line for line in (*results, *lines))
    report["method"]["decoder"] = "levels"
    report["few_steps"] = {"timesteps": [14, 500], "last_step": 14, "errors": None}
    columns, method, results, lines = told(report)
    assert columns[0] == "variance `fixed_large`, decoder `levels`"
    assert "a decoder that starts at step 14 and knows how often the training images" in method
    assert "(fixed_large, decoder levels, ± 0.017)" in results[0]
    assert "bits/dim (fixed_large, decoder levels): rate" in lines[0]
    assert any("its decoder starts at step 14" in line for line in lines)


@pytest.mark.parametrize("few", ["x", 7, [1], {"last_step": "14"}], ids=repr)
def test_a_strangers_chain_is_refused(few, report):
    report["few_steps"] = few
    with pytest.raises(ValueError, match=r"^evaluation\.json: few_steps(\.last_step)? is .*; allowed: "):
        check_report(report)


def test_odd_lines_of_a_log_are_left_out(tmp_path):
    lines = ['{"step": 3, "images": 12, "loss": 0.5}', "[1]", "7", "null", "{", "[" * 100_000]
    lines += [
        '{"images": "x", "loss": [1], "heldout_bpd": NaN}',
        '{"images": 13}',
        '{"step": 4, "seconds": true}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    found = last_numbers(tmp_path / "log.jsonl")
    assert found == {"step": 3, "images": 12, "loss": 0.5}
    assert training_words(found)["loss"] == "0.5000"


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=r"log\.jsonl is a pipe; allowed: a regular file"):
        last_numbers(tmp_path / "log.jsonl")
    assert last_numbers(tmp_path / "none.jsonl") is None

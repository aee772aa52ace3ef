"""An objective that is handed to `train` instead of being named by the config."""

import json
from functools import partial

import pytest

from hf_ddpm import TrainConfig, train
from hf_ddpm.objectives import Objective, make_objective, min_snr_loss
from hf_ddpm.training.checkpoint import load_checkpoint
from tests.training.helpers import Conv, assert_same, checkpoint, kill_at, log, refused, small, weights


def min_snr(gamma: float = 2.0) -> Objective:
    return Objective(partial(min_snr_loss, prediction_type="epsilon", gamma=gamma), noises=1, outputs=1)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A run whose objective the config names."""
    folder = tmp_path_factory.mktemp("named")
    train(small(folder, objective="min-snr", snr_gamma=2.0), Conv())
    return folder


def test_an_objective_trains_as_the_named_one(named, tmp_path, caplog):
    train(small(tmp_path), Conv(), objective=min_snr())
    assert log(tmp_path) == log(named)
    assert_same(weights(tmp_path, 3), weights(named, 3))
    assert "the objective is min_snr_loss; train_config.json" in caplog.text


def test_a_name_is_the_configs(named, tmp_path):
    train(small(tmp_path), Conv(), objective="min-snr")
    assert TrainConfig.load(tmp_path / "train_config.json").objective == "min-snr"
    assert log(tmp_path) != log(named)  # of another gamma, the default
    assert "objective is 'min-sn'" in refused(small(tmp_path), Conv(), objective="min-sn")


def test_a_run_goes_on_with_the_same_objective_only(named, tmp_path):
    config = small(tmp_path, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, Conv(), objective=min_snr(), after_step=kill_at(2))
    assert load_checkpoint(checkpoint(tmp_path, 1)).state["own_objective"] == "min_snr_loss"
    words = "the run began with min_snr_loss; allowed: the same, or another output_dir"
    assert words in refused(config, Conv())
    other = make_objective("simple")
    assert "the objective is simple_loss, the run began with" in refused(config, Conv(), objective=other)
    assert train(config, Conv(), objective=min_snr()).step == 3
    assert log(tmp_path) == log(named)


def doubled(loss, *args):
    return 2 * loss(*args)


def test_a_function_is_not_named_by_what_it_is_given(tmp_path):
    inner = partial(min_snr_loss, prediction_type="epsilon")
    train(small(tmp_path, max_steps=1), Conv(), objective=partial(doubled, inner))
    assert load_checkpoint(checkpoint(tmp_path, 1)).state["own_objective"] == "doubled"


def test_a_run_of_the_configs_objective_does_not_go_on_with_another(tmp_path):
    train(small(tmp_path), Conv())
    assert "own_objective" not in json.loads((checkpoint(tmp_path, 3) / "state.json").read_text())
    text = refused(small(tmp_path, max_steps=4), Conv(), objective=min_snr())
    assert text.startswith("the objective is min_snr_loss, the run began with the one of the config; ")


def test_an_objective_that_does_not_fit_the_variance_is_refused(tmp_path):
    learned = small(tmp_path, objective="bound", variance_type="learned_range")
    assert "learned_range" in refused(learned, objective=min_snr())
    hybrid = make_objective("hybrid", variance_type="learned_range")
    assert "fixed_large" in refused(small(tmp_path), objective=hybrid)
    assert train(learned, objective=hybrid).step == 3


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (3, "objective is of type int"),
        (Objective, "objective is of type type"),
        (None.__class__, "of type type"),
    ],
)
def test_what_is_no_objective_is_refused_before_anything_is_said_of_it(tmp_path, caplog, objective, words):
    assert words in refused(small(tmp_path), Conv(), objective=objective)
    assert "train_config.json" not in caplog.text

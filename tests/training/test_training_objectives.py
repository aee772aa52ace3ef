"""Objectives and importance-sampled steps in real runs, against algorithm 1 written out (helpers.py)."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Image

from hf_ddpm import DDPMPipeline, DDPMScheduler, train
from hf_ddpm.objectives import (
    bound_loss,
    hybrid_loss,
    make_objective,
    min_snr_loss,
    score_matching_loss,
    sddpm_loss,
)
from hf_ddpm.training.checkpoint import load_checkpoint
from hf_ddpm.training.draws import draw_uniform
from hf_ddpm.training.importance import LossSecondMoment
from tests.training.helpers import (
    assert_same,
    by_hand,
    checkpoint,
    kill_at,
    log,
    refused,
    small,
    weights,
)


def png(seed: int) -> bytes:
    """A grey image of noise, encoded."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


OBJECTIVE_RUNS = {
    "bound": {"objective": "bound"},
    "bound of a learned variance": {"objective": "bound", "variance_type": "learned_range"},
    "hybrid": {"objective": "hybrid", "variance_type": "learned_range", "hybrid_weight": 0.01},
    "min-snr": {"objective": "min-snr", "prediction_type": "v_prediction", "snr_gamma": 2.0},
    "score-matching": {"objective": "score-matching", "prediction_type": "score"},
    "sddpm": {"objective": "sddpm", "prediction_type": "mean", "variance_type": "fixed_small"},
}


@pytest.mark.parametrize("name", OBJECTIVE_RUNS)
def test_objectives_get_what_they_need(tmp_path, name):
    config = small(tmp_path, max_steps=2, **OBJECTIVE_RUNS[name])
    train(config)
    process = DDPMScheduler().process
    how = (config.prediction_type, config.variance_type)
    loss = {
        "bound": lambda m, x, t, e, more: bound_loss(process, m, x, t, e, *how),
        "hybrid": lambda m, x, t, e, more: hybrid_loss(process, m, x, t, e, how[0], 0.01),
        "min-snr": lambda m, x, t, e, more: min_snr_loss(process, m, x, t, e, how[0], 2.0),
        "score-matching": lambda m, x, t, e, more: score_matching_loss(process, m, x, t, e, *how),
        "sddpm": lambda m, x, t, e, more: sddpm_loss(process, m, x, t, e, more, *how),
    }[config.objective]
    losses, model, *_ = by_hand(config, loss=loss, outputs=2 if "learned" in how[1] else 1)
    np.testing.assert_allclose(log(tmp_path), np.array(losses).mean(1), rtol=1e-5)
    torch.testing.assert_close(weights(tmp_path, 2), dict(model.state_dict()), rtol=1e-4, atol=1e-6)
    saved = DDPMPipeline.from_pretrained(tmp_path).scheduler.config
    assert (saved["prediction_type"], saved["variance_type"]) == how


IMPORTANCE = {
    **{"objective": "bound", "t_sampler": "importance", "num_train_timesteps": 4, "batch_size": 16},
    **{"beta_schedule": "constant", "beta_start": 0.6},
}


def test_importance_sampled_steps(tmp_path, monkeypatch):
    seen, weigh = [], LossSecondMoment.weights
    monkeypatch.setattr(
        LossSecondMoment, "weights", lambda self, t: seen.append(self.probabilities) or weigh(self, t)
    )
    train(small(tmp_path, max_steps=8, gradient_accumulation_steps=2, **IMPORTANCE))
    assert len(seen) == 16 and all(torch.equal(*seen[i : i + 2]) for i in range(0, 16, 2))  # fixed in a step
    assert torch.equal(seen[0], torch.full((4,), 0.25).double()) and seen[-1].std() > 0.05
    state = load_checkpoint(checkpoint(tmp_path, 8)).optimizer["t_sampler"]
    assert state["counts"].sum() == 8 * 32


def test_importance_sampling_goes_on_to_the_same_result(tmp_path):
    train(small(tmp_path / "whole", max_steps=8, checkpoint_every=3, **IMPORTANCE))
    with pytest.raises(KeyboardInterrupt):
        config = small(tmp_path / "cut", max_steps=8, checkpoint_every=3, **IMPORTANCE)
        train(config, after_step=kill_at(5))
    train(small(tmp_path / "cut", max_steps=8, checkpoint_every=3, **IMPORTANCE))
    assert_same(weights(tmp_path / "cut", 8), weights(tmp_path / "whole", 8))
    states = (
        load_checkpoint(checkpoint(tmp_path / run, 8)).optimizer["t_sampler"] for run in ("cut", "whole")
    )
    assert_same(*states)


def test_quartiles_of_importance_sampled_steps_are_of_the_losses(tmp_path, monkeypatch):
    # T = 4: a quartile is a step, and its mean loss does not depend on how often it is drawn.
    noted, add = [], LossSecondMoment.add

    def noting(self, positions, t, losses):
        noted.append((t, losses))
        add(self, positions, t, losses)

    monkeypatch.setattr(LossSecondMoment, "add", noting)
    train(small(tmp_path, max_steps=6, **IMPORTANCE | {"batch_size": 64}))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for line, (t, losses) in zip(lines, noted, strict=True):
        for step in range(4):
            assert line[f"loss_quartile_{step + 1}"] == pytest.approx(
                losses[t == step].mean().item(), rel=1e-5
            )
    assert max(noted[-1][0].bincount()) > 24  # one step was drawn far more often than a quarter of the time


def test_images_that_cannot_be_read_are_no_losses(tmp_path):
    images = [{"bytes": b"broken" if i % 4 == 1 else png(i), "path": None} for i in range(16)]
    folder = tmp_path / "data"
    folder.mkdir()
    Dataset.from_dict({"image": images}).cast_column("image", Image(decode=False)).to_parquet(
        folder / "train.parquet"
    )
    train(small(tmp_path / "run", dataset=str(folder), skip_corrupt=True, max_steps=2, **IMPORTANCE))
    state = load_checkpoint(checkpoint(tmp_path / "run", 2)).optimizer["t_sampler"]
    assert state["counts"].sum() == 2 * 12


def test_one_image_at_the_dear_end_is_no_explosion(tmp_path):
    # L_0 counts T times: an image at t = 0 costs over a hundred times what answering zero costs in the mean.
    seed = next(seed for seed in range(10_000) if (draw_uniform(seed, range(6)) < 1 / 1000).any())
    train(small(tmp_path, objective="bound", batch_size=1, max_steps=6, seed=seed))
    assert max(log(tmp_path)) > 100 * make_objective("bound").cost_of_zero(DDPMScheduler().process).mean()


def test_a_run_that_costs_more_than_guessing_by_nature_is_no_explosion(tmp_path):
    # ⟨s²⟩ of the score's target is about 50 in the mean, 10,000 at t = 0; it is counted in such units.
    config = small(tmp_path, max_steps=8, prediction_type="score", max_loss=10.0, batch_size=32)
    train(config)
    assert max(log(tmp_path)) > 12
    words = refused(
        small(tmp_path / "low", max_steps=8, prediction_type="score", max_loss=1e-3), kind=RuntimeError
    )
    assert "above max_loss 0.001 times the " in words and "of guessing zero" in words

"""scheduler.py: its config says one process, wherever it goes; what contradicts that is refused."""

import copy
import json
import pickle
import re

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm.scheduler import NETWORK_KEYS, DDPMScheduler

HEUN = {"beta_start": 0.00085, "beta_end": 0.012}  # its defaults, which are not DDPM's


def heun_of(scheduler):
    return diffusers.HeunDiscreteScheduler.from_config(scheduler.config)


def made_in_every_way(tmp_path):
    yield DDPMScheduler()
    yield DDPMScheduler.from_config(diffusers.DDPMScheduler().config)
    yield DDPMScheduler.from_config(diffusers.DDIMScheduler().config)
    yield DDPMScheduler.from_config({})
    yield copy.deepcopy(DDPMScheduler())
    yield pickle.loads(pickle.dumps(DDPMScheduler()))
    for number, kind in enumerate((DDPMScheduler, diffusers.DDPMScheduler)):
        kind().save_pretrained(tmp_path / str(number))
        yield DDPMScheduler.from_pretrained(tmp_path / str(number))
    changed = DDPMScheduler()
    changed.variance_type = "fixed_large"
    yield changed
    yield DDPMScheduler.from_config(heun_of(DDPMScheduler()).config)  # another class and back


def test_no_key_is_noted_as_a_default_however_it_is_made(tmp_path):
    for ours in made_in_every_way(tmp_path):
        assert ours.config["_use_default_values"] == []
        assert torch.equal(ours.process.betas, DDPMScheduler().process.betas)
        np.testing.assert_allclose(
            heun_of(ours).alphas_cumprod, ours.process.alphas_cumprod, rtol=0, atol=1e-5
        )


def test_the_file_is_plain_diffusers(tmp_path):
    DDPMScheduler(beta_end=0.03).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert "_use_default_values" not in saved and saved["_class_name"] == "DDPMScheduler"
    plain = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    torch.testing.assert_close(plain.betas, torch.linspace(1e-4, 0.03, 1000))
    assert heun_of(plain).config.beta_end == 0.03


def test_defaults_of_another_class_are_what_it_ran():
    heun = diffusers.HeunDiscreteScheduler()
    assert {"beta_start", "beta_end"} <= set(heun.config["_use_default_values"])
    ours = DDPMScheduler.from_config(heun.config)
    assert {key: ours.config[key] for key in HEUN} == HEUN
    np.testing.assert_allclose(ours.process.alphas_cumprod, heun.alphas_cumprod, atol=1e-5)
    assert (
        ours.config.timestep_spacing == "leading"
    )  # what says no process is ours by default, as in diffusers
    assert DDPMScheduler.from_config(heun.config, beta_end=0.02).config.beta_end == 0.02


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace", "constant"])
def test_betas_that_most_samplers_have_no_word_for_go_along(schedule):
    ours = DDPMScheduler(beta_schedule=schedule, beta_start=0.01)
    for kind in (diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler, diffusers.DDPMScheduler):
        theirs = kind.from_config(ours.config)
        np.testing.assert_allclose(theirs.alphas_cumprod, ours.process.alphas_cumprod, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_start": 0.3},
        {"beta_start": 0.3, "num_train_timesteps": 7},
        {"num_train_timesteps": 7},
        {"beta_schedule": "linear", "beta_end": 0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("through_disk", [False, True])
def test_betas_that_we_wrote_follow_the_schedule(changes, through_disk, tmp_path):
    given = {"beta_schedule": "constant", "beta_start": 0.2, "num_train_timesteps": 50}
    config = DDPMScheduler(**given).config
    if through_disk:
        DDPMScheduler(**given).save_pretrained(tmp_path)
        config = DDPMScheduler.load_config(tmp_path)
    changed = DDPMScheduler.from_config(config, **changes)
    assert torch.equal(changed.process.betas, DDPMScheduler(**given | changes).process.betas)


def test_betas_of_somebody_are_not_overruled_without_a_word():
    config = DDPMScheduler(trained_betas=[0.1] * 50, num_train_timesteps=50).config
    for key, value in (("beta_start", 0.3), ("beta_end", 0.3), ("beta_schedule", "constant")):
        with pytest.raises(
            ValueError, match=f"the config's trained_betas overrule {key}; allowed: trained_betas"
        ):
            DDPMScheduler.from_config(config, **{key: value})
        fresh = DDPMScheduler.from_config(config, trained_betas=None, **{key: value})
        assert torch.equal(
            fresh.process.betas, DDPMScheduler(num_train_timesteps=50, **{key: value}).process.betas
        )
    assert DDPMScheduler.from_config(config, variance_type="fixed_large").process.betas.tolist() == [0.1] * 50


@pytest.mark.parametrize(
    "key", ["beta_start", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr"]
)
def test_a_process_does_not_change_under_its_tables(key):
    scheduler = DDPMScheduler()
    value = {"trained_betas": [0.1] * 1000, "rescale_betas_zero_snr": True}.get(key, 0.5)
    with pytest.raises(
        ValueError, match=f"{key} can't change once the scheduler is made; allowed: a new one"
    ):
        scheduler.register_to_config(**{key: value})
    scheduler.register_to_config(**{k: scheduler.config[k] for k in NETWORK_KEYS})  # the same
    scheduler.register_to_config(prediction_type="sample", clip_sample=False)
    assert scheduler.config.prediction_type == "sample"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"clip_sample": "false"}, "clip_sample is 'false'; allowed: True, False"),
        ({"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr is 'no'; allowed: True, False"),
        ({"clip_sample_range": -1}, "clip_sample_range is -1; allowed: numbers > 0"),
        ({"clip_sample_range": None}, "clip_sample_range is None"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 2}, "dynamic_thresholding_ratio is 2; allowed"),
        ({"thresholding": True, "sample_max_value": -1}, "sample_max_value is -1; allowed: numbers > 0"),
        ({"steps_offset": 0.5}, "steps_offset is 0.5; allowed: whole numbers"),
        ({"beta_start": "x"}, "beta_start is 'x'; allowed: numbers"),
        ({"beta_end": None}, "beta_end is None; allowed: numbers"),
        ({"trained_betas": 5}, "trained_betas has shape (); allowed: (T,)"),
        ({"trained_betas": "abc"}, "trained_betas is 'abc'; allowed: T numbers"),
        ({"trained_betas": [None] * 1000}, "trained_betas is a list; allowed: T numbers"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True; allowed: a whole number >= 1"),
    ],
    ids=str,
)
def test_values_that_say_nothing(config, words):
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=re.escape(words)):
        scheduler = DDPMScheduler(**config)
        scheduler.set_timesteps(10)
        scheduler.step(x, scheduler.timesteps[0], x)


def test_betas_in_an_array_that_runs_backwards():
    betas = np.linspace(0.2, 0.1, 7)[::-1]
    scheduler = DDPMScheduler(trained_betas=betas, num_train_timesteps=7)
    assert scheduler.process.betas.tolist() == betas.tolist()

"""Pushing to the Hub while the real trainer runs, against a Hub of the test's own."""

import pytest
from safetensors.torch import load_file
from torch import nn

from hf_ddpm import TrainConfig, train
from hf_ddpm.cli import run, train_command
from hf_ddpm.publishing.upload import PublishError
from tests.launching import flags

REPO = "tester/run"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def plan(folder, **changes) -> dict:
    values = {
        **{"dataset": "digits", "model": "tiny", "output_dir": str(folder), "max_steps": 5, "batch_size": 4},
        **{"sample_every": 0, "log_every": 1, "push_to_hub": REPO, "push_every": 2, "license": "mit"},
    }
    return values | changes


def commits(hub) -> int:
    return sum("/commit/" in request for request in hub.requests)


def test_a_run_is_on_the_hub_when_it_ends(tmp_path, local_hub):
    config = TrainConfig(**plan(tmp_path / "run", ema_decay="0.9,0.5"))
    assert train(config).step == 5
    files = local_hub.files(REPO)
    assert files[WEIGHTS] == (tmp_path / "run" / WEIGHTS).read_bytes()
    assert {"README.md", "model_index.json", "scheduler/scheduler_config.json", WEIGHTS} <= files.keys()
    assert not any(word in name for name in files for word in ("checkpoint", "optimizer", "log", "ema_"))
    assert b"license: mit" in files["README.md"]
    assert not (tmp_path / "run" / ".push").exists()
    before = commits(local_hub)
    train(config)  # nothing is left to do, and nothing new to push
    assert commits(local_hub) == before


def test_a_hub_that_says_no_stops_no_training(tmp_path, local_hub, capsys):
    local_hub.fail(r"/api/repos/create", times=100, status=401)
    with pytest.raises(SystemExit) as stop:
        run(train_command, flags(**plan(tmp_path / "run")), "hf-ddpm train")
    assert stop.value.code == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("hf-ddpm train: failed") and f"hf-ddpm publish {tmp_path / 'run'} {REPO}" in told
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    unet = load_file(tmp_path / "run" / WEIGHTS)
    ema = load_file(tmp_path / "run" / "checkpoints" / "step-00000005" / "ema_0.9999.safetensors")
    assert unet.keys() == ema.keys()


def test_what_passes_is_tried_again(tmp_path, local_hub):
    local_hub.fail(r"/commit/", times=1, status=500)
    train(TrainConfig(**plan(tmp_path / "run", max_steps=2)))
    assert WEIGHTS in local_hub.files(REPO)


def test_bad_requests_are_refused_before_a_step(tmp_path, local_hub):
    with pytest.raises(ValueError, match="a/b/c"):
        train(TrainConfig(**plan(tmp_path / "run", push_to_hub="a/b/c")))
    network = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="push_to_hub needs a diffusers network, this is Conv2d"):
        train(TrainConfig(**plan(tmp_path / "run")), network)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_failure_is_an_error_in_python_too(tmp_path, local_hub):
    local_hub.fail(r"/api/repos/create", times=100, status=403)
    with pytest.raises(PublishError, match="hf-ddpm publish"):
        train(TrainConfig(**plan(tmp_path / "run", max_steps=1)))

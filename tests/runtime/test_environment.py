"""environment.py: a variable of the launch that no library could read is named before one reads it."""

import os

import pytest

from hf_ddpm.runtime.environment import asked_of_accelerate, check_environment


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("WORLD_SIZE", "x", "a whole number >= 1"),
        ("WORLD_SIZE", "0", "a whole number >= 1"),
        ("WORLD_SIZE", "", "a whole number >= 1"),
        ("WORLD_SIZE", "２", "a whole number >= 1"),
        ("RANK", "-1", "a whole number >= 0"),
        ("LOCAL_RANK", "first", "a whole number >= 0, or -1"),
        ("MASTER_PORT", "abc", "a whole number in 0..65535"),
        ("MASTER_PORT", "70000", "a whole number in 0..65535"),
        ("OMP_NUM_THREADS", "many", "a whole number >= 1"),
        ("SLURM_STEP_NUM_TASKS", "2(x3)", "a whole number >= 1"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", "a whole number >= 1"),
        ("ACCELERATE_USE_CPU", "maybe", "1, true, yes, on"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "false"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "false"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "no, fp16, bf16"),
        ("ACCELERATE_TORCH_DEVICE", "gpu", "a device of torch, such as cpu, cuda or cuda:0"),
        ("CUDA_VISIBLE_DEVICES", "all", "numbers or names of GPUs with commas between"),
        ("HF_HOME", "/dev/null", "a folder"),
        ("HF_HOME", "/dev/null/x/y", "a folder"),
    ],
)
def test_refused(name, value, allowed, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        check_environment()
    text = str(error.value)
    assert text.startswith(f"the environment variable {name} is {value!r}")
    assert f"; allowed: {allowed}" in text and text.endswith(", or unset") and len(text) <= 280


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("CUDA_VISIBLE_DEVICES", value) for value in ("", "0", "0,1", "-1", "GPU-1a2b-3c", "MIG-1a/2/3")],
        *[("LOCAL_RANK", value) for value in ("0", "-1")],
        *[("ACCELERATE_TORCH_DEVICE", value) for value in ("cpu", "cuda", "cuda:11", "mps")],
        *[("ACCELERATE_USE_DEEPSPEED", value) for value in ("", "0", "False")],
        ("ACCELERATE_USE_CPU", "True"),
        ("HF_HOME", "/tmp"),
        ("HF_HOME", "/tmp/not/there/yet"),
        ("HF_HOME", "~/.cache/huggingface"),
        ("MASTER_PORT", "0"),
    ],
)
def test_allowed(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    check_environment()


def test_a_rank_that_the_world_has_not(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK is 2; allowed: below WORLD_SIZE, which is 2"):
        check_environment()


def test_what_the_environment_asks_for(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_"))]:
        monkeypatch.delenv(name)
    assert asked_of_accelerate() == "no variable of a launch is set"
    monkeypatch.setenv("FSDP_X", "y" * 999)
    monkeypatch.setenv("RANK", "0")
    said = asked_of_accelerate()
    assert said.startswith("FSDP_X='yyy") and said.endswith(", RANK='0'") and len(said) < 120

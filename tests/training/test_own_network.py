"""A module of one's own: trained, it samples, is measured, and is loaded again, whatever form it has."""

import copy
import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hf_ddpm
from hf_ddpm import DDPMPipeline, EvaluationConfig, evaluate, load_run, load_stream, train
from tests.launching import together
from tests.training.helpers import Conv, assert_same, kill_at, small, weights

SHORT = {"num_train_timesteps": 20, "beta_end": 0.4}
DIGITS = torch.cat([next(load_stream("digits", "test").batches(4))])


@dataclasses.dataclass
class Answer:
    sample: torch.Tensor


class Many(nn.Module):
    """A network with everything that modules have: tied weights, batch norm, buffers that are not saved."""

    def __init__(self, form="tensor", answers=1):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, answers, 1)
        self.register_buffer("scale", torch.tensor(1.0), persistent=False)
        self.form = form

    def forward(self, x_t, t):
        out = self.last(self.norm(self.first(x_t) + self.second(x_t))) * self.scale
        forms = {"tensor": out, "tuple": (out, None), "dict": {"sample": out}, "object": Answer(out)}
        return forms[self.form]


def refused(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a module of one's own with two decays; its folder, and what `train` returned."""
    folder = tmp_path_factory.mktemp("own") / "run"
    torch.manual_seed(0)
    return folder, train(small(folder, **SHORT, ema_decay="0.9,0.5"), Many())


def images(pipeline, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(3, generator, output_type="pt").images


def test_what_a_run_leaves(run):
    folder, result = run
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file())
    stem = "unet/diffusion_pytorch_model"
    assert files == [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"{stem}.ema_0_5.safetensors",
        f"{stem}.safetensors",
    ]
    assert not (folder / "model_index.json").exists()
    assert_same(load_file(folder / f"{stem}.safetensors"), weights(folder, 3, "ema_0.9"))
    assert_same(load_file(folder / f"{stem}.ema_0_5.safetensors"), weights(folder, 3, "ema_0.5"))
    config = json.loads((folder / "unet/config.json").read_text())
    assert config == {"_class_name": "Many", "in_channels": 1, "sample_size": [8, 8]}
    assert "Many(" not in repr(result)


def test_it_samples_and_is_measured(run):
    folder, result = run
    pipeline = load_run(folder, model=Many())
    assert isinstance(pipeline, DDPMPipeline) and not pipeline.unet.training
    assert pipeline.image_shape == (1, 8, 8) and len(pipeline.process) == 20
    assert_same(images(pipeline), images(result.pipeline))
    assert pipeline(2).images[0].size == (8, 8)
    bits = pipeline.bits_per_dim(DIGITS, num_evals_per_image=4).bpd
    assert bits == result.pipeline.bits_per_dim(DIGITS, num_evals_per_image=4).bpd and np.isfinite(bits)
    # The weights are the average's, and the caller's module keeps those of its last step
    assert_same(dict(pipeline.unet.state_dict()), weights(folder, 3, "ema_0.9"))
    assert_same(dict(result.network.state_dict()), weights(folder, 3))
    other = load_run(folder, model=Many(), ema_decay=0.5)
    assert_same(dict(other.unet.state_dict()), weights(folder, 3, "ema_0.5"))
    first = load_run(folder, model=Many(), ema_decay=0.9)
    assert_same(dict(first.unet.state_dict()), weights(folder, 3, "ema_0.9"))
    assert other.unet.second.weight is other.unet.first.weight


def test_evaluate(run, tmp_path, caplog):
    folder, _ = run
    options = {"split": "train", "part": "train", "num_images": 4, "num_evals_per_image": 4}
    config = EvaluationConfig(model=str(folder), dataset="digits", out=str(tmp_path), **options)
    report = evaluate(config, network=Many())
    assert "says whether digits is as it was" not in caplog.text  # as train_data.json says it
    assert np.isfinite(report["bits_per_dim"]["bpd"]["value"]) and (tmp_path / "evaluation.json").exists()
    again = evaluate(dataclasses.replace(config, overwrite=True), network=Many())
    assert again["bits_per_dim"] == report["bits_per_dim"]
    assert "load_run" in refused(lambda: evaluate(dataclasses.replace(config, overwrite=True)))


@pytest.mark.parametrize("form", ["tuple", "dict", "object"])
def test_forms_of_an_answer(form, run, tmp_path):
    torch.manual_seed(0)
    train(small(tmp_path, **SHORT, ema_decay="0.9,0.5"), Many(form))
    found = images(load_run(tmp_path, model=Many(form)))
    assert_same(found, images(load_run(run[0], model=Many())))


def test_learned_variances(tmp_path):
    how = {"objective": "hybrid", "variance_type": "learned_range"}
    result = train(small(tmp_path, **SHORT, **how), Many(answers=2))
    pipeline = load_run(tmp_path, model=Many(answers=2))
    assert pipeline.scheduler.variance_type == "learned_range"
    assert_same(images(pipeline), images(result.pipeline))
    assert np.isfinite(pipeline.bits_per_dim(DIGITS, num_evals_per_image=4).bpd)


def test_wrapped_half_and_double(run, tmp_path):
    folder, _ = run
    wanted = images(load_run(folder, model=Many()))
    compiled = torch.compile(Many(), backend="eager")
    pipeline = load_run(folder, model=compiled)  # pyright: ignore[reportArgumentType]
    assert type(pipeline.unet) is Many
    assert_same(images(pipeline), wanted)
    assert_same(images(load_run(folder, model=nn.DataParallel(Many()))), wanted)
    assert load_run(folder, model=Many().to(torch.bfloat16)).unet.last.weight.dtype == torch.bfloat16
    assert images(load_run(folder, model=Many().double())).shape == wanted.shape
    result = train(small(tmp_path, **SHORT), torch.compile(Many(), backend="eager"))  # pyright: ignore[reportArgumentType]
    assert_same(images(result.pipeline), images(load_run(tmp_path, model=Many())))


def test_a_run_that_was_killed_and_goes_on(run, tmp_path, caplog):
    plan = {**SHORT, "max_steps": 4, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path, **plan), Many(), after_step=kill_at(3))
    assert_same(dict(load_run(tmp_path, model=Many()).unet.state_dict()), weights(tmp_path, 2, "ema_0.9999"))
    # What version 0.1 left of such a run is a checkpoint alone
    shutil.rmtree(tmp_path / "unet")
    words = refused(lambda: load_run(tmp_path, model=Many()))
    assert words.endswith(
        "it has no weights but checkpoints: train(config, model=...), called as before, writes them"
    )
    with caplog.at_level(logging.WARNING):
        train(small(tmp_path, **plan), Many())
    assert f"hf_ddpm.load_run({str(tmp_path)!r}, model=...)  # a Many" in caplog.text
    whole = dict(load_run(tmp_path, model=Many()).unet.state_dict())
    assert_same(whole, weights(tmp_path, 4, "ema_0.9999"))
    shutil.rmtree(tmp_path / "unet")
    train(small(tmp_path, **plan), Many())
    assert_same(dict(load_run(tmp_path, model=Many()).unet.state_dict()), whole)


def trained_together(folder):
    """What each of two processes has of the run's pipeline: its weights, and those of `load_run`."""
    torch.manual_seed(0)
    result = train(small(folder, **SHORT), Many("dict"))
    own, loaded = result.pipeline.unet, load_run(folder, model=Many("dict")).unet
    return dict(own.state_dict()), dict(loaded.state_dict())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes(tmp_path):
    for own, loaded in together(tmp_path, trained_together, tmp_path / "run"):
        assert_same(own, loaded)
        assert_same(own, weights(tmp_path / "run", 3, "ema_0.9999"))


class Unsized(nn.Module):
    """A network whose layers get their sizes from the first images that it sees."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d(), nn.Conv2d(4, 1, 1))

    def forward(self, x_t, t):
        return self.layers(x_t)


def test_lazy_layers(tmp_path):
    words = refused(lambda: train(small(tmp_path / "run", **SHORT), Unsized()))
    assert words == (
        "the network's 'layers.0.weight' has no shape yet, as of a lazy layer; allowed: a network that was "
        "called once, model(x_t, t)"
    )
    assert not (tmp_path / "run").exists()
    model = Unsized()
    model(DIGITS.float(), torch.zeros(4))
    train(small(tmp_path / "run", **SHORT), model)
    found = images(load_run(tmp_path / "run", model=Unsized()))
    assert_same(found, images(load_run(tmp_path / "run", model=model)))
    words = refused(lambda: load_run(tmp_path / "run", model=nn.LazyConv2d(4, 3)))
    assert "'bias' is missing there, and of any shape in this LazyConv2d" in words


def test_runs_of_networks_of_diffusers(finished):
    pipeline = load_run(finished)
    assert_same(dict(pipeline.unet.state_dict()), weights(finished, 4, "ema_0.9999"))
    other = load_run(finished, model=hf_ddpm.create_model("tiny"))
    assert_same(images(other), images(pipeline))


def test_the_result_of_a_preset(tmp_path):
    result = train(small(tmp_path, **SHORT))
    assert result.network is None and result.pipeline is result.pipeline
    assert_same(dict(result.pipeline.unet.state_dict()), weights(tmp_path, 3, "ema_0.9999"))


def test_refused(run, finished, tmp_path):
    folder, _ = run
    assert "does not exist" in refused(lambda: load_run(tmp_path / "nowhere", model=Many()))
    assert "does not exist" in refused(lambda: load_run(tmp_path / "nowhere"))
    words = refused(lambda: load_run(Many(), folder))  # pyright: ignore[reportArgumentType]
    assert words == "folder is a Many; allowed: a run's folder; the order is load_run(folder, model)"
    assert "is a file" in refused(lambda: load_run(folder / "train_config.json", model=Many()))
    assert "register_network" in refused(lambda: hf_ddpm.publish(folder, "a/b"))
    words = refused(lambda: load_run(folder, model=Many))  # pyright: ignore[reportArgumentType]
    assert words == "model is the class Many; allowed: an nn.Module, made as the trained one was"
    words = refused(lambda: load_run(folder, model=Conv()))
    assert words.endswith("of another network: 'conv.bias' is missing there, and (1,) in this Conv")
    words = refused(lambda: load_run(folder, model=Many(answers=2)))
    assert words.endswith("of another network: 'last.bias' is (1,) there, and (2,) in this Many")
    assert "its network, 'Many', is your own" in refused(lambda: load_run(folder))
    owners = "is its owner's; allowed: hf_ddpm.load_run(folder, model=...)"
    assert owners in refused(lambda: DDPMPipeline.from_pretrained(folder))
    words = refused(lambda: load_run(folder, model=Many(), ema_decay=0.7))
    assert words.endswith("ema_decay is 0.7; allowed: 0.5, 0.9")
    assert "ema_decay is 0.7" in refused(lambda: load_run(finished, ema_decay=0.7))
    assert "it has no weights; allowed" in refused(lambda: load_run(tmp_path, model=Many()))
    assert "register_network" in refused(lambda: load_run(folder, model=Many()).save_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("unet/diffusion_pytorch_model.safetensors", b"no weights", "HeaderTooLarge|header"),
        ("unet/config.json", b"{}", "doesn't say the images' in_channels"),
        ("unet/config.json", b'{"in_channels": 1, "sample_size": [8, -8]}', "doesn't say the images'"),
        ("unet/config.json", b"[", "config.json"),
        ("scheduler/scheduler_config.json", b'{"num_train_timesteps": "x"}', "num_train_timesteps"),
    ],
)
def test_damaged_files(run, tmp_path, file, data, words):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(data)
    module = Many()
    before = copy.deepcopy(module.state_dict())
    found = refused(lambda: load_run(tmp_path / "run", model=module))
    assert any(word in found for word in words.split("|")) and found.startswith("run folder")
    assert_same(dict(module.state_dict()), dict(before))

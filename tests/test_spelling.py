"""Unknown keywords and names: one line that says which was meant, of the class that Python raises too."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch

import hf_ddpm
from hf_ddpm import DDPMPipeline, DDPMScheduler, DiffusionProcess, EvaluationConfig, TrainConfig
from hf_ddpm.spelling import TUTORIAL_NAMES, suggest_keywords
from tests.launching import ROOT

PROCESS = DiffusionProcess.linear(10)
IMAGES = torch.zeros(1, 1, 8, 8)


def line(call, kind=TypeError) -> str:
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    words = str(error.value)
    assert len(words) <= 300 and "\n" not in words
    return words


@pytest.fixture(scope="module")
def pipeline():
    return DDPMPipeline(hf_ddpm.create_model("tiny"), DDPMScheduler())


@pytest.mark.parametrize(
    ("call", "typed", "meant"),
    [
        (lambda **key: TrainConfig(**key), "datset", "dataset"),
        (lambda **key: dataclasses.replace(TrainConfig(), **key), "lerning_rate", "learning_rate"),
        (lambda **key: EvaluationConfig(**key), "num_image", "num_images"),
        (lambda **key: hf_ddpm.load_stream("digits", **key), "image_sise", "image_size"),
        (lambda **key: DDPMScheduler(**key), "beta_shedule", "beta_schedule"),
        (lambda **key: hf_ddpm.create_model("tiny", **key), "chanels", "channels"),
        (lambda **key: DDPMPipeline(None, **key), "sheduler", "scheduler"),
        (lambda **key: hf_ddpm.train(TrainConfig(), **key), "objectiv", "objective"),
        (lambda **key: hf_ddpm.evaluate(EvaluationConfig(), **key), "comand", "command"),
        (lambda **key: hf_ddpm.publish("a", "b", **key), "privat", "private"),
        (lambda **key: hf_ddpm.simple_loss(PROCESS, None, IMAGES, **key), "nois", "noise"),  # pyright: ignore
        (lambda **key: DiffusionProcess.linear(**key), "beta_strt", "beta_start"),
        (lambda **key: DiffusionProcess.cosine(**key), "num_timesteps", "num_train_timesteps"),
        (lambda **key: PROCESS.q_sample(IMAGES, **key), "nois", "noise"),
        (lambda **key: PROCESS.q_sample_prev(IMAGES, **key), "nois", "noise"),
        (lambda **key: PROCESS.q_step(IMAGES, **key), "nois", "noise"),
        (lambda **key: PROCESS.p_sample(IMAGES, 0, IMAGES, **key), "varianse_type", "variance_type"),
    ],
)
def test_keywords(call, typed, meant):
    assert f"has no keyword {typed!r} (did you mean {meant!r}?)" in line(lambda: call(**{typed: 1}))


@pytest.mark.parametrize(
    ("name", "typed", "meant"),
    [
        ("__call__", "num_inference_step", "num_inference_steps"),
        ("denoise", "num_inference_step", "num_inference_steps"),
        ("bits_per_dim", "num_evals", "num_evals_per_image"),
    ],
)
def test_keywords_of_a_pipeline(pipeline, name, typed, meant):
    words = line(lambda: getattr(pipeline, name)(**{typed: 1}))
    assert words == f"DDPMPipeline.{name}() has no keyword {typed!r} (did you mean {meant!r}?)"


def test_keywords_that_are_like_no_other():
    words = line(lambda: hf_ddpm.create_model("tiny", zzz=1))  # pyright: ignore[reportCallIssue]
    allowed = "preset, image_size, channels, out_channels, dropout, num_classes"
    assert words == f"create_model() has no keyword 'zzz'; allowed: {allowed}"
    assert line(lambda: TrainConfig(**{"z" * 5000: 1})).endswith(", ...")


def test_what_is_decorated_stays_what_it_is():
    assert TrainConfig.__name__ == "TrainConfig" and dataclasses.is_dataclass(TrainConfig)
    assert list(inspect.signature(TrainConfig).parameters)[:2] == ["dataset", "split"]
    assert pickle.loads(pickle.dumps(TrainConfig(seed=3))) == TrainConfig(seed=3)
    assert pickle.loads(pickle.dumps(hf_ddpm.train)) is hf_ddpm.train
    assert copy.deepcopy(DDPMScheduler()).config == DDPMScheduler().config
    assert "a missing" not in line(lambda: hf_ddpm.create_model())  # pyright: ignore[reportCallIssue]

    @suggest_keywords
    def one(first, /, second=2, *, third=3):
        """Its words."""
        return first, second, third

    assert one(1, third=5) == (1, 2, 5) and one.__doc__ == "Its words."
    assert "allowed: second, third" in line(lambda: one(1, first=1))  # pyright: ignore[reportCallIssue]


def test_names_of_the_package():
    for name, meant in (
        ("DDPMPipelin", "DDPMPipeline"),
        ("likelyhood", "likelihood"),
        ("evalute", "evaluate"),
    ):
        words = line(lambda name=name: getattr(hf_ddpm, name), AttributeError)
        assert words == f"module 'hf_ddpm' has no attribute {name!r} (did you mean {meant!r}?)"
        words = line(lambda name=name: exec(f"from hf_ddpm import {name}"), ImportError)
        assert words == f"cannot import name {name!r} from 'hf_ddpm' (did you mean {meant!r}?)"
    assert not hasattr(hf_ddpm, "likelyhood")
    assert "did you mean 'cifar10'" in line(lambda: hf_ddpm.create_model("cifra10"), ValueError)


@pytest.mark.parametrize("name", TUTORIAL_NAMES)
def test_names_of_the_tutorials(name):
    here = TUTORIAL_NAMES[name].partition("(")[0]
    found = hf_ddpm
    for part in here.split("."):
        found = getattr(found, part)
    assert callable(found)
    assert f"`{name}" in (ROOT / "docs/paper-to-code.md").read_text()
    words = line(lambda: getattr(hf_ddpm, name), AttributeError)
    assert words == f"module 'hf_ddpm' has no attribute {name!r} (here: hf_ddpm.{TUTORIAL_NAMES[name]})"
    with pytest.raises(ImportError, match=rf"here: hf_ddpm\.{here}"):
        exec(f"from hf_ddpm import {name}")
    if not hasattr(DiffusionProcess, name):
        assert f"(here: hf_ddpm.{here}" in line(lambda: getattr(PROCESS, name), AttributeError)


def test_what_a_process_lacks():
    words = line(lambda: PROCESS.p_sampel, AttributeError)  # pyright: ignore[reportAttributeAccessIssue]
    assert words == "'DiffusionProcess' object has no attribute 'p_sampel'"
    assert not hasattr(PROCESS, "__deepcopy__")
    for copied in (copy.deepcopy(PROCESS), pickle.loads(pickle.dumps(PROCESS))):
        assert torch.equal(copied.alphas_cumprod, PROCESS.alphas_cumprod)
    words = "t is missing; allowed: q_sample(x_0, t=t), or q_sample(x_0, noise, t)"
    assert line(lambda: PROCESS.q_sample(IMAGES), ValueError) == words


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (
            lambda: PROCESS.p_sample(min, IMAGES, 5, 5),  # the order of the tutorials
            "DiffusionProcess.p_sample(): too many positional arguments; the call is p_sample(x_t, t, model)"
            ", and all else by name",
        ),
        (lambda: PROCESS.p_sample(IMAGES, 5), "'model'; the call is p_sample(x_t, t, model), and"),
        (lambda: PROCESS.q_sample(IMAGES, 5, noise=IMAGES), "the call is q_sample(x_0, noise, t), and all"),
        (lambda: hf_ddpm.simple_loss(min, IMAGES), "'x_0'; the call is simple_loss(process, model, x_0, t, "),
        (lambda: hf_ddpm.create_model("tiny", 8), "the call is create_model(preset), and all else by name"),
        (lambda: TrainConfig(*range(99)), "image_column, label_column, label_dropout, ...)"),
    ],
)
def test_calls_in_another_order(call, wanted):
    assert wanted in line(call)


def test_the_error_of_a_callers_own_function_stays():
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        PROCESS.p_sample(IMAGES, 5, lambda x: x)

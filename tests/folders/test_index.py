"""index.py: who can run a folder, network classes, layouts of plain diffusers, code that is not run."""

import copy
import json
import pickle
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.models import NETWORKS, register_network
from hf_ddpm.parametrization import from_x0_eps
from hf_ddpm.scheduler import DDPMScheduler
from tests.folders.files import INDEX, REPO, SCHEDULER, UNET, WEIGHTS, edit, publish_as_it_is, read, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")


def short(**changes):
    return DDPMScheduler(**{"num_train_timesteps": 20, "beta_end": 0.5, **changes})


def draw(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(2, generator, output_type="np", num_inference_steps=10, **options).images


def saved(pipeline, folder):
    pipeline.save_pretrained(folder)
    return {part: entry for part, entry in read(folder / INDEX).items() if part in ("unet", "scheduler")}


class TinyNet(ModelMixin, ConfigMixin):
    """A network class that no diffusers has."""

    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 1, out_channels: int = 1, width: int = 3):
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 1)
        self.last = nn.Conv2d(width, out_channels, 1)

    def forward(self, x_t, t):
        return self.last(self.first(x_t).tanh())


@pytest.fixture
def registered():
    register_network(TinyNet)
    yield TinyNet
    del NETWORKS["TinyNet"]


# Who can run it

PLAIN, OURS = "diffusers", "hf_ddpm"


@pytest.mark.parametrize(
    ("scheduler", "out_channels", "sampler", "unet_entry", "scheduler_entry"),
    [
        ({}, 1, None, [PLAIN, "UNet2DModel"], [PLAIN, "DDPMScheduler"]),
        ({"variance_type": "fixed_large"}, 1, "ddim", [PLAIN, "UNet2DModel"], [PLAIN, "DDIMScheduler"]),
        ({"variance_type": "learned_range"}, 2, None, [PLAIN, "UNet2DModel"], [PLAIN, "DDPMScheduler"]),
        ({"variance_type": "learned_range"}, 2, "ddim", [OURS, "UNet2DModel"], [PLAIN, "DDIMScheduler"]),
        ({"variance_type": "learned"}, 2, None, [OURS, "UNet2DModel"], [OURS, "DDPMScheduler"]),
        ({"variance_type": "fixed_large_log"}, 1, None, [PLAIN, "UNet2DModel"], [OURS, "DDPMScheduler"]),
        ({"prediction_type": "mean"}, 1, None, [PLAIN, "UNet2DModel"], [OURS, "DDPMScheduler"]),
        ({"prediction_type": "score"}, 1, None, [PLAIN, "UNet2DModel"], [OURS, "DDPMScheduler"]),
    ],
)
def test_what_plain_diffusers_cannot_run_it_refuses(
    scheduler, out_channels, sampler, unet_entry, scheduler_entry, tmp_path
):
    pipeline = DDPMPipeline(tiny(out_channels=out_channels), short(**scheduler))
    if sampler is not None:
        swap_scheduler(pipeline, sampler)
    assert saved(pipeline, tmp_path) == {"unet": unet_entry, "scheduler": scheduler_entry}
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is diffusers.UNet2DModel and type(again.scheduler) is type(pipeline.scheduler)
    np.testing.assert_array_equal(draw(again), draw(pipeline))
    for plain in (
        diffusers.DDPMPipeline,
        DiffusionPipeline,
    ):  # hf_ddpm is imported here, and it is all the same
        if OURS in (unet_entry[0], scheduler_entry[0]):
            with pytest.raises(ValueError, match="hf_ddpm"):
                plain.from_pretrained(tmp_path)
        else:
            plain.from_pretrained(tmp_path)


def test_a_variance_type_set_later_counts(tmp_path):
    pipeline = DDPMPipeline(tiny(), short())
    pipeline.scheduler.variance_type = "learned"
    assert saved(pipeline, tmp_path)["scheduler"] == [OURS, "DDPMScheduler"]
    pipeline.scheduler.variance_type = "fixed_large"
    assert saved(pipeline, tmp_path)["scheduler"] == [PLAIN, "DDPMScheduler"]


@pytest.mark.parametrize(
    ("config", "library"),
    [({}, PLAIN), ({"variance_type": "learned"}, OURS), ({"prediction_type": "score"}, OURS)],
)
@pytest.mark.parametrize("how", ["as it is", "pickled", "copied"])
def test_our_scheduler_in_a_plain_pipeline_says_the_same(config, library, how, tmp_path):
    scheduler = short(**config)
    copies = {"pickled": pickle.dumps, "copied": copy.deepcopy}
    if how in copies:
        scheduler = copies[how](scheduler)
        scheduler = pickle.loads(scheduler) if how == "pickled" else scheduler
    assert type(scheduler) is DDPMScheduler and type(scheduler).__module__ == "hf_ddpm.scheduler"
    diffusers.DDPMPipeline(tiny(), scheduler).save_pretrained(tmp_path)
    assert read(tmp_path / INDEX)["scheduler"] == [library, "DDPMScheduler"]
    again = DDPMPipeline.from_pretrained(tmp_path).scheduler
    assert {key: again.config[key] for key in config} == config
    if library == OURS:
        with pytest.raises(ValueError, match="hf_ddpm"):
            diffusers.DDPMPipeline.from_pretrained(tmp_path)


class Late(DDPMScheduler):
    """Somebody's own scheduler: no other class can stand in for it."""


def test_a_class_derived_from_our_scheduler_is_not_passed_off_as_diffusers(tmp_path):
    entry = saved(DDPMPipeline(tiny(), Late(20)), tmp_path)["scheduler"]
    assert entry == [__name__, "Late"]
    with pytest.raises(ValueError, match=r"scheduler in model_index.json is .*'Late'\], which is not known"):
        DDPMPipeline.from_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path, scheduler=Late.from_pretrained(tmp_path / "scheduler"))
    assert type(again.scheduler) is Late


@pytest.mark.parametrize("kind", ["mean", "score"])
def test_predictions_without_a_word_in_diffusers_step_as_epsilon_does(kind):
    x_0, eps = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64) * 2 - 1
    plain, ours = short(), short(prediction_type=kind)
    for t in (19, 7, 1):
        steps = torch.full((3,), t)
        x_t = plain.add_noise(x_0, eps, steps)
        output = from_x0_eps(plain.process, kind, x_0, eps, steps)
        expected = plain.step(eps, t, x_t, torch.Generator().manual_seed(0))
        found = ours.step(output, t, x_t, torch.Generator().manual_seed(0))
        torch.testing.assert_close(found.prev_sample, expected.prev_sample)
        torch.testing.assert_close(found.pred_original_sample, expected.pred_original_sample)


# Network classes


@pytest.mark.parametrize("from_hub", [False, True])
def test_a_network_class_that_is_registered_loads(registered, from_hub, tmp_path, local_hub):
    pipeline = DDPMPipeline(TinyNet(), short())
    assert saved(pipeline, tmp_path)["unet"] == [OURS, "TinyNet"]
    publish_as_it_is(local_hub, tmp_path)
    again = DDPMPipeline.from_pretrained(REPO if from_hub else tmp_path)
    assert type(again.unet) is TinyNet
    np.testing.assert_array_equal(draw(again), draw(pipeline))
    with pytest.raises(ValueError, match="hf_ddpm"):
        diffusers.DDPMPipeline.from_pretrained(tmp_path)


def test_a_network_that_a_plain_pipeline_saved_loads(registered, tmp_path):
    diffusers.DDPMPipeline(TinyNet(), short()).save_pretrained(tmp_path)
    assert read(tmp_path / INDEX)["unet"] == [__name__, "TinyNet"]
    assert type(DDPMPipeline.from_pretrained(tmp_path).unet) is TinyNet


def test_a_network_class_that_is_not_registered(tmp_path):
    saved(DDPMPipeline(TinyNet(), short()), tmp_path)
    words = r"unet in model_index.json is \['hf_ddpm', 'TinyNet'\], which is not known here; allowed: "
    with pytest.raises(
        ValueError,
        match=words + "UNet2DModel, .*, a class after register_network, or unet= at loading",
    ):
        DDPMPipeline.from_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path, unet=TinyNet.from_pretrained(tmp_path / "unet"))
    assert type(again.unet) is TinyNet and again.scheduler.config.num_train_timesteps == 20


def test_what_can_be_registered(registered):
    assert register_network(TinyNet) is TinyNet  # again is fine
    namesake = type("UNet2DModel", (ModelMixin, ConfigMixin), {})
    with pytest.raises(ValueError, match="network 'UNet2DModel' is known already; allowed: another name"):
        register_network(namesake)
    for other in (nn.Linear, DDPMScheduler, "TinyNet", None):
        with pytest.raises(ValueError, match="allowed: a class that is a ModelMixin and a ConfigMixin"):
            register_network(other)


# Layouts that plain diffusers wrote


def cifar_layout(folder, flat):
    """What google/ddpm-cifar10-32 holds: old keys and names, a pickle, and maybe all at the root."""
    stock = diffusers.DDPMScheduler(20, beta_end=0.5, variance_type="fixed_large")
    diffusers.DDPMPipeline(tiny(channels=3), stock).save_pretrained(folder)
    edit(folder / INDEX, _diffusers_version="0.1.1")
    old = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "variance_type")
    config = {key: value for key, value in read(folder / SCHEDULER).items() if key in (*old, "clip_sample")}
    (folder / SCHEDULER).write_text(json.dumps(config | {"_class_name": "DDPMScheduler"}))
    new = {key for key, value in read(folder / UNET).items() if value is None} - {"attention_head_dim"}
    unet = {key: value for key, value in read(folder / UNET).items() if key not in new}
    (folder / UNET).write_text(json.dumps(unet | {"_diffusers_version": "0.0.4"}))
    weights = load_file(folder / WEIGHTS)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in names.items():  # of attention, as they were then
        weights = {key.replace(new, name): weight for key, weight in weights.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    if flat:
        for file in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
            file.rename(folder / file.name)
        (folder / "unet").rmdir(), (folder / "scheduler").rmdir()
    return stock


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("from_hub", [False, True])
def test_a_repository_of_plain_diffusers(flat, from_hub, tmp_path, local_hub):
    stock = cifar_layout(tmp_path / "model", flat)
    publish_as_it_is(local_hub, tmp_path / "model")
    pipeline = DDPMPipeline.from_pretrained(REPO if from_hub else tmp_path / "model")
    assert type(pipeline.scheduler) is DDPMScheduler
    assert pipeline.scheduler.config.variance_type == "fixed_large"
    np.testing.assert_allclose(
        draw(pipeline), draw(diffusers.DDPMPipeline(tiny(channels=3), stock)), atol=2e-4
    )
    assert not any(".bin" in line for line in local_hub.requests)
    pipeline.push_to_hub("tester/again")
    assert set(local_hub.files("tester/again")) == {"README.md", INDEX, SCHEDULER, UNET, WEIGHTS}
    assert draw(DDPMPipeline.from_pretrained("tester/again")).shape == (2, 8, 8, 3)


def test_variants_load_from_a_folder_and_from_the_hub(run_folder, local_hub):
    publish_as_it_is(local_hub, run_folder)
    main = DDPMPipeline.from_pretrained(run_folder)
    other = [DDPMPipeline.from_pretrained(where, variant="ema_0_9") for where in (run_folder, REPO)]
    np.testing.assert_array_equal(draw(other[0]), draw(other[1]))
    assert (draw(other[0]) != draw(main)).any()
    asked = [line for line in local_hub.requests if line.startswith("GET") and "safetensors" in line]
    assert len(asked) == 1 and "ema_0_9" in asked[0]


# Code


def test_code_runs_only_for_those_who_ask_for_it(tiny_folder, tmp_path, local_hub):
    mark = tmp_path / "code-ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nfrom hf_ddpm import DDPMPipeline\n"
    harmless, pipeline, component = (tmp_path / name for name in ("harmless", "pipeline", "component"))
    for folder in (harmless, pipeline, component):
        shutil.copytree(tiny_folder, folder)
        (folder / "pipeline.py").write_text(code)
        (folder / "unet" / "net.py").write_text(code + "from diffusers import UNet2DModel as Net\n")
    edit(pipeline / INDEX, _class_name=["pipeline", "DDPMPipeline"])
    edit(component / INDEX, unet=["net", "Net"])
    for folder in (harmless, pipeline, component):
        publish_as_it_is(local_hub, folder, f"tester/{folder.name}")
    for where in (harmless, "tester/harmless"):
        DDPMPipeline.from_pretrained(where)
    for where in (pipeline, "tester/pipeline"):
        with pytest.raises(ValueError, match=r"_class_name in model_index.json is .*; allowed: the name of"):
            DDPMPipeline.from_pretrained(where)
    for where in (component, "tester/component"):
        with pytest.raises(
            ValueError, match=r"unet in model_index.json is \['net', 'Net'\], which is not known here"
        ):
            DDPMPipeline.from_pretrained(where)
    assert not mark.exists() and not any(".py" in line for line in local_hub.requests)


def test_the_custom_pipeline_gives_ours_where_diffusers_is_told_to_trust_it(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "pipeline.py").write_text("from hf_ddpm import DDPMPipeline\n")
    for loader in (DiffusionPipeline, DDPMPipeline):
        pipeline = loader.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
        assert isinstance(pipeline, DDPMPipeline) and type(pipeline.scheduler) is DDPMScheduler


def test_a_parts_own_code_runs_where_it_is_trusted(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "unet" / "net.py").write_text(
        "from diffusers import UNet2DModel\nclass Net(UNet2DModel): ...\n"
    )
    edit(folder / INDEX, unet=["net", "Net"])
    with pytest.raises(ValueError, match="which is not known here"):
        DDPMPipeline.from_pretrained(folder)
    assert type(DDPMPipeline.from_pretrained(folder, trust_remote_code=True).unet).__name__ == "Net"

"""loading.py, guard.py, portable.py: who can run a folder, old layouts, and folders from strangers."""

import copy
import json
import pickle
import re
import shutil
import struct
import zlib
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.stream import load_stream
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.folders.guard import make_empty
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.models import NETWORKS, create_model, register_network
from hf_ddpm.parametrization import from_x0_eps
from hf_ddpm.runtime.messages import redact
from hf_ddpm.scheduler import DDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")

INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
REPO = "tester/model"
TOKEN = "hf_" + "a1B2c3D4" * 4


def short(**changes):
    return DDPMScheduler(**{"num_train_timesteps": 20, "beta_end": 0.5, **changes})


def tiny(**changes):
    torch.manual_seed(0)
    return create_model("tiny", **changes).eval()


def draw(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(2, generator, output_type="np", num_inference_steps=10, **options).images


def saved(pipeline, folder):
    pipeline.save_pretrained(folder)
    return {part: entry for part, entry in read(folder / INDEX).items() if part in ("unet", "scheduler")}


def read(file):
    return json.loads(file.read_text())


def edit(file, **changes):
    file.write_text(json.dumps(read(file) | changes))


def publish_as_it_is(hub, folder, repo_id=REPO):
    """What `hf upload` of the folder would do: nothing is checked on the way."""
    hub.put(
        repo_id, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    )


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
        ValueError, match=words + ".* after hf_ddpm.models.register_network, or unet= at loading"
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


# Folders from strangers: from disk and from the Hub, refused in one line


class Mark:
    """Unpickling this leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def renamed_pickle(folder, mark):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Mark(mark)))


def pickle_only(folder, mark):
    (folder / WEIGHTS).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Mark(mark)))


def torch_pickle(folder, mark):
    pickle_only(folder, mark)
    torch.save(Mark(mark), folder / WEIGHTS)


def shards(name):
    def damage(folder, mark):
        (folder / WEIGHTS).rename(folder / "outside.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": name}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return damage


def config(file, **changes):
    return lambda folder, mark: edit(folder / file, **changes)


def entry(**changes):
    return lambda folder, mark: edit(folder / INDEX, **changes)


BAD = {
    "a pickle named safetensors": (
        renamed_pickle,
        f"{WEIGHTS}'. Error while deserializing header",
    ),
    "torch's pickle named safetensors": (
        torch_pickle,
        f"{WEIGHTS}'. Error while deserializing header",
    ),
    "nothing but a pickle": (
        pickle_only,
        "no file named diffusion_pytorch_model.safetensors, and pickles (.bin) are",
    ),
    "a shard outside": (
        shards("../../outside.safetensors"),
        "names '../../outside.safetensors'; allowed: safetensors",
    ),
    "a shard above": (
        shards("../outside.safetensors"),
        "names '../outside.safetensors'; allowed: safetensors files",
    ),
    "a shard anywhere": (
        shards("/etc/x.safetensors"),
        "names '/etc/x.safetensors'; allowed: safetensors files",
    ),
    "a shard that is a pickle": (
        shards("diffusion_pytorch_model-1.bin"),
        "allowed: safetensors files of its own",
    ),
    "shards that are no names": (shards(7), "has no weight_map of names"),
    "wide": (
        config(UNET, block_out_channels=[10**9, 10**9]),
        "describes a network of more than 0 weights in 0 tensors",
    ),
    "wider than numbers go": (
        config(UNET, block_out_channels=[10**18, 10**18]),
        "can't be made from config.json: ",
    ),
    "a little wide": (config(UNET, block_out_channels=[64, 64]), "but its files hold 44969 in "),
    "deep": (config(UNET, layers_per_block=10**9), "but its files hold 44969 in "),
    "many classes": (config(UNET, num_class_embeds=10**12), "but its files hold 44969 in "),
    "large images": (config(UNET, sample_size=10**9), "sample_size is 1000000000; allowed: one or two sides"),
    "tall images": (
        config(UNET, sample_size=[10**9, 8]),
        "sample_size is [1000000000, 8]; allowed: one or two sides",
    ),
    "no images": (config(UNET, sample_size=0), "sample_size is 0; allowed: one or two sides"),
    "sizes in words": (
        config(UNET, sample_size="large"),
        "sample_size is 'large'; allowed: one or two sides",
    ),
    "long process": (
        config(SCHEDULER, num_train_timesteps=10**12),
        "num_train_timesteps of the scheduler is 10000",
    ),
    "a module's function": (
        entry(unet=["os", "system"]),
        "unet in model_index.json is ['os', 'system'], which is not",
    ),
    "a class with another job": (
        entry(unet=["diffusers", "AutoencoderKL"]),
        "'AutoencoderKL'], which is not known",
    ),
    "a pipeline as scheduler": (
        entry(scheduler=["diffusers", "DDPMPipeline"]),
        "scheduler in model_index.json is [",
    ),
    "nested too deep": (
        lambda folder, mark: (folder / UNET).write_text("[" * 100_000),
        "is not a valid JSON file",
    ),
}


@pytest.mark.parametrize("from_hub", [False, True], ids=["folder", "hub"])
@pytest.mark.parametrize("kind", BAD)
def test_a_folder_from_a_stranger(kind, from_hub, tiny_folder, tmp_path, local_hub):
    damage, words = BAD[kind]
    folder, mark = tmp_path / "outer" / "model", tmp_path / "was-unpickled"
    shutil.copytree(tiny_folder, folder)
    damage(folder, mark)
    publish_as_it_is(local_hub, folder)
    where = REPO if from_hub else str(folder)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        DDPMPipeline.from_pretrained(where)
    message = str(error.value)
    assert message.startswith(f"can't load a pipeline from '{where}': ") and "\n" not in message
    assert not mark.exists()


def test_making_a_network_of_a_config_allocates_nothing():
    network = make_empty(diffusers.UNet2DModel, dict(tiny().config) | {"block_out_channels": [4096, 8192]})
    assert {weight.device.type for weight in network.parameters()} == {"meta"}
    assert sum(weight.numel() for weight in network.parameters()) > 10**9


def test_a_bomb_in_a_data_set(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 30_000  # 900 million pixels in 200 bytes
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    with pytest.raises(ValueError, match="decompression bomb"):
        load_stream(str(tmp_path))
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    assert load_stream(str(tmp_path)).shape == (1, 8, 8)


# Tokens


def test_redact(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sesame-open")
    for text, clean in (
        (f"Bearer {TOKEN}!", "Bearer ***!"),
        (f"https://me:{TOKEN}@hf.co/x", "https://***@hf.co/x"),
        ("ftp://me:pass@h/x and https://hf.co/a@b", "ftp://***@h/x and https://hf.co/a@b"),
        ("https://hf.co/x?a=1&token=abc&b=2", "https://hf.co/x?a=1&token=***&b=2"),
        ("sesame-open", "***"),
        ("hf_ddpm and hf_transfer are packages", "hf_ddpm and hf_transfer are packages"),
    ):
        assert redact(text) == clean == redact(clean)
    assert redact("it is tell-no-one", "tell-no-one", None) == "it is ***"


@pytest.mark.parametrize(
    "name",
    [f"https://me:{TOKEN}@hf.co/me/x", f"me/{TOKEN}", f"/nowhere/{TOKEN}", f"x@{TOKEN}", "me/sesame-open"],
)
def test_a_token_in_a_models_name_is_not_repeated(name, local_hub, monkeypatch, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", "sesame-open")
    with pytest.raises(ValueError, match=r"\*\*\*") as error:
        DDPMPipeline.from_pretrained(name)
    shown = "".join(map(str, (error.value, error.value.__cause__, caplog.text, *capfd.readouterr())))
    assert TOKEN not in shown and "sesame-open" not in shown


@pytest.mark.parametrize("kind", [TrainConfig, EvaluationConfig])
def test_a_config_holds_no_token(kind):
    with pytest.raises(
        ValueError, match=r"dataset is 'https://\*\*\*@hf.co/x', with a token or password in it"
    ):
        kind(dataset=f"https://me:{TOKEN}@hf.co/x")

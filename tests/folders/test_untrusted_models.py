"""Models of plain diffusers in every layout load; what is not exactly a model is refused in one line."""

import json
import os
import shutil
import struct

import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from hf_ddpm.folders.guard import MAX_ACTIVATIONS, activations, make_empty
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.models import PRESETS
from tests.folders.files import INDEX, SCHEDULER, UNET, WEIGHTS, edit, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")

SMALL = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SKIPS = {
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
}


def save(folder, half=False, scheduler="DDPMScheduler", changes=None, **options):
    unet = diffusers.UNet2DModel(**SMALL | (changes or {}))
    sampler = getattr(diffusers, scheduler)(num_train_timesteps=20)
    diffusers.DDPMPipeline(unet.half() if half else unet, sampler).save_pretrained(folder, **options)
    return unet


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "200KB"}])
@pytest.mark.parametrize("variant", [{}, {"variant": "fp16"}])
def test_shards_and_variants_load(shards, variant, tmp_path):
    unet = save(tmp_path, half=bool(variant), **shards, **variant)
    assert (len([*tmp_path.glob("unet/*.safetensors")]) > 1) == bool(shards)
    found = DDPMPipeline.from_pretrained(tmp_path, **variant).unet.state_dict()
    assert all(torch.equal(found[name], weight.float()) for name, weight in unet.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": None},
        {"sample_size": [16, 8]},
        {"sample_size": 15},
        {"norm_num_groups": None, **SKIPS},
        {"time_embedding_type": "learned", "num_train_timesteps": 20},
        {"num_class_embeds": 10},
        {"class_embed_type": "timestep"},
        {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "mid_block_type": None},
    ],
    ids=str,
)
def test_configs_of_plain_diffusers_load(changes, tmp_path):
    save(tmp_path, changes=changes)
    assert type(DDPMPipeline.from_pretrained(tmp_path).unet) is diffusers.UNet2DModel


def test_an_average_of_diffusers_trainer_loads(tmp_path):
    unet = save(tmp_path)
    EMAModel(unet.parameters(), model_cls=diffusers.UNet2DModel, model_config=unet.config).save_pretrained(
        tmp_path / "unet"
    )
    assert "decay" in json.loads((tmp_path / UNET).read_text())
    DDPMPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["LCMScheduler", "DDIMParallelScheduler", "KDPM2DiscreteScheduler"])
def test_samplers_of_a_ddpm_load(name, tmp_path):
    save(tmp_path, scheduler=name)
    assert type(DDPMPipeline.from_pretrained(tmp_path).scheduler).__name__ == name


@pytest.mark.parametrize(
    "name", ["ScoreSdeVeScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_samplers_of_other_models_are_refused(name, tmp_path):
    save(tmp_path, scheduler=name)
    with pytest.raises(ValueError, match=rf"'{name}'\], which is not known here; allowed: .* samples a DDPM"):
        DDPMPipeline.from_pretrained(tmp_path)


# What is no model


@pytest.fixture
def model(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refused(model, **options):
    with pytest.raises(ValueError, match=r"can't load a pipeline from|model folder") as error:
        DDPMPipeline.from_pretrained(model, **options)
    words = str(error.value)
    assert len(words) <= 300 and "\n" not in words
    return words


@pytest.mark.parametrize("file", [UNET, SCHEDULER, WEIGHTS])
def test_only_regular_files_are_opened(file, model):
    (model / file).unlink()
    os.mkfifo(model / file)
    assert f"{file} is a pipe; allowed: a regular file" in refused(model)
    (model / file).unlink()
    (model / file).symlink_to("/dev/zero")
    assert f"{file} is a device; allowed: a regular file" in refused(model)
    (model / file).unlink()
    (model / file).mkdir()
    assert f"{file} is a folder; allowed: a regular file" in refused(model)


def test_links_out_of_the_folder_work_as_in_the_hubs_cache(model, tmp_path):
    for file in (INDEX, UNET, SCHEDULER, WEIGHTS):
        blob = tmp_path / "blobs" / file.replace("/", "-")
        blob.parent.mkdir(exist_ok=True)
        (model / file).rename(blob)
        (model / file).symlink_to(blob)
    DDPMPipeline.from_pretrained(model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1, "a": 2}', "is not a valid JSON file: the key 'a' stands there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not a valid JSON file: Exceeds the limit"),
        (b'{"a": "\\ud800"}', "holds half of a character"),
        (b'{"a": ' + b"[" * 30 + b"]" * 30 + b"}", "is nested too deep; allowed: 20 levels"),
        (b'{"a": [' + b"[]," * 200_000 + b"[]]}", "has more than 100000 brackets"),
        (b'{"a": "' + b"x" * 2**22 + b'"}', "has more than 4194304 bytes; allowed: at most 4194304"),
    ],
    ids=["a key twice", "a long number", "half a character", "deep", "many lists", "large"],
)
def test_json_that_is_refused(content, words, model):
    (model / UNET).write_bytes(content)
    assert f"{UNET} {words}" in refused(model)


@pytest.mark.parametrize(
    ("file", "key", "value", "allowed"),
    [
        (UNET, "norm_eps", "x", "a number"),
        (UNET, "norm_eps", float("nan"), "a number"),
        (UNET, "layers_per_block", -1, ">= 1"),
        (UNET, "layers_per_block", True, "a whole number"),
        (UNET, "downsample_padding", 10**9, "0 to 1"),
        (UNET, "time_embedding_type", "fuorier", "positional, fourier, learned"),
        (UNET, "act_fn", None, "text"),
        (UNET, "block_out_channels", 8, "a list of whole numbers"),
        (UNET, "down_block_types", [], "one or more values"),
        (SCHEDULER, "num_train_timesteps", "2000000", "a whole number"),
        (SCHEDULER, "num_train_timesteps", 2e6, "a whole number"),
        (SCHEDULER, "num_train_timesteps", 2_000_000, "at most 1000000"),
        (SCHEDULER, "trained_betas", [[0.1]], "a list of numbers or null"),
        (SCHEDULER, "beta_end", -1, "0 to 1"),
        (SCHEDULER, "clip_sample_range", -1.0, "> 0"),
        (SCHEDULER, "solver_order", 10**6, "1 to 3"),  # of another sampler
        (INDEX, "unet", {"a": 1}, "text, or [library, class]"),
    ],
)
def test_values_that_are_refused(file, key, value, allowed, model):
    edit(model / file, **{key: value})
    words = refused(model)
    assert file in words and f"{value!r}; allowed: {allowed}" in words and key in words


def test_a_pipeline_of_further_parts_is_refused(model):
    """The network of a latent diffusion draws no images: its decoder makes them."""
    edit(model / INDEX, vae=[None, None])
    DDPMPipeline.from_pretrained(model)
    edit(model / INDEX, _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"])
    assert "'vqvae' in model_index.json is ['diffusers', 'VQModel']; allowed parts: unet, " in refused(model)


def test_two_million_betas_are_refused(model):
    text = (model / SCHEDULER).read_text()
    betas = "[" + "0.1," * 1_999_999 + "0.1]"
    (model / SCHEDULER).write_text(text.replace('"trained_betas": null', f'"trained_betas": {betas}'))
    assert "trained_betas is a list of 2000000; allowed: at most 1000000" in refused(model)


def change_weights(model, change):
    weights = load_file(model / WEIGHTS)
    change(weights)
    save_file(weights, model / WEIGHTS, {"format": "pt"})


FIRST = "conv_in.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda x: x.pop(FIRST),
            f"lacks '{FIRST}'; allowed: the tensors of the network that {UNET} describes",
        ),
        (lambda x: x.update(extra=torch.zeros(1)), "holds 'extra', which the network has no use for"),
        (
            lambda x: x.update({FIRST: x[FIRST].flatten()}),
            "has shape (72,); allowed by unet/config.json: (8, 1",
        ),
        (lambda x: x.update({FIRST: x[FIRST].bool()}), "is of BOOL; allowed: F64, F32, F16, BF16"),
        (lambda x: x.update({FIRST: x[FIRST].to(torch.float8_e4m3fn)}), "is of F8_E4M3; allowed: F64"),
        (lambda x: x.update({FIRST: x[FIRST].to(torch.complex64)}), "is of C64; allowed: F64"),
        (
            lambda x: x[FIRST].view(-1)[0].fill_(torch.nan),
            f"weights of '{FIRST}' hold NaN or infinite numbers",
        ),
    ],
    ids=["missing", "extra", "shape", "bool", "float8", "complex", "NaN"],
)
def test_weights_that_are_not_the_networks(change, words, model):
    change_weights(model, change)
    assert words in refused(model)


def test_a_config_with_fewer_layers_than_the_weights_have(model):
    edit(model / UNET, mid_block_type=None)
    assert "holds 'mid_block.attentions.0.group_norm.bias' and" in refused(model)


def test_a_header_that_is_too_large(model):
    size = 2**25
    (model / WEIGHTS).write_bytes(struct.pack("<Q", size) + b" " * size + b"\0")
    assert f"its header has {size} bytes; allowed: at most 16777216" in refused(model)


def test_a_shard_that_holds_other_tensors_than_its_index_says(tmp_path):
    save(tmp_path, max_shard_size="200KB")
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(names.values()))[:2]
    moved = next(name for name, shard in names.items() if shard == first)
    edit(index, weight_map=names | {moved: second})
    assert "holds other tensors than diffusion_pytorch_model.safetensors.index.json says" in refused(tmp_path)


def test_an_image_that_takes_more_memory_than_it_may(model):
    edit(model / UNET, sample_size=4096)
    DDPMPipeline.from_pretrained(model)
    wide = dict(tiny().config) | {"block_out_channels": [128, 128], "sample_size": 4096}
    with pytest.raises(MemoryError):
        activations(make_empty(diffusers.UNet2DModel, wide), (1, 4096, 4096))
    edit(model / UNET, sample_size=8192)
    assert "sample_size is 8192; allowed: one or two sides, of at most 16777216 pixels" in refused(model)


def test_the_memory_of_an_image_is_that_of_its_tensors():
    """One convolution makes what it answers, and nothing else."""
    conv = torch.nn.Conv2d(2, 2, 3, padding=1, device="meta")
    found = activations(lambda x, t: conv(x), (2, 100, 50))
    assert found == 4 * 2 * 100 * 50
    config = dict(PRESETS["256"])
    network = make_empty(diffusers.UNet2DModel, {k: v for k, v in config.items() if k != "_class_name"})
    assert 2**28 < activations(network.eval(), (3, 256, 256)) < 2**29 < MAX_ACTIVATIONS


@pytest.mark.parametrize(
    "name", ["~nobody-of-this-name/x", "./" + "x" * 5000, "./a\0b", "/root-of-nothing/x"]
)
def test_names_that_are_no_folders(name):
    refused(name)

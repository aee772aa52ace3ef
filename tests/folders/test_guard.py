"""guard.py: folders from strangers, from disk and from the Hub, are refused in one line."""

import json
import pickle
import re
import shutil
import struct
import zlib
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.stream import load_stream
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.folders.guard import make_empty
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.runtime.messages import redact
from tests.folders.files import INDEX, REPO, SCHEDULER, UNET, WEIGHTS, edit, publish_as_it_is, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")

TOKEN = "hf_" + "a1B2c3D4" * 4


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
        f"{WEIGHTS} is not a safetensors file that can be read: Error while deserializing header",
    ),
    "torch's pickle named safetensors": (
        torch_pickle,
        f"{WEIGHTS} is not a safetensors file that can be read: Error while deserializing header",
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
        "describes a network of more weights than its files hold, 44969 in 144 tensors",
    ),
    "wider than numbers go": (
        config(UNET, block_out_channels=[10**18, 10**18]),
        "block_out_channels is [1000000000000000000, 1000000000000000000]; allowed: a list of",
    ),
    "a little wide": (
        config(UNET, block_out_channels=[64, 64]),
        "than its files hold, 44969 in 144 tensors; allowed: a config",
    ),
    "deep": (config(UNET, layers_per_block=10**9), "than its files hold, 44969 in 144 tensors"),
    "many classes": (config(UNET, num_class_embeds=10**9), "than its files hold, 44969 in 144 tensors"),
    "large images": (config(UNET, sample_size=10**9), "sample_size is 1000000000; allowed: one or two sides"),
    "tall images": (
        config(UNET, sample_size=[10**9, 8]),
        "sample_size is [1000000000, 8]; allowed: one or two sides",
    ),
    "no images": (
        config(UNET, sample_size=0),
        "unet/config.json: sample_size is 0; allowed: one or two sides",
    ),
    "sizes in words": (
        config(UNET, sample_size="large"),
        "sample_size is 'large'; allowed: a whole number or a list of whole numbers or null",
    ),
    "long process": (
        config(SCHEDULER, num_train_timesteps=10**12),
        "scheduler/scheduler_config.json: num_train_timesteps is 1000000000000; allowed: at most 1000000",
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
    with pytest.raises(ValueError, match="says that it has more than 89,478,485 pixels"):
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


@pytest.mark.parametrize("kind", [TrainConfig, EvaluationConfig])
def test_a_config_holds_no_token(kind):
    with pytest.raises(
        ValueError, match=r"dataset is 'https://\*\*\*@hf.co/x', with a token or password in it"
    ):
        kind(dataset=f"https://me:{TOKEN}@hf.co/x")

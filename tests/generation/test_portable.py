"""portable.py: folders that plain diffusers reads too, and folders that are damaged."""

import json
import logging
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.scheduler import DDPMScheduler
from tests.generation.networks import ROUNDING, draw, quiet, seeds, tiny

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")
SCHEDULER = "scheduler/scheduler_config.json"
TOKEN = "hf_" + "a1B2c3D4" * 4
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_folder(tiny_folder):
    files = {path.relative_to(tiny_folder).as_posix() for path in tiny_folder.rglob("*") if path.is_file()}
    assert files == {"model_index.json", SCHEDULER, "unet/config.json", WEIGHTS}
    index = json.loads((tiny_folder / "model_index.json").read_text())
    assert index.pop("_diffusers_version") == diffusers.__version__
    assert index == {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    assert json.loads((tiny_folder / SCHEDULER).read_text())["_class_name"] == "DDPMScheduler"


def test_reload_draws_the_same_bits(tiny_folder, tmp_path, capfd):
    first = DDPMPipeline.from_pretrained(tiny_folder)
    first.save_pretrained(tmp_path / "again")
    second = DDPMPipeline.from_pretrained(str(tmp_path / "again"))
    assert type(second.scheduler) is DDPMScheduler
    assert second.scheduler.config.variance_type == "fixed_large"
    np.testing.assert_array_equal(draw(first, 3), draw(second, 3))
    assert capfd.readouterr() == ("", "")


ELSEWHERE = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_ddpm":
            raise ModuleNotFoundError("No module named 'hf_ddpm'")

sys.meta_path.insert(0, Missing())
import diffusers, numpy as np, torch
for folder in sys.argv[1:]:
    for cls in (diffusers.DDPMPipeline, diffusers.DiffusionPipeline):
        pipeline = cls.from_pretrained(folder)
        assert type(pipeline) is diffusers.DDPMPipeline, type(pipeline)
        assert type(pipeline.scheduler).__module__.startswith("diffusers."), type(pipeline.scheduler)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(3, generator, num_inference_steps=20, output_type="np").images
        np.save(f"{folder}/{cls.__name__}.npy", images)
assert "hf_ddpm" not in sys.modules
"""


def test_folders_load_where_hf_ddpm_is_not_installed(tiny_folder, tmp_path):
    ours = DDPMPipeline.from_pretrained(tiny_folder)
    plain, ddim = tmp_path / "plain", tmp_path / "ddim"
    expected = {tmp_path / "ours": draw(ours, 3), plain: draw(ours, 3)}
    ours.save_pretrained(tmp_path / "ours")
    # Someone puts our scheduler into diffusers' own pipeline.
    diffusers.DDPMPipeline(ours.unet, ours.scheduler).save_pretrained(plain)
    swap_scheduler(ours, "ddim")
    ours.save_pretrained(ddim)
    expected[ddim] = draw(ours, 3)

    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, expected)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for folder, images in expected.items():
        for loader in ("DDPMPipeline", "DiffusionPipeline"):
            np.testing.assert_allclose(np.load(folder / f"{loader}.npy"), images, atol=ROUNDING)


def test_a_folder_of_plain_diffusers_gets_our_scheduler(tmp_path):
    stock = diffusers.DDPMScheduler(20, beta_end=0.5, variance_type="fixed_large", clip_sample_range=2.0)
    theirs = diffusers.DDPMPipeline(tiny(), stock)
    theirs.save_pretrained(tmp_path)
    ours = DDPMPipeline.from_pretrained(tmp_path)
    assert type(ours) is DDPMPipeline and type(ours.scheduler) is DDPMScheduler
    assert {key: ours.scheduler.config[key] for key in stock.config if key[0] != "_"} == {
        key: value for key, value in stock.config.items() if key[0] != "_"
    }
    expected = quiet(theirs)(3, seeds(1)[0], num_inference_steps=20, output_type="np").images
    np.testing.assert_allclose(draw(ours, 3), expected, atol=ROUNDING)


def test_ddim_survives_saving(tiny_folder, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    swap_scheduler(pipeline, "ddim")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.DDIMScheduler
    np.testing.assert_array_equal(
        draw(again, 2, num_inference_steps=5), draw(pipeline, 2, num_inference_steps=5)
    )


class Mark:
    """Unpickling this leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_read_or_written(tiny_folder, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "was-unpickled"
    shutil.copytree(tiny_folder, folder)
    pickle.loads(pickle.dumps(Mark(mark)))
    assert mark.exists()
    mark.unlink()
    (folder / WEIGHTS).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Mark(mark)))
    with pytest.raises(ValueError, match=rf"can't load a pipeline from '{folder}': .*\.safetensors") as error:
        DDPMPipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)
    for value in (False, None):
        with pytest.raises(ValueError, match="would load a pickle; allowed: safetensors only"):
            DDPMPipeline.from_pretrained(folder, use_safetensors=value)
    with pytest.raises(ValueError, match="would write a pickle; allowed: safetensors only"):
        DDPMPipeline.from_pretrained(tiny_folder).save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not mark.exists() and not (tmp_path / "x").exists()


def cut(file, size):
    def damage(folder):
        (folder / file).write_bytes((folder / file).read_bytes()[:size])

    return damage


def remove(name):
    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


def edit(file, **changes):
    def damage(folder):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return damage


def forget_a_weight(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGE = {
    "one byte short": (
        cut(WEIGHTS, -1),
        f"{WEIGHTS} is not a safetensors file that can be read: Error while deserializing header: incomplete",
    ),
    "weights cut": (
        cut(WEIGHTS, 1000),
        f"{WEIGHTS} is not a safetensors file that can be read: Error while deserializing header: ",
    ),
    "weights empty": (
        cut(WEIGHTS, 0),
        f"{WEIGHTS} is not a safetensors file that can be read: Error while deserializing",
    ),
    "a weight missing": (forget_a_weight, "lacks 'conv_in.weight'; allowed: the tensors"),
    "no weights": (remove(WEIGHTS), "no file named diffusion_pytorch_model.safetensors"),
    "no index": (remove("model_index.json"), "has no model_index.json: it is not a pipeline folder"),
    "no network": (remove("unet"), "no file named config.json"),
    "no scheduler": (remove("scheduler"), "no file named scheduler_config.json"),
    "index cut": (cut("model_index.json", 20), "model_index.json is not a valid JSON file"),
    "index a list": (write("model_index.json", "[]"), "can't load a pipeline"),
    "index empty": (write("model_index.json", "{}"), "_class_name"),
    "network cut": (cut("unet/config.json", 20), "unet/config.json is not a valid JSON file"),
    "scheduler cut": (cut(SCHEDULER, 20), f"{SCHEDULER} is not a valid JSON file"),
    "foreign class": (edit("model_index.json", unet=["elsewhere.models", "Net"]), "elsewhere.models"),
    "bad network": (edit("unet/config.json", block_out_channels=[8]), "number of `block_out_channels`"),
    "bad scheduler": (edit(SCHEDULER, beta_schedule="linaer"), "linaer is not implemented"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folder(kind, tiny_folder, tmp_path, capfd):
    damage, words = DAMAGE[kind]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    with pytest.raises(ValueError) as error:
        DDPMPipeline.from_pretrained(folder)
    message = str(error.value)
    assert words in message and f"'{folder}'" in message and "\n" not in message
    assert capfd.readouterr() == ("", "")  # nothing but the message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/model", "model folder '/nowhere/model' does not exist"),
        ("./model", "model folder './model' does not exist"),
        ("~/no-such-model", "model folder '~/no-such-model' does not exist"),
        ("runs/a/b", "model folder 'runs/a/b' does not exist"),
        ("somebody/no-such-model", "from 'somebody/no-such-model': no such folder, and from the Hub: "),
        ("no such model", "from 'no such model': no such folder, and from the Hub: "),
    ],
)
def test_missing_folder(name, words, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        DDPMPipeline.from_pretrained(name)
    assert "\n" not in str(error.value)


def test_home_and_relative_folders(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/model", "model", "./model/", Path("model")):
        assert type(DDPMPipeline.from_pretrained(name).scheduler) is DDPMScheduler


def test_a_config_of_another_version_is_a_warning(tiny_folder, tmp_path, caplog):
    shutil.copytree(tiny_folder, tmp_path / "model")
    edit("unet/config.json", key_of_tomorrow=1)(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "hf_ddpm"):
        DDPMPipeline.from_pretrained(tmp_path / "model")
    assert "key_of_tomorrow" in caplog.text


def test_output_folder_that_cannot_be_written(tiny_folder, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    file = tmp_path / "file"
    file.write_text("precious")
    for folder, reason in ((file, "File exists"), (file / "model", "Not a directory")):
        with pytest.raises(ValueError, match=rf"folder '{folder}' can't be written: {reason}"):
            pipeline.save_pretrained(folder)
    assert file.read_text() == "precious"


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

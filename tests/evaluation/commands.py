"""What the tests of `hf-ddpm evaluate` share: its command, also killed or refused, models and data sets."""

import functools
import json

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features as Columns
from datasets import Image as ImageColumn
from PIL import Image
from safetensors.torch import load_file

from hf_ddpm.cli import main
from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import load_stream
from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.models import create_model
from tests.launching import ROOT

CLASSIFIER = str(ROOT / "train_scripts" / "classifiers" / "digits")
TENSORS = "evaluation.safetensors"
PICTURES = ("bits-per-step.png", "rate-distortion.png", "reconstructions.png")
FEW = ("--num-images", 7, "--num-evals-per-image", 4, "--batch-size", 3)


def run(model, out, *flags, dataset="digits"):
    """The report and the tensors that the command leaves in `out`."""
    main(["evaluate", *(str(word) for word in (model, dataset, "--out", out, *flags))])
    return json.loads((out / "evaluation.json").read_text()), load_file(out / TENSORS)


def refused(capfd, *words, code=2):
    """The one line on stderr of a command that has to fail."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *(str(word) for word in words)])
    out, err = capfd.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("hf-ddpm")]
    assert stop.value.code == code and out == "" and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def files(folder):
    return sorted(path.name for path in folder.rglob("*"))


def assert_same(a, b):
    """Equal to the last bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@functools.lru_cache(1)
def all_test_digits():
    return torch.stack(list(load_stream("digits", "test").images()))


def digits_at(rows):
    return to_float(all_test_digits()[torch.as_tensor(rows)])


def save_plain(folder, scheduler, out_channels=1, seed=0):
    """A pipeline folder of plain diffusers."""
    torch.manual_seed(seed)
    config = dict(create_model("tiny").config) | {"out_channels": out_channels}
    unet = diffusers.UNet2DModel.from_config(config).eval()
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def write_images(folder, images, split="test"):
    """A parquet data set of one column of PNG files."""
    folder.mkdir(parents=True)
    rows = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
        rows.append({"bytes": (folder / f"{i}.png").read_bytes(), "path": None})
        (folder / f"{i}.png").unlink()
    schema = Columns({"image": ImageColumn()}).arrow_schema
    pq.write_table(
        pa.Table.from_pydict({"image": rows}, schema=schema), folder / f"{split}-00000-of-00001.parquet"
    )
    return folder


def grey(count, height=8, width=8, dtype=np.uint8, top=256):
    return np.random.default_rng(0).integers(0, top, (count, height, width)).astype(dtype)


def kill_at(monkeypatch, number):
    """End the command as Ctrl-C would, before its `number`-th part is saved."""
    save, left = Parts.save, [number]

    def killed(self, *what):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        save(self, *what)

    monkeypatch.setattr(Parts, "save", killed)


def run_killed(model, out, *flags, part=2):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        kill_at(patch, part)
        run(model, out, *flags)
    assert stop.value.code == 130
    assert not (out / "evaluation.json").exists() and any(out.glob(".parts-*/*.safetensors"))

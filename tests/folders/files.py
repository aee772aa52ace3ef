"""What the tests of folders share: names of files, a tiny network, and files read, changed and published."""

import json

import torch

from hf_ddpm.models import create_model

INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
REPO = "tester/model"


def tiny(**changes):
    torch.manual_seed(0)
    return create_model("tiny", **changes).eval()


def read(file):
    return json.loads(file.read_text())


def edit(file, **changes):
    file.write_text(json.dumps(read(file) | changes))


def publish_as_it_is(hub, folder, repo_id=REPO):
    """What `hf upload` of the folder would do: nothing is checked on the way."""
    files = (path for path in folder.rglob("*") if path.is_file())
    hub.put(repo_id, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})

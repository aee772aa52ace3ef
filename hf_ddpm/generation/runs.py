"""A run's folder and a network that only its owner's program can make: what is written, and a pipeline of it.

diffusers' networks are made from the config in their folder. A module of one's own is made by the program
that has its class, so its run has no `model_index.json`, which would name a class that nothing may import:

    RUN/scheduler/scheduler_config.json                 the process that the network was trained for
        unet/config.json                                the class's name, and the images' channels and sides
             diffusion_pytorch_model.safetensors        the averaged weights, as the module's `state_dict`
             diffusion_pytorch_model.ema_0_999.safetensors      those of another decay

This module knows files. No code of a folder is imported or run, and nothing is unpickled.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hf_ddpm.checks import described
from hf_ddpm.denoiser import num_classes
from hf_ddpm.folders.guard import check_scheduler, weights_files
from hf_ddpm.folders.labels import read_labels
from hf_ddpm.folders.layout import (
    CHECKPOINTS,
    CONFIG,
    INDEX,
    RECORD,
    SCHEDULER,
    SCHEDULER_FILE,
    TENSORS,
    UNET,
    WEIGHTS,
    decay_of,
    variant_name,
    weights_name,
)
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.portable import refuse_not_finite
from hf_ddpm.publishing.publish import main_decay
from hf_ddpm.runtime.disk import named
from hf_ddpm.runtime.messages import one_line, shown
from hf_ddpm.runtime.untrusted import check_regular, read_json
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.spelling import suggest_keywords


def save_own_network(
    place: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    kind: str,
    shape: tuple[int, int, int],
    scheduler: Any,
) -> None:
    """Write what `load_run` reads of a network that is not of diffusers' kind.

    Args:
        place: the run's folder, or one whose files go there.
        weights: for each decay, as text, the averaged weights by name; the first are the main ones.
        kind: the name of the network's class, for people.
        shape: (C, H, W) of the images.
        scheduler: the run's.

    Raises:
        OSError: a file can't be written.
    """
    scheduler.save_pretrained(place / SCHEDULER)
    (place / UNET).mkdir()
    channels, *sides = shape
    config = {"_class_name": kind, "in_channels": channels, "sample_size": sides}
    (place / UNET / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for number, (decay, tensors) in enumerate(weights.items()):
        # Copies, as safetensors refuses tensors that share memory, as tied weights do
        plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        with named(place / UNET / weights_name(variant_name(decay) if number else None)) as file:
            save_file(plain, file, {"format": "pt"})


@suggest_keywords
def load_run(
    folder: str | os.PathLike, model: nn.Module | None = None, *, ema_decay: float | None = None
) -> DDPMPipeline:
    """The pipeline of a training run: its averaged weights, and the process that it was trained for.

    It is how a module of your own that `train(config, model=module)` trained samples and is measured; the run
    may go on meanwhile, or have been killed. The weights are those of its last checkpoint.

        pipeline = load_run("runs/mine", model=MyNetwork())
        pipeline(16).images
        pipeline.bits_per_dim(images)

    Args:
        folder: of the run.
        model: a module made as the trained one was; its weights are replaced, in its dtype and on its device,
            and it is put into eval mode. DDP and torch.compile are taken off. None for a network of
            diffusers' kind, which is made from the folder.
        ema_decay: decay of the weights, one of the run's; by default the first.

    Raises:
        ValueError: no such folder, a model that is none or has other weights, or another decay.
    """
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(
            f"folder is {described(folder)}; allowed: a run's folder; the order is load_run(folder, model)"
        )
    place = Path(folder).expanduser()
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"model is {described(model)}; allowed: an nn.Module, made as the trained one was")
    there = place.is_dir()
    if model is None and (not there or (place / INDEX).is_file()):
        found = {} if ema_decay is None or not there else {"variant": _variant(place, ema_decay)}
        return DDPMPipeline.from_pretrained(folder, **found)
    where = f"run folder {shown(str(place), 120)}"
    if not there:
        raise ValueError(f"{where} is a file" if place.exists() else f"{where} does not exist")
    try:
        variant = _variant(place, ema_decay)
        files = weights_files(place / UNET, variant)
        if not files:
            raise ValueError(f"it has no weights{_remedy(place)}")
        config = read_json(place / UNET / CONFIG)
        if model is None:
            kind = shown(str(config.get("_class_name")), 40)
            raise ValueError(f"its network, {kind}, is your own; allowed: load_run(folder, model=...)")
        check_scheduler(DDPMScheduler, place / SCHEDULER_FILE)
        shape = _shape(config)
        module = extract_model_from_parallel(model, keep_torch_compile=False)
        weights: dict[str, Tensor] = {}
        for file in files:
            check_regular(file)
            weights |= load_file(file)
        _load(module, weights)
        names = read_labels(place, classes := num_classes(module))
        if names is not None and classes is None:
            raise ValueError(
                f"{type(module).__name__} says no num_classes; allowed: {len(names)}, as an attribute"
            )
    except (ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"{where}: {one_line(error, 180)}") from error
    scheduler = DDPMScheduler.from_pretrained(place / SCHEDULER)
    pipeline = DDPMPipeline(module.eval(), scheduler, image_shape=shape)
    pipeline._folder, pipeline.id2label = place, names
    return pipeline


def _variant(place: Path, ema_decay: float | None) -> str | None:
    """The variant of the weights with a decay; None for the main ones.

    Raises:
        ValueError: there are none with this decay.
    """
    record = place / RECORD
    main = main_decay(read_json(record)) if record.is_file() else None
    if ema_decay in (None, main):
        return None
    names = [path.name for path in (place / UNET).glob(f"{WEIGHTS}.*{TENSORS}")]
    decays = {decay: name for name in names if (decay := decay_of(name)) is not None}
    if ema_decay not in decays:
        allowed = ", ".join(map(str, sorted({*decays, *([] if main is None else [main])}))) or "none"
        raise ValueError(f"ema_decay is {described(ema_decay)}; allowed: {allowed}")
    return decays[ema_decay].removeprefix(f"{WEIGHTS}.").removesuffix(TENSORS)


def _remedy(place: Path) -> str:
    """What a run has to do that has checkpoints alone, as those of version 0.1 have."""
    if not (place / CHECKPOINTS).is_dir():
        return "; allowed: the folder of a run of train(config, model=...)"
    return " but checkpoints: train(config, model=...), called as before, writes them"


def _shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images, from the network's config.

    Raises:
        ValueError: it doesn't say it.
    """
    channels, sides = config.get("in_channels"), config.get("sample_size")
    found = [channels, *(sides if isinstance(sides, list) else [sides, sides])]
    if len(found) != 3 or not all(type(number) is int and 0 < number < 2**16 for number in found):
        raise ValueError(f"its {UNET}/{CONFIG} doesn't say the images' in_channels and sample_size")
    return found[0], found[1], found[2]


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace a module's weights and buffers.

    Raises:
        ValueError: they are of another network, or not finite; the message names the first.
    """
    own, kind = module.state_dict(), type(module).__name__
    for name in sorted(weights.keys() | own.keys()):
        found, wanted = weights.get(name), own.get(name)
        if found is not None and wanted is not None:
            if is_lazy(wanted) or found.shape == wanted.shape:  # lazy: it takes its shape from these
                continue
        its, theirs = _shape_of(found), _shape_of(wanted)
        raise ValueError(
            f"its weights are of another network: {name[:60]!r} is {its} there, and {theirs} in this {kind}"
        )
    with torch.no_grad():
        module.load_state_dict(dict(weights))
    refuse_not_finite(module)


def _shape_of(weight: Tensor | None) -> str:
    if weight is None:
        return "missing"
    return "of any shape" if is_lazy(weight) else str(tuple(weight.shape))

"""Drawing images from a model into a folder: numbered PNG files and a grid, on one or more processes.

Image i depends on the seed and i alone. This module knows folders and processes; pipeline.py makes the
images.

Each file has a note, "sample <key> <name>", whose key is a hash of all that an image depends on.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from PIL import Image

from hf_ddpm.folders.errors import errors_digest
from hf_ddpm.folders.footprint import check_batch
from hf_ddpm.folders.layout import GRID, INDEX, RECORD, SAMPLE, sample_name
from hf_ddpm.folders.output import check_strangers, output_folder
from hf_ddpm.generation.grids import class_grid, image_grid, is_whole, read_note, save_image
from hf_ddpm.generation.measured import check_ending, ending_decoder, measured_errors
from hf_ddpm.generation.pipeline import PIL_CHANNELS, DDPMPipeline, count_images
from hf_ddpm.generation.quality import check_quality, give_quality
from hf_ddpm.generation.samplers import respace, sampler_class, swap_scheduler, whole_config
from hf_ddpm.models import num_classes, weights_digest
from hf_ddpm.runtime.disk import delete_partials
from hf_ddpm.runtime.processes import held_back, on_main_process, process_state
from hf_ddpm.runtime.progress import Bar, progress
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.seeds import image_generators
from hf_ddpm.spacing import check_spacing
from hf_ddpm.variances import FIXED, LEARNED, MEASURED

logger = logging.getLogger(__name__)

EVERY = "all"  # in the place of a class: every class in turn
GRID_IMAGES = 100  # the grid shows at most so many of the samples


def sample(
    model: str,
    num_images: int,
    out: str,
    steps: int | None = None,
    scheduler: str | None = None,
    variance_type: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    overwrite: bool = False,
    timestep_spacing: str | None = None,
    class_labels: int | str | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    ending: Literal["mean", "mode", "draw"] = "mean",
    quality: str | None = None,
) -> Path:
    """Write `num_images` numbered PNG files and a grid of the first hundred.

    Everything is checked before the folder is touched. Each file says which drawing it is of, so that the
    same call goes on with a drawing that was stopped, and no file that this function did not write is
    replaced or deleted. Old samples are deleted when the new ones are there.

    Args:
        model: a pipeline's folder or Hub id.
        num_images: how many.
        out: the folder; made if it is not there.
        steps: sampling steps, by default all T.
        scheduler: a key of `SCHEDULERS`; by default the model's own.
        variance_type: "fixed_small" or "fixed_large", for the sampler "ddpm", or "optimal" or "by-value" of a
            model that `hf-ddpm plan` has measured; by default the model's own.
        seed: of all noise, ≥ 0.
        batch_size: images at once in each process.
        overwrite: whether samples that the folder holds may be replaced.
        timestep_spacing: how so many steps out of T are chosen, one of `schedules.SPACINGS`; by default as
            the sampler does.
        class_labels: of a class-conditional model: a class by its number or name, for all images, or "none",
            as by default, or "all": image i is of class i mod C, and the grid has a row for each class.
        guidance_scale: w, see `DDPMPipeline.__call__`.
        guidance_interval: the steps (lo, hi) that are guided; None for all.
        ending: an image is the x_0 that the last step predicts ("mean"), or, of a model that `hf-ddpm plan`
            has measured, the likeliest grey levels given that ("mode") or a draw of them ("draw").
        quality: "fast" or "best": the sampler and the steps that `hf-ddpm sweep` found for the model.

    Returns:
        The grid's path.

    Raises:
        ValueError: a number out of range, a folder that can't be written, is in use, or holds samples already
            or other things, a bad model, a sampler that is unknown or can't do this.
        OSError: a file can't be written, or the folder was moved or deleted meanwhile.
    """
    least_values = (("num_images", num_images, 1), ("batch_size", batch_size, 1), ("seed", seed, 0))
    for name, value, least in least_values:
        if value < least:
            raise ValueError(f"{name} is {value}; allowed: whole numbers >= {least}")
    if quality is not None:
        check_quality(quality)
        chosen = {"steps": steps, "scheduler": scheduler, "variance_type": variance_type}
        chosen["timestep_spacing"] = timestep_spacing
        for name, value in chosen.items():
            if value is not None:
                raise ValueError(
                    f"{name} is {value!r}, but quality {quality!r} chooses it; allowed: one of the two"
                )
    if variance_type not in (None, *FIXED, *MEASURED):
        allowed = ", ".join((*FIXED, *MEASURED))
        raise ValueError(f"variance_type is {variance_type!r}; allowed: {allowed}")
    check_ending(ending)
    if scheduler is not None:
        sampler_class(scheduler)  # an unknown one is refused before a model is loaded
    if timestep_spacing is not None:
        check_spacing(timestep_spacing)
        if steps is None:
            raise ValueError(f"timestep_spacing is {timestep_spacing!r}, but has no use without steps")
    state, folder = process_state(), Path(out).expanduser()
    with output_folder(folder, "out", lambda folder: _check_folder(folder, overwrite), state) as lock:
        pipeline, steps = _load(model, scheduler, variance_type, steps, timestep_spacing, quality)
        drawn = _drawn(pipeline, ending, class_labels, guidance_scale, guidance_interval)
        if state.device is None or state.device.type == "cpu":
            at_once = min(batch_size, num_images)
            shape, times = pipeline.image_shape, drawn.evaluations
            check_batch("batch_size", at_once, pipeline.unet, shape, times)
        key = _key(pipeline, seed, steps, drawn)
        on_main_process(state, lambda: _check_samples(folder, key, num_images, overwrite))
        mine = range(num_images)[state.process_index :: state.num_processes]
        with progress("sample", len(mine), "image", state.is_main_process) as bar:
            for start in range(0, len(mine), batch_size):
                chunk = mine[start : start + batch_size]
                _draw(pipeline, folder, key, chunk, seed, steps, drawn, lock.check, bar)
        state.wait_for_everyone()

        grid = folder / GRID
        if state.is_main_process:
            lock.check()
            names = [sample_name(i) for i in range(num_images)]
            pictures = [Image.open(folder / name, formats=["PNG"]) for name in names[:GRID_IMAGES]]
            names_of_rows = drawn.names(range(len(pictures)))
            picture = image_grid(pictures) if names_of_rows is None else class_grid(pictures, names_of_rows)
            save_image(picture, grid, _note(key, GRID))
            for name in _samples_in(folder) - {*names, GRID}:
                (folder / name).unlink()
            print(f"{num_images} images and {GRID} in {folder}")
    return grid


def _load(
    model: str,
    scheduler: str | None,
    variance_type: str | None,
    steps: int | None,
    timestep_spacing: str | None,
    quality: str | None,
) -> tuple[DDPMPipeline, int | None]:
    """The model with its sampler, and the number of steps.

    Raises:
        ValueError: they can't do what is asked.
    """
    pipeline = DDPMPipeline.from_pretrained(model).to(process_state().device)
    if scheduler is not None:
        swap_scheduler(pipeline, scheduler)
    if quality is not None:
        told = process_state().is_main_process
        with contextlib.nullcontext() if told else held_back("hf_ddpm.generation.quality"):
            steps = give_quality(pipeline, quality)
    if timestep_spacing is not None:
        respace(pipeline, timestep_spacing)
    if variance_type is not None:
        if not isinstance(pipeline.scheduler, DDPMScheduler):
            raise ValueError(f"variance_type is {variance_type!r}; allowed: only with the sampler ddpm")
        if (own := pipeline.scheduler.variance_type) in LEARNED:
            raise ValueError(
                f"variance_type is {variance_type!r}, but the network learns its own ({own}); allowed: none"
            )
        pipeline.scheduler.variance_type = variance_type
    if (channels := pipeline.image_shape[0]) not in PIL_CHANNELS:
        raise ValueError(f"model {model!r} makes images of {channels} channels; allowed in a PNG: 1 to 4")
    try:
        pipeline.check_inputs(num_inference_steps=steps)
    except ValueError as error:
        raise ValueError(str(error).replace("num_inference_steps", "steps")) from error  # its name here
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, steps


@dataclass(frozen=True)
class _Drawn:
    """What is drawn.

    Attributes:
        given: what the pipeline is told, by keyword, whichever images are drawn.
        labels: of images 0, 1, ..., beginning anew after the last; None where no class is given.
        evaluations: how often the network gets each image at once.
        titles: of the rows of the grid, one for each of `labels`; () for a grid without classes.
    """

    given: Mapping[str, Any]
    labels: tuple[int | None, ...] | None = None
    evaluations: int = 1
    titles: tuple[str, ...] = ()

    def keywords(self, indices: range) -> dict[str, Any]:
        """The keywords of the pipeline for these images."""
        if self.labels is None:
            return dict(self.given)
        return {"class_labels": [self.labels[i % len(self.labels)] for i in indices], **self.given}

    def names(self, indices: range) -> list[str] | None:
        """The title of each image's row in the grid; None for a grid without classes."""
        return [self.titles[i % len(self.titles)] for i in indices] if self.titles else None


def _drawn(pipeline: DDPMPipeline, ending: str, class_labels: Any, scale: Any, interval: Any) -> _Drawn:
    """What is drawn, once it is known to make sense.

    Raises:
        ValueError: an ending without measured errors, no such class, guidance without one, or "all" is also
            the name of a class.
    """
    ending_decoder(pipeline, ending)
    names, classes = pipeline.id2label or {}, num_classes(pipeline.unet)
    every = class_labels == EVERY and bool(classes)
    if every and EVERY in names.values():
        raise ValueError(f"class {EVERY!r} may be the one of that name or every class; allowed: its number")
    found = pipeline.check_classes(1, 0 if every else class_labels, scale, interval)
    given: dict[str, Any] = {"ending": ending}
    if found.labels is None:
        return _Drawn(given)
    given |= {"guidance_scale": found.scale, "guidance_interval": found.interval}
    if every:
        assert classes is not None
        titles = tuple(names.get(y, str(y)) for y in range(classes))
        return _Drawn(given, tuple(range(classes)), found.evaluations, titles)
    label = found.labels[0].item()
    return _Drawn(given, (None if label == classes else int(label),), found.evaluations)


def _key(pipeline: DDPMPipeline, seed: int, steps: int | None, drawn: _Drawn) -> str:
    """Sixteen hex digits of all that an image depends on, besides its number."""
    network, scheduler = pipeline.unet, pipeline.scheduler
    weights: Any = network.state_dict()  # type: ignore[union-attr]
    facts = {
        "weights": weights_digest(getattr(network, "config", {}), weights),
        "scheduler": [type(scheduler).__name__, whole_config(scheduler)],
        "variance_type": scheduler.variance_type if isinstance(scheduler, DDPMScheduler) else None,
        "seed": seed,
        "steps": steps,
        "versions": [torch.__version__, diffusers.__version__],
    }
    if drawn.labels is not None:
        facts["classes"] = [drawn.labels, drawn.given["guidance_scale"], drawn.given["guidance_interval"]]
    ending = drawn.given["ending"]
    if ending != "mean" or facts["variance_type"] in MEASURED:
        facts["measured"] = [ending, errors_digest(measured_errors(pipeline, f"ending is {ending!r}"))]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _draw(
    pipeline: DDPMPipeline,
    folder: Path,
    key: str,
    indices: range,
    seed: int,
    steps: int | None,
    drawn: _Drawn,
    check: Callable[[], None],
    bar: Bar,
) -> None:
    """Write a batch of images, if they are not all there already; `check` looks at the folder before."""
    names = [sample_name(i) for i in indices]
    there = [name for name in names if read_note(folder / name) == _note(key, name)]
    damaged = [name for name in there if not is_whole(folder / name)]
    for name in damaged:
        logger.warning("%r is damaged and drawn anew", str(folder / name))
    if there == names and not damaged:
        bar.update(len(indices))
        return
    generators = image_generators(seed, indices)
    images: Any = pipeline(
        len(indices),
        generators,
        steps,
        return_dict=False,
        callback_on_step_end=count_images(bar),
        **drawn.keywords(indices),
    )[0]
    for name, image in zip(names, images, strict=True):
        check()
        save_image(image, folder / name, _note(key, name))


def _note(key: str, name: str) -> str:
    return f"sample {key} {name}"


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder of other things, before the model is loaded.

    Raises:
        ValueError: the message names one of them.
    """
    own = any((folder / name).is_file() for name in (INDEX, RECORD)) or bool(_samples_in(folder))
    check_strangers(folder, "out", (), own, overwrite)


def _check_samples(folder: Path, key: str, num_images: int, overwrite: bool) -> None:
    """Refuse to replace what is there already, but for a drawing of this key that has not come to its end.

    Raises:
        ValueError: there are finished samples or those of another drawing, or files that `sample` did not
            write in their place.
    """
    delete_partials(folder, lambda name: bool(SAMPLE.fullmatch(name)) or name == GRID)
    ours = _samples_in(folder)
    for name in (*map(sample_name, range(num_images)), GRID):
        if (folder / name).exists() and name not in ours:
            raise ValueError(
                f"out {str(folder)!r} holds {name!r}, which is damaged or not of `hf-ddpm sample`; allowed: "
                "another folder, or that file deleted"
            )
    if overwrite or not ours:
        return
    others = any(read_note(folder / name) != _note(key, name) for name in ours)
    if others or GRID in ours:
        raise ValueError(
            f"out {str(folder)!r} holds samples already; allowed: another folder, or --overwrite"
        )


def _samples_in(folder: Path) -> set[str]:
    """The names of the files that `sample` wrote into a folder, and may replace."""
    names = (path.name for path in folder.glob("*.png"))
    return {
        name
        for name in names
        if (SAMPLE.fullmatch(name) or name == GRID) and (read_note(folder / name) or "").startswith("sample ")
    }

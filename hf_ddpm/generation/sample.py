"""Drawing images from a model into a folder: numbered PNG files and a grid, on one or more processes.

Image i depends on the seed and i alone. The file knows folders and processes; the images are the pipeline's.
"""

import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from hf_ddpm.generation.grids import image_grid, save_image
from hf_ddpm.generation.pipeline import PIL_CHANNELS, DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import REFRESH
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.seeds import image_generators
from hf_ddpm.variances import FIXED, LEARNED

GRID_IMAGES = 100  # a grid shows at most so many of the samples
OURS = re.compile(r"\d{5,}\.png|grid\.png")  # what `sample` writes, and may replace


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
) -> Path:
    """Write `num_images` numbered PNG files and a grid of the first hundred; returns the grid's path.

    Everything is checked before the folder is touched, and old samples go when their successors are there.

    Raises:
        ValueError: a number out of range, a folder that can't be written or holds samples already, a bad
            model, a sampler that is unknown or can't do this.
    """
    for name, value, least in (
        ("num_images", num_images, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; allowed: whole numbers >= {least}")
    if variance_type not in (None, *FIXED):
        raise ValueError(f"variance_type is {variance_type!r}; allowed: {', '.join(FIXED)}")
    state, folder = process_state(), Path(out)
    pipeline = DDPMPipeline.from_pretrained(model).to(state.device)
    if scheduler is not None:
        swap_scheduler(pipeline, scheduler)
    if variance_type is not None:
        if not isinstance(pipeline.scheduler, DDPMScheduler):
            raise ValueError(f"variance_type is {variance_type!r}; allowed: only with the sampler ddpm")
        if (own := pipeline.scheduler.variance_type) in LEARNED:
            raise ValueError(
                f"variance_type is {variance_type!r}, but the network learns its own ({own}); allowed: none"
            )
        pipeline.scheduler.variance_type = variance_type
    if (channels := pipeline.image_shape[0]) not in PIL_CHANNELS:
        raise ValueError(f"model {model!r} makes images of {channels} channels; allowed in a PNG: 1, 3, 4")
    try:
        pipeline.check_inputs(num_inference_steps=steps)
    except ValueError as error:
        raise ValueError(str(error).replace("num_inference_steps", "steps")) from error  # its name here
    _prepare_folder(folder, overwrite)  # every process looks before any of them writes
    state.wait_for_everyone()

    pipeline.set_progress_bar_config(
        desc="sample", leave=False, disable=not state.is_main_process, mininterval=REFRESH
    )
    mine = range(state.process_index, num_images, state.num_processes)
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        images: Any = pipeline(len(indices), image_generators(seed, indices), steps, return_dict=False)[0]
        for i, image in zip(indices, images, strict=True):
            save_image(image, folder / f"{i:05d}.png")
    state.wait_for_everyone()

    grid = folder / "grid.png"
    if state.is_main_process:
        names = [f"{i:05d}.png" for i in range(num_images)]
        save_image(image_grid([Image.open(folder / name) for name in names[:GRID_IMAGES]]), grid)
        for name in _samples_in(folder) - {*names, grid.name}:
            (folder / name).unlink()
        print(f"{num_images} images and grid.png in {folder}")
    return grid


def _prepare_folder(folder: Path, overwrite: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise ValueError(f"out {str(folder)!r} can't be written: {error.strerror}") from None
    if not overwrite and _samples_in(folder):
        raise ValueError(
            f"out {str(folder)!r} holds samples already; allowed: another folder, or --overwrite"
        )


def _samples_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if OURS.fullmatch(path.name)}

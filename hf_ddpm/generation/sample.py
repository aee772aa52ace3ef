"""Drawing images from a model into a folder: numbered PNG files and a grid, on one or more processes.

Image i depends on the seed and i alone. This module knows folders and processes; pipeline.py makes the
images.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from hf_ddpm.folders.footprint import check_batch
from hf_ddpm.folders.layout import GRID, SAMPLE, sample_name
from hf_ddpm.generation.grids import image_grid, save_image
from hf_ddpm.generation.pipeline import PIL_CHANNELS, DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.runtime.disk import why_not_writable
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import REFRESH
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.seeds import image_generators
from hf_ddpm.variances import FIXED, LEARNED

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
) -> Path:
    """Write `num_images` numbered PNG files and a grid of the first hundred.

    Everything is checked before the folder is touched. Old samples are deleted when the new ones are there.

    Args:
        model: a pipeline's folder or Hub id.
        num_images: how many.
        out: the folder; made if it is not there.
        steps: sampling steps, by default all T.
        scheduler: a key of `SCHEDULERS`; by default the model's own.
        variance_type: "fixed_small" or "fixed_large", for the sampler "ddpm"; by default the model's own.
        seed: of all noise, ≥ 0.
        batch_size: images at once in each process.
        overwrite: whether samples that the folder holds may be replaced.

    Returns:
        The grid's path.

    Raises:
        ValueError: a number out of range, a folder that can't be written or holds samples already, a bad
            model, a sampler that is unknown or can't do this.
    """
    least_values = (("num_images", num_images, 1), ("batch_size", batch_size, 1), ("seed", seed, 0))
    for name, value, least in least_values:
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
        raise ValueError(f"model {model!r} makes images of {channels} channels; allowed in a PNG: 1 to 4")
    try:
        pipeline.check_inputs(num_inference_steps=steps)
    except ValueError as error:
        raise ValueError(str(error).replace("num_inference_steps", "steps")) from error  # its name here
    if state.device is None or state.device.type == "cpu":
        check_batch("batch_size", min(batch_size, num_images), pipeline.unet, pipeline.image_shape)
    _check_folder(folder, overwrite)
    state.wait_for_everyone()  # every process has looked before any of them writes

    pipeline.set_progress_bar_config(
        desc="sample", leave=False, disable=not state.is_main_process, mininterval=REFRESH
    )
    mine = range(state.process_index, num_images, state.num_processes)
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        images: Any = pipeline(len(indices), image_generators(seed, indices), steps, return_dict=False)[0]
        for i, image in zip(indices, images, strict=True):
            save_image(image, folder / sample_name(i))
    state.wait_for_everyone()

    grid = folder / GRID
    if state.is_main_process:
        names = [sample_name(i) for i in range(num_images)]
        save_image(
            image_grid([Image.open(folder / name, formats=["PNG"]) for name in names[:GRID_IMAGES]]), grid
        )
        for name in _samples_in(folder) - {*names, grid.name}:
            (folder / name).unlink()
        print(f"{num_images} images and {GRID} in {folder}")
    return grid


def _check_folder(folder: Path, overwrite: bool) -> None:
    if reason := why_not_writable(folder):
        raise ValueError(f"out {str(folder)!r} can't be written: {reason}")
    if not overwrite and _samples_in(folder):
        raise ValueError(
            f"out {str(folder)!r} holds samples already; allowed: another folder, or --overwrite"
        )


def _samples_in(folder: Path) -> set[str]:
    """The names of the files that `sample` wrote into a folder, and may replace."""
    return {path.name for path in folder.glob("*") if SAMPLE.fullmatch(path.name) or path.name == GRID}

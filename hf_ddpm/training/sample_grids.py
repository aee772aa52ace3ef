"""Samples of the averaged network while it trains, always from the same noise, as one picture for each time.

RUN/samples/step-00000500.png     or .npy, (B, H, W, C) in [0, 1], for images that can't be pictures
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from hf_ddpm.config import TrainConfig
from hf_ddpm.folders.layout import GRIDS, step_name
from hf_ddpm.generation.grids import class_grid, image_grid, save_image
from hf_ddpm.generation.pipeline import PIL_CHANNELS, DDPMPipeline, count_images
from hf_ddpm.runtime.disk import named, whole_file
from hf_ddpm.runtime.memory import check_memory
from hf_ddpm.runtime.processes import on_main_process
from hf_ddpm.runtime.progress import progress
from hf_ddpm.scheduler import DDPMScheduler


class SampleGrids:
    """The sample grids of a run.

    Args:
        config: the run: how many images, in how many steps, from which seed.
        folder: the run's folder.
        accelerator: the processes that share the sampling, and the trackers that are shown the pictures.
        scheduler: the run's.
        shape: (C, H, W) of an image.
        class_names: of a run with classes, each of which gets a row of the grid, or as many as there are
            images.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        accelerator: Accelerator,
        scheduler: DDPMScheduler,
        shape: tuple[int, int, int],
        class_names: Sequence[str] | None = None,
    ):
        self._config, self._folder, self._accelerator = config, folder / GRIDS, accelerator
        self._scheduler, self._shape = scheduler, shape
        self._as_picture = shape[0] in PIL_CHANNELS
        self._names = class_names
        self._count, self._labels = config.sample_num_images, None
        if class_names is not None:
            rows = min(len(class_names), config.sample_num_images)
            columns = config.sample_num_images // rows
            self._count, self._labels = rows * columns, [y for y in range(rows) for _ in range(columns)]
        if config.sample_every:
            what = "image {}x{}x{}".format(*shape)
            check_memory("sample_num_images", config.sample_num_images, 5 * math.prod(shape), what)

    def path(self, step: int) -> Path:
        """Where the grid of a step goes: a picture, or an array where images can't be pictures."""
        return self._folder / f"{step_name(step)}{'.png' if self._as_picture else '.npy'}"

    def save(self, model: nn.Module, step: int, check: Callable[[], None] = lambda: None) -> None:
        """Sample, and save the grid; all processes call it together and share the work.

        Args:
            model: the network with its averaged weights.
            step: optimizer steps done.
            check: called at each step of sampling; it may raise.

        Raises:
            OSError: the file can't be written.
        """
        accelerator, config, path = self._accelerator, self._config, self.path(step)
        # Each process samples as many: FSDP needs every process at every call of a network it shares out
        world, wanted = accelerator.num_processes, self._count
        each = -(-wanted // world)
        mine = range(accelerator.process_index, each * world, world)
        pipeline = DDPMPipeline(model, self._scheduler)
        pipeline.set_progress_bar_config(disable=True)
        labels = None if self._labels is None else [self._labels[i % wanted] for i in mine]
        bar = progress("sample", each, "image", accelerator.is_main_process, leave=False)
        count = count_images(bar)

        def after_step(*step: Any) -> None:
            check()
            count(*step)

        with accelerator.autocast(), bar:
            images: Any = pipeline(
                batch_size=each,
                generator=[torch.Generator().manual_seed(config.seed + i) for i in mine],
                num_inference_steps=config.sample_steps,
                output_type="pil" if self._as_picture else "np",
                return_dict=False,
                max_batch_size=config.batch_size,
                callback_on_step_end=after_step,
                image_shape=self._shape,
                class_labels=labels,
            )[0]
        found = dict(gather_object(list(zip(mine, images, strict=True))))

        def write() -> None:
            images = [found[i] for i in range(wanted)]
            if self._as_picture:
                names = [self._names[y] for y in self._labels or ()] if self._names else []
                with named(path):
                    save_image(class_grid(images, names) if names else image_grid(images), path)
                self._show(path, step)
            else:
                with whole_file(path) as place, place.open("wb") as file:
                    np.save(file, np.stack(images))

        on_main_process(accelerator, write)

    def _show(self, grid: Path, step: int) -> None:
        """Give a picture to those trackers that take pictures."""
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                with Image.open(grid, formats=["PNG"]) as image:
                    tracker.log_images({"samples": np.asarray(image)[None]}, step=step, **layout)

"""What a training run says: one progress bar, `log.jsonl`, sample grids, and accelerate's trackers.

It knows numbers and pictures and where they are shown. It reads numbers back from the device only in `log`.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_ddpm.config import TrainConfig
from hf_ddpm.pipeline import PIL_CHANNELS, DDPMPipeline
from hf_ddpm.plots import image_grid, save_image
from hf_ddpm.progress import REFRESH, progress
from hf_ddpm.scheduler import DDPMScheduler


class Record:
    """The run's progress from the step it starts at, a context that leaves no bar or tracker open.

    Attributes:
        loss: mean loss of the last logged interval, over all processes.
        images_per_second: throughput since the start, without pauses.
        grad_norm: norm of the last gradient before clipping, on the device; None if it isn't clipped.
    """

    def __init__(self, run: Path, accelerator: Accelerator, first: int, config: TrainConfig):
        self.run, self.accelerator, self.config = run, accelerator, config
        self.loss = self.images_per_second = math.nan
        self.grad_norm: Tensor | None = None
        self._per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        self._losses: list[Tensor] = []
        self._step, self._logged_step, self._first = first, first, first
        self._worked, self._logged_worked, self._since = 0.0, 0.0, time.perf_counter()
        self._file = run / "log.jsonl"
        if accelerator.is_main_process:
            _keep_lines(self._file, first)
            (run / "train_config.json").write_text(config.to_json(), encoding="utf-8")
        if config.trackers:
            facts = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
            accelerator.init_trackers("hf_ddpm", config=facts)
        self._bar = progress("train", config.max_steps, "step", accelerator.is_main_process, initial=first)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._bar.close()
        if kind is not None:  # a run that ends well finishes them with `end_training`
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def add(self, loss: Tensor) -> None:
        """Note the loss of a micro-step, a scalar that stays on its device."""
        self._losses.append(loss.detach())

    def advance(self, step: int) -> None:
        """An optimizer step is done."""
        self._step = step
        self._bar.update()

    def log(self, lr: float) -> None:
        """Read the numbers of the interval back from the device, and write them down.

        Args:
            lr: learning rate of the last step.

        Raises:
            RuntimeError: the loss is not finite.
        """
        mean = self.accelerator.reduce(torch.stack(self._losses).mean(), "mean")
        self._losses.clear()
        self.loss = float(mean)  # type: ignore[arg-type]
        if not math.isfinite(self.loss):
            raise RuntimeError(
                f"the loss is {self.loss} at step {self._step}, or since step {self._logged_step + 1}; "
                "checkpoints from before stand"
            )
        now = self._worked + time.perf_counter() - self._since
        speed = (self._step - self._logged_step) * self._per_step / (now - self._logged_worked)
        self.images_per_second = (self._step - self._first) * self._per_step / now
        self._logged_step, self._logged_worked = self._step, now

        line = {"step": self._step, "images": self._step * self._per_step, "loss": self.loss, "lr": lr}
        line["images_per_second"] = round(speed, 1)
        norm = math.inf if self.grad_norm is None else float(self.grad_norm)
        if math.isfinite(norm):  # with fp16 it may overflow: that step was left out, and JSON has no infinity
            line["grad_norm"] = norm
        self.note(line)
        self._bar.set_postfix_str(f"loss {self.loss:.4f}, {speed:.0f} images/s", refresh=False)

    def note(self, line: Mapping[str, float]) -> None:
        """Write numbers of this step to log.jsonl and the trackers."""
        numbers = {key: value for key, value in line.items() if key != "step"}
        if self.accelerator.is_main_process:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self._step, **numbers}) + "\n")
        self.accelerator.log(numbers, step=self._step)

    def save_grid(self, model: nn.Module, scheduler: DDPMScheduler, shape: tuple[int, int, int]) -> None:
        """Sample, always from the same noise, and show the grid; the processes share the work.

        Args:
            model: the network with its averaged weights.
            scheduler: the run's.
            shape: (C, H, W); images that can't be pictures are saved as an array (B, H, W, C).
        """
        accelerator, as_picture = self.accelerator, shape[0] in PIL_CHANNELS
        mine = range(accelerator.process_index, self.config.sample_num_images, accelerator.num_processes)
        images: Any = []
        if mine:
            pipeline = DDPMPipeline(model, scheduler)
            pipeline.set_progress_bar_config(
                desc="sample", leave=False, mininterval=REFRESH, disable=not accelerator.is_main_process
            )
            with accelerator.autocast():
                images = pipeline(
                    batch_size=len(mine),
                    generator=[torch.Generator().manual_seed(self.config.seed + i) for i in mine],
                    num_inference_steps=self.config.sample_steps,
                    output_type="pil" if as_picture else "np",
                    return_dict=False,
                    max_batch_size=self.config.batch_size,
                    image_shape=shape,
                )[0]
        found = dict(gather_object(list(zip(mine, images, strict=True))))
        if not accelerator.is_main_process:
            return
        images = [found[i] for i in sorted(found)]
        place = self.run / "samples" / f"step-{self._step:08d}"
        if not as_picture:
            np.save(place.with_suffix(".npy"), np.stack(images))
            return
        grid = image_grid(images)
        save_image(grid, place.with_suffix(".png"))
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(grid)[None]}, step=self._step, **layout)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (sampling, saving) doesn't count as training."""
        self._worked += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()


def _keep_lines(file: Path, step: int) -> None:
    """Drop log lines past the step that the run goes on from: they will be written again."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    kept = "".join(line + "\n" for line in lines if _step_of(line) <= step)
    new = file.with_suffix(".tmp")
    new.write_text(kept, encoding="utf-8")
    os.replace(new, file)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a killed run may leave half a line
        return math.inf

"""What a training run says: one progress bar, `log.jsonl`, and accelerate's trackers.

It knows numbers and where they are shown. It reads them back from the device only in `log`.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.config import TrainConfig


class Record:
    """The run's progress, from the step it starts at.

    Attributes:
        loss: mean loss of the last logged interval, over all processes.
        images_per_second: throughput since the start, without pauses.
        grad_norm: norm of the last gradient before clipping, on the device; None if it isn't clipped.
    """

    def __init__(self, run: Path, accelerator: Accelerator, first: int, config: TrainConfig):
        self.accelerator = accelerator
        self.loss = self.images_per_second = math.nan
        self.grad_norm: Tensor | None = None
        self._per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        self._losses: list[Tensor] = []
        self._step, self._logged_step, self._first = first, first, first
        self._worked, self._logged_worked, self._since = 0.0, 0.0, time.perf_counter()
        self._file = run / "log.jsonl"
        if accelerator.is_main_process:
            _keep_lines(self._file, first)
            (run / "train_config.json").write_text(config.to_json())
        if config.trackers:
            facts = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
            accelerator.init_trackers("hf_ddpm", config=facts)
        self._bar = tqdm(
            total=config.max_steps,
            initial=first,
            desc="train",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 15.0,  # a log file wants a line now and then
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )

    def add(self, loss: Tensor) -> None:
        """Note the loss of a micro-step, a scalar that stays on its device."""
        self._losses.append(loss.detach())

    def advance(self, step: int) -> None:
        """An optimizer step is done."""
        self._step = step
        self._bar.update()

    def log(self, lr: float) -> None:
        """Read the numbers of the interval back from the device, and write them down.

        Raises:
            RuntimeError: the loss is not finite.
        """
        mean = self.accelerator.reduce(torch.stack(self._losses).mean(), "mean")
        self._losses.clear()
        self.loss = float(mean)  # type: ignore[arg-type]
        if not math.isfinite(self.loss):
            raise RuntimeError(f"the loss is {self.loss} at step {self._step}; the last checkpoint stands")
        now = self._worked + time.perf_counter() - self._since
        speed = (self._step - self._logged_step) * self._per_step / (now - self._logged_worked)
        self.images_per_second = (self._step - self._first) * self._per_step / now
        self._logged_step, self._logged_worked = self._step, now

        line = {"step": self._step, "images": self._step * self._per_step, "loss": self.loss, "lr": lr}
        line["images_per_second"] = round(speed, 1)
        if self.grad_norm is not None:
            line["grad_norm"] = float(self.grad_norm)
        if self.accelerator.is_main_process:
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=self._step)
        self._bar.set_postfix_str(f"loss {self.loss:.4f}, {speed:.0f} images/s", refresh=False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (sampling, saving) doesn't count as training."""
        self._worked += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _keep_lines(file: Path, step: int) -> None:
    """Drop log lines past the step that the run goes on from: they will be written again."""
    lines = file.read_text().splitlines() if file.exists() else []
    file.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))

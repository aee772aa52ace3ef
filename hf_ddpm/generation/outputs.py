"""What a call of the pipeline gives: images as PIL images, arrays or tensors, from tensors in [−1, 1]."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from hf_ddpm.data.pixels import to_uint8
from hf_ddpm.generation.grids import image_grid, png, to_pil
from hf_ddpm.shown import count, or_none, summary

OUTPUT_TYPES = ("pil", "np", "pt")
PIL_CHANNELS = (1, 2, 3, 4)
MOST_SHOWN = 64  # images of an output that a notebook shows


@dataclass
class DDPMPipelineOutput(ImagePipelineOutput):
    """What a call of the pipeline returns.

    Attributes:
        images: the samples, in the output type that was asked for.
        pred_original_images: for each position in `pred_original_steps`, as given, the predicted x_0 there.
    """

    pred_original_images: dict[int, Any] | None = None

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says."""
        first, number = self.images[0], count(len(self.images), "image")
        kind = f"PIL {first.mode}, {first.width}x{first.height}" if isinstance(self.images, list) else ""
        if not kind:
            array: Any = self.images  # (B, H, W, C), or a tensor (B, C, H, W)
            kind = f"{str(array.dtype).removeprefix('torch.')} {tuple(array.shape)}"
        seen = self.pred_original_images
        return [number, kind, *([] if seen is None else [f"x̂_0 at {count(len(seen), 'position')}"])]

    def _repr_png_(self) -> bytes | None:
        """The images in a grid, for a notebook; of very many, the first ones."""
        return or_none(lambda: png(image_grid(as_pil(self.images[:MOST_SHOWN]))))


def to_unit(x: Tensor) -> Tensor:
    """[−1, 1] → [0, 1] on the CPU, float32."""
    return (x.float() / 2 + 0.5).clamp(0, 1).cpu()


def as_pil(images: Any) -> list[Any]:
    """The images of an output, of any type, as PIL images; of more than 4 channels the first one."""
    if isinstance(images, list):
        return images
    x = images.float() if isinstance(images, Tensor) else torch.as_tensor(images).permute(0, 3, 1, 2)
    return [to_pil(image) for image in to_uint8(2 * x - 1)]


def as_type(chunks: list[Tensor], output_type: str) -> Any:
    """Images in [0, 1] of the chunks of a call in the form that was asked for, one of `OUTPUT_TYPES`."""
    images = torch.cat(chunks)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).numpy()
    return array if output_type == "np" else DiffusionPipeline.numpy_to_pil(array)

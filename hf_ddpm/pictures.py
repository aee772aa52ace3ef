"""Pictures of a process and its model: interpolation, encode → decode, generation, the way to noise.

There is one function for each, which returns a `Sheet`: images in rows and columns with labels, which can be
saved as a PNG file. An image's noise depends on the seed and its place alone. `draw_interpolation` is the
command `hf-ddpm interpolate`, and `draw_inpainting` is `hf-ddpm inpaint`. No formula stands here but the
mixture of two images.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.checks import check_count, check_seed, described
from hf_ddpm.data.pixels import to_float, to_uint8
from hf_ddpm.generation.given import as_pictures
from hf_ddpm.generation.grids import checked_path, labelled_grid, png, save_image, to_pil
from hf_ddpm.generation.picture_files import as_text, check_out, open_image, open_mask, trained_reading
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.runtime.disk import named
from hf_ddpm.runtime.lock import file_lock
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import along
from hf_ddpm.seeds import Use, derive_seed, image_generators
from hf_ddpm.shown import count, or_none, summary


@dataclass(frozen=True)
class Sheet:
    """Images in rows and columns, with labels.

    Attributes:
        images: mostly in [−1, 1], beyond which `save` clips, (rows, columns, C, H, W), float32, on the CPU.
        columns: a label for each column.
        rows: a label for each row.

    A notebook shows it.
    """

    images: Tensor
    columns: list[str]
    rows: list[str]

    def __repr__(self) -> str:
        return summary(self, self._facts)

    def _facts(self) -> list[str]:
        """What its one-line `repr` says."""
        rows, columns, channels, height, width = self.images.shape
        return [f"{count(rows, 'row')} of {columns}", f"images {(channels, height, width)} (C, H, W)"]

    def _repr_png_(self) -> bytes | None:
        """The picture, for a notebook."""
        return or_none(lambda: png(self.picture()))

    def picture(self) -> Image.Image:
        """The sheet as one PIL image: images that are small enlarged, and labels above and beside them.

        Raises:
            ValueError: images of other dimensions, or not one label for each row and column.
        """
        self._check()
        pictures = [[to_pil(image) for image in to_uint8(row)] for row in self.images]
        return labelled_grid(pictures, self.columns, self.rows)

    def _check(self) -> None:
        """Refuse images that are not in rows and columns, and labels that are more or fewer than these."""
        if not isinstance(self.images, Tensor) or self.images.ndim != 5:
            raise ValueError(
                f"images are {described(self.images)}; allowed: a tensor (rows, columns, C, H, W)"
            )
        for name, wanted in (("rows", len(self.images)), ("columns", self.images.shape[1])):
            labels = getattr(self, name)
            if not isinstance(labels, list | tuple) or len(labels) != wanted:
                found = f"{len(labels)} labels" if isinstance(labels, list | tuple) else described(labels)
                raise ValueError(
                    f"{name} is {found}; allowed: a list of {wanted}, one for each of the {name}"
                )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `picture()` to a file, making its folders where they are missing; returns the path.

        Args:
            path: the file, such as "sheet.png"; the end of its name says which kind.

        Raises:
            ValueError: the end of the name is none that pictures are written as, or as in `picture`.
            OSError: it can't be written.
        """
        path = checked_path(path)
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return save_image(self.picture(), path)


def interpolate(
    pipeline: DDPMPipeline,
    x_0_a: Any,
    x_0_b: Any,
    t: int | Sequence[int],
    num_images: int = 9,
    seed: int = 0,
    num_inference_steps: int | None = None,
) -> Sheet:
    """Latent interpolation of two images, Ho et al. 2020, section 4.4.

        x̄_t = (1 − λ) x_t^a + λ x_t^b,   x_t^a, x_t^b ~ q(x_t | x_0) with one ε;   x̄_0 ~ p_θ(x_0 | x̄_t)

    As both images get the same ε, the noise in x̄_t has the variance 1 − ᾱ_t that it has to have, for every λ.
    The steps back share their noise too, over all λ. λ = 0 and 1 give reconstructions of the two images, not
    the images.

    Args:
        pipeline: the model, with the sampler `DDPMScheduler`.
        x_0_a: an image: a PIL image, or an array or a tensor of (C, H, W), (H, W, C) or (H, W), uint8 or
            floating point in [−1, 1].
        x_0_b: the other image.
        t: zero-based step of the training process to interpolate at, or several, a row each.
        num_images: λ = 0, ..., 1 in even steps, at least 2.
        seed: of all noise.
        num_inference_steps: as in `DDPMPipeline.denoise`.

    Returns:
        A row for each t: image a, the interpolations, image b.

    Raises:
        ValueError: fewer than 2 images, images of two shapes, or what `denoise` refuses.
    """
    _check_pipeline(pipeline)
    check_count("num_images", num_images, 2)
    x_0_a, x_0_b = (_one_image(image, pipeline) for image in (x_0_a, x_0_b))
    if x_0_a.shape != x_0_b.shape:
        shapes = f"{tuple(x_0_a.shape)} and {tuple(x_0_b.shape)}"
        raise ValueError(f"the images have shapes {shapes}; allowed: one (C, H, W)")
    steps = _steps(t, pipeline.process)
    noise = _noise(seed, [0], x_0_a)[0].to(pipeline.device)
    weights, places = torch.linspace(0, 1, num_images).view(-1, 1, 1, 1).to(noise), [0] * num_images
    rows = []
    for step in steps:
        a, b = (pipeline.process.q_sample(x_0.to(noise), noise, step) for x_0 in (x_0_a, x_0_b))
        mixed = torch.lerp(a, b, weights)
        decoded = _denoise(pipeline, mixed, step, seed, places, num_inference_steps)
        rows.append(torch.cat([x_0_a[None].cpu().float(), decoded, x_0_b[None].cpu().float()]))
    columns = ["A", *(f"λ = {weight:.3g}" for weight in weights.flatten().tolist()), "B"]
    return Sheet(torch.stack(rows), columns, [f"t = {step}" for step in steps])


def encode_decode(
    pipeline: DDPMPipeline,
    images: Any,
    timesteps: Sequence[int],
    seed: int = 0,
    num_inference_steps: int | None = None,
) -> Sheet:
    """Images noised to some steps, what the network sees in them, and a draw of p_θ(x_0 | x_t).

    Details that x_t has lost are blurred in x̂_0, and made up anew in the decoded image; if so few steps are
    asked for that t is the only one, the decoded image is x̂_0, clipped as the scheduler says. Of D pixels of
    variance 1, x_t tells at most D/2 · log2(1 + SNR_t) bits, so at t = T − 1 the decoded image must not
    resemble the first.

    Args:
        pipeline: the model, with the sampler `DDPMScheduler`.
        images: PIL images, arrays or tensors, one or more, as in `DDPMPipeline.bits_per_dim`, but that
            floating-point numbers are any in [−1, 1].
        timesteps: zero-based steps of the training process, a column each.
        seed: of all noise; image i's depends on (seed, i), and is the same at every step.
        num_inference_steps: as in `DDPMPipeline.denoise`.

    Returns:
        Three rows for each image, x_t, x̂_0 (not clipped) and the decoded image, each after the image itself.

    Raises:
        ValueError: a step that the process doesn't have, images of another shape than the model's, or another
            sampler.
    """
    _check_pipeline(pipeline)
    images = as_pictures(images, pipeline.shape_or_none)
    steps, places = _steps(timesteps, pipeline.process), range(len(images))
    noise = _noise(seed, places, images[0]).to(pipeline.device)
    x_0 = images.to(noise)
    columns = [x_0.cpu().float().expand(3, *x_0.shape)]
    for step in steps:
        x_t = pipeline.process.q_sample(x_0, noise, step)
        predicted = pipeline.predict_x0(x_t, step)
        decoded = _denoise(pipeline, x_t, step, seed, places, num_inference_steps)
        columns.append(torch.stack([x_t.cpu(), predicted.cpu(), decoded]))
    return _sheet(columns, ["image", *(f"t = {step}" for step in steps)], ["x_t", "x̂_0", "decoded"])


def progressive_generation(
    pipeline: DDPMPipeline,
    num_images: int = 4,
    num_columns: int = 8,
    seed: int = 0,
    num_inference_steps: int | None = None,
) -> Sheet:
    """Images as they come to be: x_t and the predicted x̂_0 while t falls, Ho et al. 2020, section 4.3.

    Args:
        pipeline: the model, with the sampler `DDPMScheduler`.
        num_images: how many, two rows each.
        num_columns: how many of the executed steps are shown, evenly spread; the image comes after them.
        seed: of all noise; image i is that of (seed, i) of `hf-ddpm sample`.
        num_inference_steps: as in a call of the pipeline.

    Returns:
        Two rows for each image, x_t and x̂_0 (not clipped); the last column is the image.

    Raises:
        ValueError: a number out of range, or another sampler.
    """
    _check_pipeline(pipeline)
    check_count("num_images", num_images)
    shape, _, total = pipeline.check_inputs(num_images, None, num_inference_steps, "pt")
    visited = [int(step) for step in pipeline.scheduler.timesteps]  # type: ignore[attr-defined]
    shown = [visited[place] for place in _spread(num_columns, total)]
    generators = image_generators(seed, range(num_images))
    x_t = _normal(shape, generators).to(pipeline.device)
    seen = {visited[0]: x_t}

    def watch(owner: Any, step: int, t: Tensor, kept: dict[str, Tensor]) -> None:
        if step + 1 < total and visited[step + 1] in shown:
            seen[visited[step + 1]] = kept["sample"]

    images = pipeline.denoise(x_t, visited[0], generators, num_inference_steps, callback_on_step_end=watch)
    columns = [torch.stack([seen[t], pipeline.predict_x0(seen[t], t)]).cpu().float() for t in shown]
    columns.append(images.cpu().float().expand(2, *images.shape))
    return _sheet(columns, [*(f"t = {t}" for t in shown), "image"], ["x_t", "x̂_0"])


def forward_process(process: DiffusionProcess, images: Any, num_columns: int = 8, seed: int = 0) -> Sheet:
    """Images on their way to noise: x_t ~ q(x_t | x_0) with one ε for all t, Ho et al. 2020, eq. 4.

    Args:
        process: such as `pipeline.process`.
        images: as in `encode_decode`, with 1, 3 or 4 channels where they are no tensor (B, C, H, W).
        num_columns: steps shown, evenly spread from 0 to T − 1.
        seed: of the noise; image i's depends on (seed, i).

    Returns:
        A row for each image, the image first.

    Raises:
        ValueError: a number of columns that the process doesn't have, or no such images.
    """
    if not isinstance(process, DiffusionProcess):
        raise ValueError(f"process is {described(process)}; allowed: a DiffusionProcess, as pipeline.process")
    images = as_pictures(images)
    steps, noise = _spread(num_columns, len(process)), _noise(seed, range(len(images)), images[0])
    x_0 = images.cpu().float()
    columns = [x_0, *(process.q_sample(x_0, noise, t) for t in steps)]
    labels = ["image", *(f"t = {process.timesteps[t]}" for t in steps)]
    return Sheet(torch.stack(columns, 1).float(), labels, [f"image {i}" for i in range(len(images))])


def draw_interpolation(
    model: str | os.PathLike[str],
    image_a: str | os.PathLike[str],
    image_b: str | os.PathLike[str],
    out: str | os.PathLike[str],
    timesteps: Sequence[int] | None = None,
    num_images: int = 9,
    seed: int = 0,
    steps: int | None = None,
    image_column: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Interpolate two images into a PNG file, on one process; returns its path.

    Args:
        model: pipeline folder or Hub id.
        image_a: an image file, or DATASET:SPLIT:ROW, see `open_image`.
        image_b: the other image.
        out: the PNG file.
        timesteps: steps to interpolate at, a row each; by default T/4, T/2 and 3T/4.
        num_images: see `interpolate`.
        seed: see `interpolate`.
        steps: K sampling steps for the whole process, by default all T.
        image_column: column of the images in the data sets, by default the only one.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ValueError: a bad argument, model or image, or a file that can't be written or is there already.
        OSError: the file can't be written after all.
    """
    model, image_a, image_b, out = (
        as_text(what, name)
        for what, name in (("model", model), ("image", image_a), ("image", image_b), ("out", out))
    )
    path = check_out(out, (image_a, image_b), overwrite)
    pipeline = DDPMPipeline.from_pretrained(model).to(process_state().device)
    reading = trained_reading(model)
    a, b = (open_image(name, pipeline.image_shape, image_column, **reading) for name in (image_a, image_b))
    pipeline.progress_bar = functools.partial(along, "interpolate")  # type: ignore[method-assign]
    total = len(pipeline.process)
    chosen = timesteps or list(dict.fromkeys(total * quarter // 4 for quarter in (1, 2, 3)))
    try:
        sheet = interpolate(pipeline, to_float(a), to_float(b), chosen, num_images, seed, steps)
    except ValueError as error:
        # The command's name for it
        raise ValueError(str(error).replace("num_inference_steps", "steps")) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path):
        check_out(out, (image_a, image_b), overwrite)  # another command may have written it meanwhile
        return sheet.save(path)


def draw_inpainting(
    model: str | os.PathLike[str],
    image: str | os.PathLike[str],
    mask: str | os.PathLike[str],
    out: str | os.PathLike[str],
    steps: int | None = None,
    resample: int = 10,
    class_labels: int | str | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: Sequence[float] | None = None,
    seed: int = 0,
    image_column: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Fill a part of an image into a PNG file, on one process; returns its path.

    Args:
        model: pipeline folder or Hub id.
        image: an image file, or DATASET:SPLIT:ROW, see `open_image`.
        mask: an image file, white where pixels are filled.
        out: the PNG file.
        steps: K, by default all T.
        resample: see `DDPMPipeline.inpaint`, and so the next three.
        class_labels: the class of the image.
        guidance_scale: w.
        guidance_interval: the steps that are guided.
        seed: of all noise.
        image_column: column of the images in the data set, by default the only one.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ValueError: a bad argument, model, image or mask, or a file that can't be written or is there already.
        OSError: the file can't be written after all.
    """
    model, image, mask, out = (
        as_text(what, name)
        for what, name in (("model", model), ("image", image), ("mask", mask), ("out", out))
    )
    check_seed(seed)
    path = check_out(out, (image, mask), overwrite)
    masked = open_mask(mask)
    pipeline = DDPMPipeline.from_pretrained(model).to(process_state().device)
    pixels = open_image(image, pipeline.image_shape, image_column, **trained_reading(model))
    pipeline.progress_bar = functools.partial(along, "inpaint")  # type: ignore[method-assign]
    try:
        found = pipeline.inpaint(
            to_float(pixels)[None],
            masked,
            resample=resample,
            generator=image_generators(seed, range(1)),
            num_inference_steps=steps,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,  # type: ignore[arg-type]
        )
    except ValueError as error:
        # The command's name for it
        raise ValueError(str(error).replace("num_inference_steps", "steps")) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path):
        check_out(out, (image, mask), overwrite)  # another command may have written it meanwhile
        return save_image(found.images[0], path)  # type: ignore[union-attr]


def _check_pipeline(pipeline: Any) -> None:
    """Refuse what is no pipeline of this package, as when arguments come in another order."""
    if not isinstance(pipeline, DDPMPipeline):
        raise ValueError(f"pipeline is {described(pipeline)}; allowed: a DDPMPipeline")


def _one_image(image: Any, pipeline: DDPMPipeline) -> Tensor:
    """One image in any form as (C, H, W)."""
    if isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point():
        return as_pictures(image[None])[0]
    found = as_pictures(image, pipeline.shape_or_none)
    if len(found) != 1:
        raise ValueError(f"there are {len(found)} images where one is interpolated; allowed: one (C, H, W)")
    return found[0]


def _steps(t: Any, process: DiffusionProcess) -> list[int]:
    """The steps as a list, each one checked before any work."""
    several = isinstance(t, Iterable) and not isinstance(t, str) and getattr(t, "ndim", 1) > 0
    steps: list[Any] = [step.item() if isinstance(step, Tensor) else step for step in (t if several else [t])]
    if not steps:
        raise ValueError(f"t is empty; allowed: steps in 0..{len(process) - 1}")
    for step in steps:
        if not isinstance(step, Integral) or isinstance(step, bool) or step not in range(len(process)):
            raise ValueError(f"t is {described(step)}; allowed: steps in 0..{len(process) - 1}")
    return [int(step) for step in steps]


def _spread(count: int, total: int) -> list[int]:
    """`count` places of `total`, evenly, with the first and the last."""
    if not isinstance(count, Integral) or isinstance(count, bool) or not 1 <= count <= total:
        raise ValueError(f"num_columns is {described(count)}; allowed: whole numbers in 1..{total}")
    return torch.linspace(0, total - 1, count, dtype=torch.float64).round().int().tolist()


def _generators(use: Use, seed: int, places: Sequence[int]) -> list[torch.Generator]:
    """A generator for each place, on the CPU."""
    return [torch.Generator().manual_seed(derive_seed(use, seed, place)) for place in places]


def _normal(shape: Sequence[int], generators: list[torch.Generator]) -> Tensor:
    """Standard normal noise by each generator, (B, C, H, W), float32, the same on every device."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def _noise(seed: int, places: Sequence[int], like: Tensor) -> Tensor:
    """The ε of x_t at each place, (B, C, H, W), float32."""
    return _normal(like.shape, _generators(Use.PICTURE_NOISE, seed, places))


def _denoise(
    pipeline: DDPMPipeline, x_t: Tensor, t: int, seed: int, places: Sequence[int], steps: int | None
) -> Tensor:
    """Algorithm 2 from step t on, with the noise of each place, float32, on the CPU."""
    generators = _generators(Use.PICTURE_STEPS, seed, places)
    return pipeline.denoise(x_t, t, generators, steps).cpu().float()


def _sheet(columns: Sequence[Tensor], labels: list[str], kinds: list[str]) -> Sheet:
    """A sheet that has K rows for each of B images, from its columns (K, B, C, H, W)."""
    rows = torch.stack(list(columns), 2).transpose(0, 1)
    return Sheet(rows.flatten(0, 1), labels, kinds * len(rows))

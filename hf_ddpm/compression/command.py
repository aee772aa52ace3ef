"""What `hf-ddpm compress` and `hf-ddpm decompress` do: files in, files out, and a few lines about sizes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hf_ddpm.compression.codec import Sizes, compress, decompress
from hf_ddpm.compression.coder import load_constriction
from hf_ddpm.compression.container import Side
from hf_ddpm.compression.images import check_out, open_images, png_bytes, write_images
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.runtime.disk import why_not_writable
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.shown import count


def compress_files(
    model: str,
    images: Sequence[str],
    out: str,
    steps: int | None = None,
    batch: int = 8,
    dtype: str = "float64",
    verify: bool = False,
    overwrite: bool = False,
) -> Iterator[str]:
    """Compress images into a file.

    Args:
        model: folder of a pipeline, or its Hub id.
        images: see `images.open_images`.
        out: the file to write.
        steps: as in `compress`, like the next two.
        batch: see there.
        dtype: see there.
        verify: decompress the file afterwards, and compare every pixel.
        overwrite: whether a file that is there may be replaced.

    Returns:
        Lines that say what has been done.

    Raises:
        ValueError: a bad argument, model or image, or a file that is there already.
        OSError: the file can't be written.
    """
    load_constriction()
    path = Path(out).expanduser()
    reason = "Is a directory" if path.is_dir() else why_not_writable(path.parent)
    if reason:
        raise ValueError(f"out {out!r} can't be written: {reason}")
    if path.exists() and not overwrite:
        raise ValueError(f"out {out!r} is there already; allowed: another file, or --overwrite")
    pipeline = DDPMPipeline.from_pretrained(model).to(process_state().device)
    found = open_images(images, pipeline.image_shape)
    side = found.side
    sizes = compress(
        pipeline,
        found.images,
        path,
        steps=steps,
        batch=batch,
        dtype=dtype,
        names=side.names,
        labels=side.labels,
        classes=side.classes,
        overwrite=overwrite,
    )
    yield from describe(sizes, found.images)
    if verify:
        again = decompress(pipeline, path)
        same = np.array_equal(again.images.numpy(), found.images)
        if not (same and (again.names, again.labels) == (side.names, side.labels)):
            raise RuntimeError(f"{out!r} does not decompress to the images; please report this")
        yield f"verified: every pixel came back, {len(found.images) / again.seconds:.3g} images/s"
    yield f"file: {path}"


def describe(sizes: Sizes, images: np.ndarray) -> Iterator[str]:
    """Lines about what a file came to, against raw pixels and PNG files as small as Pillow makes them."""
    shape = "x".join(map(str, images.shape[1:]))
    yield (
        f"{count(sizes.images, 'image')} of {shape} (C, H, W): {sizes.file:,} bytes, {sizes.bpd:.3f} "
        f"bits/dim, and of these bytes {sizes.names:,} are names and labels"
    )
    if sizes.net_images:
        yield f"by the model alone: {sizes.net_bpd:.3f} bits/dim"
    raw = images.size
    against = f"{raw:,} bytes raw ({raw / sizes.file:.2f} times as many)"
    if images.shape[1] <= 4:
        pngs = sum(len(png_bytes(image)) for image in images)
        against += f", {pngs:,} bytes as PNG files ({pngs / sizes.file:.2f} times)"
    yield f"{against}; {sizes.images / sizes.seconds:.3g} images/s"


def decompress_file(model: str, file: str, out: str, force: bool = False) -> Iterator[str]:
    """Write the images of a file.

    Args:
        model: folder of the pipeline that they were compressed with, or its Hub id.
        file: the file.
        out: a folder for PNG files that is new or empty, or a parquet file that is not there yet.
        force: as in `decompress`.

    Returns:
        Lines that say what has been done.

    Raises:
        ValueError: a bad argument, file or model.
        OSError: the images can't be written.
    """
    load_constriction()
    path = check_out(out)
    pipeline = DDPMPipeline.from_pretrained(model).to(process_state().device)
    found = decompress(pipeline, file, force=force)
    write_images(path, found.images.numpy(), Side(found.names, found.labels, found.classes))
    number = len(found.images)
    speed = f"{number / found.seconds:.3g} images/s"
    yield f"{count(number, 'image')} in {path}, as compressed to the last bit, {speed}"

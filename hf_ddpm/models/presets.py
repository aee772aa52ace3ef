"""Networks by name: the presets, and how one is chosen and made for images of a given size.

The presets are the U-Nets of Ho et al. 2020, smaller ones for less time and fewer images, and the
autoencoders of the SDDPM article (autoencoders.py). The file knows shapes and layouts. It deliberately does
not know what the output means (parametrization.py), nor how a network is trained or saved.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.models.modeling_utils import ModelMixin

from hf_ddpm.denoiser import MAX_CLASSES
from hf_ddpm.models.networks import NETWORKS
from hf_ddpm.spelling import did_you_mean, suggest_keywords


def unet_config(
    size: int, channels: int, widths: tuple[int, ...], *, attention_at: int, **others: Any
) -> dict[str, Any]:
    """Config of a `UNet2DModel`; keys not named here are as in google/ddpm-cifar10-32.

    Args:
        size: side of the square images.
        channels: C.
        widths: channels of each level, from full resolution down, each level half as large.
        attention_at: side of the level whose residual blocks attend; the middle block always does.
        **others: further keys of the config.
    """
    attends = [size >> level == attention_at for level in range(len(widths))]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "layers_per_block": 2,
        "dropout": 0.0,
        "attention_head_dim": None,  # one head as wide as its level; diffusers' default of 8 means many heads
        "downsample_padding": 0,  # TensorFlow's SAME at stride 2: one row and column of zeros at the far side
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    } | others


def _autoencoders(name: str, network: str, **layers: Any) -> dict[str, dict[str, Any]]:
    """An autoencoder's preset for 8x8 grey images, and under NAME-t its variant that is told t."""
    config = {"_class_name": network, "sample_size": 8, "in_channels": 1, "out_channels": 1, **layers}
    return {name: config, f"{name}-t": config | {"time_conditioned": True}}


AUTO = "auto"  # in place of a preset's name: the one for the size of the images


class UNet(NamedTuple):
    """A U-Net's preset.

    Attributes:
        name: what it is called.
        size: side of its images, which any multiple of 2^(levels − 1) may replace.
        channels: of its images, which any number may replace.
        widths: channels of each level, from full resolution down, each level half as large.
        blocks: residual blocks of each level on the way down.
        attention_at: side of the level that attends; the middle block always does.
        up_to: the longest side of square images for which `AUTO` takes it; None for never.
        reason: why it is as it is.
        others: further keys of its config.
    """

    name: str
    size: int
    channels: int
    widths: tuple[int, ...]
    blocks: int
    attention_at: int
    up_to: float | None
    reason: str
    others: dict[str, Any] = {}  # noqa: RUF012  a tuple's default is never changed


# The table of U-Nets. `AUTO` takes the small ones, whose step of 64 images takes seconds on 2 CPU cores, not
# minutes (measured in tests/benchmarks/README.md); with a GPU and many images, the paper's are asked for by
# name.
UNETS = (
    UNet("cifar10", 32, 3, (128, 256, 256, 256), 2, 16, None, "the paper's for CIFAR-10", {"dropout": 0.1}),
    UNet("256", 256, 3, (128, 128, 256, 256, 512, 512), 2, 16, None, "the paper's for LSUN and CelebA-HQ"),
    UNet("fashion-mnist", 28, 1, (32, 64, 64), 1, 7, 28, "the lowest loss for its CPU time of 8 U-Nets"),
    UNet("digits", 8, 1, (32, 32), 1, 4, 16, "two levels, as a third would be 2x2", {"norm_num_groups": 8}),
    UNet("tiny", 8, 1, (8, 16), 1, 4, None, "the least that runs, for tests", {"norm_num_groups": 4}),
    UNet("small-32", 32, 3, (32, 64, 128, 128), 1, 8, 48, "fast on CPUs, and its last level, 4x4, sees all"),
    UNet(
        "small-64", 64, 3, (32, 64, 128, 192), 1, 16, 96, "fast on CPUs: few channels where pixels are many"
    ),
    UNet("small-128", 128, 3, (32, 32, 64, 128, 256), 1, 16, 192, "as small-64, with a level more"),
    UNet(
        "small-256", 256, 3, (32, 32, 32, 64, 128, 256), 1, 16, math.inf, "as small-64, with two levels more"
    ),
)

# Configs by name, with diffusers' key for the class. `dropout` acts as in the paper: before the second
# convolution of every residual block, the middle's too, and nowhere in attention (read in diffusers 0.42.1,
# kept true by tests/models/test_presets.py).
PRESETS: dict[str, dict[str, Any]] = {
    **{
        row.name: unet_config(
            row.size,
            row.channels,
            row.widths,
            attention_at=row.attention_at,
            layers_per_block=row.blocks,
            **row.others,
        )
        for row in UNETS
    },
    # The SDDPM article's: 30 units at the narrowest, and without -t the network doesn't see the step.
    **_autoencoders("shallow-autoencoder", "DenseAutoencoder", hidden_sizes=(30,)),
    **_autoencoders("deep-autoencoder", "DenseAutoencoder", hidden_sizes=(128, 64, 30, 64, 128)),
    **_autoencoders("conv-autoencoder", "ConvAutoencoder", conv_channels=(16, 32), hidden_size=30),
}


def names_preset(name: str) -> bool:
    """Whether a name is meant as a preset's, and not as that of a pipeline's folder or of one on the Hub."""
    return name in (AUTO, *PRESETS) or not ("/" in name or Path(name).is_dir())


def size_multiple(preset: str) -> int:
    """The number whose multiples the sides of a preset's images are: 2^(levels − 1) of a U-Net, else 1."""
    config = PRESETS[preset]
    return 2 ** (len(config["block_out_channels"]) - 1) if config["_class_name"] == "UNet2DModel" else 1


def choose_preset(height: int, width: int) -> UNet | None:
    """The preset that `AUTO` stands for: by the area of the images, and by what can halve them.

    Args:
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        The preset for such images; the one below it, if these can be halved as often as that asks for, but
        not as often as the larger asks for; None if they can't be halved as often as either.
    """
    return next((row for row in _candidates(height, width) if takes(row.name, height, width)), None)


def nearest_sizes(preset: str, height: int, width: int) -> list[tuple[int, int]]:
    """The sizes nearest to this one that a preset takes: this one alone, or a smaller and a larger one.

    Args:
        preset: a name in `PRESETS`, or `AUTO`.
        height: of the images, in pixels.
        width: of the images, in pixels.
    """
    row = _candidates(height, width)[-1].name if preset == AUTO else preset
    if takes(preset, height, width):
        return [(height, width)]
    found = set()
    for whole in (math.floor, math.ceil):
        # `AUTO` may take a larger network for the larger image, which asks for a larger multiple
        for multiple in (size_multiple(row) * 2**more for more in range(3)):
            near = tuple(max(whole(side / multiple), 1) * multiple for side in (height, width))
            if takes(preset, *near):
                found.add(near)
                break
    return sorted(found)


def _candidates(height: int, width: int) -> list[UNet]:
    """The row of the table for a size, and the row for smaller ones."""
    rows = sorted((row for row in UNETS if row.up_to is not None), key=_up_to)
    place = next(i for i, row in enumerate(rows) if height * width <= _up_to(row) ** 2)
    return [rows[place], *rows[max(place - 1, 0) : place]]


def _up_to(row: UNet) -> float:
    return 0 if row.up_to is None else row.up_to


def takes(preset: str, height: int, width: int) -> bool:
    """Whether a preset, or one that `AUTO` stands for, takes images of a size."""
    if preset == AUTO:
        return choose_preset(height, width) is not None
    multiple = size_multiple(preset)
    return height % multiple == 0 and width % multiple == 0


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@suggest_keywords
def create_model(
    preset: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    out_channels: int | None = None,
    dropout: float | None = None,
    num_classes: int | None = None,
) -> ModelMixin:
    """A freshly initialised network of `NETWORKS`. Arguments left at None are as in the preset.

    Args:
        preset: a name in `PRESETS`.
        image_size: side, or (height, width). A U-Net takes multiples of 2^(levels − 1), and attends at the
            same levels.
        channels: C of the images.
        out_channels: channels of the output, C (the default) or 2C for learned variances.
        dropout: probability in [0, 1); autoencoders have none.
        num_classes: C' classes, for a network that is called as (x_t, t, class_labels), class_labels of
            shape (B,), int64. It has C' + 1 rows of an embedding (`num_class_embeds` of its config): classes
            are 0 to C' − 1, and C' is "no class", for which diffusers has no convention.

    Raises:
        ValueError: an argument is not as above; the message names it and what is allowed.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS)
        raise ValueError(f"preset {preset!r} is unknown{hint}; allowed: {', '.join(PRESETS)}")
    config = dict(PRESETS[preset])
    network = NETWORKS[config.pop("_class_name")]

    if image_size is not None:
        sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
        multiple = size_multiple(preset)
        possible = len(sides) == 2 and all(map(_is_positive_int, sides))
        if not possible or not takes(preset, *sides):
            near = nearest_sizes(preset, *sides) if possible else []
            such = " or ".join(str(size[0] if isinstance(image_size, int) else size) for size in near)
            raise ValueError(
                f"image_size is {image_size!r}; allowed for {preset!r}: a positive multiple of {multiple}, "
                f"or a pair (height, width) of them{such and f', such as {such}'}"
            )
        config["sample_size"] = image_size
    if channels is not None:
        if not _is_positive_int(channels):
            raise ValueError(f"channels is {channels!r}; allowed: a positive integer")
        config["in_channels"] = config["out_channels"] = channels
    if out_channels is not None:
        allowed = (config["in_channels"], 2 * config["in_channels"])
        if not _is_positive_int(out_channels) or out_channels not in allowed:
            raise ValueError(f"out_channels is {out_channels!r}; allowed: one of {allowed} (C or 2C)")
        config["out_channels"] = out_channels
    if dropout is not None:
        if "dropout" not in config:
            raise ValueError(f"dropout is {dropout!r}, but {preset!r} has none; allowed: none")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; allowed: a probability in [0, 1)")
        config["dropout"] = float(dropout)
    if num_classes is not None:
        if not _is_positive_int(num_classes) or num_classes > MAX_CLASSES:
            raise ValueError(
                f"num_classes is {num_classes!r}; allowed: a whole number of 1 to {MAX_CLASSES} classes"
            )
        config["num_class_embeds"] = num_classes + 1
    return network(**config)

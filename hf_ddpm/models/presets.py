"""Networks by name: the presets, and how one is made for images of a given size.

The presets are the U-Nets of Ho et al. 2020 and the autoencoders of the SDDPM article (autoencoders.py). The
file knows shapes and layouts. It deliberately does not know what the output means (parametrization.py),
nor how a network is trained or saved.
"""

from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel

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


# Configs by name, with diffusers' key for the class. `dropout` acts as in the paper: before the second
# convolution of every residual block, the middle's too, and nowhere in attention (read in diffusers 0.42.1,
# kept true by tests/models/test_presets.py).
PRESETS: dict[str, dict[str, Any]] = {
    # Ho et al. 2020, appendix B: CIFAR-10, and LSUN and CelebA-HQ.
    "cifar10": unet_config(32, 3, (128, 256, 256, 256), attention_at=16, dropout=0.1),  # 35.7M
    "256": unet_config(256, 3, (128, 128, 256, 256, 512, 512), attention_at=16),  # 114M
    # Ours, small enough for 2 CPU cores: levels 28-14-7 and 8-4; `tiny` is for tests.
    # 1.1M: it had the lowest loss for its time among the widths and depths in tests/benchmarks/README.md.
    "fashion-mnist": unet_config(28, 1, (32, 64, 64), attention_at=7, layers_per_block=1),
    "digits": unet_config(8, 1, (32, 32), attention_at=4, layers_per_block=1, norm_num_groups=8),  # 0.3M
    "tiny": unet_config(8, 1, (8, 16), attention_at=4, layers_per_block=1, norm_num_groups=4),
    # The SDDPM article's: 30 units at the narrowest, and without -t the network doesn't see the step.
    **_autoencoders("shallow-autoencoder", "DenseAutoencoder", hidden_sizes=(30,)),
    **_autoencoders("deep-autoencoder", "DenseAutoencoder", hidden_sizes=(128, 64, 30, 64, 128)),
    **_autoencoders("conv-autoencoder", "ConvAutoencoder", conv_channels=(16, 32), hidden_size=30),
}


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
) -> ModelMixin:
    """A freshly initialised network of `NETWORKS`. Arguments left at None are as in the preset.

    Args:
        preset: a name in `PRESETS`.
        image_size: side, or (height, width). A U-Net takes multiples of 2^(levels − 1), and attends at the
            same levels.
        channels: C of the images.
        out_channels: channels of the output, C (the default) or 2C for learned variances.
        dropout: probability in [0, 1); autoencoders have none.

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
        multiple = 2 ** (len(config["block_out_channels"]) - 1) if network is UNet2DModel else 1
        if len(sides) != 2 or not all(_is_positive_int(side) and side % multiple == 0 for side in sides):
            raise ValueError(
                f"image_size is {image_size!r}; allowed for {preset!r}: a positive multiple of {multiple}, "
                "or a pair (height, width) of them"
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
    return network(**config)

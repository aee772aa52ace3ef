"""Autoencoders with 30 hidden units as denoisers, the SDDPM article's: shallow, multi-layer, convolutional.

    ε_r(x_t) = decode(encode(x_t)),    answer m = x_t + ε_r(x_t)

The article's networks see x_t and not t. With `time_conditioned`, t shifts every hidden layer and scales x_t:
the mean μ̃_t contains c_t x_t, and x_t − c_t x_t is more than what passes 30 units. "30 hidden units" is the
narrowest layer, in all three; layers around it and the activation (SiLU, diffusers' habit) are our choice.
The file knows layers and shapes. What the answer means is parametrization.py's.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = 30  # units of the narrowest layer in the article
FREQUENCIES, EMBEDDING = 64, 128  # t becomes 64 sines and cosines, then 128 numbers that layers are given


class Autoencoder(ModelMixin, ConfigMixin):
    """Base of the autoencoders: everything but the layers between x_t and ε_r."""

    def _set_up(self, widths: list[int]) -> None:
        """Check the config and make the layers that are told t; `widths` are the hidden layers' in order."""
        config: Any = self.config
        size = config.sample_size
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2 or not all(map(_is_count, sides)):
            raise ValueError(f"sample_size is {size!r}; allowed: a positive whole number, or a pair of them")
        channels, answers = config.in_channels, config.out_channels
        if not _is_count(channels):
            raise ValueError(f"in_channels is {channels!r}; allowed: a positive whole number")
        if answers not in (channels, 2 * channels):
            raise ValueError(f"out_channels is {answers!r}; allowed: {channels} or {2 * channels} (C or 2C)")
        if not widths or not all(map(_is_count, widths)):
            raise ValueError(
                f"hidden layers are {widths!r} wide; allowed: one or more positive whole numbers"
            )
        self.image_shape: tuple[int, int, int] = (channels, *sides)
        self.time = _Time(widths, config.residual) if config.time_conditioned else None
        rows = config.num_class_embeds
        if rows is not None and not _is_count(rows):
            raise ValueError(f"num_class_embeds is {rows!r}; allowed: None, or a positive whole number")
        self._widths = widths
        # As in diffusers' U-Net a class is added to the embedding of t; without one, to each hidden layer
        size_of_row = EMBEDDING if config.time_conditioned else sum(widths)
        self.class_embedding = None if rows is None else nn.Embedding(rows, size_of_row)

    def _layers(self, x_t: Tensor, shifts: Sequence[Tensor | None]) -> Tensor:
        """ε_r, shape (B, out_channels, H, W); `shifts[i]` (B, width) is added to the i-th hidden layer."""
        raise NotImplementedError

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The answer to x_t, called and returned as by diffusers' `UNet2DModel`.

        Args:
            sample: x_t, shape (B, C, H, W) with C, H and W of the config.
            timestep: t of all, or of each example, shape (B,); not looked at unless `time_conditioned`.
            class_labels: the class of each example, shape (B,), int64; needed by a network that has classes.
            return_dict: return an object with `.sample`, or a tuple of it.

        Raises:
            ValueError: images of another shape; classes missing, or given to a network that has none.
        """
        if sample.ndim != 4 or sample.shape[1:] != self.image_shape:
            raise ValueError(
                f"x_t has shape {tuple(sample.shape)}; allowed for this {type(self).__name__}: "
                f"(B, {', '.join(map(str, self.image_shape))})"
            )
        if (class_labels is None) != (self.class_embedding is None):
            has = "has no classes" if self.class_embedding is None else "needs a class for each image"
            raise ValueError(f"class_labels is {class_labels!r}, but this network {has}")
        of_class = None if self.class_embedding is None else self.class_embedding(class_labels)
        kept, shifts = sample, [None] * len(self._widths)  # one for each hidden layer
        if self.time is not None:
            steps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
            shifts, gain = self.time(steps, sample.dtype, of_class)
            kept = sample if gain is None else sample + gain * sample
        elif of_class is not None:
            shifts = of_class.split(self._widths, dim=1)
        answer = self._layers(sample, shifts)
        if self.config["residual"]:
            mean, *variance = answer.split(sample.shape[1], dim=1)  # a learned variance is no image
            answer = torch.cat([kept + mean, *variance], dim=1)
        return UNet2DOutput(sample=answer) if return_dict else (answer,)


class DenseAutoencoder(Autoencoder):
    """Fully connected layers: one of 30 units (shallow), or several with 30 in the middle (multi-layer).

    Args:
        sample_size: side of the images, or (height, width); any, but the network takes no other.
        in_channels: C.
        out_channels: C, or 2C for learned variances.
        hidden_sizes: units of each hidden layer.
        residual: answer x_t + ε_r(x_t), not ε_r(x_t).
        time_conditioned: tell the network t.
        num_class_embeds: rows of the table of classes, one for each and one for "no class"; None for a
            network without classes.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 8,
        in_channels: int = 1,
        out_channels: int = 1,
        hidden_sizes: tuple[int, ...] = (HIDDEN,),
        residual: bool = True,
        time_conditioned: bool = False,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        widths = list(hidden_sizes)
        self._set_up(widths)
        channels, height, width = self.image_shape
        pixels = height * width
        self.hidden = nn.ModuleList(
            nn.Linear(before, after) for before, after in itertools.pairwise([channels * pixels, *widths])
        )
        self.last = nn.Linear(widths[-1], out_channels * pixels)

    def _layers(self, x_t: Tensor, shifts: Sequence[Tensor | None]) -> Tensor:
        x = x_t.flatten(1)
        for layer, shift in zip(self.hidden, shifts, strict=True):
            x = functional.silu(_shifted(layer(x), shift))
        return self.last(x).view(len(x_t), -1, *x_t.shape[2:])


class ConvAutoencoder(Autoencoder):
    """Convolutions that halve the image, 30 units that see all of what is left, and the way back.

    Args:
        sample_size: side of the images, or (height, width); any, but the network takes no other. Sides are
            halved upwards: 7, 4, 2, 1.
        in_channels: C.
        out_channels: C, or 2C for learned variances.
        conv_channels: channels after each halving.
        hidden_size: units in the middle.
        residual: answer x_t + ε_r(x_t), not ε_r(x_t).
        time_conditioned: tell the network t.
        num_class_embeds: rows of the table of classes, one for each and one for "no class"; None for a
            network without classes.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 8,
        in_channels: int = 1,
        out_channels: int = 1,
        conv_channels: tuple[int, ...] = (16, 32),
        hidden_size: int = HIDDEN,
        residual: bool = True,
        time_conditioned: bool = False,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        channels = list(conv_channels)
        self._set_up([*channels, hidden_size, *channels[::-1]] if channels else [])
        sides = [self.image_shape[1:]]
        for _ in channels:
            sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
        self._sides = sides
        down = [in_channels, *channels]
        up = [*channels[::-1], out_channels]
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in itertools.pairwise(down)
        )
        left = channels[-1] * sides[-1][0] * sides[-1][1]
        self.encode, self.decode = nn.Linear(left, hidden_size), nn.Linear(hidden_size, left)
        self.up = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(up)
        )

    def _layers(self, x_t: Tensor, shifts: Sequence[Tensor | None]) -> Tensor:
        x, left = x_t, iter(shifts)
        for layer in self.down:
            x = functional.silu(_shifted(layer(x), next(left)))
        code = functional.silu(_shifted(self.encode(x.flatten(1)), next(left)))
        x = self.decode(code).view_as(x)
        for layer, size in zip(self.up, self._sides[-2::-1], strict=True):
            x = functional.silu(_shifted(x, next(left)))
            x = layer(functional.interpolate(x, size=size, mode="nearest"))
        return x


class _Time(nn.Module):
    """What t, and a class beside it, adds to each hidden layer, and by how much they scale x_t.

    Before training they don't scale it at all.
    """

    def __init__(self, widths: list[int], residual: bool):
        super().__init__()
        self.sines = Timesteps(FREQUENCIES, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.embed = TimestepEmbedding(FREQUENCIES, EMBEDDING)
        self.shifts = nn.ModuleList(nn.Linear(EMBEDDING, width) for width in widths)
        self.gain = nn.Linear(EMBEDDING, 1) if residual else None
        if self.gain is not None:
            nn.init.zeros_(self.gain.weight)
            nn.init.zeros_(self.gain.bias)

    def forward(
        self, t: Tensor, dtype: torch.dtype, of_class: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        embedded = self.embed(self.sines(t).to(dtype))
        embedded = functional.silu(embedded if of_class is None else embedded + of_class)
        gain = None if self.gain is None else self.gain(embedded).view(-1, 1, 1, 1)
        return [layer(embedded) for layer in self.shifts], gain


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """The layer's values with a number added to each unit or channel."""
    return x if shift is None else x + shift.view(*shift.shape, *[1] * (x.ndim - 2))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

"""Feature networks: uint8 images become features, which distances.py compares.

A number means nothing without its network, so every network has a name: "inception-v3", or a name and a hash
of its weights and of how it prepares images. transformers and torchmetrics are imported when used; no pickle
of a model that a user names is read, and no code of a repository is run.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from hf_ddpm.runtime.hub import asking_the_hub, looks_like_path, or_near
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.shown import fields_line

INCEPTION = "inception-v3"

# The settings of an image processor that decide about the pixels that the network sees
PREPARATION = (
    *("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)


@final
@dataclass(frozen=True, eq=False)
class Features:
    """The features of N images, by one network.

    Attributes:
        extractor: the network's name, `Extractor.name`.
        features: shape (N, D), float32, on the CPU.
        logits: class scores before the softmax, shape (N, K), float32, on the CPU; None if there are none.
    """

    extractor: str
    features: Tensor
    logits: Tensor | None = None

    __repr__ = fields_line

    def __post_init__(self) -> None:
        for name, x in self.tensors().items():
            if x.ndim != 2 or x.dtype != torch.float32 or len(x) != len(self.features):
                raise ValueError(f"{name} {tuple(x.shape)} {x.dtype}; allowed: float32 (N, D), (N, K)")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: "features", and "logits" if there are any."""
        return {"features": self.features} | ({} if self.logits is None else {"logits": self.logits})

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice) -> "Features":
        return Features(self.extractor, **{name: x[rows] for name, x in self.tensors().items()})

    @staticmethod
    def cat(parts: "Iterable[Features]") -> "Features":
        """The parts as one set, in their order; `ValueError` if they are of several networks or none."""
        parts = list(parts)
        kinds = {(part.extractor, *(x.shape[1] for x in part.tensors().values())) for part in parts}
        if len(kinds) != 1:
            raise ValueError(f"features of {len(kinds)} kinds; allowed: at least one part, all of a kind")
        names = parts[0].tensors()
        joined = {name: torch.cat([part.tensors()[name] for part in parts]) for name in names}
        return Features(parts[0].extractor, **joined)


@final
@dataclass(frozen=True, eq=False)
class Extractor:
    """A feature network, made by `load_extractor`.

    Attributes:
        name: the label of its numbers: "inception-v3", or a name and a hash of the weights.
        channels: of the images that it takes; None if it doesn't say. Where it takes 3, a grey image is
            repeated.
    """

    name: str
    channels: int | None
    _forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    __repr__ = fields_line

    @torch.no_grad()
    def __call__(self, images_uint8: Tensor) -> Features:
        """Features of one batch.

        Args:
            images_uint8: shape (B, C, H, W), uint8, on any device.

        Raises:
            ValueError: other images, channels that don't fit, or a network that answers with something else.
        """
        shape = tuple(images_uint8.shape)
        if images_uint8.dtype != torch.uint8 or len(shape) != 4 or 0 in shape:
            raise ValueError(f"images are {shape} {images_uint8.dtype}; allowed: uint8 (B, C, H, W)")
        if shape[1] == 1 and self.channels == 3:
            images_uint8 = images_uint8.repeat(1, 3, 1, 1)
        elif self.channels not in (None, shape[1]):
            raise ValueError(f"images have {shape[1]} channels, {self.name} wants {self.channels}")
        try:
            features, logits = self._forward(images_uint8)
            logits = None if logits is None else logits.float().cpu()
            found = Features(self.name, features.float().cpu(), logits)
        except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{self.name} failed on images of shape {shape}: {one_line(error)}") from error
        if len(found) != shape[0]:
            raise ValueError(f"{self.name} made {len(found)} rows of features of {shape[0]} images")
        return found


def load_extractor(source: str | Path | nn.Module, device: str | torch.device = "cpu") -> Extractor:
    """A feature network in eval mode.

    Args:
        source: one of three.
            "inception" is the network of FID. It needs torch-fidelity, which downloads and unpickles its
            weights, and resizes like the TensorFlow code of the published numbers.
            A folder or Hub id is a vision model of transformers with its image processor. Features are its
            pooled output, else the class token, else the mean over places; a classifier gives logits too.
            A module of your own maps uint8 images (B, C, H, W) to (B, D). It is moved to the device and put
            in eval mode.
        device: where it runs.

    Raises:
        ValueError: no such model, an incomplete one, weights that aren't safetensors, or a missing package.
    """
    if isinstance(source, nn.Module):
        module = source.eval().to(device)
        name = f"{type(module).__name__}@{_digest(module.state_dict())}"
        return Extractor(name, None, lambda images: (module(images.to(device)), None))
    if source == "inception":
        return _load_inception(device)
    return _load_transformers(os.fspath(source), device)


def _load_inception(device: str | torch.device) -> Extractor:
    layers = ["2048", "logits_unbiased"]
    fid = torchmetrics_module("fid")
    try:
        network = fid.NoTrainInceptionV3("inception-v3-compat", layers, antialias=False).to(device)
    except ImportError as error:
        raise ValueError("Inception needs torch-fidelity: pip install 'hf_ddpm[eval]'") from error
    # The weights come over the network, so anything may go wrong
    except Exception as error:
        raise ValueError(f"can't load Inception's weights: {one_line(error)}") from error
    return Extractor(INCEPTION, 3, lambda images: network._torch_fidelity_forward(images.to(device)))


def _load_transformers(source: str, device: str | torch.device) -> Extractor:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
    from transformers.utils import logging

    from hf_ddpm.metrics.feature_folders import check_config, check_processor, check_weights, fetch

    path = Path(source).expanduser()
    if not source or (looks_like_path(source) and not path.is_dir()):
        raise ValueError(
            f"no folder {source!r}{or_near(source)}; it looks like a path, so the Hub was not asked"
        )
    if not path.is_dir():
        asking_the_hub(source)
    what = "config"
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        folder = path if path.is_dir() else fetch(source)
        check_config(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        what = "image processor"
        check_processor(folder)
        # Always PIL's, as torchvision's rounds otherwise
        processor: Any = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
        what = "safetensors weights"
        classifies = any(name.endswith("ForImageClassification") for name in config.architectures or [])
        kind: Any = AutoModelForImageClassification if classifies else AutoModel
        check_weights(folder, lambda: kind.from_config(config, trust_remote_code=False))
        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        model, info = kind.from_pretrained(folder, trust_remote_code=False, **options)
    # What transformers, the Hub client and safetensors raise has no common class
    except Exception as error:
        raise ValueError(one_line(f"can't load the {what} of {source!r}: {one_line(error)}")) from error
    finally:
        if bar:
            logging.enable_progress_bar()
    missing = set(info["missing_keys"])
    if lacks := sorted(name for name in missing if "pooler." not in name):
        raise ValueError(f"the weights of {source!r} lack {lacks[0]} and {len(lacks) - 1} more")

    model.eval().to(device)
    weights = {name: x for name, x in model.state_dict().items() if name not in missing}
    shown = {key: x for key, x in processor.to_dict().items() if x and key in PREPARATION}
    name = path.resolve().name if path.is_dir() else source
    has_class_token = any("cls_token" in key for key in weights)
    # CLIP and its kin hold a text model too
    vision = getattr(model, "vision_model", model.base_model)
    # The features are caught by a hook, so that one pass gives features and logits
    caught: dict[str, Any] = {}
    vision.register_forward_hook(lambda module, inputs, output: caught.update(output=output))

    def forward(images: Tensor) -> tuple[Tensor, Tensor | None]:
        arrays = list(images.cpu().numpy())
        pixels = processor(arrays, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        output = (model if classifies else vision)(pixels.to(device))
        logits, output = output.logits if classifies else None, caught.pop("output")
        x = getattr(output, "pooler_output", None)
        # A pooler whose weights are missing was drawn at random
        if x is None or missing:
            x = output.last_hidden_state
            x = x.mean((2, 3)) if x.ndim == 4 else x[:, 0] if has_class_token else x.mean(1)
        return x.flatten(1), logits

    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    return Extractor(f"{name}@{_digest(weights, shown)}", channels, forward)


def _digest(weights: Mapping[str, Tensor], settings: Any = None) -> str:
    """Eight hex digits of names, types, shapes and values, and of how images are prepared."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, x in sorted(weights.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:8]


def torchmetrics_module(name: str) -> Any:
    """A module of `torchmetrics.image`, or the line that says how to get it."""
    try:
        return importlib.import_module(f"torchmetrics.image.{name}")
    # A torchvision that was built for another torch makes it a RuntimeError
    except Exception as error:
        reason = one_line(error)
        raise ValueError(
            f"sample metrics need torchmetrics: pip install 'hf_ddpm[eval]' ({reason})"
        ) from error

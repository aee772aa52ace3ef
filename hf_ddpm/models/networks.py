"""The network classes that a pipeline's folder may name, and what tells one network from another."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from hf_ddpm.models.autoencoders import ConvAutoencoder, DenseAutoencoder

# The network classes that a pipeline's folder may name: nothing else is looked up, imported or run.
NETWORKS: dict[str, type[ModelMixin]] = {
    "UNet2DModel": UNet2DModel,
    "DenseAutoencoder": DenseAutoencoder,
    "ConvAutoencoder": ConvAutoencoder,
}


def register_network(network: type[ModelMixin]) -> type[ModelMixin]:
    """Let `DDPMPipeline.from_pretrained` load a network class of yours; also a decorator.

    Args:
        network: a `ModelMixin` and `ConfigMixin`, which can be made on the "meta" device and is called as
            (x_t, t), or as (x_t, t, class_labels) if its config has `num_class_embeds`.

    Raises:
        ValueError: it is no such class, or another one has its name.
    """
    if not (
        isinstance(network, type) and issubclass(network, ModelMixin) and issubclass(network, ConfigMixin)
    ):
        raise ValueError(f"network is {network!r}; allowed: a class that is a ModelMixin and a ConfigMixin")
    if NETWORKS.setdefault(network.__name__, network) is not network:
        raise ValueError(f"network {network.__name__!r} is known already; allowed: another name")
    return network


def add_classes(network: ModelMixin, num_classes: int) -> ModelMixin:
    """The same network with classes, all of which it answers as it did: the rows of its new table are zero.

    Args:
        network: one of `NETWORKS` without classes.
        num_classes: C; the table has C + 1 rows, and the last is "no class".

    Raises:
        ValueError: its class has no table of classes.
    """
    made: Any = type(network).from_config({**network.config, "num_class_embeds": num_classes + 1})  # type: ignore[attr-defined]
    table = getattr(made, "class_embedding", None)
    if not isinstance(table, nn.Embedding):
        raise ValueError(f"{type(network).__name__} has no classes; allowed: a UNet2DModel or an autoencoder")
    nn.init.zeros_(table.weight)
    made.load_state_dict(network.state_dict() | {"class_embedding.weight": table.weight})
    return made.to(network.dtype).train(network.training)


def is_built_in(network: type) -> bool:
    """Whether a network's class is of diffusers or of this package, which run on the "meta" device."""
    return network.__module__.partition(".")[0] in ("diffusers", __name__.partition(".")[0])


def weights_digest(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits of a network: its config, without the keys that diffusers adds, and its weights.

    Args:
        config: of the network.
        weights: by name, as in its `state_dict`.
    """
    shown = {key: value for key, value in sorted(config.items()) if not key.startswith("_")}
    if shown.get("num_class_embeds") is None and "class_embed_type" not in shown:
        shown.pop("num_class_embeds", None)  # autoencoders saved before they knew classes lack the key
    found = hashlib.sha256(str(shown).encode())
    for name, weight in sorted(weights.items()):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]

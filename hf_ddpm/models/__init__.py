"""Networks: `create_model` makes one of the `PRESETS`; a pipeline's folder may name those of `NETWORKS`.

A network of any kind fits the slot of a `Denoiser` through `as_denoiser`.
"""

from hf_ddpm.denoiser import Denoiser, as_denoiser, num_classes
from hf_ddpm.models.networks import NETWORKS, add_classes, is_built_in, register_network, weights_digest
from hf_ddpm.models.presets import PRESETS, create_model

__all__ = [
    "NETWORKS",
    "PRESETS",
    "Denoiser",
    "add_classes",
    "as_denoiser",
    "create_model",
    "is_built_in",
    "num_classes",
    "register_network",
    "weights_digest",
]

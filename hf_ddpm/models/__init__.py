"""Networks: `create_model` makes one of the `PRESETS`; a pipeline's folder may name those of `NETWORKS`."""

from hf_ddpm.models.networks import NETWORKS, register_network, weights_digest
from hf_ddpm.models.presets import PRESETS, create_model

__all__ = ["NETWORKS", "PRESETS", "create_model", "register_network", "weights_digest"]

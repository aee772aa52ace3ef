"""Networks: the presets by name, the classes that load."""

from hf_ddpm.models.networks import NETWORKS, register_network, weights_digest
from hf_ddpm.models.presets import PRESETS, create_model

__all__ = ["NETWORKS", "PRESETS", "create_model", "register_network", "weights_digest"]

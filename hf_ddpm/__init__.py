"""hf_ddpm: Denoising Diffusion Probabilistic Models (Ho et al. 2020), exact, in the Hugging Face ecosystem.

Notation, everywhere: B batch, C channels, H height, W width, T steps of the process. t is zero-based (the
paper's t is code t + 1): x_t is the state after step t, and the state before step 0 is the image x_0, in [−1,
1]. `_kl`, `_nll` and `.nats` are nats summed over dimensions, `_bpd` is bits per dimension, sigma is a
standard deviation.
"""

from hf_ddpm.config import TrainConfig
from hf_ddpm.data.stream import load_stream
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.models import create_model
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training.trainer import train

__version__ = "0.1.0"

__all__ = [
    "DDPMPipeline",
    "DDPMScheduler",
    "DiffusionProcess",
    "TrainConfig",
    "create_model",
    "load_stream",
    "train",
]

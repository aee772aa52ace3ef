"""hf_ddpm: Denoising Diffusion Probabilistic Models (Ho et al. 2020), exact, in the Hugging Face ecosystem.

Notation, everywhere: B batch, C channels, H height, W width, T steps of the process. t is zero-based (the
paper's t is code t + 1): x_t is the state after step t, and the state before step 0 is the image x_0, in [−1,
1]. `_kl`, `_nll` and `.nats` are nats summed over dimensions, `_bpd` is bits per dimension, sigma is a
standard deviation.

Public names and modules are imported when they are first asked for (PEP 562): `import hf_ddpm.gaussian` loads
torch but no Hugging Face library, and `hf-ddpm --help` loads neither.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ddpm.config import TrainConfig
    from hf_ddpm.data.stream import load_stream
    from hf_ddpm.evaluation.config import EvaluationConfig
    from hf_ddpm.evaluation.evaluate import evaluate
    from hf_ddpm.generation.pipeline import DDPMPipeline
    from hf_ddpm.models import create_model
    from hf_ddpm.process import DiffusionProcess
    from hf_ddpm.publishing.publish import publish
    from hf_ddpm.publishing.upload import PublishError
    from hf_ddpm.runtime.signals import TrainingStopped
    from hf_ddpm.scheduler import DDPMScheduler
    from hf_ddpm.training.trainer import train

__version__ = "0.1.0"

__all__ = [
    "DDPMPipeline",
    "DDPMScheduler",
    "DiffusionProcess",
    "EvaluationConfig",
    "PublishError",
    "TrainConfig",
    "TrainingStopped",
    "__version__",
    "create_model",
    "evaluate",
    "load_stream",
    "publish",
    "train",
]

# The module that defines each public name, as type checkers read it above.
_HOMES = {
    "DDPMPipeline": "generation.pipeline",
    "DDPMScheduler": "scheduler",
    "DiffusionProcess": "process",
    "EvaluationConfig": "evaluation.config",
    "PublishError": "publishing.upload",
    "TrainConfig": "config",
    "TrainingStopped": "runtime.signals",
    "create_model": "models",
    "evaluate": "evaluation.evaluate",
    "load_stream": "data.stream",
    "publish": "publishing.publish",
    "train": "training.trainer",
}


# Type checkers would read it as saying that the package has every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, or a module of this package; it is imported now."""
        if name in _HOMES:
            globals()[name] = value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
            return value
        # Python asks for names such as `__path__`, and `getattr` for any text; those are never modules.
        if name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

"""hf_ddpm: Denoising Diffusion Probabilistic Models (Ho et al. 2020), exact, in the Hugging Face ecosystem.

Notation, everywhere: B batch, C channels, H height, W width, T steps of the process. t is zero-based (the
paper's t is code t + 1): x_t is the state after step t, and the state before step 0 is the image x_0, in [−1,
1]. `_kl`, `_nll` and `.nats` are nats summed over dimensions, `_bpd` is bits per dimension, sigma is a
standard deviation.

Public names and modules are imported when they are first asked for (PEP 562): `import hf_ddpm.gaussian` loads
torch but no Hugging Face library, and `hf-ddpm --help` loads neither.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from hf_ddpm.spelling import did_you_mean, tutorial_hint

if TYPE_CHECKING:
    from hf_ddpm.config import TrainConfig
    from hf_ddpm.data.stream import load_stream
    from hf_ddpm.evaluation.config import EvaluationConfig
    from hf_ddpm.evaluation.evaluate import evaluate
    from hf_ddpm.generation.pipeline import DDPMPipeline
    from hf_ddpm.generation.runs import load_run
    from hf_ddpm.models import create_model
    from hf_ddpm.objectives import simple_loss
    from hf_ddpm.process import DiffusionProcess
    from hf_ddpm.publishing.publish import publish
    from hf_ddpm.publishing.upload import PublishError
    from hf_ddpm.runtime.signals import TrainingStopped
    from hf_ddpm.scheduler import DDPMScheduler
    from hf_ddpm.training.trainer import train

__version__ = "0.2.0"

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
    "load_run",
    "load_stream",
    "publish",
    "simple_loss",
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
    "load_run": "generation.runs",
    "load_stream": "data.stream",
    "publish": "publishing.publish",
    "simple_loss": "objectives",
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
        private = not name.isidentifier() or name.startswith("_")
        if not private and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        hint = tutorial_hint(name)
        if not (hint or private):
            hint = did_you_mean(name, (*_HOMES, *(found.name for found in iter_modules(__path__))))
        # Of a `from hf_ddpm import name`, Python would replace the words of an AttributeError by its own
        if hint and sys._getframe(1).f_code.co_name == "_handle_fromlist":
            raise ImportError(f"cannot import name {name!r} from {__name__!r}{hint}", name=__name__)
        # Given the name, Python adds no hint of its own
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}", name=name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

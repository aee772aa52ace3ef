"""A run's folder as its pipeline's folder: weights averaged with each decay, for diffusers to load.

RUN/model_index.json   scheduler/   unet/diffusion_pytorch_model.safetensors           the first decay
unet/diffusion_pytorch_model.ema_0_999.safetensors   another, a variant
"""

from pathlib import Path

from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.runtime.disk import update_folder
from hf_ddpm.scheduler import DDPMScheduler


def variant_name(decay: str) -> str:
    """The `variant` of `from_pretrained` for a decay; diffusers doesn't find one with a point in it."""
    return f"ema_{decay.replace('.', '_')}"


def write_pipeline(
    run: Path,
    averages: dict[str, nn.Module],
    shell: nn.Module | None,
    states: dict[str, dict[str, Tensor]],
    scheduler: DDPMScheduler,
) -> None:
    """The first average as the run's pipeline, the others beside it as variants of the weights.

    Args:
        run: the run's folder.
        averages: the averaged networks by decay; nothing is written for one that isn't diffusers' kind.
        shell: where processes share the averages out, a whole network for `states` to be loaded into.
        states: the averages' whole weights by decay, used with `shell`.
        scheduler: the run's.
    """
    if not isinstance(next(iter(averages.values())), ModelMixin):
        return

    def fill(place: Path) -> None:
        for number, (name, average) in enumerate(averages.items()):
            if shell is not None:  # the averages are shared out
                shell.load_state_dict(states[name])
                average = shell
            if number == 0:
                DDPMPipeline(average, scheduler).save_pretrained(place)
            else:
                average.save_pretrained(place / "unet", variant=variant_name(name))  # type: ignore[operator]

    update_folder(run, fill, last="model_index.json")

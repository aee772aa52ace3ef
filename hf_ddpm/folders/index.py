"""The classes that `model_index.json` names: what is written there, and how it is read safely.

The file says [library, class] for the network and for the scheduler. What plain diffusers runs rightly is
written ["diffusers", class], so that it loads anywhere. What only this package runs is written ["hf_ddpm",
class]: plain diffusers refuses such a folder, whether or not hf_ddpm is imported, and this package finds the
class in `models.NETWORKS`. No module that a folder names is ever imported.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import snapshot_download

from hf_ddpm import spacing
from hf_ddpm.folders.guard import check_network, check_scheduler, weights_files
from hf_ddpm.folders.layout import (
    CONFIG,
    ERRORS,
    INDEX,
    LABELS,
    SCHEDULER,
    SCHEDULER_CONFIG,
    SCHEDULER_FILE,
    SWEEP,
    TENSORS,
    UNET,
    WEIGHTS_INDEX,
    weights_name,
)
from hf_ddpm.folders.values import is_ddpm_scheduler
from hf_ddpm.models import NETWORKS
from hf_ddpm.runtime.untrusted import check_regular, read_json, shown
from hf_ddpm.scheduler import PACKAGE, DDPMScheduler
from hf_ddpm.variances import LEARNED, in_diffusers

# The keywords of `from_pretrained` that say how files come from the Hub.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def __getattr__(name: str) -> Any:
    """A network class as an attribute of this module, which is where diffusers' loader looks (`resolve`)."""
    if name in NETWORKS:
        return NETWORKS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def entries(network: Any, scheduler: Any) -> dict[str, list[str]]:
    """The entries of a pipeline's index for its two parts: [library, class] of each.

    The network is left to plain diffusers only where that runs it rightly: if it has as many channels out as
    in, or twice as many under a `DDPMScheduler` with a learned variance of which diffusers makes no mistake.
    """
    network = getattr(network, "_orig_mod", network)  # a network of torch.compile holds the original
    kind, config = type(network), getattr(network, "config", {})
    learns = config.get("out_channels") != config.get("in_channels")
    splits = isinstance(scheduler, diffusers.DDPMScheduler)
    word = scheduler.config.get("variance_type")
    plain = not learns or (splits and word in LEARNED and in_diffusers(word))
    plain = plain and _is_diffusers(kind.__module__)
    module = scheduler.__module__  # which our scheduler sets by its config: DDPMScheduler.register_to_config
    if _is_diffusers(module):
        spaced = spacing.in_diffusers(scheduler.config.get("timestep_spacing"))
        module = "diffusers" if spaced else PACKAGE
    return {
        UNET: ["diffusers" if plain else PACKAGE, kind.__name__],
        SCHEDULER: [module, type(scheduler).__name__],
    }


def _is_diffusers(module: str) -> bool:
    return module.partition(".")[0] == "diffusers"


def needs_us(index: Mapping[str, Any]) -> bool:
    """Whether a folder with this index loads with hf_ddpm only."""
    return any(isinstance(part, list) and part[0] != "diffusers" for part in index.values())


def resolve(index: Mapping[str, Any], given: Iterable[str] = (), strict: bool = True) -> dict[str, Any]:
    """The index with entries by which diffusers' loader finds each part's class.

    Args:
        index: content of `model_index.json`.
        given: names of the parts that the caller passes to the loader; their entries don't matter.
        strict: whether another part of an unknown class is refused; else its entry stays as it is.

    Raises:
        ValueError: with `strict`, a part is missing, or its class is not known here.
    """
    found, bases = dict(index), {UNET: ModelMixin, SCHEDULER: SchedulerMixin}
    if strict and not isinstance(name := index.get("_class_name"), str):
        raise ValueError(f"_class_name in {INDEX} is {shown(name)}; allowed: the name of a pipeline class")
    for part, base in bases.items():
        entry = index.get(part)
        if part in given:
            found[part] = ["diffusers", base.__name__]
        elif (known := _known(part, entry)) is not None:
            found[part] = known
        elif strict:
            raise ValueError(
                f"{part} in {INDEX} is {shown(entry)}, which is not known here; allowed: {_allowed(part)}"
            )
    return found


def _allowed(part: str) -> str:
    if part == SCHEDULER:
        return "a scheduler of diffusers that samples a DDPM, or scheduler= at loading"
    return f"{', '.join(NETWORKS)}, a class after register_network, or unet= at loading"


def _known(part: str, entry: Any) -> list[str] | None:
    """The module and name by which diffusers finds a part's class; None if it is not known here."""
    if not (isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(w, str) for w in entry)):
        return None
    library, kind = entry
    if part == UNET:
        known = kind in NETWORKS and library in ("diffusers", PACKAGE, NETWORKS[kind].__module__)
        return [__name__, kind] if known else None
    if library == PACKAGE and kind == DDPMScheduler.__name__:
        return [DDPMScheduler.__module__, kind]
    return ["diffusers", kind] if library in ("diffusers", PACKAGE) and _is_scheduler(kind) else None


def _is_scheduler(kind: str) -> bool:
    return is_ddpm_scheduler(getattr(diffusers, kind, None))


def check_folder(folder: Path, variant: str | None = None, given: Iterable[str] = ()) -> dict[str, Any]:
    """Refuse a pipeline's folder that names an unknown class, or whose parts would fill the memory.

    Args:
        folder: of a pipeline; its parts in folders of their own, or all at the root as in old repositories.
        variant: of the weights, as in diffusers' `from_pretrained`.
        given: names of the parts that the caller passes to the loader, which are not looked at.

    Returns:
        The content of `model_index.json`.

    Raises:
        ValueError: the folder is refused; the message names the file or the entry.
    """
    index = read_json(folder / INDEX)
    check_index(index)
    found = resolve(index, given)
    if SCHEDULER not in given:
        place = part_folder(folder, SCHEDULER)
        kind = getattr(diffusers, found[SCHEDULER][1])
        check_scheduler(kind, place / SCHEDULER_CONFIG, _name(folder, place / SCHEDULER_CONFIG))
    if UNET not in given:
        place = part_folder(folder, UNET)
        check_regular(place / CONFIG, _name(folder, place / CONFIG))
        if not weights_files(place, variant):
            raise ValueError(
                f"there is no file named {weights_name(variant)}, and pickles (.bin) are never loaded"
            )
        check_network(NETWORKS[found[UNET][1]], place, variant, _name(folder, place / CONFIG)[: -len(CONFIG)])
    return index


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def check_index(index: Mapping[str, Any]) -> None:
    """Refuse an index with anything but names and classes in it, or of a pipeline with further parts.

    Without its other parts, such as the decoder of a latent diffusion, a pipeline would draw something else.

    Raises:
        ValueError: it holds a value that diffusers writes into none, or names a part that a DDPM lacks.
    """
    for key, value in index.items():
        words = value if isinstance(value, list) else [value]
        if not words or not all(word is None or isinstance(word, str | bool) for word in words):
            raise ValueError(f"{shown(key)} in {INDEX} is {shown(value)}; allowed: text, or [library, class]")
        if (
            isinstance(value, list)
            and not key.startswith("_")
            and key not in (UNET, SCHEDULER)
            and any(value)
        ):
            raise ValueError(f"{shown(key)} in {INDEX} is {shown(value)}; allowed parts: {UNET}, {SCHEDULER}")


def part_folder(folder: Path, part: str) -> Path:
    """Where a part's files are: in a folder of its name, or at the root as in old repositories."""
    return folder / part if (folder / part).is_dir() else folder


def fetch(repo_id: str, variant: str | None = None, **options: Any) -> Path:
    """Download a pipeline's JSON and safetensors files, but for those in the cache; no pickles, no code.

    Args:
        repo_id: on the Hub.
        variant: of the weights, as in diffusers' `from_pretrained`.
        **options: keywords of `huggingface_hub.snapshot_download` that `HUB_OPTIONS` lists.

    Returns:
        The folder in the cache.
    """
    shards = weights_name(variant).removesuffix(TENSORS) + f"-*-of-*{TENSORS}"
    names = [CONFIG, weights_name(variant), shards, f"{WEIGHTS_INDEX.rpartition('.')[0]}*"]
    patterns = [
        INDEX,
        ERRORS,
        LABELS,
        SWEEP,
        SCHEDULER_CONFIG,
        SCHEDULER_FILE,
        *names,
        *(f"{UNET}/{name}" for name in names),
    ]
    return Path(snapshot_download(repo_id, allow_patterns=patterns, **options))

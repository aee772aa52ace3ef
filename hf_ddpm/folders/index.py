"""What a pipeline's folder names as its parts, and the way of a folder from the Hub.

`model_index.json` says [library, class] for each part. What plain diffusers runs rightly is written
["diffusers", class], so that it loads anywhere. What only this package runs is written ["hf_ddpm", class],
which plain diffusers refuses with an error, whether or not hf_ddpm is imported; here it is looked up in
`models.NETWORKS`. No module that a folder names is ever imported.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import snapshot_download

from hf_ddpm.folders.guard import check_network, check_scheduler, read_json, weights_files
from hf_ddpm.folders.layout import INDEX, WEIGHTS
from hf_ddpm.models import NETWORKS
from hf_ddpm.scheduler import PACKAGE, DDPMScheduler
from hf_ddpm.variances import LEARNED, in_diffusers

# Keywords of `from_pretrained` that are about the way from the Hub.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def __getattr__(name: str) -> Any:
    """A network class by name: diffusers' loader looks for attributes of a module (see `resolve`)."""
    if name in NETWORKS:
        return NETWORKS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def entries(network: Any, scheduler: Any) -> dict[str, list[str]]:
    """What a pipeline of the two writes into its index; only what it runs rightly is left to plain diffusers.

    Plain diffusers knows two outputs: C channels, and 2C under its own scheduler with a learned variance that
    it runs rightly.
    """
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    kind, config = type(network), getattr(network, "config", {})
    learns = config.get("out_channels") != config.get("in_channels")
    splits = isinstance(scheduler, diffusers.DDPMScheduler)
    word = scheduler.config.get("variance_type")
    plain = not learns or (splits and word in LEARNED and in_diffusers(word))
    plain = plain and _is_diffusers(kind.__module__)
    module = scheduler.__module__  # the instance's word, see DDPMScheduler.register_to_config
    return {
        "unet": ["diffusers" if plain else PACKAGE, kind.__name__],
        "scheduler": ["diffusers" if _is_diffusers(module) else module, type(scheduler).__name__],
    }


def _is_diffusers(module: str) -> bool:
    return module.partition(".")[0] == "diffusers"


def needs_us(index: Mapping[str, Any]) -> bool:
    """Whether plain diffusers refuses a folder with this index."""
    return any(isinstance(part, list) and part[0] != "diffusers" for part in index.values())


def resolve(index: Mapping[str, Any], given: Iterable[str] = (), strict: bool = True) -> dict[str, Any]:
    """The index in words that diffusers' loader finds classes by.

    Args:
        index: content of `model_index.json`.
        given: parts that the caller brings along, whose entries don't matter.
        strict: refuse other parts that are not known here; else they stay as they are.

    Raises:
        ValueError: a part is missing, or is of a class that is not known here.
    """
    found, bases = dict(index), {"unet": ModelMixin, "scheduler": SchedulerMixin}
    if strict and not isinstance(name := index.get("_class_name"), str):
        raise ValueError(f"_class_name in {INDEX} is {name!r}; allowed: the name of a pipeline class")
    for part, base in bases.items():
        entry = index.get(part)
        known = None if part in given else _known(part, entry)
        if known is None and strict and part not in given:
            words = f"{part} in {INDEX} is {entry!r}, which is not known here; allowed: "
            if part == "scheduler":
                raise ValueError(
                    words + "[library, class] of a scheduler of diffusers, or scheduler= at loading"
                )
            raise ValueError(
                words + f"[library, class] of {', '.join(NETWORKS)}, another class after "
                "hf_ddpm.models.register_network, or unet= at loading"
            )
        if known is not None or part in given:
            found[part] = known or ["diffusers", base.__name__]
    return found


def _known(part: str, entry: Any) -> list[str] | None:
    """The module and name by which diffusers finds a part's class; None if it is not known here."""
    if not (isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(w, str) for w in entry)):
        return None
    library, kind = entry
    if part == "unet":
        known = kind in NETWORKS and library in ("diffusers", PACKAGE, NETWORKS[kind].__module__)
        return [__name__, kind] if known else None
    if library == PACKAGE and kind == DDPMScheduler.__name__:
        return [DDPMScheduler.__module__, kind]
    return [library, kind] if library == "diffusers" and _is_scheduler(kind) else None


def _is_scheduler(kind: str) -> bool:
    found = getattr(diffusers, kind, None)
    return isinstance(found, type) and issubclass(found, SchedulerMixin)


def check_folder(folder: Path, variant: str | None = None, given: Iterable[str] = ()) -> dict[str, Any]:
    """Refuse a pipeline's folder that names what is not known here, or whose parts are of absurd sizes.

    Args:
        folder: of a pipeline; its parts in folders of their own, or all at the root as in old repositories.
        variant: of the weights, as in diffusers' `from_pretrained`.
        given: parts that the caller brings along.

    Returns:
        The content of `model_index.json`.

    Raises:
        ValueError: as said; the message names the culprit.
    """
    index = read_json(folder / INDEX)
    found = resolve(index, given)
    if "scheduler" not in given:
        file = part_folder(folder, "scheduler") / "scheduler_config.json"
        check_scheduler(read_json(file) if file.is_file() else {})
    if "unet" not in given:
        place = part_folder(folder, "unet")
        check_network(NETWORKS[found["unet"][1]], place, variant)
        if (place / "config.json").is_file() and not weights_files(place, variant):
            name = f"{WEIGHTS}.safetensors" if variant is None else f"{WEIGHTS}.{variant}.safetensors"
            raise ValueError(f"there is no file named {name}, and pickles (.bin) are never loaded")
    return index


def part_folder(folder: Path, part: str) -> Path:
    """Where a part's files are."""
    return folder / part if (folder / part).is_dir() else folder


def fetch(repo_id: str, variant: str | None = None, **options: Any) -> Path:
    """A pipeline's files from the Hub or its cache: JSON and safetensors, never pickles or code.

    Args:
        repo_id: on the Hub.
        variant: of the weights.
        **options: of `HUB_OPTIONS`, as in `snapshot_download`.

    Returns:
        The folder in the cache.
    """
    weights = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
    names = ["config.json", f"{weights}.safetensors", f"{weights}-*-of-*.safetensors"]
    names.append(f"{WEIGHTS}.safetensors.index*.json")
    patterns = [INDEX, "scheduler_config.json", "scheduler/scheduler_config.json"]
    patterns += [prefix + name for prefix in ("", "unet/") for name in names]
    return Path(snapshot_download(repo_id, allow_patterns=patterns, **options))

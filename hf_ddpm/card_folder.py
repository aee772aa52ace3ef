"""Folders of model_cards/: a published run's files and the card made from them, for the project to keep."""

import dataclasses
import json
from pathlib import Path

from safetensors.torch import load, save

from hf_ddpm.card import CARD, PLOTS, CardFacts, make_card, read_json_file
from hf_ddpm.publication import Publication
from hf_ddpm.report import JSON, TENSORS


def card_folders(parent: Path) -> list[Path]:
    """The folders of published runs."""
    return sorted(path.parent for path in parent.glob("*/card.json"))


def card_of(folder: Path) -> str:
    """The card of a published run's folder in model_cards/, from the files in it.

    Raises:
        ValueError: its `card.json` is missing or says what `CardFacts` doesn't know.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    try:
        return make_card(files, CardFacts(**read_json_file(files, "card.json")))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{str(folder)!r} is no folder of a card: {error}") from error


def save_card_folder(publication: Publication, folder: Path, *, half_weights: bool = False) -> None:
    """Write what a card is made of, and the card: a folder of model_cards/.

    Args:
        publication: what `collect` found.
        folder: where to; an evaluation in it is deleted, as it may be of other weights.
        half_weights: write the weights too, in float16, so that the folder loads, but no evaluation of them
            before they were rounded; else write no weights.

    Raises:
        ValueError: weights that float16 can't hold; nothing has been written then.
    """
    evaluation, contents = (JSON, TENSORS, *PLOTS), {}
    for path, content in publication.files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        if not path.endswith(".safetensors"):
            contents[path] = data
        elif half_weights:
            contents[path] = _halved(path, data)
    for name in evaluation:
        (folder / name).unlink(missing_ok=True)
        if half_weights:
            contents.pop(name, None)
    for path, data in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    facts = {key: value for key, value in dataclasses.asdict(publication.facts).items() if value is not None}
    (folder / "card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if half_weights:
        (folder / CARD).write_text(card_of(folder), encoding="utf-8")


def _halved(path: str, data: bytes) -> bytes:
    """A safetensors file's content with its floating-point numbers in float16."""
    tensors = {name: z.half() if z.is_floating_point() else z for name, z in load(data).items()}
    if not all(z.isfinite().all() for z in tensors.values()):
        raise ValueError(f"{path} has weights beyond 65504, which float16 can't hold")
    return save(tensors, {"format": "pt"})

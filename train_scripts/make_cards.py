"""`make cards`: fill the card of every run in model_cards/ anew, from the files beside it; or add a run."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load, save

from hf_ddpm.cli import run
from hf_ddpm.folders.layout import (
    CARD,
    CARD_FACTS,
    ERRORS,
    EVALUATION,
    EVALUATION_TENSORS,
    PLOTS,
    SWEEP,
    SWEEP_PLOT,
    TENSORS,
)
from hf_ddpm.publishing.card import CardFacts, make_card, read_json_file
from hf_ddpm.publishing.publish import Publication, collect
from hf_ddpm.runtime.arguments import Parser

CARDS = Path(__file__).parents[1] / "model_cards"


def make_cards(argv: Sequence[str], prog: str) -> None:
    """Write the cards of all runs, or say which of them are stale."""
    parser = Parser(prog, __doc__ or "")
    parser.add_argument("--folder", default=CARDS, type=Path, metavar="DIR", help="of the runs [model_cards]")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 2 if a card is stale")
    parser.add_argument(
        "--add",
        nargs=2,
        metavar=("MODEL", "REPO_ID"),
        help="take a published run's files, but for its weights, into a folder of its own first",
    )
    parser.add_argument(
        "--half-weights", action="store_true", help="take its weights too, in float16: the folder then loads"
    )
    parser.add_argument("--license", metavar="ID", help="of the weights of the run that is added")
    parser.add_argument("--dataset-license", metavar="ID", help="of its training images")
    parser.add_argument("--dataset-id", metavar="ID", help="of its training images on the Hub")
    args = parser.parse(argv)
    if args.half_weights and args.add is None:
        raise ValueError("half_weights has no use without add")
    if args.add is not None:
        model, repo_id = args.add
        licenses = {"license": args.license, "dataset_license": args.dataset_license}
        publication = collect(model, repo_id, dataset_id=args.dataset_id, **licenses)
        folder = args.folder / repo_id.split("/")[-1]
        save_card_folder(publication, folder, half_weights=args.half_weights)
    stale = []
    for folder in card_folders(args.folder):
        card, file = card_of(folder), folder / CARD
        if not file.is_file() or file.read_text(encoding="utf-8") != card:
            stale.append(folder.name)
        if not args.check:
            file.write_text(card, encoding="utf-8")
    if args.check and stale:
        raise ValueError(
            f"stale cards in model_cards: {', '.join(stale)}; allowed: as `make cards` writes them"
        )
    print(f"cards: {len(card_folders(args.folder))}, of which {len(stale)} were stale")


def card_folders(parent: Path) -> list[Path]:
    """The folders of published runs, in order."""
    return sorted(path.parent for path in parent.glob(f"*/{CARD_FACTS}"))


def card_of(folder: Path) -> str:
    """The card of a published run's folder in model_cards/, from the files in it.

    Raises:
        ValueError: its `card.json` is missing, or has a key that `CardFacts` doesn't have.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    try:
        return make_card(files, CardFacts(**read_json_file(files, CARD_FACTS)))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{str(folder)!r} is no folder of a card: {error}") from error


def save_card_folder(publication: Publication, folder: Path, *, half_weights: bool = False) -> None:
    """Write a folder of model_cards/: what a card is made of, and the card.

    Args:
        publication: what `collect` found.
        folder: where to; an evaluation, a sweep and measured errors in it are deleted, as they may be of
            other weights.
        half_weights: whether the weights are written too, in float16, so that the folder loads. The
            others are left out then, as they measured the weights before they were rounded.

    Raises:
        ValueError: weights that float16 can't hold; nothing has been written then.
    """
    measured, contents = (EVALUATION, EVALUATION_TENSORS, *PLOTS, SWEEP, SWEEP_PLOT, ERRORS), {}
    for path, content in publication.files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        if not path.endswith(TENSORS):
            contents[path] = data
        elif half_weights and path not in measured:
            contents[path] = _halved(path, data)
    for name in measured:
        (folder / name).unlink(missing_ok=True)
        if half_weights:
            contents.pop(name, None)
    for path, data in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    facts = {key: value for key, value in dataclasses.asdict(publication.facts).items() if value is not None}
    (folder / CARD_FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if half_weights:
        (folder / CARD).write_text(card_of(folder), encoding="utf-8")


def _halved(path: str, data: bytes) -> bytes:
    """A safetensors file's content with its floating-point numbers in float16."""
    tensors = {name: z.half() if z.is_floating_point() else z for name, z in load(data).items()}
    if not all(z.isfinite().all() for z in tensors.values()):
        raise ValueError(f"{path} has weights beyond 65504, which float16 can't hold")
    return save(tensors, {"format": "pt"})


if __name__ == "__main__":
    run(make_cards)

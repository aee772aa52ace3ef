"""`make cards`: fill the card of every run in model_cards/ anew, from the files beside it; or add a run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_ddpm.card import CARD
from hf_ddpm.card_folder import card_folders, card_of, save_card_folder
from hf_ddpm.cli import run
from hf_ddpm.publication import collect

CARDS = Path(__file__).parents[1] / "model_cards"


def make_cards(argv: Sequence[str], prog: str) -> None:
    """Write the cards, or say which are stale."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
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
    args = parser.parse_args(argv)
    if args.half_weights and args.add is None:
        raise ValueError("half-weights has no use without add")
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


if __name__ == "__main__":
    run(make_cards)

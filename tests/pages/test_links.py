"""Links between the pages, to other files and to headings lead somewhere; what pages name is there."""

import ast
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import hf_ddpm
from hf_ddpm.config import TrainConfig, tomllib
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.models import create_model
from hf_ddpm.models.presets import UNETS, UNet
from hf_ddpm.runtime.arguments import Parser, add_options, spelled
from tests.pages.reading import PAGES, ROOT, TAUGHT, anchors, links, name, prose

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_of_docs_is_linked_from_the_map_and_stands_in_the_site():
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(links(ROOT / "docs" / "README.md"))
    # mkdocs.yml has a line for a feature that only mkdocs reads
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert pages <= {entry for entry in nav if isinstance(entry, str)}
    assert {f"docs/{page}" for page in pages} <= set(links(ROOT / "README.md"))


@pytest.mark.parametrize("page", TAUGHT, ids=name)
def test_paths_on_pages_exist(page):
    folders = r"(?:tests|hf_ddpm|train_scripts|model_cards|docs)"
    paths = set(re.findall(rf"`({folders}/[\w./-]+)`", prose(page)))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_names_the_extras_that_there_are():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| extra | brings |\n|---|---|\n")[2]
    rows = table.partition("\n\n")[0].splitlines()
    named = {extra for row in rows for extra in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(PROJECT["optional-dependencies"])


def test_badges_and_citation_say_what_pyproject_says():
    texts = {
        path.stem: re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))[1]
        for path in (ROOT / "docs" / "badges").glob("*.svg")
    }
    wanted = {
        "licence": PROJECT["license"],
        "python": PROJECT["requires-python"],
        "version": hf_ddpm.__version__,
    }
    assert {key: text.replace("&gt;", ">").replace(" ", "") for key, text in texts.items()} == wanted
    assert {f"docs/badges/{key}.svg" for key in wanted} <= set(links(ROOT / "README.md"))

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (hf_ddpm.__version__, PROJECT["license"])


def literal_texts() -> Iterator[str]:
    """The texts of the package's code, with "␀" in the place of what is filled in, as commands print them."""
    parser = Parser("hf-ddpm", "")
    add_options(parser, TrainConfig)
    add_options(parser, EvaluationConfig, but=[field.name for field in dataclasses.fields(TrainConfig)])
    parser.parse([])  # from here on these are the options that errors may name
    for path in (ROOT / "hf_ddpm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "'␀'" for part in node.values]
                text = "".join(map(str, parts))
                yield text
                yield spelled(text)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield spelled(node.value)


def test_error_lines_of_troubleshooting_are_those_of_the_code():
    """The pieces between the dots of a quoted line stand in one text of the code, in that order."""
    texts = list(literal_texts())
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    lines = list(re.findall(r"^\| `([^`]+)` \| ", page, re.MULTILINE))
    assert len(lines) > 25
    assert [line for line in lines if not any(_quoted(line).search(text) for text in texts)] == []


def _quoted(line: str) -> re.Pattern[str]:
    pieces = [piece.strip(" ;(),.'") for piece in line.split("…")]
    return re.compile(".*".join(re.escape(piece) for piece in pieces if piece), re.DOTALL)


def test_tests_that_pages_name_are_there():
    for page in TAUGHT:
        for path, case in re.findall(r"`(tests/[\w/]+\.py)`: `(test_\w+)`", prose(page)):
            assert f"def {case}(" in Path(ROOT / path).read_text(encoding="utf-8"), (page, case)


def test_the_table_of_presets_is_that_of_the_code():
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip("`"): cells[1:5]
        for line in re.findall(r"^\| (`[\w-]+` \| \d+x\d+ .*) \|$", page, re.MULTILINE)
        if len(cells := line.split(" | ")) == 6
    }
    assert rows == {row.name: preset_words(row) for row in UNETS}


def preset_words(row: UNet) -> list[str]:
    """Its images, channels of each level, parameters and when `auto` takes it, as the table has them."""
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in create_model(row.name).parameters()) / 1e6
    auto = (
        "never"
        if row.up_to is None
        else "above"
        if row.up_to == math.inf
        else f"up to {row.up_to}x{row.up_to}"
    )
    return [
        f"{row.size}x{row.size} {'RGB' if row.channels == 3 else 'grey'}",
        ", ".join(map(str, row.widths)),
        f"{parameters:.{1 if parameters > 0.1 else 2}f}M",
        auto,
    ]

"""`make docs`: the site is built, strictly, and fetches nothing."""

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import hf_ddpm
from tests.pages.reading import ROOT


def test_the_site(tmp_path, monkeypatch, caplog):
    """It is built once for all that is asked of it; any warning, as of a dead link or anchor, is an error."""
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    except Abort as error:
        pytest.fail(f"{error}: {caplog.text[-3000:]}")
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8")
        for path in tmp_path.rglob("*.html")
    }
    assert len(pages) > 30
    for page, html in pages.items():
        nothing_is_fetched_from_elsewhere(page, html)
        pictures_are_there(tmp_path / page, html)
    reference = {page: html for page, html in pages.items() if page.startswith("reference/")}
    public_names_are_in_the_reference(reference)

    options = pages["reference/options.html"]
    assert options.count("<code>--") > 80 and "<code>--shuffle-memory</code>" in options
    assert "<code>DATASET</code>" in options and "<code>--dataset</code>" in options  # of evaluate, of train
    for command, flag in (("sample", "--scheduler"), ("interpolate", "--t"), ("publish", "--dry-run")):
        assert f"usage: hf-ddpm {command}" in options and f"  {flag}" in options
    # Formulas of docstrings, which are indented there
    code = "".join(re.findall(r"<pre>.*?</pre>", pages["reference/process.html"], re.DOTALL))
    assert "q(x_t | x_prev) = N(√α_t x_prev, β_t I)" in code
    assert "β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t)" in pages["reference/process.html"]  # not cut by emphasis


def nothing_is_fetched_from_elsewhere(page: str, html: str) -> None:
    tags = r"<(?:script|link|img|iframe|source)\b[^>]*?"
    assert re.findall(tags + r'(?:src|href)="?((?:https?:)?//[^" >]+)', html) == [], page


def pictures_are_there(page: Path, html: str) -> None:
    for place in re.findall(r'<img[^>]* src="([^"]+)"', html):
        assert (page.parent / place).resolve().is_file(), (page, place)


def public_names_are_in_the_reference(pages: dict[str, str]) -> None:
    """All that `import hf_ddpm` offers, and no private name."""
    names = {found for html in pages.values() for found in re.findall(r'id="(hf_ddpm\.[\w.]+)"', html)}
    assert [found for found in names if re.search(r"\._(?!_)", found)] == []
    last = {found.rpartition(".")[2] for found in names} | {
        "TrainConfig",
        "EvaluationConfig",
    }  # in the tables
    assert set(hf_ddpm.__all__) - {"__version__"} <= last

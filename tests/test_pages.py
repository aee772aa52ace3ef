"""The pages for developers say what is there: docs/maths.md, ARCHITECTURE.md, SECURITY.md.

The pages for users, their links and their code have the tests in tests/pages/.
"""

import pkgutil
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py") if path != Path(__file__)}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_every_long_number_of_the_maths_stands_in_a_test():
    numbers = set(re.findall(r"\d+\.\d{5,}(?:e-?\d+)?", read("docs/maths.md")))
    assert len(numbers) > 100
    everything = "\n".join(SOURCES.values())
    missing = {number for number in numbers if number not in everything}
    assert missing <= {"0.044715"}  # a constant of the published approximation of Φ


def test_sections_that_tests_cite_exist():
    headings = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", read("docs/maths.md"), re.MULTILINE))
    cited = 0
    for path, text in SOURCES.items():
        for numbers in re.findall(r"docs/maths\.md ((?:\d+(?:\.\d+)?(?:, )?)+)", text):
            for number in re.findall(r"\d+(?:\.\d+)?", numbers):
                assert number in headings, (path, number)
                cited += 1
        assert not re.search(r"(?<!docs/)maths\.md", text), path  # every citation says where the page is
    assert cited > 20


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_paths_in_pages_exist(page):
    folders = r"(?:tests|hf_ddpm|train_scripts|model_cards|docs)"
    paths = set(re.findall(rf"`({folders}/[\w./-]*)`", read(page)))
    paths |= set(re.findall(rf"\]\(({folders}/[\w./-]+|[A-Z]+\.md|pyproject\.toml)\)", read(page)))
    assert paths and [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_tests_that_the_security_page_names_exist():
    everything = "\n".join(SOURCES.values())
    names = set(re.findall(r"`(test_\w+)`", read("SECURITY.md")))
    assert len(names) > 10 and [name for name in names if f"def {name}(" not in everything] == []


def test_names_in_paper_to_code_exist():
    page = read("docs/paper-to-code.md")
    rows = [line.split(" | ")[-2:] for line in page.splitlines() if line.startswith("| ")]
    text = "\n".join(cell for row in rows for cell in row)
    names = set(re.findall(r"`((?:hf_ddpm\.|DiffusionProcess|DDPMScheduler|DDPMPipeline)[\w.]*)", text))
    # A lower-case object in the table is one of these classes
    for word, owner in (("process", "DiffusionProcess"), ("scheduler", "DDPMScheduler")):
        names |= {f"{owner}.{name}" for name in re.findall(rf"`{word}\.(\w+)", text)}
    assert len(names) > 25
    for name in names:
        pkgutil.resolve_name(name if name.startswith("hf_ddpm.") else f"hf_ddpm.{name}")


def test_architecture_lists_every_file_of_the_package():
    listing = read("ARCHITECTURE.md").split("```")[1]
    package, _, _ = listing.partition("\ndocs/")
    entries = re.split(r"\n  (?=\S)", package)  # one for each file at the root and each folder
    for path in sorted((ROOT / "hf_ddpm").rglob("*.py")):
        if path.name == "__init__.py":
            continue
        *folder, name = path.relative_to(ROOT / "hf_ddpm").parts
        start, word = (f"{folder[0]}/", path.stem) if folder else ("", name)
        assert any(entry.startswith(start) and re.search(rf"\b{word}\b", entry) for entry in entries), path

"""docs/maths.md: its values are those that tests check, and the sections that tests cite exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "maths.md").read_text(encoding="utf-8")
SOURCES = {path: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py") if path != Path(__file__)}


def test_every_long_number_stands_in_a_test():
    numbers = set(re.findall(r"\d+\.\d{5,}(?:e-?\d+)?", PAGE))
    assert len(numbers) > 100
    everything = "\n".join(SOURCES.values())
    missing = {number for number in numbers if number not in everything}
    assert missing <= {"0.044715"}  # a constant of the published approximation of Φ


def test_cited_sections_exist():
    headings = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", PAGE, re.MULTILINE))
    cited = 0
    for path, text in SOURCES.items():
        for numbers in re.findall(r"docs/maths\.md ((?:\d+(?:\.\d+)?(?:, )?)+)", text):
            for number in re.findall(r"\d+(?:\.\d+)?", numbers):
                assert number in headings, (path, number)
                cited += 1
        assert not re.search(r"(?<!docs/)maths\.md", text), path  # every citation says where the page is
    assert cited > 20

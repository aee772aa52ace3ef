"""What stands on the pages, README.md, docs/ and others at the root: blocks of code and links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from sybil import Document
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).parents[2]
# The pages that teach: every block of code on them is run, or says why not
TAUGHT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*TAUGHT, *(ROOT / name for name in ("ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md"))]
# Before a block that is not run
MARK = re.compile(r"<!-- not run: ((?:needs|takes|installs|writes) .+) -->\n\Z")
FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n"))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: its file.
        line: of the page, where the text begins, from 1.
        language: what stands after the fence.
        text: what is in it.
        reason: why it is not run; None for a block that is.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    document = Document(page.read_text(encoding="utf-8"), str(page))
    found = []
    for region in FENCES(document):
        before = document.text[: region.start]
        mark = MARK.search(before)
        line = before.count("\n") + 2
        text = str(region.lexemes["source"])
        found.append(Block(page, line, region.lexemes["language"].strip(), text, mark and mark[1]))
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block, without comments, settings of variables and `srun`."""
    text = re.sub(r"\$\([^)]*\)", "HOST0", block.text.replace("\\\n", " "))
    found = []
    for line in text.splitlines():
        for part in " ".join(map(shlex.quote, shlex.split(line, comments=True))).split(" '&&' "):
            words = shlex.split(part)
            while words and (words[0] == "srun" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
                words.pop(0)
            if words:
                found.append(words)
    return found


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower()
        found.add(words.replace(" ", "-"))
    return found

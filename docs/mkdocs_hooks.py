"""What mkdocs does besides: it makes the API reference, and takes in what pages link to outside docs/.

On a forge, the pages link to files of the repository (`../SECURITY.md`, `../model_cards/...`). The site holds
copies of these under repository/, and this file turns the links to them. The pages of the reference are made
here, because they would be empty on a forge: their text is the docstrings.
"""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from unittest import mock

import markdown
from markdown.inlinepatterns import SimpleTextInlineProcessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from hf_ddpm.cli import COMMANDS
from hf_ddpm.config import TrainConfig
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.errors_config import ErrorsConfig
from hf_ddpm.evaluation.sweep_config import SweepConfig
from hf_ddpm.runtime.options import listed

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()([\w./-]+)(?=[#)])")

# The reference, in the order in which it is read: page, title, and for each module the names that it shows.
# A package shows what its `__all__` lists.
REFERENCE: list[tuple[str, str, dict[str, list[str]]]] = [
    (
        "process",
        "The process",
        {
            "process": ["DiffusionProcess"],
            "schedules": ["make_betas", "spaced_timesteps"],
            "spacing": ["sampling_steps", "start_step"],
        },
    ),
    ("gaussian", "Gaussians and the decoder", {"gaussian": [], "decoders": []}),
    ("scheduler", "The scheduler", {"scheduler": ["DDPMScheduler"]}),
    ("likelihood", "The bound", {"likelihood": []}),
    (
        "pipeline",
        "The pipeline",
        {
            "generation.pipeline": ["DDPMPipeline"],
            "generation.outputs": ["DDPMPipelineOutput"],
            "generation.predictor": ["PredictingPipeline"],
            "generation.portable": ["PortablePipeline"],
            "generation.sample": ["sample"],
            "generation.runs": ["load_run"],
        },
    ),
    ("pictures", "Pictures", {"pictures": [], "generation.grids": []}),
    (
        "training",
        "Training",
        {"training.trainer": ["train", "TrainResult"], "runtime.signals": ["TrainingStopped"]},
    ),
    ("objectives", "Objectives", {"objectives": [], "parametrization": []}),
    ("data", "Data", {"data.stream": [], "data.survey": ["Survey"], "data.pixels": ["to_float", "to_uint8"]}),
    (
        "evaluation",
        "Evaluation",
        {
            "evaluation.evaluate": ["evaluate"],
            "evaluation.sweep": ["sweep"],
            "folders.sweep": ["Sweep", "Cell", "choose"],
        },
    ),
    ("compression", "The codec", {"compression": []}),
    ("metrics", "Sample metrics", {"metrics": []}),
    ("exact", "The exact denoiser", {"exact": []}),
    ("guidance", "Classes and guidance", {"guidance": ["Conditioned", "Guided"]}),
    ("models", "Networks", {"models": [], "models.autoencoders": []}),
    (
        "publishing",
        "Publishing",
        {"publishing.publish": ["publish", "collect", "Publication"], "publishing.upload": ["PublishError"]},
    ),
]
OPTIONS = {
    "train": (TrainConfig, "hf_ddpm.config.TrainConfig"),
    "evaluate": (EvaluationConfig, "hf_ddpm.evaluation.config.EvaluationConfig"),
    "plan": (ErrorsConfig, "hf_ddpm.evaluation.errors_config.ErrorsConfig"),
    "sweep": (SweepConfig, "hf_ddpm.evaluation.sweep_config.SweepConfig"),
}


# What the command line calls the fields that are no flags of it
ARGUMENTS = {command: {"model": "MODEL", "dataset": "DATASET"} for command in ("evaluate", "plan", "sweep")}


class UnderscoresAfterMarks(markdown.Extension):
    """The `_` of β̃_t begins no emphasis, as on a forge: here the mark above β would be a word's end."""

    def extendMarkdown(self, md: markdown.Markdown) -> None:
        """Called by markdown, for pages and for docstrings."""
        md.inlinePatterns.register(SimpleTextInlineProcessor("([\u0300-\u036f]_)"), "marks", 175)


def on_config(config: MkDocsConfig) -> None:
    """Add what mkdocs.yml can't name."""
    config.markdown_extensions.append(UnderscoresAfterMarks())  # type: ignore[arg-type]  markdown takes these


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and every file outside docs/ that a page links to, or that such a file links to."""
    for name, title, modules in REFERENCE:
        text = f"# {title}\n\n" + "\n".join(_reference(module, names) for module, names in modules.items())
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    files.append(File.generated(config, "reference/options.md", content=_options()))

    waiting = [ROOT / "docs" / file.src_uri for file in files.documentation_pages() if file.abs_src_path]
    while waiting:
        for target in _targets(waiting.pop()):
            if files.get_file_from_path(_place(target)) is None:
                file = File.generated(
                    config, _place(target), abs_src_path=str(target), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(file)
                waiting += [target] * (target.suffix == ".md")
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links to files of the repository to their places in the site."""
    source = page.file.abs_src_path
    if source is None:
        return markdown

    def turned(found: re.Match[str]) -> str:
        target = _resolved(Path(source), found[1])
        return (
            found[1]
            if target is None
            else os.path.relpath(_place(target), PurePosixPath(page.file.src_uri).parent)
        )

    return LINK.sub(turned, markdown)


def _targets(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if target := _resolved(page, link):
            yield target


def _resolved(page: Path, link: str) -> Path | None:
    """The file that a page's link means; None if it is none of the repository's."""
    target = (page.parent / link).resolve()
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def _place(target: Path) -> str:
    """Where a file of the repository is in the site's sources."""
    place = target.relative_to(ROOT).as_posix()
    return place.removeprefix("docs/") if place.startswith("docs/") else f"repository/{place}"


def _reference(module: str, names: list[str]) -> str:
    members = f"    options:\n      members: [{', '.join(names)}]\n" if names else ""
    return f"## `hf_ddpm.{module}`\n\n::: hf_ddpm.{module}\n{members}"


def _options() -> str:
    """The options of every command: a table where it has a config, else what its `--help` says."""
    parts = [
        "# Every option\n\nA key of the TOML file of `hf-ddpm train --config FILE` is called as its flag, "
        "with `_` in the place of `-`.\n"
    ]
    for command in COMMANDS:
        parts.append(f"## hf-ddpm {command}\n")
        if command not in OPTIONS:
            parts.append(f"```text\n{_help(command)}```\n")
            continue
        kind, name = OPTIONS[command]
        rows = [_row(field, ARGUMENTS.get(command, {})) for field in dataclasses.fields(kind)]
        parts.append(f"In Python, the fields of `{name}`.\n")
        parts.append("| flag | default | what it says |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _help(command: str) -> str:
    said = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(said):
        with contextlib.suppress(SystemExit):
            COMMANDS[command](["--help"], f"hf-ddpm {command}")
    return said.getvalue()


def _row(field: Any, arguments: dict[str, str]) -> str:
    default = (
        ""
        if field.default in (None, "")
        else f"`{str(field.default).lower() if field.type is bool else field.default}`"
    )
    names = listed(field.metadata, "choices") + listed(field.metadata, "examples")
    text = field.metadata["help"] + (f" ({', '.join(f'`{name}`' for name in names)})" if names else "")
    flag = arguments.get(field.name, f"--{field.name.replace('_', '-')}")
    return f"| `{flag}` | {default} | {text.replace('|', chr(92) + '|')} |"

"""Every block of code of README.md, CONTRIBUTING.md and docs/ is run, in a namespace and a folder of its own.

A Python block is run as it stands. A command `hf-ddpm ...` of a shell block is run too, but short: flags
after its own (`SHORT`) make its numbers small. A block that has to be left out says why in a comment before
it, `<!-- not run: needs the Hub -->`; its Python is compiled, and the words of its commands are read by the
parsers that they are meant for. The folder is that of `clone` in conftest.py.
"""

import re
import shutil
from pathlib import Path

import pytest

from hf_ddpm.cli import COMMANDS, main
from hf_ddpm.models.networks import NETWORKS
from hf_ddpm.objectives import OBJECTIVES
from tests.pages.reading import TAUGHT, blocks_of, commands, name, prose

pytestmark = pytest.mark.usefixtures("no_hub")
BLOCKS = [block for page in TAUGHT for block in blocks_of(page)]
# What is added to a command, so that it takes no time
SHORT = {
    "train": "--max-steps 2 --batch-size 4 --sample-every 0",
    "sample": "--num-images 2 --steps 2",
    "evaluate": "--num-images 4 --num-evals-per-image 2",
    "interpolate": "--num-images 2 --steps 4",
    "publish": "",
    "export": "",
    "inpaint": "--steps 4 --resample 2",
    "plan": "",
    "sweep": "--num-samples 10 --steps 2,3",
    "compress": "--steps 2",
    "decompress": "",
}
SAMPLES = "--num-samples 6 --sampling-steps 2"
LARGE = ("cifar10", "256")  # networks that are replaced by the smallest one
# What each command calls once its words are read
CALLS = {
    "train": "hf_ddpm.training.trainer.train",
    "sample": "hf_ddpm.generation.sample.sample",
    "evaluate": "hf_ddpm.evaluation.evaluate.evaluate",
    "interpolate": "hf_ddpm.pictures.draw_interpolation",
    "inpaint": "hf_ddpm.pictures.draw_inpainting",
    "export": "hf_ddpm.generation.export.export",
    "publish": "hf_ddpm.publishing.publish.collect",
    "plan": "hf_ddpm.evaluation.errors.measure_errors",
    "sweep": "hf_ddpm.evaluation.sweep.sweep",
    "compress": "hf_ddpm.compression.command.compress_files",
    "decompress": "hf_ddpm.compression.command.decompress_file",
}


def blocks(*languages: str, run: bool):
    chosen = [block for block in BLOCKS if block.language in languages and (block.reason is None) == run]
    return pytest.mark.parametrize("block", chosen, ids=str)


def test_every_block_is_of_a_language_that_is_run_or_says_why_not():
    assert len(BLOCKS) > 30
    known = ("python", "sh")
    assert [str(block) for block in BLOCKS if block.language not in known and block.reason is None] == []
    comments = sum(page.read_text(encoding="utf-8").count("\n<!-- not run") for page in TAUGHT)
    assert comments == sum(block.reason is not None for block in BLOCKS)  # each stands before a block


@pytest.fixture
def unregistered():
    """What a block registers is forgotten after it."""
    kept = [(table, dict(table)) for table in (NETWORKS, OBJECTIVES)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


@blocks("python", run=True)
def test_python(block, clone, unregistered):
    # Lines are numbered as on the page, for the traceback
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    exec(code, {"__name__": "__main__"})


@blocks("sh", run=True)
def test_commands(block, clone):
    for words in commands(block):
        program, command, *rest = words
        assert program == "hf-ddpm", f"{program} is not run here: say why in a comment before the block"
        run_short(command, rest)


def run_short(command: str, words: list[str]) -> None:
    """Run a command with smaller numbers; what its folders hold from before is deleted first."""
    short = SHORT[command].split()
    if "--exact" in words:
        short = short[:2]  # every step has to be evaluated
    if command == "train":
        shutil.rmtree(words[words.index("--output-dir") + 1], ignore_errors=True)
        if "--model" not in words or words[words.index("--model") + 1] in LARGE:
            short += ["--model", "tiny"]
    if command == "evaluate" and {"--extractor", "--nearest-dataset"} & set(words):
        short += SAMPLES.split()
    if command == "publish":
        assert "--dry-run" in words, "publishing needs the Hub"
    main([command, *words, *short])


@blocks("python", "sh", run=False)
def test_what_is_not_run(block, clone, monkeypatch):
    if block.language == "python":
        compile(block.text, str(block), "exec")
    else:
        for words in commands(block):
            check_words(words, monkeypatch)


class Read(BaseException):
    """The words of a command were read, and it would begin."""


def check_words(words: list[str], monkeypatch) -> None:
    """Let the parser that a command's words are meant for read them."""
    program, *rest = words
    if program == "hf-ddpm":
        read_by_the_command(rest, monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(rest)
        script([args.training_script, *args.training_script_args], monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(rest[1:])
        script([args.training_script, *args.training_script_args], monkeypatch)
    elif program in ("python", "bash"):
        script(rest, monkeypatch)
    elif program == "make":
        assert all(re.search(rf"^{target}:", Path("Makefile").read_text(), re.MULTILINE) for target in rest)
    else:  # pip, apt-get and the like install things
        assert program in ("pip", "apt-get", "python3", ".", "hf"), words


def script(words: list[str], monkeypatch) -> None:
    place = Path(words[0])
    assert place.is_file(), words
    if place.parent.name == "train_scripts" and place.stem in COMMANDS:
        read_by_the_command([place.stem, *words[1:]], monkeypatch)


def read_by_the_command(words: list[str], monkeypatch) -> None:
    def called(*args, **kwargs):
        raise Read

    with monkeypatch.context() as patch, pytest.raises(Read):
        patch.setattr(CALLS[words[0]], called)
        main(words)


def test_flags_in_the_text_are_there(capsys):
    """Words like `--ema-decay` in a sentence are flags of a command of ours, or of a launcher."""
    known = set(
        "--signals-to-handle --multi_gpu --num_processes --help --version --add --half-weights".split()
    )
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known |= set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))
    for page in TAUGHT:
        spans = re.findall(r"`[^`\n]+`", prose(page))
        flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", span)}
        assert flags <= known, (name(page), flags - known)

"""layout.py: the only module that spells a file's name; names there and back."""

import ast
import re
from pathlib import Path

import pytest

import hf_ddpm
from hf_ddpm.folders import layout

PACKAGE = Path(hf_ddpm.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != Path(layout.__file__))


def constants(tree):
    """The texts in a module, but for docstrings; the pieces of an f-string each."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, False)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node


def joined(tree):
    """The texts behind a slash: `folder / "unet"`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            if isinstance(node.right, ast.Constant) and isinstance(node.right.value, str):
                yield node.right


def names():
    """What layout.py spells: names with a point or a hyphen in them, and plain words such as "unet"."""
    found = {node.value for node in constants(ast.parse(Path(layout.__file__).read_text()))}
    found = {name.strip("/") for name in found if re.fullmatch(r"[\w./-]{3,}", name)}
    found -= {layout.TENSORS, ".png"}  # which files of others end with, too
    speaking = {name for name in found if re.search(r"[.-]|_pytorch_", name)}
    return speaking, found - speaking


def spelled(source):
    """(line, text) of every name of a file that a module's source spells; sentences may mention one."""
    tree, (speaking, words) = ast.parse(source), names()
    paths = [node for node in constants(tree) if " " not in node.value]
    found = [node for node in paths if any(name in node.value for name in speaking)]
    found += [node for node in joined(tree) if node.value in words]
    return sorted({(node.lineno, node.value) for node in found})


# Names of others that are spelled alike: what no branch of git may end with
OF_OTHERS = {"cli.py": {"--timestep-spacing"}, "runtime/hub.py": {".lock"}}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_module_spells_a_files_name(path):
    found = {text for _, text in spelled(path.read_text(encoding="utf-8"))}
    assert found == OF_OTHERS.get(path.relative_to(PACKAGE).as_posix(), set())


def test_the_check_finds_a_name_in_each_disguise():
    speaking, words = names()
    assert {"model_index.json", "log.jsonl", "step-", ".parts-", ".lock"} <= speaking
    assert {"unet", "scheduler", "samples", "checkpoints", "heldout"} <= words
    assert spelled('x = run / "unet"\n') == [(1, "unet")]
    assert spelled('x = run / "heldout" / f"step-{step:08d}.safetensors"\n') == [(1, "heldout"), (1, "step-")]
    assert spelled('open(f"{run}/log.jsonl")\n') == [(1, "/log.jsonl")]
    assert spelled('"""log.jsonl"""\nraise ValueError("there is no log.jsonl")\nx = parts["unet"]\n') == []


def test_weights_by_name():
    assert layout.weights_name() == "diffusion_pytorch_model.safetensors"
    assert layout.weights_name("fp16") == "diffusion_pytorch_model.fp16.safetensors"
    shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert layout.is_weights(layout.weights_name()) and layout.is_weights(shard)
    for other in (layout.weights_name("fp16"), layout.WEIGHTS_INDEX, "model.safetensors", f"{shard}.tmp"):
        assert not layout.is_weights(other)
    assert layout.is_weights(layout.weights_name("fp16"), "fp16")
    assert not layout.is_weights(layout.weights_name("fp16"), "f.16")


@pytest.mark.parametrize("decay", ["0", "0.9", "0.9999"])
def test_a_decay_there_and_back(decay):
    name = layout.weights_name(layout.variant_name(decay))
    assert name.count(".") == 2  # diffusers finds no variant with a point in it
    assert layout.decay_of(name) == float(decay)


def test_other_files_have_no_decay():
    for name in (layout.weights_name(), layout.weights_name("fp16"), "ema_0.9.safetensors"):
        assert layout.decay_of(name) is None


def test_a_step_there_and_back():
    for step in (0, 500, 123_456_789):
        assert int(layout.STEP.fullmatch(layout.step_name(step))[1]) == step
    assert layout.STEP.fullmatch("step-12") is None


def test_the_newest_grid(tmp_path):
    assert layout.newest_grid(tmp_path) is None
    (tmp_path / layout.GRIDS).mkdir()
    for step in (20, 3):
        (tmp_path / layout.GRIDS / f"{layout.step_name(step)}.png").touch()
    (tmp_path / layout.GRIDS / "step-00000099.npy").touch()
    assert layout.newest_grid(tmp_path) == tmp_path / "samples" / "step-00000020.png"


def test_samples_by_name():
    assert layout.sample_name(7) == "00007.png" and layout.sample_name(123_456) == "123456.png"
    for name in ("00007.png", "123456.png"):
        assert layout.SAMPLE.fullmatch(name)
    for name in ("7.png", "00007.jpg", "x00007.png", "grid.png"):
        assert not layout.SAMPLE.fullmatch(name)


def test_the_docstring_shows_every_name():
    for name in (layout.INDEX, layout.CONFIG, layout.SCHEDULER_CONFIG, layout.weights_name(), layout.CARD):
        assert name in layout.__doc__
    for name in (*layout.PLOTS, *layout.SHOWN, layout.NEAREST, layout.LOCK, layout.SNAPSHOTS, layout.PARTS):
        assert name in layout.__doc__

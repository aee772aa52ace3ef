"""The package's root: public names are there when they are asked for, and nothing is loaded before."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hf_ddpm
from tests.launching import ROOT, environment

LIBRARIES = ["diffusers", "accelerate", "datasets", "transformers", "huggingface_hub", "safetensors"]
MATHEMATICS = """
    gaussian process schedules parametrization likelihood objectives exact variances seeds denoiser tables
    shown
""".split()
DOCUMENTED = """
    likelihood gaussian models metrics pictures exact parametrization schedules process
""".split()


def fresh(code: str) -> list[str]:
    """Which of torch and the Hugging Face libraries a new interpreter has loaded after it ran the code."""
    code += f"\nimport json, sys; print(json.dumps([n for n in {['torch', *LIBRARIES]} if n in sys.modules]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("names", [MATHEMATICS, ["gaussian"], ["likelihood"]], ids=" ".join)
def test_the_mathematics_loads_no_hugging_face_library(names):
    assert fresh("\n".join(f"import hf_ddpm.{name}" for name in names)) == ["torch"]


def test_the_root_and_the_options_load_nothing():
    code = (
        "import hf_ddpm, hf_ddpm.cli; hf_ddpm.TrainConfig, hf_ddpm.EvaluationConfig, hf_ddpm.TrainingStopped"
    )
    assert fresh(code) == []


def test_a_module_is_there_without_an_import_of_its_own():
    code = (
        "import hf_ddpm; hf_ddpm.likelihood.bound_term; hf_ddpm.DiffusionProcess; hf_ddpm.gaussian.normal_kl"
    )
    assert fresh(code) == ["torch"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_modules(name):
    assert getattr(hf_ddpm, name) is import_module(f"hf_ddpm.{name}")


def test_public_names():
    expected = """
        DDPMPipeline DDPMScheduler DiffusionProcess EvaluationConfig PublishError TrainConfig TrainingStopped
        __version__ create_model evaluate load_run load_stream publish simple_loss train
    """.split()
    assert sorted(hf_ddpm.__all__) == dir(hf_ddpm) == expected
    starred: dict = {}
    exec("from hf_ddpm import *", starred)
    assert {name: starred[name] for name in expected} == {name: getattr(hf_ddpm, name) for name in expected}
    assert starred.keys() - {"__builtins__"} == set(expected)


def test_public_names_are_few_and_explained():
    assert len(dir(hf_ddpm)) <= 16
    for name in set(dir(hf_ddpm)) - {"__version__"}:
        assert len(getattr(hf_ddpm, name).__doc__.splitlines()[0]) > 20, name


def test_type_checkers_and_python_find_the_same_objects():
    """The imports under TYPE_CHECKING name the module that each public name comes from."""
    tree = ast.parse(Path(hf_ddpm.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom) and line.module
        found |= {alias.name: getattr(import_module(line.module), alias.name) for alias in line.names}
    assert found == {name: getattr(hf_ddpm, name) for name in hf_ddpm.__all__ if name != "__version__"}


def test_unknown_names():
    for name in ("nothing", "ModelMixin", "__path_hooks__", "_private", "gaussian.normal_kl", "a.b", ""):
        assert not hasattr(hf_ddpm, name)  # diffusers' loader asks the package for names of its own
    with pytest.raises(AttributeError, match="module 'hf_ddpm' has no attribute 'nothing'"):
        hf_ddpm.nothing  # noqa: B018
    with pytest.raises(ImportError, match="nothing"):
        exec("from hf_ddpm import nothing")

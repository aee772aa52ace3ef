"""What is released: the wheel and the source archive, their contents, and the command from an empty place.

hatchling is called without isolation, and packages are installed without an index and without dependencies,
so nothing here needs a network. The libraries that hf_ddpm imports are this interpreter's: a line in a .pth
file of the new environment names their folder, whose own .pth files, an editable install's, have no effect.
"""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import PIL
import pytest

import hf_ddpm
from tests.launching import ROOT, environment

LIBRARIES = Path(PIL.__file__).parents[1]
STEM = f"hf_ddpm-{hf_ddpm.__version__}"
needs_hatchling = pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is in the extra dev")


def call(*command: object, cwd: Path, paths: str = "") -> str:
    """What a command prints, which sees no checkout through PYTHONPATH."""
    words = [str(word) for word in command]
    variables = environment(PYTHONPATH=paths, PIP_CONFIG_FILE=os.devnull, HF_HUB_OFFLINE="1")
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, folder: Path, kind: str) -> Path:
    """The wheel or the sdist of a source tree."""
    paths = os.pathsep.join(path for path in sys.path if path and (Path(path) / "hatchling").is_dir())
    call(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder, cwd=source, paths=paths)
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    """The source archive's tree."""
    place = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    return place / STEM


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


def files_of(folder: Path) -> set[str]:
    """The files below a folder, but for what interpreters and editors leave there."""
    found = (path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if "__pycache__" not in name and "/." not in name}


@needs_hatchling
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"{STEM}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {f"{STEM}.dist-info/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt", "RECORD")}
    licence = f"{STEM}.dist-info/licenses/LICENSE"
    assert names == files_of(ROOT / "hf_ddpm") | {"hf_ddpm/TEMPLATE.md", licence} | about
    data = {"hf_ddpm/py.typed", "hf_ddpm/data/digits/train-00000-of-00001.parquet", "hf_ddpm/cli.py"}
    assert data < names
    assert wheel.stat().st_size < 2**20
    metadata = zipfile.ZipFile(wheel).read(f"{STEM}.dist-info/METADATA").decode()
    assert f"\nVersion: {hf_ddpm.__version__}\n" in metadata


@needs_hatchling
def test_the_source_archive_holds_its_own_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("hf_ddpm", "tests", "docs", "train_scripts", "model_cards")
    wanted = set().union(*(files_of(ROOT / folder) for folder in folders))
    wanted |= {
        path.name for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".yml", ".cff", ".txt")
    }
    wanted |= {"Makefile", "LICENSE"}
    assert wanted <= names
    assert not [name for name in names if name.startswith((".venv", "runs", "site")) or name.endswith(".pyc")]
    assert sdist.stat().st_size < 10 * 2**20


@pytest.mark.slow
@needs_hatchling
@pytest.mark.parametrize("source", ["wheel", "sdist"])
def test_the_command_works_from_an_empty_place(source, wheel, unpacked, tmp_path):
    built = wheel if source == "wheel" else build(unpacked, tmp_path / "built", "wheel")
    place, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    venv.create(place, with_pip=False, symlinks=True)
    python, command = place / "bin" / "python", place / "bin" / "hf-ddpm"
    (site,) = place.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    call(*pip, "install", "--no-deps", "--no-index", built, cwd=work)
    (site / "libraries.pth").write_text(f"{LIBRARIES}\n")

    # It is the installed package that is imported, and not the checkout
    about = "import hf_ddpm, importlib.metadata as m; print(hf_ddpm.__file__, m.version('hf_ddpm'))"
    assert call(python, "-c", about, cwd=work).split() == [
        str(site / "hf_ddpm" / "__init__.py"),
        hf_ddpm.__version__,
    ]
    assert call(command, "--version", cwd=work) == f"hf-ddpm {hf_ddpm.__version__}\n"
    assert "usage: hf-ddpm COMMAND" in call(command, "--help", cwd=work)

    quick = ["--model", "tiny", "--max-steps", 2, "--batch-size", 4, "--sample-every", 0]
    call(
        command,
        "train",
        *quick,
        "--num-train-timesteps",
        20,
        "--beta-end",
        0.4,
        "--output-dir",
        "run",
        cwd=work,
    )
    assert (work / "run" / "model_index.json").is_file()
    call(command, "sample", "run", "--num-images", 2, "--steps", 3, "--out", "samples", cwd=work)
    assert len(list((work / "samples").glob("*.png"))) == 3
    call(command, "evaluate", "run", "digits", "--num-images", 2, "--num-evals-per-image", 2, cwd=work)
    told = call(command, "publish", "run", "me/digits", "--dry-run", cwd=work)
    assert "README.md" in told and "unet/diffusion_pytorch_model.safetensors" in told
    lines = call(python, "-c", "import sys, hf_ddpm.cli; print(*sys.path, sep='\\n')", cwd=work).splitlines()
    assert str(ROOT) not in lines


@pytest.mark.slow
@needs_hatchling
def test_the_source_archive_passes_tests_of_its_own(unpacked, tmp_path):
    tests = ["tests/test_pages.py", "tests/test_imports.py", "tests/test_shipped.py", "tests/test_process.py"]
    options = ["-q", "-n", "0", "-p", "no:cacheprovider"]
    said = call(sys.executable, "-m", "pytest", *options, *tests, cwd=unpacked, paths=str(unpacked))
    assert " passed" in said or "100%" in said

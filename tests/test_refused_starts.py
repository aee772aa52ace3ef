"""Whatever is refused leaves the disk as it was: no new folder, and no file that is changed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_ddpm import train
from hf_ddpm.cli import main
from tests.evaluation.commands import CLASSIFIER, FEW
from tests.training.helpers import Conv, again, checkpoint, folder_of_images, small

RUN = "--model tiny --batch-size 4 --max-steps 4 --sample-every 0 --lr-warmup-steps 0".split()


def some(cases: list[str], default: int = 2) -> list:
    """The cases, of which all but a few are for the slow tests."""
    return [*cases[:default], *(pytest.param(case, marks=pytest.mark.slow) for case in cases[default:])]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with its content; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(capfd, *words, code=2) -> str:
    """The line of a command that has to fail."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("hf-ddpm")]
    assert stop.value.code == code and len(lines) == 1 and "Traceback" not in err, err
    assert len(lines[0]) <= 300
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with two checkpoints, to be read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(again(folder, num_train_timesteps=20, beta_end=0.5))
    return folder


@pytest.fixture
def data(tmp_path_factory):
    """Folders of images: good ones of 8x8, of two sizes, one of which is broken, and large ones of 10x10."""
    place = tmp_path_factory.mktemp("data")
    for name, shape in (("good", (8, 8)), ("sizes", (8, 8)), ("broken", (8, 8)), ("ten", (10, 10))):
        folder_of_images(place / name, 6, shape)
    for number in range(1, 6):  # so that the first step of four images meets one
        Image.fromarray(np.zeros((9, 7), np.uint8)).save(place / "sizes" / "train" / f"{number:03d}.png")
    for number in range(6):
        (place / "broken" / "train" / f"{number:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return place


TRAIN = [
    "--dataset /nowhere",
    "--dataset DATA/sizes",
    "--dataset DATA/broken",
    "--dataset DATA/ten --model cifar10",
    "--dataset DATA/ten --image-size 9 --fit resize",
    "--dataset DATA/good --output-dir DATA/good/run",
    "--dataset DATA/good --split test",
    "--dataset DATA/good --evaluate-every 1",
    "--split tset",
    "--image-column nothing",
    "--image-size 9",
    "--image-size 9 --model auto --fit resize",
    "--channels 7",
    "--model tinny",
    "--model /nowhere/model",
    "--model shallow-autoencoder --dropout 0.1",
    "--objective simpel",
    "--objective min-snr --snr-gamma 0",
    "--objective bound --prediction-type nothing",
    "--variance-type nothing",
    "--evaluate-every 1 --evaluate-split tset",
    "--sample-every 1 --sample-steps 2000",
    "--sample-every 1 --sample-num-images 99999",
    "--trackers nothing",
    "--push-to-hub a/b/c",
    "--push-to-hub me/model --license not,a,licence",
    "--resume /nowhere",
    "--config nowhere.toml",
    "--mixed-precision fp16",
    "--batch-size 1048576",
    "--max-steps 0",
    "--seed 1.5",
]


@pytest.mark.parametrize("flags", some(TRAIN))
def test_train_into_a_new_folder(flags, data, tmp_path, capfd, no_hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(data)
    words = flags.replace("DATA", str(data)).split()
    refused(capfd, "train", *RUN, "--output-dir", tmp_path / "new" / "run", *words)
    assert not list(tmp_path.iterdir()) and tree(data) == before


CHANGES = [
    "--seed 1",
    "--learning-rate 0.5",
    "--model digits",
    "--dataset /nowhere",
    "--evaluate-every 1 --evaluate-split tset",
    "--trackers nothing",
    "--resume never",
    "--resume /nowhere",
    "--mixed-precision fp16",
]


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
@pytest.mark.parametrize("flags", some(CHANGES))
def test_train_into_the_folder_of_a_run(flags, damaged, finished, tmp_path, capfd, no_hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(finished, tmp_path / "run")
    if damaged:  # what a killed run leaves is not tidied up by one that is refused
        (checkpoint(run, 4) / "model.safetensors").write_bytes(b"damaged")
        (run / "samples").mkdir()
        (run / "samples" / ".step-00000004.png.part-1").write_bytes(b"half")
    before = tree(tmp_path)
    words = ["--config", finished / "train_config.json", "--output-dir", run, *flags.split()]
    refused(capfd, "train", *words)
    assert tree(tmp_path) == before


class Wrong(Conv):
    """A network whose answer has another shape."""

    def forward(self, x_t, t):
        return super().forward(x_t, t)[..., :3]


class Raises(Conv):
    def forward(self, x_t, t):
        raise ValueError("no such images")


@pytest.mark.parametrize("network", [Wrong(), Raises(), Conv(3)], ids=["shape", "error", "channels"])
@pytest.mark.parametrize("goes_on", [False, True], ids=["new", "resumed"])
def test_a_network_that_fails_at_its_first_step(network, goes_on, tmp_path):
    if goes_on:
        train(small(tmp_path / "run", max_steps=1), Conv())
    before = tree(tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        train(small(tmp_path / "run"), network)
    assert tree(tmp_path) == before


def test_an_objective_that_fails_at_its_first_step(tmp_path):
    def objective(process, denoiser, x_0, t, noise):
        raise ValueError("not with these images")

    with pytest.raises(ValueError, match="not with these"):
        train(small(tmp_path / "run"), Conv(), objective=objective)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_does_not_start(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no key")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fails)
    with pytest.raises(RuntimeError, match="no key"):
        train(small(tmp_path / "run", trackers="tensorboard"), Conv())
    assert not list(tmp_path.iterdir())


SAMPLE = [
    "MODEL --steps 21",
    "MODEL --scheduler nothing",
    "MODEL --scheduler ddim --variance-type fixed_small",
    "MODEL --variance-type learned",
    "MODEL --batch-size 0",
    "MODEL --num-images 1000000000 --batch-size 1000000000",
    "/nowhere/model",
]


@pytest.mark.parametrize("flags", some(SAMPLE))
def test_sample(flags, tiny_folder, tmp_path, capfd, no_hub):
    before = tree(tiny_folder)
    refused(
        capfd, "sample", *flags.replace("MODEL", str(tiny_folder)).split(), "--out", tmp_path / "new" / "out"
    )
    assert not list(tmp_path.iterdir()) and tree(tiny_folder) == before


def test_sample_into_a_folder_of_samples(tiny_folder, tmp_path, capfd):
    main(["sample", str(tiny_folder), "--out", str(tmp_path), "--num-images", "2"])
    (tmp_path / ".00001.png.part-1").write_bytes(b"half")
    before = tree(tmp_path)
    for flags in ([], ["--seed", 1], ["--steps", 21, "--overwrite"]):
        refused(capfd, "sample", tiny_folder, "--out", tmp_path, "--num-images", 2, *flags)
        assert tree(tmp_path) == before


EVALUATE = [
    ("MODEL digits --split tset", "no split 'tset'"),
    ("MODEL digits --num-images 301", "--num-images is 301"),
    ("MODEL digits --steps 21", "--steps is 21"),
    ("MODEL digits --compare-with nowhere", "'nowhere' holds no evaluation"),
    ("MODEL digits --extractor /nowhere/model", "no folder '/nowhere/model'"),
    ("MODEL digits --extractor CLASSIFIER --num-samples 8 --reference REFERENCE", "reference.safetensors"),
    ("MODEL digits --nearest-dataset digits --nearest-split test", "--nearest-split 'test'"),
    ("MODEL digits --nearest-dataset /nowhere", "/nowhere"),
    ("MODEL digits --image-column nothing", "no column 'nothing'"),
    ("MODEL DATA/ten --split train", "for a network of 1x8x8 (CxHxW): add --fit resize_crop"),
    ("MODEL /nowhere", "/nowhere"),
    ("/nowhere/model digits", "/nowhere/model"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "words"), EVALUATE, ids=[flags for flags, _ in EVALUATE])
@pytest.mark.parametrize("there", [False, True], ids=["new", "evaluated"])
def test_evaluate(there, flags, words, tiny_folder, data, tmp_path, capfd, no_hub, evaluated, monkeypatch):
    """Its input is looked at before it says that the folder holds an evaluation."""
    monkeypatch.chdir(data)
    reference = data / "reference.safetensors"
    reference.write_bytes(b"something else")
    for name, value in {
        "MODEL": tiny_folder,
        "DATA": data,
        "CLASSIFIER": CLASSIFIER,
        "REFERENCE": reference,
    }.items():
        flags = flags.replace(name, str(value))
    out = shutil.copytree(evaluated, tmp_path / "out") if there else tmp_path / "new" / "out"
    before = tree(tmp_path), tree(data), tree(tiny_folder)
    assert words in refused(capfd, "evaluate", *flags.split(), "--out", out)
    assert (tree(tmp_path), tree(data), tree(tiny_folder)) == before


@pytest.fixture(scope="module")
def evaluated(tiny_folder, tmp_path_factory):
    """A folder that holds an evaluation, to be read only."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    folder.mkdir()
    (folder / "evaluation.json").write_text('{"bits_per_dim": {}}')
    (folder / ".evaluation.safetensors.part-1").write_bytes(b"half")
    return folder


def test_evaluate_says_at_last_that_the_folder_holds_an_evaluation(tiny_folder, tmp_path, capfd, evaluated):
    out = shutil.copytree(evaluated, tmp_path / "out")
    before = tree(tmp_path)
    line = refused(capfd, "evaluate", tiny_folder, "digits", "--out", out, *FEW)
    assert "holds an evaluation already" in line and tree(tmp_path) == before


def test_a_comparison_is_looked_at_first(tiny_folder, tmp_path, capfd):
    for name in ("one", "two"):
        main(["evaluate", str(tiny_folder), "digits", "--out", str(tmp_path / name), *map(str, FEW)])
    before = tree(tmp_path)
    words = [tiny_folder, "digits", "--out", tmp_path / "one", *FEW, "--compare-with", tmp_path / "two"]
    assert "seed" in refused(capfd, "evaluate", *words, "--seed", 1)
    assert "holds an evaluation already" in refused(capfd, "evaluate", *words)
    assert tree(tmp_path) == before


INTERPOLATE = [
    "MODEL digits:test:4 digits:test:999",
    "MODEL digits:test:4 /nowhere.png",
    "MODEL digits:test:4 digits:test:5 --t 20",
    "MODEL digits:test:4 digits:test:5 --steps 21",
    "MODEL digits:test:4 digits:test:5 --num-images 1",
    "/nowhere/model digits:test:4 digits:test:5",
]


@pytest.mark.parametrize("flags", some(INTERPOLATE))
def test_interpolate(flags, tiny_folder, tmp_path, capfd, no_hub):
    words = flags.replace("MODEL", str(tiny_folder)).split()
    refused(capfd, "interpolate", *words, "--out", tmp_path / "new" / "mixed.png")
    assert not list(tmp_path.iterdir())


PUBLISH = [
    "RUN a/b/c",
    "RUN me/x --license a,b",
    "RUN me/x --ema-decay 0.5",
    "/nowhere me/x",
    "RUN me/x --picture no.png",
]


@pytest.mark.parametrize("flags", some(PUBLISH))
def test_publish(flags, finished, tmp_path, capfd, no_hub):
    run = shutil.copytree(finished, tmp_path / "run")
    before = tree(tmp_path)
    refused(capfd, "publish", *flags.replace("RUN", str(run)).split())
    assert tree(tmp_path) == before

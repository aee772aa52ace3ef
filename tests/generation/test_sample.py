"""`hf-ddpm sample`: an image depends on its seed and number; what is written, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler, create_model
from hf_ddpm.generation.samplers import respace
from hf_ddpm.seeds import image_generators
from tests.commands import pixels, refused, same_images, sample
from tests.launching import ROOT, forked

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")


def test_sample_writes_numbered_images_and_a_grid(tiny_folder, tmp_path, capsys):
    images = sample(tiny_folder, tmp_path / "deep" / "out", "--num-images", 5, "--steps", 4)
    assert capsys.readouterr().out == f"5 images and grid.png in {tmp_path}/deep/out\n"
    assert sorted(images) == [f"{i:05d}.png" for i in range(5)] + ["grid.png"]
    assert {images[f"{i:05d}.png"].shape for i in range(5)} == {(8, 8)}
    grid = images["grid.png"]
    assert grid.shape == (2 * 100 + 4, 3 * 100 + 4, 3)
    for i in range(5):
        top, left = 4 + i // 3 * 100, 4 + i % 3 * 100
        shown = grid[top : top + 96 : 12, left : left + 96 : 12]
        np.testing.assert_array_equal(shown, np.repeat(images[f"{i:05d}.png"][..., None], 3, axis=2))


def test_an_image_depends_on_its_seed_and_number_only(tiny_folder, tmp_path):
    images = sample(tiny_folder, tmp_path / "64", "--num-images", 5, "--seed", 3, "--steps", 5)
    small = sample(
        tiny_folder, tmp_path / "2", "--num-images", 5, "--seed", 3, "--steps", 5, "--batch-size", 2
    )
    assert same_images(images, small)
    fewer = sample(tiny_folder, tmp_path / "3", "--num_images", 3, "--seed=3", "--steps", 5)
    assert all(np.abs(fewer[name] - images[name]).max() <= 1 for name in fewer if name != "grid.png")
    other = sample(tiny_folder, tmp_path / "s", "--num-images", 5, "--steps", 5)
    assert not any(np.array_equal(other[name], images[name]) for name in images)

    # By hand: one generator per image, its seed drawn from (seed, number).
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = np.random.SeedSequence((3, 4)).generate_state(1, np.uint64)[0] >> 1
    (image,) = pipeline(1, torch.Generator().manual_seed(int(drawn)), 5).images
    assert np.abs(np.asarray(image).astype(int) - images["00004.png"]).max() <= 1


def test_sampler_and_variance(tiny_folder, tmp_path):
    default = sample(tiny_folder, tmp_path / "a", "--num-images", 2)
    large = sample(tiny_folder, tmp_path / "b", "--num-images", 2, "--variance-type", "fixed_large")
    small = sample(tiny_folder, tmp_path / "c", "--num-images", 2, "--variance-type", "fixed_small")
    ddim = sample(tiny_folder, tmp_path / "d", "--num-images", 2, "--scheduler", "ddim")
    assert same_images(default, large)  # as the model was saved
    assert not same_images(default, small) and not same_images(default, ddim)


def test_timestep_spacing(tiny_folder, tmp_path):
    few = ["--num-images", 2, "--steps", 4]
    found = {
        spacing: sample(tiny_folder, tmp_path / spacing, *few, "--timestep-spacing", spacing)
        for spacing in ("leading", "trailing", "linspace")
    }
    assert same_images(found["leading"], sample(tiny_folder, tmp_path / "own", *few))
    # By hand: T = 20 and the steps of Lin et al. 2023, table 2
    for spacing, steps in {"trailing": [19, 14, 9, 4], "linspace": [19, 13, 6, 0]}.items():
        pipeline = DDPMPipeline.from_pretrained(tiny_folder)
        pipeline.scheduler.register_to_config(timestep_spacing=spacing)
        (image,) = pipeline(1, image_generators(0, [0]), 4).images
        assert pipeline.scheduler.timesteps.tolist() == steps
        assert np.abs(np.asarray(image).astype(int) - found[spacing]["00000.png"]).max() <= 1
    ddim = [*few, "--scheduler", "ddim"]
    trailing = sample(tiny_folder, tmp_path / "ddim", *ddim, "--timestep-spacing", "trailing")
    assert not same_images(trailing, sample(tiny_folder, tmp_path / "ddim-own", *ddim))


def test_samplers_without_a_choice_of_spacing():
    pipeline = DDPMPipeline(create_model("tiny"), diffusers.DPMSolverSinglestepScheduler())
    with pytest.raises(ValueError, match="'trailing', but DPMSolverSinglestepScheduler has no such key"):
        respace(pipeline, "trailing")


def test_a_drawing_knows_its_spacing(tiny_folder, tmp_path, capfd):
    few = ["--num-images", 2, "--steps", 4]
    sample(tiny_folder, tmp_path / "out", *few, "--timestep-spacing", "trailing")
    (tmp_path / "out" / "grid.png").unlink()  # as if it had been stopped
    capfd.readouterr()
    command = ["sample", tiny_folder, "--out", tmp_path / "out", *few, "--timestep-spacing"]
    assert "holds samples already" in refused(capfd, *command, "linspace")
    assert sample(tiny_folder, tmp_path / "out", *few, "--timestep-spacing", "trailing")["grid.png"].any()


def test_overwrite_replaces_samples_and_nothing_else(tiny_folder, tmp_path, capfd):
    out = tmp_path / "out"
    old = sample(tiny_folder, out, "--num-images", 3, "--steps", 3)
    (out / "holiday.png").write_bytes((out / "00000.png").read_bytes())
    capfd.readouterr()
    command = ["sample", tiny_folder, "--out", out, "--num-images", 2, "--seed", 1]
    line = refused(capfd, *command)
    assert line.endswith(f"out '{out}' holds samples already; allowed: another folder, or --overwrite")
    for bad in (["--steps", 21], ["--scheduler", "dimm"], ["--scheduler", "pndm", "--steps", 2]):
        refused(capfd, *command, "--overwrite", *bad)
    assert same_images({**old, "holiday.png": old["00000.png"]}, pixels(out))

    new = sample(tiny_folder, out, "--num-images", 2, "--seed", 1, "--steps", 3, "--overwrite")
    assert sorted(new) == ["00000.png", "00001.png", "grid.png", "holiday.png"]
    np.testing.assert_array_equal(new["holiday.png"], old["00000.png"])
    assert not np.array_equal(new["00000.png"], old["00000.png"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-images 0", "--num-images is '0'; allowed: whole numbers >= 1"),
        ("--num-images -3", "--num-images is '-3'; allowed: whole numbers >= 1"),
        ("--num-images 2.5", "--num-images is '2.5'; allowed: whole numbers >= 1"),
        ("--batch_size 0", "--batch-size is '0'; allowed: whole numbers >= 1"),
        ("--steps 0", "--steps is '0'; allowed: whole numbers >= 1"),
        ("--steps 21", "--steps is 21; allowed: whole numbers in 1..20"),
        ("--seed -1", "--seed is '-1'; allowed: whole numbers >= 0"),
        ("--seed x", "--seed is 'x'; allowed: whole numbers >= 0"),
        ("--scheduler dimm", "scheduler 'dimm' is unknown (did you mean 'ddim'?); allowed: ddpm, ddim, "),
        ("--scheduler unipc", "--steps is 20; allowed: fewer, UniPCMultistepScheduler would repeat a step"),
        (
            "--scheduler ddim --variance-type fixed_small",
            "--variance-type is 'fixed_small'; allowed: only with",
        ),
        ("--variance-type fixed", "--variance-type is 'fixed'; allowed: fixed_small, fixed_large"),
        (
            "--timestep-spacing trailling --steps 4",
            "--timestep-spacing is 'trailling' (did you mean 'trailing'?); allowed: linspace, leading, ",
        ),
        ("--timestep-spacing trailing", "--timestep-spacing is 'trailing', but has no use without --steps"),
        (
            "--scheduler ddim --steps 7 --timestep-spacing trailing",
            "goes down by 2 from each step, but --timestep-spacing 'trailing' lists",
        ),
        ("--num-image 3", "unknown argument '--num-image'; did you mean --num-images?"),
    ],
)
def test_sample_refuses(flags, words, tiny_folder, tmp_path, capfd):
    line = refused(capfd, "sample", tiny_folder, "--out", tmp_path / "out", *flags.split())
    assert line.startswith("hf-ddpm sample: error: ") and words in line
    assert not (tmp_path / "out").exists()


def test_sample_refuses_models_and_folders(tiny_folder, tmp_path, capfd, no_hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("empty").mkdir()
    DDPMPipeline(create_model("tiny", channels=5), DDPMScheduler()).save_pretrained("five")
    DDPMPipeline(create_model("tiny"), DDPMScheduler()).save_pretrained("odd")
    config = json.loads(Path("odd/unet/config.json").read_text())
    Path("odd/unet/config.json").write_text(json.dumps(config | {"sample_size": 7}))
    shutil.copytree(tiny_folder, "cut")
    Path("cut", WEIGHTS).write_bytes(Path("cut", WEIGHTS).read_bytes()[:-100])
    capfd.readouterr()

    for argv, words in {
        ("/nowhere/model", "out"): "model folder '/nowhere/model' does not exist",
        ("/nowhere/model", "out", "--scheduler", "nope"): "scheduler 'nope' is unknown; allowed: ddpm, ",
        ("nobody/no-such-model", "out"): "can't load a pipeline from 'nobody/no-such-model': no such folder",
        ("empty", "out"): "model folder 'empty' has no model_index.json: it is not a pipeline folder",
        ("cut", "out"): f"{WEIGHTS} is not a safetensors file that can be read",
        ("five", "out"): "model 'five' makes images of 5 channels; allowed in a PNG: 1 to 4",
        ("odd", "out"): "image_shape is (1, 7, 7); allowed: (1, H, W) with H and W multiples of 2",
        (tiny_folder, "file"): "out 'file' can't be written: File exists",
        (tiny_folder, "file/out"): "out 'file/out' can't be written: Not a directory",
    }.items():  # fmt: skip
        line = refused(capfd, "sample", argv[0], "--out", *argv[1:])
        assert words in line
    assert refused(capfd, "sample").endswith("the following arguments are required: MODEL, --out")
    assert not Path("out").exists()


# Real processes

# Runs the script as it stands, then once more with a bad model and its own stderr; says what it saw in files.
PROBE = """
import os, runpy, sys
from pathlib import Path

here, script, bad_model = Path(sys.argv[0]).parent, *sys.argv[1:3]
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")

from accelerate import PartialState
state = PartialState()
(here / f"rank{state.process_index}").write_text(str(state.num_processes))
os.dup2(os.open(here / f"stderr{state.process_index}", os.O_WRONLY | os.O_CREAT), 2)
sys.argv[1] = bad_model
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as stop:
    print(f"exit {stop.code}", file=sys.stderr)
"""


@pytest.mark.distributed
def test_two_processes_share_the_work(tiny_folder, tmp_path):
    probe, out, bad_model = tmp_path / "probe.py", tmp_path / "two", tmp_path / "cut"
    probe.write_text(PROBE)
    shutil.copytree(tiny_folder, bad_model)
    (bad_model / WEIGHTS).write_bytes((bad_model / WEIGHTS).read_bytes()[:-1])
    flags = ["--num-images", "5", "--steps", "5", "--batch-size", "2"]
    script = ROOT / "train_scripts" / "sample.py"
    done = forked([probe, script, bad_model, tiny_folder, *flags, "--out", out], tmp_path / "launch")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{i}").read_text() for i in (0, 1)] == ["2", "2"]
    assert done.stdout == f"5 images and grid.png in {out}\n"  # once
    assert same_images(pixels(out), sample(tiny_folder, tmp_path / "one", *flags))
    line = r"sample\.py: error: can't load a pipeline from '.*cut': .*file not fully covered\nexit 2\n"
    assert all(re.fullmatch(line, (tmp_path / f"stderr{i}").read_text()) for i in (0, 1))

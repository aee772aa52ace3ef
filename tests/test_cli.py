"""cli.py: what a person types, reads and finds in a folder; bad input is one line and exit code 2."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.cli import main, run
from hf_ddpm.config import TrainConfig
from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import load_stream
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import SCHEDULERS, swap_scheduler
from hf_ddpm.models import create_model
from hf_ddpm.pictures import interpolate
from hf_ddpm.scheduler import DDPMScheduler
from tests.launching import forked

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword:DeprecationWarning")

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# Other people's scripts hold these: a flag may be added, here too, but none may go.
TRAIN_FLAGS = """
    --config --dataset --split --image-column --image-size --channels --fit --horizontal-flip
    --shuffle-buffer --skip-corrupt --num-workers --model --dropout --num-train-timesteps
    --beta-schedule --beta-start --beta-end --rescale-betas-zero-snr --prediction-type
    --variance-type --clip-sample --objective --t-sampler --snr-gamma --hybrid-weight
    --max-steps --batch-size --gradient-accumulation-steps
    --learning-rate --lr-scheduler --lr-warmup-steps --adam-beta1 --adam-beta2 --adam-epsilon
    --weight-decay --max-grad-norm --ema-decay --seed --mixed-precision --gradient-checkpointing
    --compile --channels-last --output-dir --resume --checkpoint-every --keep-checkpoints
    --log-every --max-loss --sample-every --sample-num-images --sample-steps
    --evaluate-every --evaluate-split --evaluate-num-images --evaluate-num-evals --trackers
    --push-to-hub --push-every --push-private --license --dataset-license --dataset-id
""".split()
EVALUATE_FLAGS = """
    --split --num-images --image-column --fit --exact --num-evals-per-image --pilot-images --variance-type
    --clip-x0 --decoder --steps --first-variance --extractor --nearest-dataset --nearest-split --num-samples
    --sampling-steps --num-reference --reference --compare-with --out --overwrite --seed --batch-size
""".split()
PUBLISH_FLAGS = """
    --private --revision --dry-run --ema-decay --license --dataset-license --dataset-id --picture
    --custom-pipeline --commit-message
""".split()
INTERPOLATE_FLAGS = "--t --num-images --out --steps --seed --image-column --overwrite".split()
SAMPLE_FLAGS = (
    "--num-images --out --steps --scheduler --variance-type --seed --batch-size --overwrite".split()
)


def refused(capfd, *words, code=2):
    """The one line on stderr of a command that has to fail."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert stop.value.code == code, err
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err.rstrip("\n")


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("*.png")}


def same_images(one, other):
    """Equal up to one grey level: a network's last bits may depend on the batch."""
    return one.keys() == other.keys() and all(np.abs(one[name] - other[name]).max() <= 1 for name in one)


# Help


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]], ids=str)
def test_top_level_help(argv, capsys):
    main(argv)
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("usage: hf-ddpm COMMAND [options]")
    commands = ["train", "sample", "evaluate", "interpolate", "publish"]
    assert re.findall(r"^  (\w+) +\w.*\.$", out, re.MULTILINE) == commands


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", TRAIN_FLAGS),
        ("sample", SAMPLE_FLAGS),
        ("evaluate", EVALUATE_FLAGS),
        ("interpolate", INTERPOLATE_FLAGS),
        ("publish", PUBLISH_FLAGS),
    ],
    ids=["train", "sample", "evaluate", "interpolate", "publish"],
)
def test_help_lists_every_flag(command, flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.findall(r"^  (?:-h, )?(--[\w-]+)", out, re.MULTILINE) == ["--help", *flags]
    lines = re.split(r"\n  (?=--|-h)", out)[1:]
    assert all(len(re.sub(r"^\S+( \[?[A-Z|a-z]+\]?)?", "", line).split()) >= 1 for line in lines)
    assert "example: hf-ddpm" in out
    if command == "train":
        assert {field.name for field in dataclasses.fields(TrainConfig)} | {"config"} == {
            flag[2:].replace("-", "_") for flag in flags
        }
        assert "[digits]" in out and "[false]" in out and "[]" not in out
    elif command == "evaluate":
        assert {field.name for field in dataclasses.fields(EvaluationConfig)} == {
            "model",
            "dataset",
            *(flag[2:].replace("-", "_") for flag in flags),
        }
    elif command == "sample":
        assert all(name in out for name in SCHEDULERS)


# Words become values


@pytest.fixture
def configs(monkeypatch):
    """The configs that `train` is called with, instead of training."""
    seen = []

    class Enough(ValueError):
        pass

    def train(config):
        seen.append(config)
        raise Enough("seen")

    monkeypatch.setattr("hf_ddpm.cli.train", train)
    return seen


def test_defaults_then_file_then_flags(configs, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('batch_size = 5\nseed = 7\nimage_size = "8x4"\n')
    for argv in (
        [],
        ["--config", str(file)],
        ["--config", str(file), "--batch-size", "6"],
        ["--batch_size=6", "--horizontal_flip", "--clip-sample", "false", "--dropout", "none"],
    ):
        with pytest.raises(SystemExit):
            main(["train", *argv])
    assert configs == [
        TrainConfig(),
        TrainConfig(batch_size=5, seed=7, image_size="8x4"),
        TrainConfig(batch_size=6, seed=7, image_size="8x4"),
        TrainConfig(batch_size=6, horizontal_flip=True, clip_sample=False),
    ]
    # What a run leaves behind starts it again.
    (tmp_path / "train_config.json").write_text(configs[2].to_json())
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "train_config.json")])
    assert configs[-1] == configs[2]


def test_every_flag_reaches_its_key(configs, capsys):
    for field in dataclasses.fields(TrainConfig):
        value = field.default if field.default is not None else "none"
        for name in (field.name, field.name.replace("_", "-")):
            with pytest.raises(SystemExit):
                main(["train", f"--{name}", str(value)])
            assert configs.pop() == TrainConfig()


# Bad input to train


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bacth-size", "3"], "unknown argument '--bacth-size'; did you mean --batch-size?"),
        (["--bacth_size=3"], "unknown argument '--bacth-size=3'; did you mean --batch-size?"),
        (["stray"], "unknown argument 'stray'; see --help"),
        (["--batch-size"], "argument --batch-size: expected one argument"),
        (["--batch-size", "-1"], "batch_size is -1; allowed: >= 1"),
        (["--batch_size", "-1"], "batch_size is -1; allowed: >= 1"),
        (["--batch-size", "2.5"], "batch_size is '2.5'; allowed: a whole number"),
        (["--batch-size", "many"], "batch_size is 'many'; allowed: a whole number"),
        (["--image-size", "-8"], "image_size is '-8'; allowed: a positive whole number, or two"),
        (["--image-size", "-8x8"], "image_size is '-8x8'; allowed: a positive whole number"),
        (["--image-size", "8.5"], "image_size is '8.5'; allowed: a positive whole number"),
        (["--image-size=7", "--fit=resize"], "image_size is 7; allowed for 'tiny': a positive multiple of 2"),
        (["--learning-rate", "-1e-4"], "learning_rate is -0.0001; allowed: > 0"),
        (["--model", "tinny"], "preset 'tinny' is unknown (did you mean 'tiny'?); allowed: cifar10, "),
        (["--model", "/nowhere/model"], "model folder '/nowhere/model' does not exist"),
        (["--dataset", "/nowhere/data"], "no file or folder /nowhere/data"),
        (["--dataset", "somebody/no-such-set"], "can't read 'somebody/no-such-set' as a data set"),
        (["--split", "tset"], "no split 'tset' in digits; it has train, test"),
        (["--config", "nowhere.toml"], "can't read config file 'nowhere.toml': No such file or directory"),
    ],
    ids=str,
)  # fmt: skip
def test_train_refuses(argv, words, no_hub, tmp_path, capfd):
    run_folder = tmp_path / "run"
    flags = ["--output-dir", run_folder, "--model", "tiny", "--max-steps", 1, "--sample-every", 0]
    line = refused(capfd, "train", *flags, *argv)
    assert line.startswith("hf-ddpm train: error: ") and words in line


def test_train_refuses_files(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("typo.toml").write_text("bacth_size = 3\n")
    Path("cut.toml").write_text("batch_size =\n")
    Path("cut.json").write_text('{"batch_size"')
    Path("file").write_text("")
    Path("empty").mkdir()
    shutil.copytree(ROOT / "hf_ddpm" / "data" / "digits", "damaged")
    for shard in Path("damaged").glob("train*"):
        shard.write_bytes(shard.read_bytes()[:1000])

    for argv, words in {
        ("--config", "typo.toml"): "config file 'typo.toml': unknown key 'bacth_size'; did you mean 'batch",
        ("--config", "cut.toml"): "config file 'cut.toml' is not TOML: ",
        ("--config", "cut.json"): "config file 'cut.json' is not JSON: ",
        ("--dataset", "empty"): "can't read 'empty' as a data set: ",
        ("--dataset", "damaged"): "damaged",
        ("--output-dir", "file/run"): "output_dir 'file/run' can't be written: Not a directory",
        ("--output-dir", "file"): "output_dir 'file' can't be written: ",
    }.items():  # fmt: skip
        line = refused(capfd, "train", "--output-dir", "run", "--model", "tiny", *argv)
        assert words in line


@pytest.mark.parametrize("broken", [0, 2])
def test_train_refuses_a_truncated_png(broken, tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(256, size=(8, 8), dtype=np.uint8)
        Image.fromarray(noise).save(data / f"{i}.png")
    file = data / f"{broken}.png"
    file.write_bytes(file.read_bytes()[:-40])
    flags = f"--output-dir {tmp_path}/run --dataset {data} --model tiny --batch-size 4 --max-steps 3"
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags.split(), "--sample-every", "0"])
    err = capfd.readouterr().err
    line = err.rstrip("\n").rpartition("\n")[2]
    assert stop.value.code == 2 and "Traceback" not in err
    assert line.startswith("hf-ddpm train: error: ") and str(file) in line and "corrupt image" in line
    assert broken or err == line + "\n"  # the first image is read before anything else is said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tarin"], "hf-ddpm: error: unknown command 'tarin'; did you mean 'train'?"),
        (
            ["xyz"],
            "hf-ddpm: error: unknown command 'xyz'; allowed: train, sample, evaluate, interpolate, publish",
        ),
    ],
    ids=str,
)
def test_unknown_command(argv, words, capfd):
    assert refused(capfd, *argv) == words


# Training, then sampling


def test_from_data_to_pictures(tmp_path, capsys):
    run_folder, out = tmp_path / "run", tmp_path / "out"
    flags = "--model tiny --batch_size 8 --max-steps 2 --num-train-timesteps 20 --beta-end 0.5 --seed 1"
    main(["train", *flags.split(), "--sample-every", "0", "--output-dir", str(run_folder)])
    said = capsys.readouterr().out
    assert said.startswith("step 2, 16 images seen, loss ") and f"pipeline: {run_folder}" in said
    config = json.loads((run_folder / "train_config.json").read_text())
    assert config["batch_size"] == 8 and config["seed"] == 1
    main(["sample", str(run_folder), "--num-images", "2", "--out", str(out)])
    assert sorted(pixels(out)) == ["00000.png", "00001.png", "grid.png"]


# sample


def sample(model, out, *flags):
    main(["sample", str(model), "--out", str(out), *(str(flag) for flag in flags)])
    return pixels(out)


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
        ("--num-images 0", "argument --num-images: '0'; allowed: whole numbers >= 1"),
        ("--num-images -3", "argument --num-images: '-3'; allowed: whole numbers >= 1"),
        ("--num-images 2.5", "argument --num-images: '2.5'; allowed: whole numbers >= 1"),
        ("--batch_size 0", "argument --batch-size: '0'; allowed: whole numbers >= 1"),
        ("--steps 0", "argument --steps: '0'; allowed: whole numbers >= 1"),
        ("--steps 21", "steps is 21; allowed: whole numbers in 1..20"),
        ("--seed -1", "argument --seed: '-1'; allowed: whole numbers >= 0"),
        ("--seed x", "argument --seed: 'x'; allowed: whole numbers >= 0"),
        ("--scheduler dimm", "scheduler 'dimm' is unknown (did you mean 'ddim'?); allowed: ddpm, ddim, "),
        ("--scheduler unipc", "steps is 20; allowed: fewer, UniPCMultistepScheduler would repeat a step"),
        (
            "--scheduler ddim --variance-type fixed_small",
            "variance_type is 'fixed_small'; allowed: only with",
        ),
        ("--variance-type fixed", "variance_type is 'fixed'; allowed: fixed_small, fixed_large"),
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
        ("nobody/no-such-model", "out"): "can't load a pipeline from 'nobody/no-such-model': no such folder",
        ("empty", "out"): "model folder 'empty' has no model_index.json: it is not a pipeline folder",
        ("cut", "out"): f"cut/{WEIGHTS}'. Error while deserializing header: incomplete metadata",
        ("five", "out"): "model 'five' makes images of 5 channels; allowed in a PNG: 1, 3, 4",
        ("odd", "out"): "image_shape is (1, 7, 7); allowed: (1, H, W) with H and W multiples of 2",
        (tiny_folder, "file"): "out 'file' can't be written: File exists",
        (tiny_folder, "file/out"): "out 'file/out' can't be written: Not a directory",
    }.items():  # fmt: skip
        line = refused(capfd, "sample", argv[0], "--out", argv[1])
        assert words in line
    assert refused(capfd, "sample").endswith("the following arguments are required: MODEL, --out")
    assert not Path("out").exists()


# interpolate


def test_interpolate_rows_of_a_data_set_and_files(tiny_folder, tmp_path, capfd):
    rows = list(load_stream("digits", "test").select([4, 17]))
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for row, file in zip(rows, files, strict=True):
        Image.fromarray(row[0].numpy()).save(file)
    out = tmp_path / "deep" / "mixed.png"
    command = ["interpolate", tiny_folder, "digits:test:4", "digits:test:17", "--num-images", 3, "--seed", 2]
    main([str(word) for word in (*command, "--t", "3,7", "--out", out)])
    assert capfd.readouterr().out == f"picture: {out}\n"
    drawn = pixels(out.parent)["mixed.png"]

    # By hand, from Python.
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    sheet = interpolate(pipeline, *(to_float(row) for row in rows), [3, 7], 3, 2)
    np.testing.assert_array_equal(
        drawn, pixels(sheet.save(tmp_path / "hand" / "mixed.png").parent)["mixed.png"]
    )

    same = ["interpolate", tiny_folder, *files, "--num-images", 3, "--seed", 2, "--t", "3,7", "--out", out]
    line = refused(capfd, *same)
    assert line.endswith(f"out '{out}' is there already; allowed: another file, or --overwrite")
    main([str(word) for word in (*same, "--overwrite")])
    np.testing.assert_array_equal(pixels(out.parent)["mixed.png"], drawn)
    main([str(word) for word in (*same, "--overwrite", "--steps", 5)])
    assert not np.array_equal(pixels(out.parent)["mixed.png"], drawn)

    # T/4, T/2 and 3T/4 of 20 steps
    main([str(word) for word in (*command, "--out", tmp_path / "default.png")])
    main([str(word) for word in (*command, "--out", tmp_path / "named.png", "--t", "5,10,15")])
    written = pixels(tmp_path)
    np.testing.assert_array_equal(written["default.png"], written["named.png"])


@pytest.mark.parametrize(
    ("a", "flags", "words"),
    [
        ("digits:test:4", "--t 20", "t is 20; allowed: steps in 0..19"),
        ("digits:test:4", "--t 3,x", "argument --t: '3,x'; allowed: whole numbers >= 0 between commas"),
        ("digits:test:4", "--t -1", "argument --t: '-1'; allowed: whole numbers >= 0 between commas"),
        ("digits:test:4", "--steps 21", "steps is 21; allowed: whole numbers in 1..20"),
        ("digits:test:4", "--num-images 1", "num_images is 1; allowed: whole numbers >= 2"),
        ("digits:test:4", "--out mixed.jpg", "out is 'mixed.jpg'; allowed: a file name that ends in .png"),
        ("digits:test:4", "--out file/mixed.png", "out 'file/mixed.png' can't be written: Not a directory"),
        ("digits:test:4", "--image-column pixels", "no column 'pixels'; there are: image"),
        ("digits:test:9999", "", "no row 9999 in "),
        ("digits:tset:4", "", "no split 'tset' in digits; it has train, test"),
        ("digits:4", "", "image 'digits:4' is no file; allowed: an image file, or DATASET:SPLIT:ROW such"),
        ("nowhere.png", "", "image 'nowhere.png' is no file; allowed: an image file, or DATASET:SPLIT:ROW"),
        ("file", "", "file: corrupt image: cannot identify image file"),
        ("large.png", "", "image 'large.png' is (1, 9, 8) (C, H, W); allowed: the model's (1, 8, 8)"),
        ("color.png", "", "image 'color.png' is (3, 8, 8) (C, H, W); allowed: the model's (1, 8, 8)"),
    ],
)
def test_interpolate_refuses(a, flags, words, tiny_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no image")
    Image.new("L", (8, 9)).save("large.png")
    Image.new("RGB", (8, 8)).save("color.png")
    line = refused(
        capfd, "interpolate", tiny_folder, a, "digits:test:17", "--out", "mixed.png", *flags.split()
    )
    assert line.startswith("hf-ddpm interpolate: error: ") and words in line
    assert not Path("mixed.png").exists()


def test_interpolate_spares_its_images(tiny_folder, tmp_path, capfd):
    image = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(image)
    content = image.read_bytes()
    words = ["interpolate", tiny_folder, image, "digits:test:17", "--overwrite"]
    assert f"is the image '{image}'; allowed: another file" in refused(capfd, *words, "--out", image)
    assert image.read_bytes() == content
    assert "is no path: " in refused(capfd, *words, "--out", "~nobody-here/x.png")
    assert "is no path: " in refused(capfd, *words[:2], "a" * 300, *words[3:], "--out", tmp_path / "x.png")


def test_interpolate_refuses_models(tiny_folder, tmp_path, capfd):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    swap_scheduler(pipeline, "ddim")
    pipeline.save_pretrained(tmp_path / "ddim")
    capfd.readouterr()
    command = ["digits:test:4", "digits:test:17", "--out", tmp_path / "mixed.png"]
    line = refused(capfd, "interpolate", tmp_path / "ddim", *command)
    assert line.endswith("the scheduler is 'DDIMScheduler'; allowed: DDPMScheduler (ddpm)")
    line = refused(capfd, "interpolate", "/nowhere/model", *command)
    assert line.endswith("model folder '/nowhere/model' does not exist")
    line = refused(capfd, "interpolate", tiny_folder)
    assert line.endswith("the following arguments are required: A, B, --out")


# What else ends a command


def test_failures_and_interruptions(capsys, monkeypatch):
    def command(error):
        def fail(argv, prog):
            raise error

        return fail

    hint = "HF_DDPM_TRACEBACK=1 shows where"
    for error, code, words in (
        (ValueError("two\nlines"), 2, "prog: error: two lines\n"),
        (OSError(28, "No space"), 1, f"prog: failed ({hint}): [Errno 28] No space\n"),
        (RuntimeError("out of\n memory"), 1, f"prog: failed ({hint}): out of memory\n"),
        (KeyboardInterrupt(), 130, "prog: interrupted\n"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            run(command(error), [], "prog")
        assert (stop.value.code, capsys.readouterr().err) == (code, words)
    monkeypatch.setenv("HF_DDPM_TRACEBACK", "1")
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind):
            run(command(kind("bad")), [], "prog")


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

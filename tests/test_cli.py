"""cli.py: what a person types, reads and finds in a folder; bad input is one line and exit code 2."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hf_ddpm
from hf_ddpm import EvaluationConfig, TrainConfig
from hf_ddpm.cli import main
from hf_ddpm.generation.samplers import SCHEDULERS
from hf_ddpm.models import PRESETS
from hf_ddpm.objectives import OBJECTIVES
from hf_ddpm.schedules import SCHEDULES
from hf_ddpm.variances import FIXED
from tests.commands import pixels, refused
from tests.launching import ROOT, environment

# Other people's scripts hold these: a flag may be added, here too, but none may go.
TRAIN_FLAGS = """
    --config --dataset --split --holdout --image-column --label-column --label-dropout --image-size --channels
    --background --fit --to-8-bit --horizontal-flip --shuffle-memory --skip-corrupt --num-workers
    --model --dropout --num-train-timesteps
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
    --split --part --holdout --holdout-seed --num-images --image-column --label-column --class-label
    --classify --halving --channels --background --fit --to-8-bit --skip-corrupt --exact
    --num-evals-per-image --pilot-images --variance-type --clip-x0 --decoder --steps --chain --last-step
    --errors --first-variance --extractor --nearest-dataset --nearest-split --num-samples --sampling-steps
    --sampling-spacing --num-reference --reference --compare-with --out --overwrite --seed --batch-size
""".split()
PLAN_FLAGS = """
    --split --part --holdout --holdout-seed --evals --image-column --label-column --class-label --channels
    --background --fit --to-8-bit --skip-corrupt --clip-x0 --out --overwrite --seed --batch-size
""".split()
SWEEP_FLAGS = """
    --split --part --holdout --holdout-seed --steps --schedulers --extractor --num-samples --num-reference
    --image-column --channels --background --fit --to-8-bit --skip-corrupt --out --overwrite --seed
    --batch-size
""".split()
PUBLISH_FLAGS = """
    --private --revision --dry-run --ema-decay --license --dataset-license --dataset-id --picture
    --custom-pipeline --commit-message
""".split()
INTERPOLATE_FLAGS = "--t --num-images --out --steps --seed --image-column --overwrite".split()
INPAINT_FLAGS = """
    --out --steps --resample --class --guidance --guidance-interval --seed --image-column --overwrite
""".split()
EXPORT_FLAGS = "--class --out".split()
COMPRESS_FLAGS = "--out --steps --batch --dtype --verify --overwrite".split()
DECOMPRESS_FLAGS = "--out --force".split()
SAMPLE_FLAGS = """
    --num-images --out --steps --scheduler --variance-type --timestep-spacing --ending --class --guidance
    --guidance-interval --quality --seed --batch-size --overwrite
""".split()


# Help


COMMANDS = ["train", "sample", "evaluate", "plan", "sweep", "interpolate", "inpaint", "export"]
COMMANDS += ["compress", "decompress", "publish"]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"], ["help", "help"]], ids=str)
def test_top_level_help(argv, capsys):
    main(argv)
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("usage: hf-ddpm COMMAND [options]")
    assert re.findall(r"^  (\w+) +\w.*\.$", out, re.MULTILINE) == COMMANDS


def test_version(capsys):
    for argv in (["--version"], ["help", "--version"]):
        main(argv)
        assert capsys.readouterr().out == f"hf-ddpm {hf_ddpm.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    said = []
    for argv in (["help", command], [command, "--help"], [command, "-h"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0].startswith(f"usage: hf-ddpm {command}") and set(said) == {said[0]}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # in a test only
def test_python_m_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf_ddpm", "--version"])
    for module in ("hf_ddpm", "hf_ddpm.cli"):
        runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().out == f"hf-ddpm {hf_ddpm.__version__}\n" * 2


# What is answered at once

ANSWERS = """
import sys
from hf_ddpm.cli import main

for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit:
        pass
    loaded = {name for name in ("torch", "numpy", "diffusers", "accelerate") if name in sys.modules}
    print(f"{line} loads {loaded or 'nothing'}", file=sys.stderr)
"""


def test_help_and_mistyped_words_load_no_torch():
    lines = ["", "--help", "--version", "help", "tarin", "help tarin", "train --bacth-size 3"]
    lines += ["train --batch-size", "sample x --stepz 3", "sample x", "sample x --out y --steps 0"]
    lines += [
        "evaluate",
        "plan",
        "plan x --evals 3",
        "sweep x --steps 5",
        "sweep x --extractor y --steps 0",
        "interpolate x a b --out c --seed -1",
        "publish",
        "publish a b --privat",
    ]
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS, *lines], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    told = [line for line in done.stderr.splitlines() if " loads " in line]
    assert done.returncode == 0 and told == [f"{line} loads nothing" for line in lines]


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", TRAIN_FLAGS),
        ("sample", SAMPLE_FLAGS),
        ("evaluate", EVALUATE_FLAGS),
        ("plan", PLAN_FLAGS),
        ("sweep", SWEEP_FLAGS),
        ("interpolate", INTERPOLATE_FLAGS),
        ("inpaint", INPAINT_FLAGS),
        ("export", EXPORT_FLAGS),
        ("compress", COMPRESS_FLAGS),
        ("decompress", DECOMPRESS_FLAGS),
        ("publish", PUBLISH_FLAGS),
    ],
    ids=COMMANDS,
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
        words = re.sub(r"-\n +", "-", out).split()  # a name may be broken at its "-"
        allowed = {*PRESETS, *SCHEDULES, *OBJECTIVES, *FIXED, "learned_range", "v_prediction", "random_crop"}
        assert allowed <= {word.strip("(),") for word in words}
    elif command == "evaluate":
        assert {field.name for field in dataclasses.fields(EvaluationConfig)} == {
            "model",
            "dataset",
            *(flag[2:].replace("-", "_") for flag in flags),
        }
    elif command == "sample":
        assert all(name in re.sub(r"-\n +", "-", out) for name in (*SCHEDULERS, *FIXED))


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

    monkeypatch.setattr("hf_ddpm.training.trainer.train", train)
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
        (["--bacth_size=3"], "unknown argument '--bacth-size'; did you mean --batch-size?"),
        (["stray"], "unknown argument 'stray'; see --help"),
        (["--batch-size"], "argument --batch-size: expected one argument"),
        (["--batch-size", "-1"], "--batch-size is -1; allowed: >= 1"),
        (["--batch_size", "-1"], "--batch-size is -1; allowed: >= 1"),
        (["--batch-size", "2.5"], "--batch-size is '2.5'; allowed: a whole number"),
        (["--batch-size", "many"], "--batch-size is 'many'; allowed: a whole number"),
        (["--image-size", "-8"], "--image-size is '-8'; allowed: a positive whole number, or two"),
        (["--image-size", "-8x8"], "--image-size is '-8x8'; allowed: a positive whole number"),
        (["--image-size", "8.5"], "--image-size is '8.5'; allowed: a positive whole number"),
        (["--image-size=7", "--fit=resize"], "--image-size is 7, which model 'tiny' can't halve often"),
        (["--learning-rate", "-1e-4"], "--learning-rate is -0.0001; allowed: > 0"),
        (["--model", "tinny"], "preset 'tinny' is unknown (did you mean 'tiny'?); allowed: auto, cifar"),
        (["--model", "atuo"], "preset 'atuo' is unknown (did you mean 'auto'?); allowed: auto, cifar10"),
        (["--model", "/nowhere/model"], "model folder '/nowhere/model' does not exist"),
        (["--dataset", "/nowhere/data"], "no file or folder /nowhere/data"),
        (["--dataset", "somebody/no-such-set"], "can't read 'somebody/no-such-set' as a data set"),
        (["--split", "tset"], "no split 'tset' in digits (did you mean 'test'?); it has train, test"),
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
        ("--dataset", "empty"): "no images in empty: it is empty",
        ("--dataset", "damaged"): "damaged",
        ("--output-dir", "file/run"): "--output-dir 'file/run' can't be written: Not a directory",
        ("--output-dir", "file"): "--output-dir 'file' can't be written: ",
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
    wanted = f"4 images of 8x8, mode L, 1 can't be read ({file.name}): add --skip-corrupt"
    assert line == f"hf-ddpm train: error: {wanted}"
    assert broken or err == line + "\n"  # the first image is read before anything else is said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tarin"], "hf-ddpm: error: unknown command 'tarin'; did you mean 'train'?"),
        (["help", "tarin"], "hf-ddpm: error: unknown command 'tarin'; did you mean 'train'?"),
        (["help", "train", "x"], "hf-ddpm: error: unknown argument 'x'; allowed: hf-ddpm help COMMAND"),
        (["--version", "x"], "hf-ddpm: error: unknown argument 'x'; allowed: hf-ddpm help COMMAND"),
        (["hlep"], "hf-ddpm: error: unknown command 'hlep'; did you mean 'help'?"),
        (["--verison"], "hf-ddpm: error: unknown command '--verison'; did you mean '--version'?"),
        (
            ["xyz"],
            "hf-ddpm: error: unknown command 'xyz'; allowed: train, sample, evaluate, plan, sweep, "
            "interpolate, inpaint, export, compress, decompress, publish",
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

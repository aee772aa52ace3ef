"""Command lines that nobody means: each is refused in one short line, without a trace of a secret.

A seeded generator makes them; the short version runs by default, and the long one is `slow`. A failure prints
the words that made it, which `attack` runs again.
"""

import dataclasses
import random
import shutil

import pytest

from hf_ddpm import EvaluationConfig, TrainConfig
from hf_ddpm.config import LARGEST_BATCH
from tests.fuzz.attack import attack

pytestmark = pytest.mark.usefixtures("no_hub")

TOKEN = "hf_" + "aB3dE5gH" * 4
OAUTH = "hf_oauth_" + "eyJhbGci.OiJ-x_" * 3
# What stands where a value, a flag, a path or a command should
WORDS = [
    *("", " ", "-", "--", "---", "=", "--=", "-1", "0", "1e309", "nan", "inf", "-inf", "1_0", "0x10", "none"),
    *(
        "１２",
        "٣",
        "²",
        "½",
        "1,2",
        "1,",
        ",",
        "true",
        "NaN",
        "9" * 5000,
        "-" + "9" * 5000,
        str(2**63),
        "1e-320",
    ),
    *(
        "x" * 5000,
        "a/" * 3000,
        "/" + "y" * 300,
        "~",
        "~nouser/x",
        "~nouser",
        "/dev/null",
        "/dev/zero",
        "/",
        ".",
    ),
    *(
        "..",
        "\0",
        "a\0b",
        "a\nb",
        "\r",
        "\x1b[2J\x1b]0;x\x07",
        "\u202egnp.exe",
        "\udcff\udc80",
        "é",
        "\u2028",
    ),
    *(TOKEN, OAUTH, f"api_org_{TOKEN[3:]}", f"https://me:pw@host/{TOKEN}", "s3cret-token", f"--{TOKEN}"),
    *(f"--token={TOKEN}", f"--hf_token={TOKEN}", "--token=s3cret-token", f"Authorization: Bearer {TOKEN}"),
    *(
        "a::b",
        "hf://datasets/x",
        "http://localhost:1/x",
        "file:///etc/passwd",
        "*",
        "[",
        "{}",
        "%s",
        "{0}",
        "$HOME",
    ),
    *("help", "train", "--help=x", "-h=1", "--version", "--no-such", "--seed", "--seed=", "digits:train:x"),
    *("<script>", "[x](javascript:y)", "a|b", "`", "a/b/c", "a--b", ".git", "MIT", "apache 2.0", "__class__"),
]
# What is a right value of some option, and an odd one of others
PLAUSIBLE = """
    0 1 2 3 7 8 20 21 1000 0.0 0.5 1.0 1e-3 1e30 -1 8x8 7x9 no fp16 bf16 never auto model run digits tiny
    cifar10 conv dense-t simple hybrid bound sddpm min-snr epsilon sample score mean v_prediction
    fixed_small fixed_large learned learned_range cosine sigmoid laplace constant linear resize
    center_crop random_crop importance ddim tensorboard heun unipc edm exact tanh spaced full train test
    image label inception mit other refs/pr/1 0.9,0.99 1,2,3
""".split()
COMMANDS = ["train", "sample", "evaluate", "publish", "interpolate", "help"]
OPTIONS = {
    "train": [field.name for field in dataclasses.fields(TrainConfig)] + ["config"],
    "evaluate": [field.name for field in dataclasses.fields(EvaluationConfig)],
    "sample": "num_images out steps scheduler variance_type seed batch_size overwrite".split(),
    "publish": "private revision dry_run ema_decay license dataset_license dataset_id picture "
    "custom_pipeline commit_message".split(),
    "interpolate": "t num_images out steps seed image_column overwrite".split(),
    "help": ["seed"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """Where the commands run: a model's folder, and a token where the Hub's client has its own."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_folder, folder / "model")
    (folder / "token").write_text("s3cret-token\n")
    return folder


def environment(place):
    """The token of a file, and a home of its own."""
    return {
        "HF_TOKEN_PATH": str(place / "token"),
        "HF_TOKEN": None,
        "HOME": str(place),
        "MPLBACKEND": "agg",
    }


# Lines that are right but for what the generator does to them; what they would begin takes no second
SMALL = {
    "train": "--model tiny --max-steps 1 --batch-size 2 --sample-every 0 --num-train-timesteps 8 "
    "--output-dir run",
    "sample": "model --num-images 1 --steps 2 --out samples --overwrite",
    "evaluate": "model digits --num-images 2 --num-evals-per-image 2 --out scores --overwrite",
    "publish": "model me/tiny --dry-run",
    "interpolate": "model digits:test:1 digits:test:2 --t 1 --steps 2 --num-images 2 --out x.png --overwrite",
    "help": "",
}


def line(draw):
    """A command line: a small right one that is broken in one to three places, or words at random."""
    command = draw.choice(COMMANDS)
    words = [command, *SMALL[command].split()]
    if draw.random() < 0.15:
        words = [draw.choice([command, draw.choice(WORDS)])]
    plausible = draw.random() < 0.6
    for _ in range(1 if plausible else draw.randint(1, 3)):
        name = draw.choice(OPTIONS[command])
        name = name if draw.random() < 0.5 else name.replace("_", "-")
        name = name if draw.random() < 0.9 else name[:-1]
        number = str(draw.choice([-1, 1]) * 10 ** draw.randint(2, 40))
        value = draw.choice([*PLAUSIBLE] if plausible else [*WORDS, number, number, number])
        kind = draw.random()
        if kind < 0.45:
            words += [f"--{name}", value]
        elif kind < 0.7:
            words.append(f"--{name}={value}")
        elif kind < 0.85 and len(words) > 1:
            words[draw.randrange(1, len(words))] = value
        else:
            words.insert(draw.randint(0, len(words)), value)
    return words


def stray_files(place):
    """What a command line left behind in the folder of the commands, which the next one should not find."""
    for path in place.iterdir():
        if path.name not in ("model", "token"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def broken(place, seed, count):
    draw, found = random.Random(seed), []
    for _ in range(count):
        words = line(draw)
        outcome = attack(words, place, environment(place))
        if faults := outcome.faults():
            found.append((faults, [word[:60] for word in words], outcome.err[-400:]))
        stray_files(place)
    return found


def test_some_lines(place):
    assert broken(place, 0, 25) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_lines(place, seed):
    assert broken(place, seed, 500) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", [TOKEN, OAUTH, f"--token={TOKEN}", f"--hf_token={OAUTH}", "s3cret-token"])
def test_a_token_anywhere(place, command, word):
    """Even one of no known form, which the client has from its file."""
    for words in (
        [word],
        [command, word],
        [command, *SMALL[command].split(), word],
        [command, "--seed", word],
    ):
        outcome = attack(words, place, environment(place))
        assert outcome.faults({2}) == [], (words, outcome.err)


@pytest.mark.parametrize(
    "words",
    [
        f"train --batch-size {10**8}",
        f"train --sample-num-images {10**10}",
        f"train --num-workers {10**5}",
        f"train --num-train-timesteps {10**9}",
        f"train --gradient-accumulation-steps {10**12}",
        f"train --evaluate-num-evals {10**9} --evaluate-every 1",
        f"sample model --out x --batch-size {10**9} --num-images 1",
        f"sample model --out x --num-images {10**12}",
        f"evaluate model digits --batch-size {10**9}",
        f"evaluate model digits --num-evals-per-image {10**9}",
        f"evaluate model digits --extractor inception --num-samples {10**12}",
        f"interpolate model digits:test:1 digits:test:2 --out x.png --num-images {10**9}",
    ],
)  # fmt: skip
def test_numbers_far_above_use_name_their_limit(place, words):
    outcome = attack(words.split(), place, environment(place), memory=2**29)
    assert outcome.faults({2}) == [] and "<= " in outcome.err, outcome.err


def test_a_batch_that_is_allowed_and_does_not_fit(place):
    """By an estimate of what the network takes, before anything of it is allocated."""
    flags = f"--batch-size {LARGEST_BATCH} --model cifar10 --image-size 32 --fit resize --sample-every 0"
    for words in (
        f"train --output-dir run {flags}",
        f"sample model --out x --num-images {LARGEST_BATCH} --batch-size {LARGEST_BATCH}",
    ):
        outcome = attack(words.split(), place, environment(place), memory=2**30)
        assert outcome.faults({2}) == [], outcome.err
        assert (
            f"--batch-size is {LARGEST_BATCH}: at least " in outcome.err
            and "allowed here: <= " in outcome.err
        )
    assert not (place / "x").exists()

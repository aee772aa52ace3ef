"""The `hf-ddpm` console command; the scripts in train_scripts/ call the same functions.

It turns words on a command line into calls; what words are, and how a command ends, is arguments.py's.
"""

import difflib
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState

from hf_ddpm.config import TrainConfig
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.folders.layout import EVALUATION
from hf_ddpm.folders.numbers import describe
from hf_ddpm.generation.sample import sample
from hf_ddpm.generation.samplers import SCHEDULERS
from hf_ddpm.pictures import draw_interpolation
from hf_ddpm.publishing.publish import collect
from hf_ddpm.runtime.arguments import Parser, add_options, count, run, whole, wholes
from hf_ddpm.runtime.messages import redact
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.training.trainer import train


def main(argv: Sequence[str] | None = None) -> None:
    """`hf-ddpm COMMAND ...`."""
    argv = sys.argv[1:] if argv is None else argv
    usage = "usage: hf-ddpm COMMAND [options]; `hf-ddpm COMMAND --help` tells more\n\ncommands:\n"
    usage += "".join(
        f"  {name:12} {(command.__doc__ or '').splitlines()[0]}\n" for name, command in COMMANDS.items()
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, end="")
    elif argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(COMMANDS)}"
        print(f"hf-ddpm: error: unknown command {argv[0]!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    else:
        run(COMMANDS[argv[0]], argv[1:], f"hf-ddpm {argv[0]}")


def train_command(argv: Sequence[str], prog: str) -> None:
    """Train a model on a stream of images, or go on with a run."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--key value ...]",
        description="Train a DDPM. Values come from the defaults, then the file, then the flags; '-' and '_' "
        "in a flag's name mean the same. The same command goes on with a run that was stopped, to the same "
        "result; SIGTERM, Ctrl-C and SIGUSR1 save first, and end with exit code 75. Use torchrun or "
        "`accelerate launch --multi_gpu` for several processes.",
        epilog="example: %(prog)s --dataset photos/ --image-size 64 --model cifar10 --output-dir runs/photos",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of the keys below, or a run's train_config.json"
    )
    add_options(parser, TrainConfig)
    values = vars(parser.parse(argv))
    config = TrainConfig.load(values.pop("config"), **values)
    result = train(config)
    if PartialState().is_main_process:
        done = f"step {result.step}, {result.images} images seen"
        this_time = f", loss {result.loss:.4f}, {result.images_per_second:.1f} images/s"
        print(done + ("; nothing left to do" if math.isnan(result.loss) else this_time))
        print(f"pipeline: {result.output_dir}")


def sample_command(argv: Sequence[str], prog: str) -> None:
    """Draw images from a model: numbered PNG files and a grid."""
    parser = Parser(
        prog=prog,
        description="Draw images from a model. Image i depends on the seed and i only, not on the batch or "
        "the number of processes; start it with `accelerate launch` to use several.",
        epilog="example: %(prog)s runs/photos --num-images 16 --scheduler ddim --steps 50 --out samples",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="pipeline folder or Hub id")
    parser.add_argument("--num-images", type=count, default=64, metavar="N", help="how many [64]")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for 00000.png, ..., grid.png")
    parser.add_argument("--steps", type=count, metavar="K", help="sampling steps, by default all T")
    parser.add_argument(
        "--scheduler", metavar="NAME", help=f"sampler, by default the model's ({', '.join(SCHEDULERS)})"
    )
    parser.add_argument(
        "--variance-type", metavar="NAME", help="for the sampler ddpm (fixed_small, fixed_large)"
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="of the noise [0]")
    parser.add_argument(
        "--batch-size", type=count, default=64, metavar="N", help="images at once in each process [64]"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the samples that DIR holds, and nothing else in it"
    )
    args = parser.parse(argv)
    sample(**vars(args))


def evaluate_command(argv: Sequence[str], prog: str) -> None:
    """Measure a model's bits/dim on a data set, and its samples if asked."""
    parser = Parser(
        prog=prog,
        description="Measure the variational bound of images under a model in bits/dim, with its standard "
        "error and plots, and optionally the quality of its samples. Killed, the same command goes on. An "
        "image's numbers depend on the seed and its row alone; start it with `accelerate launch` to use "
        "several processes.",
        epilog="example: %(prog)s runs/photos photos/ --split test --num-images 1000",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="pipeline folder or Hub id, also one of plain diffusers"
    )
    parser.add_argument(
        "dataset", metavar="DATASET", help="Hub id, folder of images or of parquet files, or digits"
    )
    add_options(parser, EvaluationConfig, but=("model", "dataset"))
    config = EvaluationConfig(**vars(parser.parse(argv)))
    report = evaluate(config, redact(shlex.join([*prog.split(), *argv])))
    if PartialState().is_main_process:
        print(describe(report))
        print(f"written: {Path(config.out or config.model).expanduser() / EVALUATION}")


def interpolate_command(argv: Sequence[str], prog: str) -> None:
    """Interpolate two images in a model's noise: a grid."""
    parser = Parser(
        prog=prog,
        description="Interpolate two images in a model's noise, Ho et al. 2020, section 4.4: they are noised "
        "to step t, mixed, and denoised. The PNG file has a row for each t: A, the mixtures from A to B, and "
        "B. Small t cross-fades pixels, large t forgets A and B. It uses one process.",
        epilog="example: %(prog)s runs/digits digits:test:17 digits:test:4 --t 100,200,300 --out mixed.png",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="pipeline folder or Hub id, with the sampler ddpm")
    for name in "ab":
        parser.add_argument(
            f"image_{name}",
            metavar=name.upper(),
            help="image file, or DATASET:SPLIT:ROW such as digits:test:17, of the model's size and channels",
        )
    parser.add_argument(
        "--t", type=wholes, dest="timesteps", metavar="T,T", help="steps, a row each [T/4,T/2,3T/4]"
    )
    parser.add_argument("--num-images", type=count, default=9, metavar="N", help="mixtures in a row [9]")
    parser.add_argument("--out", required=True, metavar="FILE", help="PNG file")
    parser.add_argument(
        "--steps",
        type=count,
        metavar="K",
        help="sampling steps from noise on, of which those below t are taken",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="of all noise [0]")
    parser.add_argument("--image-column", metavar="NAME", help="of DATASET, by default the only one")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    args = parser.parse(argv)
    if process_state().is_main_process:
        print(f"picture: {draw_interpolation(**vars(args))}")


def publish_command(argv: Sequence[str], prog: str) -> None:
    """Send a model to the Hugging Face Hub, with a card."""
    parser = Parser(
        prog=prog,
        description="Send a model's folder to the Hugging Face Hub: the pipeline, a card filled from its "
        "files, pictures, its evaluation and config, notes.md and commands.sh if you wrote them; no "
        "checkpoints, optimizer states or logs. Sending the same again makes no second commit. The token is "
        "that of `hf auth login` or of HF_TOKEN.",
        epilog="example: %(prog)s runs/photos me/photos-ddpm --private --license apache-2.0",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="pipeline folder, such as a run's")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if it is not there [main]")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
    parser.add_argument(
        "--ema-decay",
        type=float,
        metavar="X",
        help="send the weights of this decay, not the main ones",
    )
    parser.add_argument("--license", metavar="ID", help="of the weights, such as apache-2.0 or cc-by-4.0")
    parser.add_argument("--dataset-license", metavar="ID", help="of the training images")
    parser.add_argument(
        "--dataset-id",
        metavar="ID",
        help="training images on the Hub, by default those of the config",
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="PNG for the card, by default samples.png, else the newest grid"
    )
    parser.add_argument(
        "--custom-pipeline",
        action="store_true",
        help="add pipeline.py, for diffusers' custom_pipeline with trust_remote_code=True",
    )
    parser.add_argument("--commit-message", metavar="TEXT", help="of the commit")
    args = vars(parser.parse(argv))
    model, repo_id, dry_run = args.pop("model"), args.pop("repo_id"), args.pop("dry_run")
    private, message = args.pop("private"), args.pop("commit_message")
    publication = collect(model, repo_id, **args)
    where = f"{repo_id}, {args['revision'] or 'main'}"
    if not publication.portable:
        print("plain diffusers will refuse this model: whoever uses it needs hf_ddpm")
    if dry_run:
        print(f"would be sent to {where}:\n{publication.describe()}")
        return
    done = publication.send(private=private, commit_message=message)
    print(f"{'published' if done.changed else 'nothing has changed'}: {done.url}")


COMMANDS: dict[str, Callable[[Sequence[str], str], None]] = {
    "train": train_command,
    "sample": sample_command,
    "evaluate": evaluate_command,
    "interpolate": interpolate_command,
    "publish": publish_command,
}

if __name__ == "__main__":
    main()

"""The `hf-ddpm` console command; the scripts in train_scripts/ call the same functions.

It turns the words of a command line into one call. How words are read and how a command ends is the business
of `runtime.arguments`. Each command imports what it needs once its words have been read, so that help and
mistyped words are answered without loading torch.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_ddpm import __version__
from hf_ddpm.config import LARGEST_BATCH, TrainConfig
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.errors_config import ErrorsConfig
from hf_ddpm.evaluation.sweep_config import SweepConfig
from hf_ddpm.folders.layout import RECORD
from hf_ddpm.runtime.arguments import (
    Parser,
    add_options,
    at_most,
    count,
    end,
    number,
    path,
    run,
    whole,
    wholes,
)
from hf_ddpm.runtime.ends import orderly_end
from hf_ddpm.runtime.messages import nearest, redact, shown
from hf_ddpm.runtime.streams import guard_streams

MOST_TOGETHER = 4096  # images, as compression.container has it, which a test compares


@orderly_end("hf-ddpm")
def main(argv: Sequence[str] | None = None) -> None:
    """`hf-ddpm COMMAND ...`.

    Args:
        argv: the words after `hf-ddpm`, by default those of the command line.
    """
    guard_streams()
    first, *rest = (sys.argv[1:] if argv is None else argv) or ["help"]
    helps = first in ("help", "-h", "--help")
    if helps and rest:
        first, rest = rest[0], ["--help", *rest[1:]]
    if (helps and len(rest) > 1) or (rest and first in ("help", "--version") and not helps):
        end("hf-ddpm", f"error: unknown argument {shown(rest[-1])}; allowed: hf-ddpm help COMMAND", 2)
    if first in ("help", "-h", "--help"):
        print(_usage(), end="")
    elif first == "--version":
        print(f"hf-ddpm {__version__}")
    elif first in COMMANDS:
        run(COMMANDS[first], rest, f"hf-ddpm {first}")
    else:
        near = nearest(first, [*COMMANDS, "help", "--version"])
        hint = f"allowed: {', '.join(COMMANDS)}" if near is None else f"did you mean {near!r}?"
        end("hf-ddpm", f"error: unknown command {shown(first)}; {hint}", 2)


def _usage() -> str:
    summaries = [(name, (command.__doc__ or "").splitlines()[0]) for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-ddpm COMMAND [options]",
            "       hf-ddpm COMMAND --help",
            "       hf-ddpm --version",
            "",
            "commands:",
            *(f"  {name:12} {summary}" for name, summary in summaries),
            "",
        ]
    )


def train_command(argv: Sequence[str], prog: str) -> None:
    """Train a model on a stream of images, or go on with a run."""
    parser = Parser(
        prog,
        "Train a DDPM on a stream of images. A value comes from its flag, else from the file, else it is the "
        "default in square brackets; '-' and '_' in a flag's name mean the same. The same command continues "
        "a run that was stopped, and comes to the same result as if it had not been. SIGTERM, SIGHUP, "
        "Ctrl-C and SIGUSR1 save a checkpoint and end with exit code 75. Use torchrun or `accelerate launch "
        "--multi_gpu` for several processes.",
        "example: %(prog)s --dataset photos/ --image-size 64 --fit resize_crop --output-dir runs/photos",
        usage="%(prog)s [--config FILE] [--key value ...]",
    )
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help=f"TOML file of the keys below, or the {RECORD} of a run",
    )
    add_options(parser, TrainConfig)
    values = vars(parser.parse(argv))
    config = TrainConfig.load(values.pop("config"), **values)

    from hf_ddpm.runtime.processes import process_state
    from hf_ddpm.training.trainer import train

    result = train(config)
    if process_state().is_main_process:
        done = f"step {result.step}, {result.images} images seen"
        this_time = f", loss {result.loss:.4f}, {result.images_per_second:.1f} images/s"
        print(done + ("; nothing left to do" if math.isnan(result.loss) else this_time))
        print(f"pipeline: {result.output_dir}")
        for number, line in enumerate(result.next_steps):
            print(f"{'     ' if number else 'next:'} {line}")


def sample_command(argv: Sequence[str], prog: str) -> None:
    """Draw images from a model: numbered PNG files and a grid."""
    parser = Parser(
        prog,
        "Draw images from a model. Image number i depends on the seed and on i only, neither on the batch "
        "size nor on the number of processes; start it with `accelerate launch` to use several. If it was "
        "stopped, the same command continues it.",
        "example: %(prog)s runs/photos --num-images 16 --scheduler ddim --steps 50 --out samples",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of a pipeline, or its Hub id")
    parser.add_argument(
        "--num-images", type=at_most(10_000_000), default=64, metavar="N", help="number of images [64]"
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="DIR", help="folder for 00000.png, ..., grid.png"
    )
    parser.add_argument("--steps", type=count, metavar="K", help="sampling steps, by default all T")
    scheduler = parser.add_argument("--scheduler", metavar="NAME")
    parser.late_help[scheduler] = lambda: f"sampler, by default the model's ({', '.join(_samplers())})"
    variance = parser.add_argument("--variance-type", metavar="NAME")
    parser.late_help[variance] = lambda: (
        f"reverse variance of the sampler ddpm ({', '.join(_variances())}); the last two of a model that "
        "hf-ddpm plan has measured"
    )
    spacing = parser.add_argument("--timestep-spacing", metavar="NAME")
    parser.late_help[spacing] = lambda: (
        "how the K steps are spaced among the T, by default as the sampler does "
        f"({', '.join(_spacings())}); the last two for ddpm, dpm-solver++ and euler"
    )
    parser.add_argument(
        "--ending",
        default="mean",
        metavar="NAME",
        help="an image is the x_0 that the last step predicts (mean), or, of a model that hf-ddpm plan has "
        "measured, the likeliest grey levels given that (mode) or a draw of them (draw) [mean]",
    )
    _add_class_flags(
        parser,
        "class of all images, by name or number; 'none', as by default, or 'all': every "
        "class in turn, and a grid with a row for each",
    )
    parser.add_argument(
        "--quality",
        metavar="NAME",
        help="sampler and steps that `hf-ddpm sweep` found for MODEL (fast: the fewest evaluations within "
        "the error of the best; best)",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="seed of the noise [0]")
    parser.add_argument(
        "--batch-size",
        type=at_most(LARGEST_BATCH),
        default=64,
        metavar="N",
        help="images at once in each process [64]",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the samples in DIR, and nothing else there"
    )
    args = parser.parse(argv)

    from hf_ddpm.generation.sample import sample

    sample(**vars(args))


def _add_class_flags(parser: Parser, which: str) -> None:
    """Add the flags of a class and of guidance; `which` classes there may be is said in the help."""
    parser.add_argument("--class", dest="class_labels", metavar="NAME", help=which)
    parser.add_argument(
        "--guidance",
        dest="guidance_scale",
        type=number,
        default=1.0,
        metavar="W",
        help="guidance scale: 1 is the class as it was learnt, 0 no class, above 1 exaggerates it and takes "
        "twice the time [1]",
    )
    parser.add_argument(
        "--guidance-interval",
        type=wholes,
        metavar="LO,HI",
        help="guide at steps LO <= t < HI of the training process alone [0,T]",
    )


def _samplers() -> Iterable[str]:
    from hf_ddpm.generation.samplers import SCHEDULERS

    return SCHEDULERS


def _variances() -> Iterable[str]:
    from hf_ddpm.variances import FIXED, MEASURED

    return (*FIXED, *MEASURED)


def _spacings() -> Iterable[str]:
    from hf_ddpm.schedules import SPACINGS

    return SPACINGS


def evaluate_command(argv: Sequence[str], prog: str) -> None:
    """Measure a model's bits/dim on a data set, and its samples if asked."""
    parser = Parser(
        prog,
        "Measure the variational bound of images under a model in bits/dim, with its standard error and "
        "plots, and optionally the quality of its samples. If it was killed, the same command continues it. "
        "The numbers of an image depend on the seed and on the image's row only; start it with `accelerate "
        "launch` to use several processes.",
        "example: %(prog)s runs/photos photos/ --num-images 1000",
    )
    default = "the run's own: the images that it held out, else its test split"
    config = EvaluationConfig(**_measurement(parser, EvaluationConfig, default, argv))

    from hf_ddpm.evaluation.evaluate import evaluate
    from hf_ddpm.folders.layout import EVALUATION
    from hf_ddpm.folders.numbers import describe
    from hf_ddpm.runtime.processes import process_state

    report = evaluate(config, redact(shlex.join([*prog.split(), *argv])))
    if process_state().is_main_process:
        print(describe(report))
        print(f"written: {Path(config.out or config.model).expanduser() / EVALUATION}")


def plan_command(argv: Sequence[str], prog: str) -> None:
    """Measure a model's errors, and say how few steps its bits/dim need."""
    parser = Parser(
        prog,
        "Measure how far a model's predictions of x_0 are off at each step, on training images, and say how "
        "many bits/dim its bound will have with few steps and better variances. The table is left beside the "
        "model as errors.safetensors, which `hf-ddpm evaluate --steps 50 --chain chosen --variance by-value` "
        "takes. If it was killed, the same command continues it; start it with `accelerate launch` to use "
        "several processes.",
        "example: %(prog)s runs/photos",
    )
    default = "the images that the run trained on"
    config = ErrorsConfig(**_measurement(parser, ErrorsConfig, default, argv))

    from hf_ddpm.evaluation.errors import describe_plan, measure_errors
    from hf_ddpm.folders.layout import ERRORS
    from hf_ddpm.runtime.processes import process_state

    found = measure_errors(config)
    if process_state().is_main_process:
        print(describe_plan(config, found))
        print(f"table: {Path(config.out or config.model).expanduser() / ERRORS}")


def sweep_command(argv: Sequence[str], prog: str) -> None:
    """Compare samplers and numbers of steps: which one to take."""
    parser = Parser(
        prog,
        "Which sampler, how many steps? Draw equally many images with each sampler in each number of steps, "
        "compare them with real images by a feature network (Fréchet distance with its standard error), and "
        "say which to take: the fewest network evaluations within the error of the best. What was found is "
        "left beside the model as sweep.json and sweep.png, and `hf-ddpm sample --quality fast` takes it. If "
        "it was killed, the same command continues it, and with more steps or samplers only the new ones are "
        "drawn; start it with `accelerate launch` to use several processes.",
        "example: %(prog)s runs/photos --extractor facebook/dinov2-small --steps 10,20,50",
    )
    default = "the run's own: the images that it held out, else its test split"
    config = SweepConfig(**_measurement(parser, SweepConfig, default, argv))

    from hf_ddpm.evaluation.sweep import sweep
    from hf_ddpm.folders.layout import SWEEP, SWEEP_PLOT
    from hf_ddpm.folders.sweep import describe_sweep
    from hf_ddpm.runtime.processes import process_state

    found = sweep(config, redact(shlex.join([*prog.split(), *argv])))
    if process_state().is_main_process:
        print(describe_sweep(found))
        print(f"written: {Path(config.out or config.model).expanduser() / SWEEP}, {SWEEP_PLOT}")


def _measurement(parser: Parser, config: type, default: str, argv: Sequence[str]) -> dict[str, Any]:
    """The values on a command line that measures a model on a data set.

    Args:
        parser: of the command.
        config: the dataclass of the options.
        default: the images without a data set.
        argv: the words.
    """
    parser.add_argument(
        "model", type=path, metavar="MODEL", help="folder of a pipeline, or its Hub id; plain diffusers' too"
    )
    parser.add_argument(
        "dataset",
        type=path,
        metavar="DATASET",
        nargs="?",
        default=argparse.SUPPRESS,
        help=f"Hub id, folder of images or of parquet files, or 'digits'; by default {default}",
    )
    add_options(parser, config, but=("model", "dataset"))
    return vars(parser.parse(argv))


def interpolate_command(argv: Sequence[str], prog: str) -> None:
    """Interpolate two images in a model's noise: a grid."""
    parser = Parser(
        prog,
        "Interpolate two images A and B in a model's noise (Ho et al. 2020, section 4.4): both are noised "
        "to step t, mixed there, and denoised. The PNG file has a row for each t: A, the mixtures from A to "
        "B, and B. A small t cross-fades pixels; a large t keeps little of A and B. It runs in one process.",
        "example: %(prog)s runs/digits digits:test:17 digits:test:4 --t 100,200,300 --out mixed.png",
    )
    parser.add_argument(
        "model", type=path, metavar="MODEL", help="folder of a pipeline with the sampler ddpm, or Hub id"
    )
    image = "image file, or DATASET:SPLIT:ROW such as digits:test:17, of the model's size and channels"
    parser.add_argument("image_a", type=path, metavar="A", help=image)
    parser.add_argument("image_b", type=path, metavar="B", help=image)
    parser.add_argument(
        "--t", type=wholes, dest="timesteps", metavar="T,T", help="steps, a row each [T/4,T/2,3T/4]"
    )
    parser.add_argument(
        "--num-images", type=at_most(100), default=9, metavar="N", help="mixtures in a row [9]"
    )
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="PNG file to write")
    parser.add_argument(
        "--steps", type=count, metavar="K", help="sampling steps of the whole chain; only those below t run"
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="seed of all noise [0]")
    parser.add_argument(
        "--image-column", metavar="NAME", help="column of the images in DATASET, by default the only one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    args = parser.parse(argv)

    from hf_ddpm.pictures import draw_interpolation
    from hf_ddpm.runtime.processes import process_state

    if process_state().is_main_process:
        print(f"picture: {draw_interpolation(**vars(args))}")


def inpaint_command(argv: Sequence[str], prog: str) -> None:
    """Fill a part of an image anew, given the rest: a picture."""
    parser = Parser(
        prog,
        "Draw the masked pixels of an image anew, given the others, which come back exactly (RePaint, "
        "Lugmayr et al. 2022). The model needs no training for it. The network is called about K times N "
        "times. Another seed gives another filling. It runs in one process.",
        "example: %(prog)s runs/digits digits:test:17 mask.png --steps 250 --out filled.png",
    )
    parser.add_argument(
        "model", type=path, metavar="MODEL", help="folder of a pipeline with the sampler ddpm, or Hub id"
    )
    image = "image file, or DATASET:SPLIT:ROW such as digits:test:17, of the model's size and channels"
    parser.add_argument("image", type=path, metavar="IMAGE", help=image)
    parser.add_argument(
        "mask",
        type=path,
        metavar="MASK",
        help="image file of the same size: white where it is filled, black where it is kept, nothing between",
    )
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="PNG file to write")
    parser.add_argument("--steps", type=count, metavar="K", help="sampling steps, by default all T")
    parser.add_argument(
        "--resample",
        type=at_most(1000),
        default=10,
        metavar="N",
        help="how often each step is taken; more fit the filling better to its surroundings [10]",
    )
    _add_class_flags(parser, "class of the image, by name or number; 'none', as by default")
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="seed of all noise [0]")
    parser.add_argument(
        "--image-column", metavar="NAME", help="column of the images in DATASET, by default the only one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    args = parser.parse(argv)

    from hf_ddpm.pictures import draw_inpainting
    from hf_ddpm.runtime.processes import process_state

    if process_state().is_main_process:
        print(f"picture: {draw_inpainting(**vars(args))}")


def export_command(argv: Sequence[str], prog: str) -> None:
    """Write one class of a model as a model that needs no class."""
    parser = Parser(
        prog,
        "Write one class of a class-conditional model, or the model without a class, as an unconditional "
        "model: a folder that plain diffusers samples. Its answers are those of the class, without guidance.",
        "example: %(prog)s runs/clothes --class boot --out boots",
    )
    parser.add_argument(
        "model", type=path, metavar="MODEL", help="folder of a class-conditional pipeline, or its Hub id"
    )
    parser.add_argument(
        "--class",
        dest="class_labels",
        required=True,
        metavar="NAME",
        help="class by name or number, or 'none'",
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="new or empty folder")
    args = parser.parse(argv)

    from hf_ddpm.generation.export import export

    print(f"model: {export(**vars(args))}")


def publish_command(argv: Sequence[str], prog: str) -> None:
    """Send a model to the Hugging Face Hub, with a card."""
    args = vars(_publish_parser(prog).parse(argv))
    model, repo_id, dry_run = args.pop("model"), args.pop("repo_id"), args.pop("dry_run")
    private, message = args.pop("private"), args.pop("commit_message")

    from hf_ddpm.publishing.publish import collect

    publication = collect(model, repo_id, **args)
    if not publication.portable:
        print("plain diffusers will refuse this model: whoever uses it needs hf_ddpm")
    if dry_run:
        print(f"would be sent to {repo_id}, {args['revision'] or 'main'}:\n{publication.describe()}")
        return
    done = publication.send(private=private, commit_message=message)
    print(f"{'published' if done.changed else 'nothing has changed'}: {done.url}")


def _publish_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Send a model's folder to the Hugging Face Hub: the pipeline, a card filled from its files, "
        "pictures, its evaluation and config, and notes.md and commands.sh if you wrote them; no "
        "checkpoints, optimizer states or logs. Sending the same again makes no second commit. The token "
        "is that of `hf auth login` or of HF_TOKEN.",
        "example: %(prog)s runs/photos me/photos-ddpm --private --license apache-2.0",
    )
    parser.add_argument(
        "model", type=path, metavar="MODEL", help="folder of a pipeline, such as that of a run"
    )
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created if it does not exist [main]")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
    parser.add_argument(
        "--ema-decay", type=number, metavar="X", help="send the weights averaged with this decay instead"
    )
    parser.add_argument(
        "--license", metavar="ID", help="licence of the weights, such as apache-2.0 or cc-by-4.0"
    )
    parser.add_argument("--dataset-license", metavar="ID", help="licence of the training images")
    parser.add_argument(
        "--dataset-id", metavar="ID", help="Hub id of the training images, by default as the config says"
    )
    parser.add_argument(
        "--picture",
        type=path,
        metavar="FILE",
        help="PNG for the card, by default samples.png, else the newest grid",
    )
    parser.add_argument(
        "--custom-pipeline",
        action="store_true",
        help="add pipeline.py, for diffusers' custom_pipeline with trust_remote_code=True",
    )
    parser.add_argument("--commit-message", metavar="TEXT", help="message of the commit")
    return parser


def compress_command(argv: Sequence[str], prog: str) -> None:
    """Compress images without loss, with a model."""
    parser = Parser(
        prog,
        "Compress images without loss into a file of about as many bits as the model's bound says. The file "
        "can be decompressed with the same model alone, and, in float32, on the same machine alone. The "
        "network is asked K times for each image. Measure the model with `hf-ddpm plan` first, which makes "
        "files much smaller. It needs the package constriction: pip install 'hf_ddpm[codec]'.",
        "example: %(prog)s runs/digits digits:test --out digits.hfdc --verify",
        usage="%(prog)s MODEL IMAGES [IMAGES ...] --out FILE [options]",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of a pipeline, or its Hub id")
    parser.add_argument(
        "images",
        type=path,
        nargs="+",
        metavar="IMAGES",
        help="a folder, image files, or DATASET:SPLIT[:ROWS] such as digits:test:0-99, all of the model's "
        "size and channels",
    )
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--steps", type=count, metavar="K", help="steps of the chain [50]")
    parser.add_argument(
        "--batch", type=at_most(MOST_TOGETHER), default=8, metavar="N", help="images at once [8]"
    )
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        default="float64",
        help="precision of the network: float32 is faster, and decompresses on the same machine alone "
        "[float64]",
    )
    parser.add_argument(
        "--verify", action="store_true", help="decompress the file afterwards, and compare every pixel"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    args = parser.parse(argv)

    from hf_ddpm.compression.command import compress_files

    for line in compress_files(**vars(args)):
        print(line, flush=True)


def decompress_command(argv: Sequence[str], prog: str) -> None:
    """Bring compressed images back, to the last bit."""
    parser = Parser(
        prog,
        "Bring the images of `hf-ddpm compress` back, with the model that they were compressed with: pixels, "
        "order, names and labels. Before anything is decoded, the file's checksum, the model and the "
        "network's answers on this machine are compared with what the file says.",
        "example: %(prog)s runs/digits digits.hfdc --out digits/",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of the pipeline, or its Hub id")
    parser.add_argument("file", type=path, metavar="FILE", help="file of hf-ddpm compress")
    parser.add_argument(
        "--out",
        type=path,
        required=True,
        metavar="DIR|FILE.parquet",
        help="new or empty folder for PNG files, or a new parquet file",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="try it although the network answers otherwise on this machine; wrong pixels are refused all "
        "the same",
    )
    args = parser.parse(argv)

    from hf_ddpm.compression.command import decompress_file

    for line in decompress_file(**vars(args)):
        print(line, flush=True)


COMMANDS: dict[str, Callable[[Sequence[str], str], None]] = {
    "train": train_command,
    "sample": sample_command,
    "evaluate": evaluate_command,
    "plan": plan_command,
    "sweep": sweep_command,
    "interpolate": interpolate_command,
    "inpaint": inpaint_command,
    "export": export_command,
    "compress": compress_command,
    "decompress": decompress_command,
    "publish": publish_command,
}

if __name__ == "__main__":
    main()

"""The names of all files in the folder of a model, a run or an evaluation: no other module spells one.

A run's folder is its model's folder, as diffusers reads it, and by default its evaluation's folder as well:

    RUN/
      model_index.json                  the classes of the parts below
      scheduler/
        scheduler_config.json           the process that the network was trained for
      unet/
        config.json                     the network's shape
        diffusion_pytorch_model.safetensors               the weights, averaged with the first decay
        diffusion_pytorch_model.ema_0_999.safetensors     with another decay: a variant in diffusers' words
      errors.safetensors                the errors of its predictions (errors.py describes it)
      labels.json                       the names of its classes (labels.py describes it)
      README.md                         the model's card
      notes.md  commands.sh             what a person says of the model: for the card
      samples.png  progressive.png  interpolation.png     pictures for the card

      train_config.json                 how the run was started
      train_data.json                   which images it was trained on (data/stream.py describes it)
      log.jsonl                         its numbers, one JSON object a line
      log-odd.jsonl                     lines of it that were found to be damaged
      training.png                      a picture of the log
      samples/step-00000500.png         a grid of images drawn at that step
      heldout/step-00000500.safetensors the bound of the held-out images at that step
      checkpoints/step-00000500/        what the run goes on from (training/checkpoint.py describes it)
      .lock                             held by the command that works here, where folders can't be locked
      .push/                            snapshots on their way to the Hub

      evaluation.json                   what was measured (numbers.py describes it)
      evaluation.safetensors            the same for each image
      bits-per-step.png  rate-distortion.png  reconstructions.png  nearest.png
      sweep.json                        samplers and numbers of steps, compared (sweep.py describes it)
      sweep.png                         a picture of that
      .parts-<key>/00000.safetensors    work that a killed evaluation or sweep finds again

`hf-ddpm sample` fills a folder with 00000.png, 00001.png, ... and grid.png. A folder in model_cards/ holds
card.json beside the files that a card is made of.

This module knows names. It reads and writes no file.
"""

import re
from pathlib import Path

# A model's folder
INDEX = "model_index.json"
UNET, SCHEDULER = "unet", "scheduler"  # folders of the parts
CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"  # in the folder of their part
NETWORK_FILE, SCHEDULER_FILE = f"{UNET}/{CONFIG}", f"{SCHEDULER}/{SCHEDULER_CONFIG}"
TENSORS = ".safetensors"  # how the name of every file of tensors ends
WEIGHTS = "diffusion_pytorch_model"  # how the name of every file of weights begins
WEIGHTS_INDEX = f"{WEIGHTS}{TENSORS}.index.json"  # which shard holds which weight

ERRORS = "errors.safetensors"
LABELS = "labels.json"

# What a card is made of
CARD, CARD_FACTS = "README.md", "card.json"
NOTES, COMMANDS = "notes.md", "commands.sh"
SAMPLES_PICTURE = "samples.png"
SHOWN = {  # pictures beside the samples, with what is written under them
    "progressive.png": "Progressive generation: x_t and the x₀ predicted from it, two rows for each",
    "interpolation.png": "Interpolation of two images, A and B, in their noise at step t",
}
CUSTOM_PIPELINE = "pipeline.py"  # in a repository: what diffusers' `custom_pipeline` imports

# A run's folder
RECORD, LOG, CURVE = "train_config.json", "log.jsonl", "training.png"
TRAINED_ON = "train_data.json"
ODD_LINES = "log-odd.jsonl"
GRIDS, HELDOUT, CHECKPOINTS = "samples", "heldout", "checkpoints"  # folders
LOCK, SNAPSHOTS = ".lock", ".push"
STEP = re.compile(r"step-(\d{8,})")  # what `step_name` makes
STEPS = "step-*"  # the pattern by which a folder lists them
RUN = frozenset(
    {INDEX, LABELS, SCHEDULER, UNET, RECORD, TRAINED_ON, LOG, ODD_LINES, CURVE, GRIDS, HELDOUT, CHECKPOINTS}
)  # what a training writes

# An evaluation's folder
EVALUATION, EVALUATION_TENSORS = "evaluation.json", "evaluation.safetensors"
BITS_PLOT, RATE_PLOT, LEVELS_PLOT = "bits-per-step.png", "rate-distortion.png", "reconstructions.png"
PLOTS = {
    BITS_PLOT: "Bits of each step",
    RATE_PLOT: "Progressive rate and distortion",
    LEVELS_PLOT: "Reconstructions from each noise level",
}
NEAREST = "nearest.png"
MEASURED = frozenset({EVALUATION, EVALUATION_TENSORS, *PLOTS, NEAREST})  # what an evaluation writes
SWEEP, SWEEP_PLOT = "sweep.json", "sweep.png"
PARTS = ".parts-"  # how the names of the folders of parts begin

# A folder of samples
GRID = "grid.png"
SAMPLE = re.compile(r"\d{5,}\.png")

_EMA_VARIANT = re.compile(rf"{WEIGHTS}\.ema_(0|0_\d+)\.safetensors")


def weights_name(variant: str | None = None) -> str:
    """The file of a network's weights, in one piece; `variant` as in diffusers' `from_pretrained`."""
    return f"{WEIGHTS}{TENSORS}" if variant is None else f"{WEIGHTS}.{variant}{TENSORS}"


def index_names(variant: str | None = None) -> tuple[str, ...]:
    """The names by which diffusers finds the index of sharded weights, in its order."""
    if variant is None:
        return (WEIGHTS_INDEX,)
    words = WEIGHTS_INDEX.split(".")
    return tuple(".".join([*words[:place], variant, *words[place:]]) for place in (3, 2))


def is_weights(name: str, variant: str | None = None) -> bool:
    """Whether a file holds a network's weights or a shard of them, in safetensors."""
    stem = re.escape(weights_name(variant).removesuffix(TENSORS))
    return re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors", name) is not None


def variant_name(decay: str) -> str:
    """The variant of the weights averaged with a decay; diffusers finds none with a point in its name."""
    return f"ema_{decay.replace('.', '_')}"


def decay_of(name: str) -> float | None:
    """The decay of a file of weights that `variant_name` named; None for other files."""
    found = _EMA_VARIANT.fullmatch(name)
    return float(found[1].replace("_", ".")) if found else None


def step_name(step: int) -> str:
    """What is called after a step of the run, without a suffix: "step-00000500"."""
    return f"step-{step:08d}"


def newest_grid(run: Path) -> Path | None:
    """The last picture of images that a run drew; None if it drew none."""
    return max((path for path in (run / GRIDS).glob(f"{STEPS}.png") if path.is_file()), default=None)


def sample_name(index: int) -> str:
    """The file of an image in a folder of samples: "00007.png"."""
    return f"{index:05d}.png"

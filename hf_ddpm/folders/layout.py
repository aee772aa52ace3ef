"""The names of all files in a model's or a run's folder, each in one place."""

import re

INDEX = "model_index.json"


WEIGHTS = "diffusion_pytorch_model"


CARD, SAMPLES_PICTURE, RECORD = "README.md", "samples.png", "train_config.json"

CURVE, NOTES, COMMANDS = "training.png", "notes.md", "commands.sh"

PLOTS = {
    "bits-per-step.png": "Bits of each step",
    "rate-distortion.png": "Progressive rate and distortion",
    "reconstructions.png": "Reconstructions from each noise level",
}

SHOWN = {  # pictures beside the samples
    "progressive.png": "Progressive generation: x_t and the x₀ predicted from it, two rows for each",
    "interpolation.png": "Interpolation of two images, A and B, in their noise at step t",
}


CUSTOM_PIPELINE, LOG, GRIDS = "pipeline.py", "log.jsonl", "samples"

EVALUATION, EVALUATION_TENSORS = "evaluation.json", "evaluation.safetensors"
NEAREST = "nearest.png"


# What a training run keeps beside its pipeline, by the step
CHECKPOINTS, HELDOUT, LOCK = "checkpoints", "heldout", ".lock"
STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """The name, without an ending, of what was kept after so many steps; `STEP` reads it."""
    return f"step-{step:08d}"


def variant_name(decay: str) -> str:
    """The `variant` of `from_pretrained` for a decay; diffusers finds none whose name holds a point."""
    return f"ema_{decay.replace('.', '_')}"

"""Every choice of a training run: a frozen dataclass, checked when it is constructed.

Values come from the defaults, a TOML file and flags, each overriding the one before; the resulting config is
written beside the weights. This file knows names, types and ranges. Whether a data set or a folder exists is
found out by the code that opens it.

Importing this file loads no torch, so that `hf-ddpm` answers at once: what the choices are and which of them
fit together is imported inside the functions that ask for it, from the modules that define it.
"""

import dataclasses
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import tomllib  # type: ignore[import-not-found]
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

from hf_ddpm.runtime.hub import check_license, check_repo_id
from hf_ddpm.runtime.messages import nearest, shown
from hf_ddpm.runtime.options import check_options, option, read_path
from hf_ddpm.spelling import suggest_keywords

if TYPE_CHECKING:
    from hf_ddpm.scheduler import DDPMScheduler


def _fits() -> Iterable[str]:
    from hf_ddpm.data.pixels import FITS

    return FITS


def check_holdout(name: str, value: float) -> None:
    """Refuse what is neither a share of the images nor a number of images, see `data.holdout`.

    Raises:
        ValueError: the message names the option and what is allowed.
    """
    from hf_ddpm.data.holdout import check_holdout as check

    check(name, value)


def _presets() -> Iterable[str]:
    from hf_ddpm.models import PRESETS
    from hf_ddpm.models.presets import AUTO

    return (AUTO, *PRESETS)


def _schedules() -> Iterable[str]:
    from hf_ddpm.schedules import SCHEDULES

    return SCHEDULES


def _prediction_types() -> Iterable[str]:
    from hf_ddpm.parametrization import PREDICTION_TYPES

    return PREDICTION_TYPES


def _variance_types() -> Iterable[str]:
    from hf_ddpm.variances import TRAINED

    return sorted(TRAINED)


def _objectives() -> Iterable[str]:
    from hf_ddpm.objectives import OBJECTIVES

    return OBJECTIVES


def _unused() -> dict[tuple[str, str], tuple[str, ...]]:
    """Keys that have no effect with a certain choice of another key; setting them is refused."""
    from hf_ddpm.schedules import SCHEDULES

    ends = {
        ("beta_schedule", name): tuple(end for end in ("beta_start", "beta_end") if end not in schedule.uses)
        for name, schedule in SCHEDULES.items()
    }
    return ends | {("lr_scheduler", "constant"): ("lr_warmup_steps",)}


# Keys that have an effect only with a certain choice of another key; setting them without it is refused.
NEEDS = {
    "t_sampler": ("objective", "bound"),
    "snr_gamma": ("objective", "min-snr"),
    "hybrid_weight": ("objective", "hybrid"),
}

# Defaults that have changed, as they were: a run whose record or checkpoint lacks such a key had the old one.
OLD_DEFAULTS = {"model": "digits"}

# Keys that are gone, and what to write instead.
GONE = {"shuffle_buffer": "shuffle_memory, in MB of undecoded images"}


LARGEST_FILE = 10**6  # bytes of a config file
# Far above what is of use, and far below what harms a machine that is asked for it
LARGEST_BATCH = 2**20
MOST_STEPS, MOST_TIMESTEPS, MOST_EVALS = 10**12, 10**6, 10**5
MOST_WORKERS, MOST_IN_GRID, MOST_MICRO_STEPS, MOST_DECAYS = 256, 4096, 10**6, 8


@suggest_keywords
@dataclass(frozen=True)
class TrainConfig:
    """All choices of a training run, checked when it is constructed.

    Raises:
        ValueError: a value has the wrong type or lies out of range; the message names the key and what is
            allowed.
        TypeError: there is no such key; the message names the nearest.
    """

    # What it learns
    dataset: str = option(
        "digits", "Hub id, folder of images or of parquet files, or 'digits' (embedded)", path=True
    )
    split: str = option("train", "split of the data set to train on, or a slice as in 'train[:90%]'")
    holdout: float | None = option(
        None,
        "share of the images (0.05), or how many (500), that are never trained on; seed and row choose them",
        check=check_holdout,
    )
    image_column: str | None = option(None, "column of the images, by default the only one")
    label_column: str | None = option(
        None,
        "column of the images' classes, for a class-conditional network; of a folder of image files a column "
        "of its metadata, or 'label', the names of the folders; by default no classes",
    )
    label_dropout: float = option(
        0.1,
        "probability with which an image's class is hidden, which trains the network without a class too, "
        "for guidance; of use with --label-column",
        least=0.0,
        below=1.0,
    )
    image_size: str | None = option(
        None, "'28' or '28x32' (height x width), by default the images' own", joined="x"
    )
    channels: int | None = option(
        None, "1 for grey or 3 for RGB, 2 or 4 with alpha; by default 1 or 3, as the images", least=1
    )
    background: str = option(
        "white", "ground that transparent pixels are laid on: white, black, or a colour as in '#ff8000'"
    )
    fit: str = option(
        "exact",
        "what to do with images of another size: refuse them, or a way of fitting them",
        choices=_fits,
    )
    to_8_bit: bool = option(
        False, "convert images of 16 bits or of floats to 8 bits, as a fit does too, instead of refusing them"
    )
    horizontal_flip: bool = option(False, "mirror images at random")
    shuffle_memory: float = option(
        256.0,
        "MB of undecoded images that are shuffled at once, in each training process; a folder of image files "
        "is shuffled as a whole; 0 keeps the order of the files",
        least=0.0,
    )
    skip_corrupt: bool = option(
        False, "skip and count training images that can't be read, instead of stopping"
    )
    num_workers: int = option(
        0, "processes that decode images ahead, for each training process", least=0, most=MOST_WORKERS
    )

    # The network and the process
    model: str = option(
        "auto",
        "preset, or folder or Hub id of a pipeline to go on from; auto takes a small preset for the size of "
        "the images; the autoencoders ...-t are told the step",
        examples=_presets,
        path=True,
    )
    dropout: float | None = option(None, "dropout probability, by default the preset's", least=0.0, below=1.0)
    num_train_timesteps: int = option(1000, "number of steps T of the process", least=2, most=MOST_TIMESTEPS)
    beta_schedule: str = option("linear", "noise schedule", choices=_schedules)
    beta_start: float = option(1e-4, "first beta", above=0.0, below=1.0)
    beta_end: float = option(0.02, "last beta", above=0.0, below=1.0)
    rescale_betas_zero_snr: bool = option(False, "rescale the schedule so that it ends at pure noise")
    prediction_type: str = option("epsilon", "what the network predicts", choices=_prediction_types)
    variance_type: str = option(
        "fixed_large",
        "reverse variance: beta_t, the posterior's, or one between them that the network learns",
        choices=_variance_types,
    )
    clip_sample: bool = option(True, "clip the predicted x_0 to [-1, 1] when sampling")

    # What is minimised
    objective: str = option("simple", "the loss", choices=_objectives)
    t_sampler: str = option(
        "uniform",
        "how steps are drawn: all alike, or, for the objective bound, by the losses last seen at each step",
        choices=("uniform", "importance"),
    )
    snr_gamma: float = option(5.0, "gamma of the objective min-snr", above=0.0)
    hybrid_weight: float = option(
        1e-3, "weight of the bound, in bits/dim, in the objective hybrid", above=0.0
    )

    # Optimisation
    max_steps: int = option(10_000, "optimizer steps of the whole run", least=1, most=MOST_STEPS)
    batch_size: int = option(64, "images per process and micro-step", least=1, most=LARGEST_BATCH)
    gradient_accumulation_steps: int = option(
        1, "micro-steps per optimizer step", least=1, most=MOST_MICRO_STEPS
    )
    learning_rate: float = option(2e-4, "peak learning rate of AdamW", above=0.0)
    lr_scheduler: str = option(
        "constant_with_warmup",
        "shape of the learning rate",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    )
    lr_warmup_steps: int = option(500, "steps of linear warm-up", least=0)
    adam_beta1: float = option(0.9, "beta1 of AdamW", least=0.0, below=1.0)
    adam_beta2: float = option(0.999, "beta2 of AdamW", least=0.0, below=1.0)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", above=0.0)
    weight_decay: float = option(0.0, "weight decay of AdamW", least=0.0)
    max_grad_norm: float = option(
        1.0, "largest norm of the gradient, which is clipped to it; 0 never clips", least=0.0
    )
    ema_decay: str = option(
        "0.9999",
        "decay of the averaged weights, warmed up as (1 + n)/(10 + n); several, as in 0.999,0.9999, are "
        "tracked side by side, and the first gives the pipeline's weights",
        joined=",",
    )
    seed: int = option(0, "seed of weights, order, noise and samples", least=0, below=2**63)

    # How it runs
    mixed_precision: str | None = option(
        None,
        "precision of the network, by default as accelerate launch says, else no",
        choices=("no", "fp16", "bf16"),
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time"
    )
    compile: bool = option(False, "torch.compile the network")
    channels_last: bool = option(False, "use the memory format channels_last for convolutions")

    # What it leaves behind
    output_dir: str = option("runs/ddpm", "folder of the run, which is also the pipeline's folder", path=True)
    resume: str = option(
        "auto",
        "auto, to continue this run if the output folder holds it; never; or a checkpoint's folder",
        path=True,
    )
    checkpoint_every: int = option(
        1000, "steps between checkpoints; one is also saved before each grid and evaluation", least=1
    )
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", least=1)
    log_every: int = option(50, "steps between log lines", least=1)
    max_loss: float = option(
        100.0,
        "stop if the mean loss between two log lines is above this multiple of the loss of predicting zero",
        above=0.0,
    )
    sample_every: int = option(1000, "steps between sample grids, 0 for none", least=0)
    sample_num_images: int = option(64, "images in a grid", least=1, most=MOST_IN_GRID)
    sample_steps: int | None = option(None, "sampling steps of a grid, by default all T", least=1)
    evaluate_every: int = option(
        0, "steps between measurements of held-out images in bits/dim, 0 for never", least=0
    )
    evaluate_split: str | None = option(
        None, "split of the held-out images, by default those of --holdout, else test"
    )
    evaluate_num_images: int = option(256, "how many held-out images, at most", least=2)
    evaluate_num_evals: int = option(
        20, "network evaluations for each held-out image", least=2, most=MOST_EVALS
    )
    trackers: str = option("", "comma-separated trackers of accelerate, such as tensorboard,wandb")
    push_to_hub: str | None = option(
        None, "Hub repository to push to while training, as user/name", check=check_repo_id
    )
    push_every: int = option(1000, "steps between pushes, in the background", least=1)
    push_private: bool = option(False, "make the repository of --push-to-hub private")
    license: str | None = option(
        None, "licence of the weights, for the model card, such as apache-2.0", check=check_license
    )
    dataset_license: str | None = option(
        None, "licence of the images, for the model card", check=check_license
    )
    dataset_id: str | None = option(None, "Hub id of the images, for the model card", check=check_repo_id)

    def __post_init__(self) -> None:
        check_options(self)
        if self.holdout is not None and self.holdout >= 1:
            object.__setattr__(self, "holdout", int(self.holdout))
        self.size  # noqa: B018  raises for text that is no size
        self.ema_decays  # noqa: B018  raises for text that is no list of decays
        if self.sample_steps is not None and self.sample_steps > self.num_train_timesteps:
            raise ValueError(
                f"sample_steps is {self.sample_steps}; allowed: <= {self.num_train_timesteps} (T)"
            )
        # Importing these takes seconds, which a value that is refused above need not wait for.
        from hf_ddpm.data.pixels import parse_background
        from hf_ddpm.objectives import make_objective
        from hf_ddpm.parametrization import works_from_pure_noise

        parse_background(self.background)
        if self.rescale_betas_zero_snr and not works_from_pure_noise(self.prediction_type):
            allowed = ", ".join(filter(works_from_pure_noise, _prediction_types()))
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}, which can't sample from "
                f"rescale_betas_zero_snr's pure noise; allowed with it: {allowed}"
            )
        make_objective(self.objective, self.prediction_type, self.variance_type)  # raises if they don't fit
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if self.label_column is None and self.label_dropout != defaults["label_dropout"]:
            raise ValueError(
                f"label_dropout is {self.label_dropout}, but has no use without label_column; allowed: "
                f"{defaults['label_dropout']} (the default)"
            )
        for name, (key, choice) in NEEDS.items():
            if getattr(self, name) != defaults[name] and getattr(self, key) != choice:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but has no use without {key} {choice!r}; allowed: "
                    f"{defaults[name]!r} (the default)"
                )
        for (key, choice), unused in _unused().items():
            for name in unused:
                if getattr(self, key) == choice and getattr(self, name) not in (defaults[name], 0):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but {key} {choice!r} has no use for it; allowed: "
                        f"{defaults[name]} (the default)"
                    )

    @property
    def size(self) -> int | tuple[int, int] | None:
        """`image_size` as numbers: a side, (height, width), or None."""
        if self.image_size is None:
            return None
        sides = self.image_size.lower().split("x")
        if len(sides) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,8}", side) for side in sides):
            raise ValueError(
                f"image_size is {shown(self.image_size)}; allowed: a positive whole number, or two as in "
                "'28x32'"
            )
        return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))

    @property
    def ema_decays(self) -> dict[str, float]:
        """The decays of `ema_decay` as numbers by the text that was given for each, in the order given."""
        decays = {}
        for text in (part.strip() for part in self.ema_decay.split(",")):
            if not re.fullmatch(r"0(\.[0-9]{1,15})?", text) or text in decays or len(decays) >= MOST_DECAYS:
                raise ValueError(
                    f"ema_decay is {shown(self.ema_decay)}; allowed: a number in [0, 1), or up to "
                    f"{MOST_DECAYS} different ones with commas between"
                )
            decays[text] = float(text)
        return decays

    @classmethod
    def load(cls, path: str | os.PathLike | None = None, **changes: Any) -> "TrainConfig":
        """The defaults, overridden by a file and then by keywords.

        Args:
            path: a TOML file, or the train_config.json of a run.
            **changes: keys of this class; text is read as the key's type.

        Raises:
            ValueError: the file can't be read, a key is unknown (the message names the nearest), or a value
                has the wrong type or lies out of range.
        """
        values = {} if path is None else _read(path)
        where = f"config file {shown(os.fspath(path), 160)}: " if path is not None else ""
        known = [field.name for field in dataclasses.fields(cls)]
        for source, names in ((where, values), ("", changes)):
            for name in names:
                if name in GONE:
                    raise ValueError(f"{source}there is no key {name!r} any more; allowed: {GONE[name]}")
                if name not in known:
                    near = nearest(name, known, cutoff=0)
                    raise ValueError(f"{source}unknown key {shown(name)}; did you mean {near!r}?")
        try:
            return cls(**{**values, **changes})
        except ValueError as error:
            culprit = str(error).split(" ", 1)[0]
            raise ValueError(
                f"{where if culprit in values and culprit not in changes else ''}{error}"
            ) from None

    @classmethod
    def of_run(cls, path: str | os.PathLike) -> "TrainConfig":
        """What a run was trained with, by its train_config.json.

        It is what `load` gives, but keys that are gone are left out, and where the file lacks a key whose
        default has changed, the run had the old one.

        Args:
            path: the file.

        Raises:
            ValueError: as `load`.
        """
        values = {name: value for name, value in _read(Path(path)).items() if name not in GONE}
        try:
            return cls.load(None, **{**OLD_DEFAULTS, **values})
        except ValueError as error:
            raise ValueError(f"config file {os.fspath(path)!r}: {error}") from None

    def to_json(self) -> str:
        """Every key with its value as indented JSON, which `load` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def _read(place: str | os.PathLike) -> Mapping[str, Any]:
    """The keys and values of a TOML or JSON file.

    Raises:
        ValueError: it can't be read, is no regular file, or holds something else.
    """
    try:
        path = Path(read_path(os.fspath(place)))
    except ValueError as error:
        raise ValueError(f"config is {error}") from None
    name, kind = shown(str(path), 160), "JSON" if path.suffix == ".json" else "TOML"
    try:
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a pipe without a writer
            raise ValueError(f"can't read config file {name}: allowed: a regular file")
        if found.st_size > LARGEST_FILE:
            raise ValueError(f"config file {name} has {found.st_size} bytes; allowed: {LARGEST_FILE}")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"can't read config file {name}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
        values = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"config file {name} is not {kind} of keys and values: it is too deep") from None
    except ValueError as error:  # what the two readers raise, and what Python says of very long numbers
        raise ValueError(f"config file {name} is not {kind}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config file {name} holds {type(values).__name__}; allowed: keys and values")
    return values


def make_scheduler(config: TrainConfig) -> "DDPMScheduler":
    """The scheduler of a run: its process is trained, and its config is saved with the weights."""
    from hf_ddpm.scheduler import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,  # type: ignore[arg-type]
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        prediction_type=config.prediction_type,  # type: ignore[arg-type]
        variance_type=config.variance_type,  # type: ignore[arg-type]
        clip_sample=config.clip_sample,
    )

"""Every choice of an evaluation: a frozen dataclass, checked when it is constructed.

Importing this file loads no torch, so that `hf-ddpm` answers at once: the choices are imported from the
modules that define them when they are first asked for.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from hf_ddpm.config import LARGEST_BATCH, MOST_EVALS, check_holdout
from hf_ddpm.runtime.messages import shown
from hf_ddpm.runtime.options import MOST, check_options, option, read_whole
from hf_ddpm.spelling import suggest_keywords


def _fits() -> Iterable[str]:
    from hf_ddpm.data.pixels import FITS

    return (fit for fit in FITS if fit != "random_crop")  # a measurement leaves nothing to chance


def parts() -> Iterable[str]:
    """Which images of a split can be asked for."""
    from hf_ddpm.data.holdout import PARTS

    return PARTS


def _variances() -> Iterable[str]:
    from hf_ddpm.variances import FIXED

    return [*sorted(FIXED), *MEASURED]


def _check_last_step(name: str, value: str) -> None:
    """Allow the word "auto" and a whole number of at least 0."""
    number = read_whole(value)
    if value != "auto" and (number is None or not 0 <= number <= MOST):
        raise ValueError(f"{name} is {shown(value)}; allowed: auto, or a whole number >= 0")


def _spacings() -> Iterable[str]:
    from hf_ddpm.schedules import SPACINGS

    return SPACINGS


MEASURED = ("optimal", "by-value")  # the variances of `likelihood.errors`, which a test compares
DECODERS = ("exact", "tanh", "levels")  # of `hf_ddpm.decoders`, which a test compares
MOST_SAMPLES = 10**7  # far above what is of use, and far below what harms a machine that is asked for it

# Keys that have an effect only together with another key, or with one of several.
NEEDS = {
    "num_samples": ("extractor", "nearest_dataset"),
    "sampling_steps": ("extractor", "nearest_dataset"),
    "sampling_spacing": ("sampling_steps",),
    "num_reference": ("extractor",),
    "reference": ("extractor",),
    "nearest_split": ("nearest_dataset",),
    "first_variance": ("steps",),
    "holdout_seed": ("holdout",),
    "halving": ("classify",),
    "chain": ("steps",),
}


@suggest_keywords
@dataclass(frozen=True)
class EvaluationConfig:
    """All choices of an evaluation, checked when it is constructed.

    Raises:
        ValueError: a value has the wrong type or lies out of range.
        TypeError: there is no such key; the message names the nearest.
    """

    model: str = option("", "pipeline folder or Hub id, also one that plain diffusers wrote", path=True)
    dataset: str = option(
        "",
        "Hub id, folder of images or of parquet files, or 'digits' (embedded); by default the run's",
        path=True,
    )
    split: str | None = option(
        None,
        "split of the data set, or a slice as in 'train[90%:]'; by default the one that the run held images "
        "out of, else test",
    )
    part: str | None = option(
        None,
        "which images of the split: those that the run held out, those that it trained on, or all; by "
        "default those held out where it trained on others of the split",
        choices=parts,
    )
    holdout: float | None = option(
        None,
        "share of the images, or how many, that are held out, as in training; by default as the run had it",
        check=check_holdout,
    )
    holdout_seed: int | None = option(
        None, "seed that chose these, by default the run's, else 0", least=0, below=2**63
    )
    num_images: int | None = option(
        None, "how many images, a random subset; by default all of the split", least=1
    )
    image_column: str | None = option(
        None, "column of the images, by default as in the run's training, else the only one"
    )
    label_column: str | None = option(
        None,
        "column of the images' classes, for a class-conditional model; by default as in the run's training",
    )
    class_label: str | None = option(
        None,
        "name or number of a class that all images are given, or none for no class; by default each is given "
        "its own",
        also="--class",
        none_is_text=True,
    )
    classify: bool = option(
        False, "also classify the images, by the bound given each class: accuracy, and log p(class | image)"
    )
    halving: bool = option(
        False, "classify with few evaluations first, and go on with the better half of the classes each time"
    )
    channels: int | None = option(
        None, "1 for grey or 3 for RGB, 2 or 4 with alpha; by default as the model's training had it", least=1
    )
    background: str | None = option(
        None,
        "ground that transparent pixels are laid on: white, black, or a colour as in '#ff8000'; by default "
        "as the model's training had it, else white",
    )
    fit: str | None = option(
        None,
        "what to do with images of another size, noted in the result; by default as the model's training "
        "did, else exact",
        choices=_fits,
    )
    to_8_bit: bool | None = option(
        None,
        "convert images of 16 bits or of floats to 8 bits, as a fit does too, noted in the result; by "
        "default as the model's training did",
    )
    skip_corrupt: bool | None = option(
        None,
        "skip and count images that can't be read, instead of refusing them; by default as the model's "
        "training did",
    )

    exact: bool = option(False, "evaluate every step once instead of a few per image")
    num_evals_per_image: int = option(
        20, "network evaluations per image of the estimate", least=2, most=MOST_EVALS
    )
    pilot_images: int = option(
        0, "images from which it is learned how often to draw each step; 0 takes a default", least=0
    )
    variance_type: str | None = option(
        None,
        "reverse variance, by default the model's; optimal and by-value need what `hf-ddpm plan` measured",
        choices=_variances,
        also="--variance",
    )
    clip_x0: bool = option(True, "clip the predicted x_0 to [-1, 1], as published evaluations do")
    decoder: str = option(
        "exact",
        "decoder of L_0; tanh is the published code's formula, in float64, and levels knows how often each "
        "grey level occurs, as `hf-ddpm plan` measured",
        choices=DECODERS,
    )
    steps: int | None = option(None, "steps of the chain, by default all T", least=2)
    chain: str = option(
        "even",
        "which steps these are: spaced by the model's scheduler, quadratic, or chosen from what `hf-ddpm "
        "plan` measured",
        choices=("even", "quadratic", "chosen"),
    )
    last_step: str = option(
        "auto",
        "step at which a chosen chain with the decoder levels ends; auto takes the best one",
        joined=" ",
        check=_check_last_step,
        examples=("auto",),
    )
    errors: str | None = option(
        None, "folder of what `hf-ddpm plan` measured, by default the model's", path=True
    )
    first_variance: str = option(
        "spaced",
        "chain whose second step gives the variance of L_0: the shorter one of --steps, or the full one",
        choices=("spaced", "full"),
    )

    extractor: str | None = option(
        None,
        "feature network for sample metrics: inception, or a folder or Hub id of a vision model",
        path=True,
    )
    nearest_dataset: str | None = option(
        None, "look for each sample's nearest image in this data set: Hub id, folder, or 'digits'", path=True
    )
    nearest_split: str = option(
        "train", "split of that data set, or a slice; of the run's, the images that it trained on"
    )
    num_samples: int = option(
        1000,
        "samples for the extractor and the nearest images, and as many held-out images",
        least=2,
        most=MOST_SAMPLES,
    )
    sampling_steps: int | None = option(None, "sampling steps of these samples, by default all T", least=1)
    sampling_spacing: str | None = option(
        None, "how these steps are spaced among the T, by default as the sampler does", choices=_spacings
    )
    num_reference: int | None = option(
        None, "real images that the extractor compares the samples with, by default as many", least=2
    )
    reference: str | None = option(
        None, "file of the real images' features: read if it exists, else written", path=True
    )

    compare_with: str | None = option(
        None, "folder with the evaluation of another model, for the difference per image", path=True
    )
    out: str | None = option(None, "folder for the results, by default MODEL if that is a folder", path=True)
    overwrite: bool = option(False, "replace an evaluation that the folder holds")
    seed: int = option(0, "seed of the chosen images, the noise and the samples", least=0, below=2**63)
    batch_size: int = option(64, "images at once in each process", least=1, most=LARGEST_BATCH)

    def __post_init__(self) -> None:
        check_options(self)
        if self.holdout is not None and self.holdout >= 1:
            object.__setattr__(self, "holdout", int(self.holdout))
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, needed in NEEDS.items():
            idle = all(getattr(self, other) == defaults[other] for other in needed)
            if getattr(self, name) != defaults[name] and idle:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but has no use without {' or '.join(needed)}"
                )
        measured = self.variance_type in MEASURED or self.chain == "chosen" or self.decoder == "levels"
        if self.errors is not None and not measured:
            raise ValueError(
                f"errors is {self.errors!r}, but has no use without variance_type {' or '.join(MEASURED)}, "
                "a chosen chain, or decoder levels"
            )
        if self.last_step != "auto" and (self.chain != "chosen" or self.decoder != "levels"):
            raise ValueError(
                f"last_step is {self.last_step}, but has no use without a chosen chain and decoder levels: "
                "others end at step 0, or where they are spaced to"
            )
        if self.background is not None:
            from hf_ddpm.data.pixels import parse_background

            parse_background(self.background)
        if self.first_variance != defaults["first_variance"] and self.variance_type in MEASURED:
            raise ValueError(
                f"first_variance is {self.first_variance!r}, but has no use with variance_type "
                f"{self.variance_type!r}, whose L_0 was measured"
            )
        if self.first_variance != defaults["first_variance"] and self.decoder == "levels":
            raise ValueError(
                f"first_variance is {self.first_variance!r}, but has no use with decoder levels, whose σ was "
                "measured"
            )
        if self.halving and self.exact:
            raise ValueError("halving is True, but exact evaluates every step; allowed: one of them")
        for name in ("num_evals_per_image", "pilot_images"):
            if self.exact and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is {getattr(self, name)}, but exact evaluates every step")

    @property
    def chosen_last_step(self) -> int | None:
        """The step at which a chosen chain is to end; None for the best one."""
        return None if self.last_step == "auto" else read_whole(self.last_step)

"""Every choice of an evaluation: a frozen dataclass, checked when made."""

import dataclasses
from dataclasses import dataclass

from hf_ddpm.data.pixels import FITS
from hf_ddpm.runtime.options import check_options, option

# Keys of an evaluation that act only together with another one, or with one of several.
NEEDS = {
    "num_samples": ("extractor", "nearest_dataset"),
    "sampling_steps": ("extractor", "nearest_dataset"),
    "num_reference": ("extractor",),
    "reference": ("extractor",),
    "nearest_split": ("nearest_dataset",),
    "first_variance": ("steps",),
}


@dataclass(frozen=True)
class EvaluationConfig:
    """What `hf-ddpm evaluate` does, checked when made.

    Raises:
        ValueError: a value has the wrong type or lies out of range.
    """

    model: str = option("", "pipeline folder or Hub id, also one that plain diffusers wrote")
    dataset: str = option("", "Hub id, folder of images or of parquet files, or 'digits' (embedded)")
    split: str = option("test", "split of the data set")
    num_images: int | None = option(None, "how many, a random subset; by default all of the split", least=1)
    image_column: str | None = option(None, "column of the images, by default the only one")
    fit: str = option(
        "exact", "what to do with images of another size, noted in the result", choices=FITS[:4]
    )

    exact: bool = option(False, "evaluate every step once instead of a few per image")
    num_evals_per_image: int = option(20, "network evaluations per image of the estimate", least=2)
    pilot_images: int = option(0, "images that a proposal is learned from; 0 takes the default one", least=0)
    variance_type: str | None = option(
        None, "reverse variance, by default the model's", choices=("fixed_large", "fixed_small")
    )
    clip_x0: bool = option(True, "clip the predicted x_0 to [-1, 1], as published evaluations do")
    decoder: str = option("exact", "of L_0; tanh is the published code's", choices=("exact", "tanh"))
    steps: int | None = option(None, "steps of the chain, by default all T", least=2)
    first_variance: str = option(
        "spaced",
        "whose second step's variance serves L_0 of a shorter chain: its own, or the full one's",
        choices=("spaced", "full"),
    )

    extractor: str | None = option(
        None, "feature network for sample metrics: inception, or a folder or Hub id of a vision model"
    )
    nearest_dataset: str | None = option(
        None, "look for each sample's nearest image in this data set: Hub id, folder, or 'digits'"
    )
    nearest_split: str = option("train", "split of that data set")
    num_samples: int = option(1000, "samples drawn for these two, and held-out images beside them", least=2)
    sampling_steps: int | None = option(None, "steps of drawing them, by default all T", least=1)
    num_reference: int | None = option(
        None, "real images that the extractor compares them with, by default as many", least=2
    )
    reference: str | None = option(None, "file of the reference's features, written or reused")

    compare_with: str | None = option(
        None, "folder of an evaluation of another model, for a paired difference"
    )
    out: str | None = option(None, "folder for the results, by default MODEL if that is a folder")
    overwrite: bool = option(False, "replace an evaluation that is there")
    seed: int = option(0, "of the images chosen, the noise and the samples", least=0, below=2**63)
    batch_size: int = option(64, "images at once in each process", least=1)

    def __post_init__(self) -> None:
        check_options(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, needed in NEEDS.items():
            idle = all(getattr(self, other) == defaults[other] for other in needed)
            if getattr(self, name) != defaults[name] and idle:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but has no use without {' or '.join(needed)}"
                )
        for name in ("num_evals_per_image", "pilot_images"):
            if self.exact and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is {getattr(self, name)}, but exact evaluates every step")

"""One class of a class-conditional model as a model of its own, which needs no label: `hf-ddpm export`.

diffusers' U-Net adds the row E[y] of a class to the embedding of t, whose last layer has a bias b. So

    b' = b + E[y]

and no table of classes is the same network for that class, and a network without classes, which plain
diffusers samples. This module knows diffusers' U-Net and folders.
"""

import os
from pathlib import Path
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel

from hf_ddpm.checks import described
from hf_ddpm.folders.index import needs_us
from hf_ddpm.folders.labels import label_id
from hf_ddpm.folders.layout import CARD, INDEX, NOTES
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.models import num_classes
from hf_ddpm.publishing.card import MARK, as_text
from hf_ddpm.runtime.disk import why_not_writable, write_folder
from hf_ddpm.runtime.messages import redact, shorten
from hf_ddpm.runtime.untrusted import read_json
from hf_ddpm.spelling import suggest_keywords

TABLE, BIAS = "class_embedding.weight", "time_embedding.linear_2.bias"  # names of weights
CARD_TEXT = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

{mark}

# {title}

{what}

```python
from {library} import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained(".")  # this folder
pipeline(batch_size=4).images[0].save("image.png")
```
"""


@suggest_keywords
def export(model: str | os.PathLike, class_labels: int | str, out: str | os.PathLike) -> Path:
    """Write a folder of a model of one class, with a card that says of what it is.

    The folder is that of an unconditional model: plain diffusers samples it, and it can be measured,
    published and trained further. Its answers are those of the class without guidance. Weights are written in
    float32.

    Args:
        model: folder or Hub id of a class-conditional model whose network is a `UNet2DModel`.
        class_labels: the class, by its number or name; or "none", for the model without a class.
        out: the folder, a new or an empty one.

    Returns:
        The folder.

    Raises:
        ValueError: a model of another kind, no such class, or a folder that can't be written or holds
            something.
        OSError: it can't be written after all.
    """
    folder = _new_folder(out)
    pipeline, name = DDPMPipeline.from_pretrained(model), redact(os.fspath(model))
    network, shown = pipeline.unet, repr(shorten(name, 80))
    if (place := Path(name).expanduser()).is_dir():
        name = place.resolve().name  # a card says nothing of its owner's disk
    if type(network) is not UNet2DModel:
        raise ValueError(f"the network of {shown} is {described(network)}; allowed: a UNet2DModel")
    if (classes := num_classes(network)) is None:
        raise ValueError(f"the network of {shown} knows no classes; allowed: a class-conditional one")
    label = label_id(class_labels, classes, pipeline.id2label)
    title = "no class" if label == classes else (pipeline.id2label or {}).get(label, f"class {label}")
    plain = DDPMPipeline(without_classes(network, label), pipeline.scheduler)

    def fill(place: Path) -> None:
        plain.save_pretrained(place)
        library = "hf_ddpm" if needs_us(read_json(place / INDEX)) else "diffusers"
        what = _what(title, label == classes, name)
        card = CARD_TEXT.format(mark=MARK, title=as_text(title), what=what, library=library)
        (place / CARD).write_text(card, encoding="utf-8")
        (place / NOTES).write_text(what + "\n", encoding="utf-8")

    write_folder(folder, fill)
    return folder


def without_classes(network: UNet2DModel, label: int) -> UNet2DModel:
    """The unconditional network that answers what a class-conditional one answers for a class.

    Args:
        network: with classes.
        label: 0 to C − 1, or C for no class.

    Returns:
        A new network, in the dtype and on the device of the other one, in eval mode.
    """
    config: Any = {**network.config, "num_class_embeds": None}
    made: Any = UNet2DModel.from_config(config)
    weights = dict(network.state_dict())
    row = weights.pop(TABLE)[label]
    weights[BIAS] = (weights[BIAS].double() + row.double()).to(row.dtype)
    made.load_state_dict(weights)
    return made.to(row.device, row.dtype).eval()


def _new_folder(out: str | os.PathLike) -> Path:
    """The folder, which must be new or empty, and whose parents are made."""
    folder = Path(out).expanduser()
    try:
        holds = folder.is_dir() and next(folder.iterdir(), None)
    except OSError as error:
        raise ValueError(f"out {str(folder)!r} can't be read: {error.strerror}") from None
    if holds:
        raise ValueError(
            f"out {str(folder)!r} holds {shorten(holds.name, 60)!r}; allowed: a new or an empty folder"
        )
    if reason := why_not_writable(folder):
        raise ValueError(f"out {str(folder)!r} can't be written: {reason}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _what(title: str, none: bool, model: str) -> str:
    """What the model is, in Markdown."""
    of = "The model without a class" if none else f"The class “{as_text(title)}”"
    return (
        f"{of} of the class-conditional model {as_text(model)}, as an unconditional model: `hf-ddpm "
        "export` added the row of the class to the bias of the time embedding. Its answers are those of that "
        "model for the class, without guidance."
    )

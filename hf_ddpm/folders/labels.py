"""The names of a model's classes, in the file `LABELS` of its folder: written, read and looked up.

    {"id2label": {"0": "boot", "1": "bag"}}

The key is that of `transformers`' configs. Class y of C has the number y, 0 to C − 1, and a name that no
other class has; C itself is "no class", which has no name. The file may come from a stranger.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_ddpm.data.labels import LABEL_RULE, is_label
from hf_ddpm.denoiser import MAX_CLASSES
from hf_ddpm.folders.layout import LABELS
from hf_ddpm.runtime.disk import whole_file
from hf_ddpm.runtime.messages import did_you_mean, shorten
from hf_ddpm.runtime.untrusted import read_json, shown

KEY = "id2label"
OWN_CLASSES = "its own"  # how records call the classes that images have by the data
NO_CLASS = "none"  # what a person writes for the last row of the embedding


def write_labels(folder: Path, id2label: Mapping[int, str]) -> None:
    """Write the names of a model's classes into its folder, whole or not at all.

    Args:
        folder: of the model.
        id2label: the name of each class, by its number.

    Raises:
        ValueError: names or numbers that `check_labels` refuses.
        OSError: it can't be written.
    """
    names = {str(y): name for y, name in check_labels(id2label).items()}
    with whole_file(folder / LABELS) as file:
        file.write_text(json.dumps({KEY: names}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_labels(folder: Path, num_classes: int | None = None) -> dict[int, str] | None:
    """The names of a model's classes, by their numbers, ascending; None if its folder has no such file.

    Args:
        folder: of the model.
        num_classes: how many classes the network has; None if that is not compared.

    Raises:
        ValueError: the file can't be read, or holds anything else than a name for each class.
    """
    if not (folder / LABELS).exists():
        return None
    found = read_json(folder / LABELS)
    names = found.get(KEY)
    if not isinstance(names, dict):
        raise ValueError(f"{LABELS} has no {KEY} of numbers and names")
    for key in names:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", key):
            raise ValueError(f"{LABELS}: {shown(key)} numbers a class; allowed: 0, 1, 2, ...")
    try:
        return check_labels({int(key): name for key, name in names.items()}, num_classes)
    except ValueError as error:
        raise ValueError(f"{LABELS}: {error}") from None


def check_labels(id2label: Any, num_classes: int | None = None) -> dict[int, str]:
    """The names of classes in the order of their numbers, if they are 0 to C − 1 and each has its own name.

    Args:
        id2label: the name of each class, by its number.
        num_classes: C; None if any number of classes will do.

    Raises:
        ValueError: it is no such mapping.
    """
    if not isinstance(id2label, Mapping):
        raise ValueError(f"{KEY} is {shown(id2label)}; allowed: a name for each class, as in {{0: 'boot'}}")
    count = len(id2label)
    if not 0 < count <= MAX_CLASSES:
        raise ValueError(f"{KEY} names {count} classes; allowed: 1 to {MAX_CLASSES}")
    if num_classes is not None and count != num_classes:
        raise ValueError(f"{KEY} names {count} classes; allowed for this network: {num_classes}")
    seen: dict[str, int] = {}
    for y in range(count):
        if y not in id2label:
            raise ValueError(f"{KEY} has no class {y}; allowed: the numbers 0 to {count - 1}, each once")
        name = id2label[y]
        if not is_label(name):
            raise ValueError(f"{KEY}: the name of class {y} is {shown(name)}; allowed: {LABEL_RULE}")
        if name in seen:
            raise ValueError(f"{KEY}: classes {seen[name]} and {y} are both named {shown(name)}")
        seen[name] = y
    return {y: name for name, y in seen.items()}


def label_id(given: int | str, num_classes: int, id2label: Mapping[int, str] | None = None) -> int:
    """The number of a class that a person names.

    Args:
        given: a number, 0 to C − 1; a name; `NO_CLASS`; or a number as text, where no class has that name.
        num_classes: C.
        id2label: the names of the classes; None if they have none.

    Returns:
        0 to C − 1, or C for `NO_CLASS`.

    Raises:
        ValueError: there is no such class, or `NO_CLASS` is also the name of one.
    """
    ids = {name: y for y, name in (id2label or {}).items()}
    if isinstance(given, str):
        if given == NO_CLASS and given in ids:
            raise ValueError(
                f"class {given!r} may be the one of that name or no class at all; allowed: its number, "
                f"{ids[given]}, or {num_classes} for no class"
            )
        if given in ids:
            return ids[given]
        if given == NO_CLASS:
            return num_classes
        if re.fullmatch("[0-9]{1,9}", given):
            given = int(given)
    numbers = num_classes + (NO_CLASS in ids)  # then no class has its number alone
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < numbers:
        return given
    names = shorten(", ".join(ids), 80)
    near = did_you_mean(given, ids) if isinstance(given, str) else ""
    raise ValueError(
        f"class is {shown(given)}{near}; allowed: 0 to {num_classes - 1}, {NO_CLASS}{names and f', {names}'}"
    )

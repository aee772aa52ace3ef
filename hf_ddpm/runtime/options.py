"""Options of a command as a frozen dataclass: each field has a default, a help text and a rule.

The command line, TOML files and Python calls all end here. The file knows types and ranges, and no option.
"""

import dataclasses
import difflib
import math
import operator
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from hf_ddpm.runtime.messages import redact

BOUNDS = {"above": (operator.gt, ">"), "least": (operator.ge, ">="), "below": (operator.lt, "<")}


def option(default: Any, help: str, **rules: Any) -> Any:
    """A field with its `--help` text and its rules: `choices`, bounds as in `BOUNDS`, or `joined`.

    `joined` is for text that lists numbers: what stands between them where a file or a call gives numbers.
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def check_options(options: Any) -> None:
    """Give every field of a frozen dataclass its type (strings are read), and check its rule.

    Raises:
        ValueError: a value has the wrong type or lies out of range; the message names the key and what is
            allowed.
    """
    for field in dataclasses.fields(options):
        value = _typed(field.name, getattr(options, field.name), field.type, field.metadata)
        object.__setattr__(options, field.name, value)
        _check_range(field.name, value, field.metadata)


def _typed(name: str, value: Any, annotation: Any, rules: Mapping[str, Any]) -> Any:
    """`value` as the type of its key; strings, as from the command line, are read."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind, optional = kinds[0], type(None) in kinds
    if optional and (value is None or str(value).lower() == "none"):
        return None
    if "joined" in rules and isinstance(value, (int, float, list, tuple)):
        return rules["joined"].join(str(n) for n in (value if isinstance(value, (list, tuple)) else (value,)))
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is str and isinstance(value, (str, os.PathLike)):
        if redact(text := os.fspath(value)) != text:  # options are written down and published
            raise ValueError(
                f"{name} is {redact(text)!r}, with a token or password in it; allowed: none, as HF_TOKEN or "
                "`hf auth login` give it to the Hub's client"
            )
        return text
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = kind(value)
            if math.isfinite(number) and (isinstance(value, str) or number == value):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise ValueError(f"{name} is {value!r}; allowed: {words[kind]}{' or none' if optional else ''}")


def _check_range(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        near = difflib.get_close_matches(str(value), [str(c) for c in rules["choices"]], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} is {value!r}{hint}; allowed: {', '.join(str(c) for c in rules['choices'])}")
    bounds = {rule: rules[rule] for rule in BOUNDS if rule in rules}
    if not all(BOUNDS[rule][0](value, bound) for rule, bound in bounds.items()):
        allowed = " and ".join(f"{BOUNDS[rule][1]} {bound:g}" for rule, bound in bounds.items())
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")

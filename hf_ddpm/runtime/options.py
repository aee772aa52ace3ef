"""Options of a command as a frozen dataclass: each field has a default, a help text and rules.

The command line, TOML files and Python calls all set the same fields. This file knows types and ranges, and
no particular option. It imports the standard library and `messages` only.
"""

import dataclasses
import math
import operator
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from hf_ddpm.runtime.messages import did_you_mean, redact

BOUNDS = {"above": (operator.gt, ">"), "least": (operator.ge, ">="), "below": (operator.lt, "<")}


def option(default: Any, help: str, **rules: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: the value where none is given.
        help: what `--help` says of it.
        **rules: `above`, `least` and `below` are bounds of a number. `choices` are the allowed values.
            `examples` are values that `--help` lists although others are allowed. Both are a collection, or a
            function that returns one when it is first needed, so that it may import what defines them.
            `joined` is for text that lists numbers: the text that stands between them if a file or a call
            gives numbers instead.
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def listed(rules: Mapping[str, Any], rule: str) -> list[Any]:
    """The values of the rule `choices` or `examples`; none where there is no such rule."""
    values = rules.get(rule, ())
    return list(typing.cast(Iterable[Any], values() if callable(values) else values))


def check_options(options: Any) -> None:
    """Give every field of a frozen dataclass the type it is declared with, and check its rules.

    Text is read as the type: "12" is a whole number, "true" is true, "none" is None.

    Raises:
        ValueError: a value has the wrong type or lies out of range; the message names the key and what is
            allowed.
    """
    for field in dataclasses.fields(options):
        value = _typed(field.name, getattr(options, field.name), field.type, field.metadata)
        object.__setattr__(options, field.name, value)
        _check_range(field.name, value, field.metadata)


def _typed(name: str, value: Any, annotation: Any, rules: Mapping[str, Any]) -> Any:
    """`value` as the type of its key; text, as from the command line, is read."""
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
    if "choices" in rules and value not in (choices := listed(rules, "choices")):
        allowed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}{did_you_mean(value, choices)}; allowed: {allowed}")
    bounds = {rule: rules[rule] for rule in BOUNDS if rule in rules}
    if not all(BOUNDS[rule][0](value, bound) for rule, bound in bounds.items()):
        allowed = " and ".join(f"{BOUNDS[rule][1]} {bound:g}" for rule, bound in bounds.items())
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")

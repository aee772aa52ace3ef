"""Options of a command as a frozen dataclass: each field has a default, a help text and rules.

The command line, TOML files and Python calls all set the same fields. This file knows types and ranges, and
no particular option. It imports the standard library and `messages` only.
"""

import dataclasses
import math
import operator
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from hf_ddpm.runtime.messages import CONTROL, did_you_mean, redact, shown

BOUNDS = {
    "above": (operator.gt, ">"),
    "least": (operator.ge, ">="),
    "below": (operator.lt, "<"),
    "most": (operator.le, "<="),
}
MOST = 2**63 - 1  # of a whole number without a bound of its own: what a tensor holds
LONGEST_NUMBER = 100  # characters
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes of a part of a path, and of a whole one, on common systems


def option(default: Any, help: str, **rules: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: the value where none is given.
        help: what `--help` says of it.
        **rules: `above`, `least`, `below` and `most` are bounds of a number. `choices` are the allowed
            values. `path` marks text that may name a file or a folder, in which "~" is expanded. `check` is a
            function of the option's name and its value that raises ValueError for what is not allowed.
            `examples` are values that `--help` lists although others are allowed. Both are a collection, or a
            function that returns one when it is first needed, so that it may import what defines them.
            `also` is another spelling of the flag. `none_is_text` keeps the word "none" where None means
            something else.
            `joined` is for text that lists numbers or words: the text that stands between them if a file or a
            call gives a list instead.
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def listed(rules: Mapping[str, Any], rule: str) -> list[Any]:
    """The values of the rule `choices` or `examples`; none where there is no such rule."""
    values = rules.get(rule, ())
    return list(typing.cast(Iterable[Any], values() if callable(values) else values))


def read_whole(text: str) -> int | None:
    """A whole number as it is typed; None for other text, and for digits that are not 0 to 9."""
    return int(text) if len(text) <= LONGEST_NUMBER and re.fullmatch(r"[+-]?[0-9]+", text) else None


def read_number(text: str) -> float | None:
    """A finite number as it is typed; None for other text, and for digits that are not 0 to 9."""
    if not text.isascii() or len(text) > LONGEST_NUMBER:  # Python reads the digits of every script
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_path(text: str) -> str:
    """A path, or a name on the Hub, as it is typed; "~" and "~user" at its start are expanded.

    Raises:
        ValueError: it can't be a path; the message names the value and what is allowed.
    """
    if not text or any(character in text for character in "\0\n\r"):
        raise ValueError(f"{shown(text)}; allowed: a path without line breaks and zero bytes")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"{shown(text)}, of which no home folder is known; allowed: such as ./~name")
    raw = os.fsencode(expanded)
    if len(raw) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in raw.split(b"/")):
        raise ValueError(
            f"{shown(text)}; allowed: {LONGEST_PATH} bytes, and {LONGEST_NAME} for each part of a path"
        )
    return expanded


def check_options(options: Any) -> None:
    """Give every field of a frozen dataclass the type it is declared with, and check its rules.

    Text is read as the type: "12" is a whole number, "true" is true, "none" is None.

    Raises:
        ValueError: a value has the wrong type or lies out of range; the message names the key and what is
            allowed.
    """
    for field in dataclasses.fields(options):
        value = _typed(field, getattr(options, field.name))
        object.__setattr__(options, field.name, value)
        _check_range(field.name, value, field.metadata)


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """`value` as the type of its key; text, as from the command line, is read."""
    name, annotation, rules = field.name, field.type, field.metadata
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind, optional = kinds[0], type(None) in kinds
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    word = value.lower() if isinstance(value, str) else ""
    if optional and (value is None or (word == "none" and not rules.get("none_is_text", False))):
        return None
    if "joined" in rules and not isinstance(value, str):
        parts = value if isinstance(value, (list, tuple)) else [value]
        if parts and all(
            isinstance(n, str) or (isinstance(n, (int, float)) and abs(n) < MOST) for n in parts
        ):
            return rules["joined"].join(str(n) for n in parts)
    elif kind is bool and (isinstance(value, bool) or word in ("true", "false")):
        return value if isinstance(value, bool) else word == "true"
    elif kind is str and isinstance(value, str):
        return _text(field, value)
    elif kind in (int, float) and not isinstance(value, bool):
        number = _number(kind, value)
        if number is not None:
            return number
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    hint = _number_meant(kind, word)
    raise ValueError(
        f"{name} is {shown(value)}{hint}; allowed: {words[kind]}{' or none' if optional else ''}"
    )


def _number_meant(kind: Any, text: str) -> str:
    """The words " (did you mean 0.05?)" on "5%" or "0,05", or on "1,000" if it is to be whole; or nothing."""
    share, thousands = re.fullmatch(r"([0-9.]+) ?%", text), re.fullmatch(r"[0-9]{1,3}([,_ ][0-9]{3})+", text)
    comma = re.fullmatch(r"[0-9]+,[0-9]+", text)
    found = None
    if kind is float and share:
        found = read_number(share[1])
        found = None if found is None else found / 100
    elif kind is int and thousands:
        found = read_whole(re.sub("[,_ ]", "", text))
    elif kind is float and comma:
        found = read_number(text.replace(",", "."))
    return "" if found is None else f" (did you mean {found:{'d' if kind is int else 'g'}}?)"


def _text(field: dataclasses.Field, text: str) -> str:
    """Text as an option may hold it: without secrets, as options are written down and published."""
    if redact(text) != text:
        raise ValueError(
            f"{field.name} is {shown(text)}, with a token or password in it; allowed: none, as HF_TOKEN or "
            "`hf auth login` give it to the Hub's client"
        )
    if text == field.default or "joined" in field.metadata:  # what reads the list refuses other text
        return text
    if field.metadata.get("path"):
        try:
            return read_path(text)
        except ValueError as error:
            raise ValueError(f"{field.name} is {error}") from None
    if not text.strip() or CONTROL.search(text):
        raise ValueError(f"{field.name} is {shown(text)}; allowed: text in one line that is not empty")
    return text


def _number(kind: Any, value: Any) -> int | float | None:
    """`value` as a number; None for what is none, is not finite, or would have to be rounded."""
    if isinstance(value, str):
        return read_whole(value) if kind is int else read_number(value)
    try:
        number = kind(value)
        return number if math.isfinite(number) and number == value else None
    except (TypeError, ValueError, OverflowError):
        return None


def _check_range(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    if value is None:
        return
    if "choices" in rules and value not in (choices := listed(rules, "choices")):
        allowed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{name} is {shown(value)}{did_you_mean(value, choices)}; allowed: {allowed}")
    bounds = {rule: rules[rule] for rule in BOUNDS if rule in rules}
    if isinstance(value, int) and not isinstance(value, bool) and not {"below", "most"} & bounds.keys():
        if not -MOST <= value <= MOST:
            raise ValueError(f"{name} is {shown(value)}; allowed: whole numbers of 64 bits")
    if not all(BOUNDS[rule][0](value, bound) for rule, bound in bounds.items()):
        if value <= bounds.get("most", value):
            bounds.pop("most", None)  # a limit is told to those who pass it
        allowed = " and ".join(f"{BOUNDS[rule][1]} {_plain(bound)}" for rule, bound in bounds.items())
        raise ValueError(f"{name} is {shown(value)}; allowed: {allowed}")
    if "check" in rules:
        rules["check"](name, value)


def _plain(bound: float) -> str:
    return f"{bound:,}".replace(",", "") if isinstance(bound, int) and bound < 10**9 else f"{bound:g}"

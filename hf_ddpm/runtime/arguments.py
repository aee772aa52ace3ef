"""Words on a command line: a parser whose errors are one line, flags of options, and how a command ends.

It knows no command.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState

from hf_ddpm.runtime.messages import redact
from hf_ddpm.runtime.signals import EXIT_CODE, TrainingStopped


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line that names the nearest flag."""

    def error(self, message: str) -> typing.NoReturn:
        """Say it in one line, and end with exit code 2."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; `-` and `_` inside a flag's name mean the same."""
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-4 and -8x8 are values too, bad ones
        words = [_dashed(word) for word in argv]
        values, unknown = self.parse_known_args(words)
        if unknown:
            flags = [
                flag for action in self._actions for flag in action.option_strings if flag.startswith("--")
            ]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
            self.error(
                f"unknown argument {unknown[0]!r}"
                + (f"; did you mean {near[0]}?" if near else "; see --help")
            )
        return values


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def run(
    command: Callable[[Sequence[str], str], None], argv: Sequence[str] | None = None, prog: str = ""
) -> None:
    """Call a command; bad input is one line on stderr and exit code 2, a failed run one line and 1.

    A training run that a signal stopped, and that the same command goes on with, has 75.
    """
    prog = prog or Path(sys.argv[0]).name
    try:
        command(sys.argv[1:] if argv is None else argv, prog)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("HF_DDPM_TRACEBACK"):
            raise
        bad_input = isinstance(error, ValueError)
        words = "error:" if bad_input else "failed (HF_DDPM_TRACEBACK=1 shows where):"
        print(f"{prog}: {words} {redact(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2 if bad_input else 1)
    except TrainingStopped as stopped:
        if PartialState().is_main_process:
            print(f"{prog}: {stopped}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)


def add_options(parser: argparse.ArgumentParser, options: type, but: Sequence[str] = ()) -> None:
    """A flag for every field of a dataclass of options, `but` for some; none has a value unless typed."""
    for option in dataclasses.fields(options):
        if option.name in but:
            continue
        rules, kind = option.metadata, option.type
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        text = rules["help"] + (f" ({', '.join(map(str, rules['choices']))})" if "choices" in rules else "")
        default = "" if option.default in (None, "") else f" [{option.default}]"
        if bool in kinds:
            default = default.lower()  # as it is typed
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar={bool: "true|false", int: "N", float: "X", str: "TEXT"}[kinds[0]],
            help=(text + default).replace("%", "%%"),
            nargs="?" if bool in kinds else None,  # a bare flag means true
            const="true" if bool in kinds else None,
        )


def count(word: str) -> int:
    """A flag's value as a positive whole number."""
    return whole(word, 1)


def whole(word: str, least: int = 0) -> int:
    """A flag's value as a whole number."""
    if not word.isdecimal() or int(word) < least:
        raise argparse.ArgumentTypeError(f"{word!r}; allowed: whole numbers >= {least}")
    return int(word)


def wholes(word: str) -> list[int]:
    """A flag's value as whole numbers between commas."""
    parts = [part.strip() for part in word.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{word!r}; allowed: whole numbers >= 0 between commas")
    return [int(part) for part in parts]

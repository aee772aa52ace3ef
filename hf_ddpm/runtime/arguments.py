"""Words on a command line: a parser whose errors are one line, flags of options, and how a command ends.

Whatever a command raises, one line on stderr says so, which is printed in `end` and nowhere else. This file
knows no command. It imports neither torch nor accelerate, so that help and mistyped words are answered at
once.
"""

import argparse
import dataclasses
import errno
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hf_ddpm.runtime.ends import orderly
from hf_ddpm.runtime.environment import check_environment
from hf_ddpm.runtime.messages import LIMIT, nearest, one_line, redact, shown
from hf_ddpm.runtime.options import MOST, listed, read_number, read_path, read_whole
from hf_ddpm.runtime.signals import EXIT_CODE, TrainingStopped
from hf_ddpm.runtime.streams import TRACEBACK, guard_streams

# What the system says of a path that can't be one, wherever that comes out
BAD_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOTDIR, errno.EISDIR)
LONGEST_LIST = 100  # numbers of a flag

# The flags of the command that runs, by the names that the functions which it calls have for them
_OPTIONS: dict[str, str] = {}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line that names the nearest flag.

    A flag is never abbreviated, so that adding one can't change what an old command line means.

    Attributes:
        late_help: functions that return the help text of an argument when the help is printed, for texts that
            list what takes seconds to import. They escape "%" as "%%", as argparse asks for.
    """

    def __init__(self, prog: str, description: str, epilog: str | None = None, usage: str | None = None):
        super().__init__(prog, usage, description, epilog, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-4 and -8x8 are (bad) values, no flags
        self.late_help: dict[argparse.Action, Callable[[], str]] = {}

    def error(self, message: str) -> typing.NoReturn:
        """Print one line to stderr, and end with exit code 2."""
        message = re.sub(r"^argument ([\w-]+): (?=.*; allowed: )", r"\1 is ", message, flags=re.DOTALL)
        end(self.prog, f"error: {message}", 2)

    def format_help(self) -> str:
        """The whole help, `late_help` included."""
        for argument, text in self.late_help.items():
            argument.help = text()
        return super().format_help()

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of the arguments; `-` and `_` inside a flag's name mean the same.

        A mistyped flag is named before anything else is complained of, and what follows its "=" is not said:
        it may be a token. Environment variables that no command could start with are refused here too.
        """
        words = [_dashed(word) for word in argv]
        flags = [flag for action in self._actions for flag in action.option_strings]
        for typed, word in zip(argv[: words.index("--")] if "--" in words else argv, words, strict=False):
            if _is_flag(word) and word.partition("=")[0] not in flags:
                self._refuse(typed, flags)
        values, unknown = self.parse_known_args(words)
        if unknown:
            self._refuse(unknown[0], flags)
        _OPTIONS.clear()
        for action in self._actions:
            for flag in (flag for flag in action.option_strings if flag.startswith("--")):
                _OPTIONS.setdefault(action.dest, flag)
                _OPTIONS.setdefault(flag[2:].replace("-", "_"), flag)
        try:
            check_environment()
        except ValueError as error:
            self.error(str(error))
        return values

    def _refuse(self, word: str, flags: Sequence[str]) -> typing.NoReturn:
        word = word.partition("=")[0] if word.startswith("-") else word
        word = word if redact(word) != word else _dashed(word)
        near = nearest(word, [flag for flag in flags if flag.startswith("--") and flag != "--help"])
        hint = "see --help" if near is None else f"did you mean {near}?"
        self.error(f"unknown argument {shown(word)}; {hint}")


def _is_flag(word: str) -> bool:
    """Whether argparse takes a word for a long flag; it takes words with a space for values."""
    return word.startswith("--") and " " not in word.partition("=")[0]


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if _is_flag(word) else word


@orderly
def run(
    command: Callable[[Sequence[str], str], None], argv: Sequence[str] | None = None, prog: str = ""
) -> None:
    """Call a command, and turn how it ends into an exit code and one line on stderr.

    Exit codes: 0, done; 2, bad input (a ValueError, or a path that can't be one); 1, a run that failed; 75, a
    command that a signal stopped and that the same command continues; 130, Ctrl-C. Python's traceback is
    printed before the line where HF_DDPM_TRACEBACK is set.

    Args:
        command: a function of the words after the command, and of the program's name for messages.
        argv: these words, by default those of the command line.
        prog: that name, by default the script's.
    """
    guard_streams()
    prog = prog or Path(sys.argv[0]).name
    try:
        command(sys.argv[1:] if argv is None else argv, prog)
    except TrainingStopped as stopped:
        from hf_ddpm.runtime.processes import process_state

        if not process_state().is_main_process:
            sys.exit(EXIT_CODE)
        end(prog, str(stopped), EXIT_CODE)
    except KeyboardInterrupt:
        end(prog, "interrupted", 130)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        words = one_line(error, limit=None)
        if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in BAD_PATH):
            end(prog, f"error: {spelled(words)}", 2)
        # These say what went wrong. An error of another kind is told by its name too
        words = words if isinstance(error, (RuntimeError, OSError)) else f"{type(error).__name__}: {words}"
        hint = f" ({TRACEBACK}=1 shows where)"
        hint = hint if len(prog + words + hint) < LIMIT - len(": failed: ") else ""
        end(prog, f"failed{hint}: {words}", 1)


def spelled(words: str) -> str:
    """The words of an error with the options that they name as these are typed: batch_size is --batch-size.

    A name without "_" could be an ordinary word, and is taken for an option only where it begins the text,
    ends it after "or", or follows "without". What is said of a file stays, as that has keys, and so does what
    stands in quotes or in a path. Advice to add an option that the command lacks is left out.
    """
    if words.startswith("config file"):
        return words

    def advice(found: re.Match[str]) -> str:
        flag, value = "--" + found[1].replace("_", "-"), found[2]
        return flag if value == "True" else f"{flag} {value}"

    def typed(found: re.Match[str]) -> str:
        name = found.group()
        return _OPTIONS.get(name, name)

    def possible(found: re.Match[str]) -> str:
        return found.group() if found[1] in _OPTIONS else ""

    words = re.sub(r"; add ([a-z]\w*)=\w+[^;]*", possible, words)
    words = re.sub(r"(?<=\badd )([a-z]\w*)=(\w+)", advice, words)
    words = re.sub(r"(?<![\w/.'\"`-])[a-z]\w*_\w+(?![\w/.'\"`-])", typed, words)
    return re.sub(r"^[a-z]\w*(?= (?:is|'))|(?<=without )[a-z]\w*|(?<= or )[a-z]\w*(?=$|;)", typed, words)


def end(prog: str, words: str, code: int) -> typing.NoReturn:
    """Say why a command ends, in one line on stderr that has no secrets and at most 300 characters."""
    print(one_line(f"{prog}: {words}", LIMIT), file=sys.stderr)
    sys.exit(code)


def add_options(parser: Parser, options: type, but: Sequence[str] = ()) -> None:
    """Add a flag for every field of a dataclass of options.

    A flag that is not typed sets nothing, so that the values of a file can be told from typed ones.

    Args:
        parser: it gets the flags.
        options: a dataclass whose fields `option` made.
        but: names of fields that get no flag.
    """
    for option in dataclasses.fields(options):
        if option.name in but:
            continue
        kinds = _kinds(option)
        # A flag of bool without a value means true
        argument = parser.add_argument(
            *["--" + option.name.replace("_", "-"), *filter(None, [option.metadata.get("also")])],
            dest=option.name,
            default=argparse.SUPPRESS,
            metavar={bool: "true|false", int: "N", float: "X", str: "TEXT"}[kinds[0]],
            nargs="?" if bool in kinds else None,
            const="true" if bool in kinds else None,
        )
        parser.late_help[argument] = partial(_help, option)


def _kinds(option: dataclasses.Field) -> tuple[type, ...]:
    """The types that a field is declared with, None's last."""
    kind: typing.Any = option.type
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _help(option: dataclasses.Field) -> str:
    """A field's help text, what it allows in brackets, and its default."""
    names = listed(option.metadata, "choices") + listed(option.metadata, "examples")
    default = "" if option.default in (None, "") else f" [{option.default}]"
    if bool in _kinds(option):
        default = default.lower()  # as it is typed
    text = option.metadata["help"] + (f" ({', '.join(map(str, names))})" if names else "") + default
    return text.replace("%", "%%")


def count(word: str, most: int = MOST) -> int:
    """A flag's value as a positive whole number."""
    return whole(word, 1, most)


def at_most(most: int) -> Callable[[str], int]:
    """`count` of numbers up to `most`."""
    return partial(count, most=most)


def whole(word: str, least: int = 0, most: int = MOST) -> int:
    """A flag's value as a whole number."""
    number = read_whole(word)
    if number is None or not least <= number <= most:
        limit = f" and <= {most}" if number is not None and number > most else ""
        raise argparse.ArgumentTypeError(f"{shown(word)}; allowed: whole numbers >= {least}{limit}")
    return number


def wholes(word: str) -> list[int]:
    """A flag's value as at most a hundred whole numbers between commas."""
    numbers = [read_whole(part.strip()) for part in word.split(",")]
    if len(numbers) > LONGEST_LIST:
        raise argparse.ArgumentTypeError(f"{len(numbers)} numbers; allowed: at most {LONGEST_LIST}")
    if any(number is None or not 0 <= number <= MOST for number in numbers):
        raise argparse.ArgumentTypeError(f"{shown(word)}; allowed: whole numbers >= 0 between commas")
    return [number for number in numbers if number is not None]


def number(word: str) -> float:
    """A flag's value as a finite number."""
    value = read_number(word)
    if value is None:
        raise argparse.ArgumentTypeError(f"{shown(word)}; allowed: a number")
    return value


def path(word: str) -> str:
    """A flag's value as a path, or as a name on the Hub; "~" is expanded."""
    try:
        return read_path(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

"""arguments.py: flags that are typed, mistyped and listed, and how a command ends."""

import argparse
from dataclasses import dataclass

import pytest

from hf_ddpm.runtime.arguments import Parser, add_options, count, run, whole, wholes
from hf_ddpm.runtime.options import option
from hf_ddpm.runtime.signals import TrainingStopped

# Words become values


@dataclass(frozen=True)
class Tea:
    """Options of a test."""

    cups: int = option(2, "how many", least=1)
    kind: str = option("green", "leaves", choices=lambda: later("choices", ("green", "black")))
    milk: bool = option(False, "with 100% milk")
    cake: str | None = option(None, "beside it", examples=lambda: later("examples", ("apple",)))


ASKED = []


def later(rule, values):
    ASKED.append(rule)
    return values


@pytest.fixture
def parser():
    ASKED.clear()
    parser = Parser("tea", "Make tea.")
    parser.add_argument("guest", metavar="GUEST")
    parser.add_argument("--said-by")
    parser.add_argument("--spoons", type=count, default=argparse.SUPPRESS)
    add_options(parser, Tea)
    return parser


def test_typed_flags_are_set_and_no_others(parser):
    assert vars(parser.parse(["me"])) == {"guest": "me", "said_by": None}
    words = ["me", "--cups", "3", "--milk", "--said_by=a_b", "--kind", "red"]
    values = {"guest": "me", "cups": "3", "milk": "true", "said_by": "a_b", "kind": "red"}
    assert vars(parser.parse(words)) == values
    assert not ASKED  # what is allowed is looked up where it is checked or listed, and nowhere else


def test_what_looks_like_a_flag_and_is_a_value(parser):
    for value in ("-1e-4", "-8x8", "--well_then, tea", "a--b"):
        assert parser.parse(["me", "--said-by", value]).said_by == value
    assert parser.parse(["--", "--me"]).guest == "--me"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["me", "--cup", "3"], "unknown argument '--cup'; did you mean --cups?"),
        (["--cup=3"], "unknown argument '--cup'; did you mean --cups?"),  # before GUEST is missed
        (["--said_bye", "x"], "unknown argument '--said-bye'; did you mean --said-by?"),
        (["me", "--zzz"], "unknown argument '--zzz'; see --help"),
        (["me", "--hel"], "unknown argument '--hel'; see --help"),
        (["me", "--spoons", "0"], "--spoons is '0'; allowed: whole numbers >= 1"),
        (["me", "you"], "unknown argument 'you'; see --help"),
        (["me", "--cups"], "argument --cups: expected one argument"),
        ([], "the following arguments are required: GUEST"),
    ],
    ids=str,
)
def test_a_bad_line_is_one_line(words, error, parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse(words)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"tea: error: {error}\n")
    assert not ASKED


def test_advice_to_add_an_option_that_there_is(parser, capsys):
    parser.parse(["me"])
    for name, words in (("cups=2", "; add --cups 2 to fill them"), ("plates=2", "")):
        with pytest.raises(SystemExit):
            run(lambda *_, name=name: read(f"a.png: too small; add {name} to fill them"), [], "tea")
        assert capsys.readouterr().err == f"tea: error: a.png: too small{words}\n"


def read(words):
    raise ValueError(words)


def test_help_lists_what_is_allowed(parser):
    text = " ".join(parser.format_help().split())
    assert "--cups N how many [2]" in text
    assert "--kind TEXT leaves (green, black) [green]" in text
    assert "--milk [true|false] with 100% milk [false]" in text
    assert "--cake TEXT beside it (apple)" in text
    assert sorted(ASKED) == ["choices", "examples"]


def test_numbers():
    assert (count("3"), whole("0"), wholes("1, 20,3")) == (3, 0, [1, 20, 3])
    for read, words in ((count, ("0", "-1", "1.5", "")), (whole, ("-1", "x")), (wholes, ("", "1,", "1;2"))):
        for word in words:
            with pytest.raises(argparse.ArgumentTypeError, match="allowed: whole numbers"):
                read(word)


# How a command ends


def test_failures_and_interruptions(capsys, monkeypatch):
    def command(error):
        def fail(argv, prog):
            raise error

        return fail

    hint = "HF_DDPM_TRACEBACK=1 shows where"
    for error, code, words in (
        (ValueError("two\nlines"), 2, "prog: error: two lines\n"),
        (OSError(28, "No space"), 1, f"prog: failed ({hint}): [Errno 28] No space\n"),
        (RuntimeError("out of\n memory"), 1, f"prog: failed ({hint}): out of memory\n"),
        (ValueError(), 2, "prog: error: ValueError\n"),
        (ValueError("x" * 999 + "; allowed"), 2, f"prog: error: {'x' * 135} ... {'x' * 138}; allowed\n"),
        (ValueError("hf_" + "a1B2" * 5), 2, "prog: error: ***\n"),
        (ValueError("\x1b[2J\u202e"), 2, "prog: error: \\x1b[2J\\u202e\n"),
        (OSError(36, "File name too long", "x"), 2, "prog: error: [Errno 36] File name too long: 'x'\n"),
        (KeyError("x"), 1, f"prog: failed ({hint}): KeyError: 'x'\n"),
        (RuntimeError("x" * 284), 1, f"prog: failed: {'x' * 284}\n"),
        (TrainingStopped("stopped"), 75, "prog: stopped\n"),
        (KeyboardInterrupt(), 130, "prog: interrupted\n"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            run(command(error), [], "prog")
        assert (stop.value.code, capsys.readouterr().err) == (code, words)
    monkeypatch.setenv("HF_DDPM_TRACEBACK", "1")
    for kind, code in ((ValueError, 2), (RuntimeError, 1), (KeyError, 1)):
        with pytest.raises(SystemExit) as stop:
            run(command(kind("hf_" + "a1B2" * 5)), [], "prog")
        told = capsys.readouterr().err
        assert stop.value.code == code and "a1B2a1B2" not in told
        assert told.startswith("Traceback (most recent call last):") and f"{kind.__name__}: " in told
        assert told.splitlines()[-1].startswith("prog: ")

"""streams.py: whatever prints, and wherever a secret comes from, no secret leaves a command."""

import io
import logging
import sys
import traceback

from hf_ddpm.runtime.streams import SafeStream, guard_streams

TOKEN = "hf_" + "a1B2c3D4" * 4


def guarded(monkeypatch):
    """The streams and the last handler of logs as a command has them, on texts that the test reads.

    It is no fixture: pytest sets the streams anew when a test begins.
    """
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.delenv("HF_DDPM_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    last = logging._StderrHandler(logging.WARNING)  # type: ignore[attr-defined]
    monkeypatch.setattr(logging, "lastResort", last)
    guard_streams()
    return out, err


def test_every_way_of_printing(monkeypatch):
    streams = guarded(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "an unusual token")
    print(f"one {TOKEN}", "an unusual token")
    print(f"two {TOKEN}", file=sys.stderr)
    sys.stderr.writelines([f"three {TOKEN}\n", "an unusual token\n"])
    last = logging.lastResort
    assert last is not None
    last.handle(logging.LogRecord("x", logging.WARNING, "", 0, "five %s\nsix", (TOKEN,), None))
    try:
        raise KeyError(TOKEN)
    except KeyError as error:
        traceback.print_exc()
        record = logging.LogRecord("x", logging.ERROR, "", 0, "seven", (), (KeyError, error, None))
        last.handle(record)
    out, err = (stream.getvalue() for stream in streams)
    assert out == "one *** ***\n" and err.startswith("two ***\nthree ***\n***\n")
    assert "five *** six\n" in err and "KeyError: '***'" in err
    assert "seven ('***')\n" in err and TOKEN not in err


def test_lines_are_short(monkeypatch):
    streams = guarded(monkeypatch)
    print("x" * 999)
    print("a" * 400 + "b" * 400, "short", sep="\n", file=sys.stderr)
    out, err = (stream.getvalue() for stream in streams)
    assert out == "x" * 148 + " ... " + "x" * 147 + "\n"
    assert err == "a" * 148 + " ... " + "b" * 147 + "\nshort\n"


def test_whole_lines_with_a_traceback(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("HF_DDPM_TRACEBACK", "1")
    guard_streams()
    print("x" * 999, TOKEN, file=sys.stderr)
    assert err.getvalue().endswith("x" * 999 + " ***\n")


def test_what_a_terminal_would_obey():
    stream = SafeStream(text := io.StringIO())
    stream.write("bar\r\x1b[A\x1b[31mred\x1b[0m\tend\n")  # progress bars, colours
    assert text.getvalue() == "bar\r\x1b[A\x1b[31mred\x1b[0m\tend\n"
    text.truncate(text.seek(0))
    stream.write("\x1b[2J\x1b]0;title\x07 \x00 \u202e \x9b")
    assert text.getvalue() == "\\x1b[2J\\x1b]0;title\\x07 \\x00 \\u202e \\x9b"


def test_any_text_on_any_stream():
    stream = SafeStream(io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii"))
    assert stream.write("±\udcff\n") == 3
    stream.flush()
    assert raw.getvalue() == b"\\xb1\\udcff\n" and stream.encoding == "ascii"


def test_once_is_enough(monkeypatch):
    guarded(monkeypatch)
    guard_streams()
    assert isinstance(sys.stderr, SafeStream) and not isinstance(sys.stderr._stream, SafeStream)


def test_closed_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    guard_streams()
    assert sys.stdout is None

"""progress.py: what is on the screen, in a notebook and in a log file, of one bar and of bars within bars."""

import io
import logging
import sys

import pytest

from hf_ddpm.runtime import progress as module
from hf_ddpm.runtime.progress import along, progress
from tests.terminal import Terminal, screen


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds that a test lets pass; each bar is drawn as often as it may."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("TERM", raising=False)
    return now


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard output and error one terminal, when the test has begun: pytest sets them just before."""

    def begin():
        shown = Terminal()
        monkeypatch.setattr(sys, "stdout", shown)
        monkeypatch.setattr(sys, "stderr", shown)
        return shown

    return begin


def lines(stream):
    return screen(stream.getvalue())


def work(bar, clock, count, after=lambda number: None):
    for number in range(count):
        clock[0] += 1
        bar.update()
        after(number)


def test_a_bar_that_stays(terminal, clock):
    terminal = terminal()
    with progress("evaluate", 4, "eval", True) as bar:
        work(bar, clock, 2)
        (line,) = lines(terminal)
        assert line.startswith("evaluate:  50%|██") and line.endswith("| 2/4 evals, 1 evals/s, 00:02 left")
        assert len(line) == 79
        work(bar, clock, 2)
    (line,) = lines(terminal)
    assert line.startswith("evaluate: 100%|██") and line.endswith("█| 4/4 evals, 1 evals/s, took 00:04")
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().endswith("\n")


def test_a_bar_that_goes_leaves_nothing(terminal, clock):
    terminal = terminal()
    with progress("read", 4, "image", True, leave=False) as bar:
        work(bar, clock, 3)
        assert len(lines(terminal)) == 1
    assert lines(terminal) == []
    print("next")
    assert lines(terminal) == ["next"]


def test_work_that_is_done_at_once_shows_no_bar(terminal):
    terminal = terminal()
    assert list(along("look", range(100))) == list(range(100))
    assert terminal.getvalue() == ""


def test_nothing_is_shown_on_other_processes(terminal, clock):
    terminal = terminal()
    with progress("evaluate", 4, "eval", False) as bar:
        work(bar, clock, 4)
        bar.line()
    assert terminal.getvalue() == "" and sys.stderr is terminal and bar.n == 4


def test_a_bar_within_a_bar_takes_its_place(terminal, clock):
    terminal = terminal()
    with progress("train", 4, "step", True) as bar:
        work(bar, clock, 1)
        for _ in range(3):
            with progress("sample", 2, "image", True, leave=False) as inner:
                work(inner, clock, 1)
                assert len(lines(terminal)) == 1 and lines(terminal)[0].startswith("sample:  50%")
                work(inner, clock, 1)
            assert len(lines(terminal)) == 1 and lines(terminal)[0].startswith("train:  25%")
        work(bar, clock, 3)
    assert len(lines(terminal)) == 1 and lines(terminal)[0].startswith("train: 100%")


def test_an_error_within_both_leaves_the_state_and_a_free_line(terminal, clock):
    terminal = terminal()
    with pytest.raises(ValueError), progress("train", 4, "step", True) as bar:
        work(bar, clock, 1)
        with progress("sample", 2, "image", True) as inner:
            work(inner, clock, 1)
            raise ValueError("stop")
    print("an error", file=sys.stderr)
    assert [line.split("|")[0] for line in lines(terminal)] == ["train:  25%", "an error"]


def test_what_others_print_stands_above(terminal, clock):
    terminal = terminal()

    def speak(number):
        print("step", number)
        print("half of a line", end="")
        sys.stderr.write(", and the rest\n")
        logging.getLogger("somebody").warning("a warning %d", number)

    handler = logging.StreamHandler()  # holds the stream that it found, as other libraries' do
    logging.getLogger("somebody").addHandler(handler)
    try:
        with progress("train", 2, "step", True) as bar:
            work(bar, clock, 2, speak)
    finally:
        logging.getLogger("somebody").removeHandler(handler)
    said = [line for n in (0, 1) for line in (f"step {n}", "half of a line, and the rest", f"a warning {n}")]
    assert lines(terminal)[:-1] == said and lines(terminal)[-1].startswith("train: 100%")
    assert sys.stderr is sys.stdout is handler.stream is terminal


def test_a_line_that_is_not_at_its_end_is_left_whole(terminal, clock):
    terminal = terminal()
    with progress("train", 3, "step", True) as bar:
        print("wait: ", end="")
        work(bar, clock, 2)  # the bar stays away meanwhile
        print("done")
        work(bar, clock, 1)
        print("and no end", end="")
    assert [line.split("|")[0] for line in lines(terminal)] == ["wait: done", "and no end", "train: 100%"]


@pytest.mark.parametrize("columns", [20, 45, 80, 200])
def test_no_line_is_longer_than_the_terminal(columns, terminal, clock, monkeypatch):
    terminal = terminal()
    monkeypatch.setattr(module.os, "get_terminal_size", lambda number: os_size(columns))
    monkeypatch.setattr(terminal, "fileno", lambda: 2, raising=False)
    with progress(
        "train", 4, "step", True, describe=lambda: "step 2/4, epoch 3.2, loss 0.5, and more"
    ) as bar:
        work(bar, clock, 4)
    (line,) = screen(terminal.getvalue(), columns)
    assert len(line) < columns and "step 2/4" in line


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (80, "step 1234/10000, epoch 12.3, loss 0.0512, 61.1 images/s, 1:20:29 left"),
        (60, "step 1234/10000, epoch 12.3, loss 0.0512, 1:20:29 left"),
        (50, "step 1234/10000, epoch 12.3, 1:20:29 left"),
        (30, "step 1234/10000, 1:20:29 left"),
        (25, "step 1234/10000"),
    ],
)
def test_a_narrow_terminal_shows_what_is_done_and_the_time_that_is_left(
    columns, words, terminal, clock, monkeypatch
):
    terminal = terminal()
    monkeypatch.setattr(module.os, "get_terminal_size", lambda number: os_size(columns))
    monkeypatch.setattr(terminal, "fileno", lambda: 2, raising=False)
    said = "step 1234/10000, epoch 12.3, loss 0.0512, 61.1 images/s, 1:20:29 left"
    with progress("train", 10000, "step", True, initial=1230, describe=lambda: said) as bar:
        work(bar, clock, 4)
    (line,) = screen(terminal.getvalue(), columns)
    assert line.removeprefix("train:  12% ") == words


def os_size(columns):
    return type("Size", (), {"columns": columns})


def test_a_terminal_of_other_characters(terminal, clock):
    terminal = terminal()
    terminal.encoding = "ascii"
    with progress("evaluate", 4, "eval", True) as bar:
        work(bar, clock, 4)
    assert terminal.getvalue().isascii() and "|####" in lines(terminal)[0]


@pytest.fixture
def file(monkeypatch):
    """Makes standard error a file, as `terminal` does."""

    def begin():
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return begin


def test_a_log_file_has_a_line_now_and_then_and_one_at_the_end(file, clock):
    file = file()
    with progress("evaluate", 40, "eval", True) as bar:
        work(bar, clock, 40)
    assert file.getvalue().splitlines() == [
        "evaluate: 15/40 evals, 1 evals/s, 00:25 left",
        "evaluate: 30/40 evals, 1 evals/s, 00:10 left",
        "evaluate: 40/40 evals, 1 evals/s, took 00:40",
    ]


def test_lines_that_are_asked_for(file, clock):
    file = file()
    with progress("train", 40, "step", True, describe=lambda: f"step {bar.n:g}", by_time=False) as bar:
        work(bar, clock, 40, lambda number: bar.line() if number % 20 == 19 else None)
        with progress("sample", 2, "image", True, leave=False) as inner:
            work(inner, clock, 2)
    assert file.getvalue() == "train: step 20\ntrain: step 40\n"


def test_a_terminal_without_a_cursor_gets_lines(terminal, clock, monkeypatch):
    terminal = terminal()
    monkeypatch.setenv("TERM", "dumb")
    with progress("evaluate", 2, "eval", True) as bar:
        work(bar, clock, 2)
    assert terminal.getvalue() == "evaluate: 2/2 evals, 1 evals/s, took 00:02\n"


def test_parts_of_units_add_up(file, clock):
    file = file()
    with progress("sample", 3, "image", True) as bar:
        for _ in range(30):
            clock[0] += 0.125
            bar.update(0.1)
    assert file.getvalue() == "sample: 3/3 images, 0.8 images/s, took 00:03\n"


CELL = """
import time
from hf_ddpm.runtime import progress as module
from hf_ddpm.runtime.progress import progress

module.REDRAW = module._Notebook.every = 0.0
with progress("read", 3, "image", True, leave=False) as bar:
    for _ in range(3):
        bar.update()
with progress("train", 2, "step", True) as bar:
    for _ in range(2):
        with progress("sample", 2, "<image>", True, leave=False) as inner:
            inner.update(2)
        bar.update()
"""


@pytest.mark.slow  # a kernel starts in some seconds
def test_a_notebook_shows_one_bar_and_keeps_its_last_state(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    monkeypatch.undo()
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    gone, stays = book.cells[0].outputs
    assert gone["data"] == {"text/plain": "", "text/html": ""}
    assert stays["data"]["text/plain"].startswith("train: 2/2 steps, ")
    assert stays["data"]["text/html"].startswith('<progress value="2" max="2"></progress> train: 2/2')

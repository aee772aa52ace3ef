"""Progress of long work as people see it: one bar on a terminal or in a notebook, plain lines in a log file.

There is never more than one bar. Work within other work (a grid that is drawn while a run trains) takes the
bar's place and gives it back when it is done. What others print meanwhile stands above the bar. Where
standard error is neither a terminal nor a notebook, a line is printed now and then, and nothing is redrawn.

A terminal that is closed takes neither the bar nor the work with it.
"""

import html
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from hf_ddpm.runtime.lasting import Lasting

T = TypeVar("T")

REDRAW = 0.5  # seconds between two drawings; work that is done sooner shows no bar that goes away again
LINES = 15.0  # seconds between two lines in a log file
WIDEST, LEAST_BAR = 160, 6  # characters of a whole line, and of the bar in it
NEARLY = 1e-6  # what fractions of units may lack after many sums


class Bar:
    """The progress of one piece of work; as a context, it is shown until the context ends.

    Args:
        what: the word in front.
        total: how many units there are.
        unit: what is counted, in the singular, such as "image".
        show: whether anything is shown; True on one process only.
        leave: whether the last state stays on the screen.
        initial: how many units are done already.
        describe: returns what is said beside the bar, parts with commas between them, of which a narrow
            terminal shows the first and the last; by default units, speed and the time that is left.
        by_time: whether a log file gets a line every few seconds and one at the end. Otherwise it gets one
            at each call of `line`.

    Attributes:
        n: units done.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        show: bool,
        leave: bool = True,
        initial: int = 0,
        describe: Callable[[], str] | None = None,
        by_time: bool = True,
    ):
        self.what, self.total, self.unit, self.leave, self.by_time = what, total, unit, leave, by_time
        self.n: float = initial
        self._show, self._initial = show, initial
        self._describe = describe or self._default_words
        self._began = self._due = 0.0

    def __enter__(self) -> "Bar":
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self) -> None:
        """Begin to show it."""
        self._began = time.monotonic()
        if self._show:
            screen = _SHOWN.begin(self)
            self._due = self._began + screen.every
            if self.leave and not isinstance(screen, _Lines):
                self.draw()

    def update(self, n: float = 1) -> None:
        """Count `n` more units."""
        self.n += n
        if self._show and time.monotonic() >= self._due and self.by_time_here:
            self.draw()

    def draw(self) -> None:
        """Show the state that it has now."""
        self._due = time.monotonic() + _SHOWN.draw(self)

    def line(self) -> None:
        """Print a line into a log file, where the bar is none that prints by time."""
        if self._show and not self.by_time_here:
            self.draw()

    def close(self) -> None:
        """Show it no longer, or its last state where that stays."""
        if self._show:
            _SHOWN.finish(self)

    @property
    def by_time_here(self) -> bool:
        """Whether it is shown as time passes: in a log file not always, elsewhere always."""
        return self.by_time or not isinstance(_SHOWN.screen, _Lines)

    @property
    def full(self) -> bool:
        """Whether all units are done."""
        return self.n >= self.total - NEARLY

    @property
    def words(self) -> str:
        """What is said beside the bar."""
        return self._describe()

    def left(self, seconds: float | None = None) -> str:
        """How long the rest takes if it goes on as before, or how long the whole took.

        Args:
            seconds: since it was opened; by default by the clock.
        """
        passed = time.monotonic() - self._began if seconds is None else seconds
        done = self.n - self._initial
        if self.full:
            return f"took {tqdm.format_interval(passed)}"
        return f"{tqdm.format_interval(passed / done * (self.total - self.n))} left" if done > 0 else ""

    def _default_words(self) -> str:
        passed, done = max(time.monotonic() - self._began, 1e-9), self.n - self._initial
        speed = f"{short(done / passed)} {self.unit}s/s" if done > 0 else ""
        return ", ".join(
            filter(None, (f"{int(self.n + NEARLY)}/{self.total} {self.unit}s", speed, self.left()))
        )


progress = Bar  # with progress(...) as bar


def along(what: str, items: Collection[T]) -> Iterator[T]:
    """Go through some steps of work with a bar, which goes away at the end.

    Args:
        what: the word in front.
        items: the steps.
    """
    with progress(what, len(items), "step", True, leave=False) as bar:
        for item in items:
            yield item
            bar.update()


def short(number: float) -> str:
    """A positive number with about three digits, never in scientific notation from 0.0001 on."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


class _Screen(Protocol):
    """Where progress is shown. Seconds `every` pass between two drawings."""

    every: float

    def show(self, bar: Bar) -> None: ...

    def end(self, bar: Bar, keep: bool) -> None:
        """The last bar is done: let its state stay, or take it away."""
        ...


class _Shown:
    """All bars that are open, the innermost last, and the screen that they share."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []
        self.screen: _Screen | None = None

    def begin(self, bar: Bar) -> _Screen:
        if self.screen is None:
            self.screen = _find_screen()
        self.bars.append(bar)
        return self.screen

    def draw(self, bar: Bar) -> float:
        """Draw the bar, if none is open within it; how many seconds to wait until the next drawing."""
        if self.screen is None:
            return REDRAW
        if self.bars and self.bars[-1] is bar:
            self.screen.show(bar)
        return self.screen.every

    def finish(self, bar: Bar) -> None:
        if self.screen is None or bar not in self.bars:
            return
        del self.bars[self.bars.index(bar) :]  # with those within that an error has left open
        if self.bars:
            if not isinstance(self.screen, _Lines):
                self.bars[-1].draw()
        else:
            screen, self.screen = self.screen, None
            screen.end(bar, bar.leave)


_SHOWN = _Shown()


def _find_screen() -> _Screen:
    """The notebook, the terminal, or what else standard error is."""
    if "IPython" in sys.modules:
        from IPython.core.getipython import get_ipython  # type: ignore[import-not-found]

        if getattr(get_ipython(), "kernel", None) is not None:
            return _Notebook()
    if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return _Terminal()
    return _Lines()


class _Lines:
    """A log file or a pipe."""

    every = LINES

    def __init__(self) -> None:
        self._stream = Lasting(sys.stderr)

    def show(self, bar: Bar) -> None:
        self._stream.write(f"{bar.what}: {bar.words}\n")
        self._stream.flush()

    def end(self, bar: Bar, keep: bool) -> None:
        if keep and bar.by_time and bar.full:
            self.show(bar)


class _Notebook:
    """An output of a notebook's cell, which is changed in place and needs no widgets."""

    every = REDRAW

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, bar: Bar) -> None:
        whole = f'<progress value="{min(bar.n, bar.total):g}" max="{bar.total}"></progress>'
        words = f"{bar.what}: {bar.words}"
        self._put({"text/plain": words, "text/html": f"{whole} {html.escape(words)}"})

    def end(self, bar: Bar, keep: bool) -> None:
        if keep:
            self.show(bar)
        elif self._handle is not None:
            self._put({"text/plain": "", "text/html": ""})

    def _put(self, data: dict[str, str]) -> None:
        from IPython.display import display  # type: ignore[import-not-found]

        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class _Terminal:
    """The last line of a terminal. As long as it is there, what others print goes above it."""

    every = REDRAW

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.midline = False  # somebody else's line is not at its end yet
        self._stream, self._line = Lasting(sys.stderr), ""
        plain = (getattr(sys.stderr, "encoding", None) or "").lower().replace("-", "") != "utf8"
        self._ascii = plain
        # Each stream, and what stands in for it
        self._streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._above = {
            name: _Above(stream, self)
            for name, stream in self._streams.items()
            if stream is not None and stream.isatty()
        }
        for name, above in self._above.items():
            setattr(sys, name, above)
        self._lead_handlers(self._streams, self._above)

    def show(self, bar: Bar) -> None:
        width = _width()
        words = _shortened(bar.words, width)
        prefix = f"{bar.what}: {100 * min(bar.n / max(bar.total, 1), 1):3.0f}%"
        room = width - len(prefix) - len(words) - 3
        line = f"{prefix} {words}" if room > -2 else words
        if room >= LEAST_BAR:
            drawn = tqdm.format_meter(
                min(bar.n, bar.total), max(bar.total, 1), 0, room, ascii=self._ascii, bar_format="{bar}"
            )
            line = f"{prefix}|{drawn}| {words}"
        with self.lock:
            line, old = line[:width], self._line
            self._line = line
            if not self.midline:
                self._put(f"\r{line}{' ' * (len(old) - len(line))}")

    def end(self, bar: Bar, keep: bool) -> None:
        with self.lock:
            if keep:
                self.show(bar)
            if self.midline:
                self._put("\n")
                self.midline = False
                self.redraw()
            if keep:
                self._put("\n")
            else:
                self.wipe()
            self._line = ""
        for name, above in self._above.items():
            if getattr(sys, name) is above:
                setattr(sys, name, self._streams[name])
        self._lead_handlers(self._above, self._streams)

    def wipe(self) -> None:
        """Take the bar away, and leave the cursor where it began."""
        if self._line and not self.midline:
            self._put(f"\r{' ' * len(self._line)}\r")

    def redraw(self) -> None:
        """Put the bar back as it was."""
        if self._line and not self.midline:
            self._put(f"\r{self._line}")

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _lead_handlers(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Let those log handlers that print to the old streams print to the new ones."""
        for handler in _handlers():
            for name in self._above:
                if handler.stream is old[name]:
                    handler.setStream(new[name])


class _Above:
    """A terminal's stream, whose lines are written above the bar.

    Args:
        stream: the terminal.
        screen: it has the bar.
    """

    def __init__(self, stream: Any, screen: _Terminal):
        self._stream, self._screen = stream, screen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, and put the bar back when its line is at its end."""
        if not text:
            return 0
        with self._screen.lock:
            self._screen.wipe()
            count = self._stream.write(text)
            self._stream.flush()
            self._screen.midline = text[-1] not in "\r\n"
            self._screen.redraw()
        return count

    def writelines(self, lines: Iterable[str]) -> None:
        """Write some texts."""
        for line in lines:
            self.write(line)


def _handlers() -> set[Any]:
    """All log handlers that print to a stream."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    return {handler for handler in found if isinstance(handler, logging.StreamHandler)}


def _shortened(words: str, width: int) -> str:
    """Words between commas, of which those before the last go first where they are too many for a line.

    What is counted stays the longest, then the time that is left.
    """
    parts = words.split(", ")
    while len(parts) > 1 and len(", ".join(parts)) > width:
        del parts[max(len(parts) - 2, 1)]
    return ", ".join(parts)


def _width() -> int:
    """Characters that fit into a line of the terminal, whose last column stays free: a cursor wraps there."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0
    return min((columns or 80) - 1, WIDEST)

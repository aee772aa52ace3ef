"""A terminal for tests: what a person would see of the bytes that a program wrote."""

import io


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def screen(text: str, columns: int = 80) -> list[str]:
    """The lines on a terminal after a text, without trailing spaces and empty lines at the end.

    It knows what programs here write: text, carriage return, line end (which a terminal makes of "\n" as
    "\r\n"), and the wrap at the last column.
    """
    lines, row, column = [[]], 0, 0
    for character in text.replace("\r\n", "\n"):
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
        else:
            assert character.isprintable(), f"a terminal would obey {character!r}"
            if column == columns:
                row, column = row + 1, 0
            lines += [[] for _ in range(row + 1 - len(lines))]
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = character
            column += 1
        lines += [[] for _ in range(row + 1 - len(lines))]
    shown = ["".join(line).rstrip() for line in lines]
    while shown and not shown[-1]:
        shown.pop()
    return shown

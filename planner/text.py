"""Text for a terminal: how to draw, how figures are written, aligned cells, wrapped lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from planner.units import GIB, KIB, MIB, TIB

MIN_WIDTH: Final = 60  # narrower than this no table is readable; lines then run over
MAX_WIDTH: Final = 120  # longer lines are tiring to read
GAP: Final = "  "
BOLD: Final = "1"
DIM: Final = "2"
RED: Final = "31"
YELLOW: Final = "33"

_UNKNOWN: Final = "?"
_FAST: Final = 100  # tokens a second: more digits would promise too much
_FULL: Final = 1000  # from here a figure is written in the next unit, so that none is wider than eight characters


@dataclass(frozen=True, slots=True)
class Style:
    """How to draw: in colour or not, with block characters or plain ASCII."""

    colour: bool = False
    unicode: bool = True

    @property
    def blocks(self) -> str:
        """Return one character per part of a bar, in the order of the table."""
        return "█▓▒░" if self.unicode else "#=+-"

    @property
    def rest(self) -> str:
        """Return the character for memory that stays free."""
        return "·" if self.unicode else "."

    def paint(self, code: str, text: str) -> str:
        """Return the text in this colour where colours are wanted."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text else text

    def clipped(self, text: str, width: int) -> str:
        """Return the text, cut to this width where it is longer."""
        return text if len(text) <= width else text[: width - 1] + ("…" if self.unicode else "~")


PLAIN: Final = Style()


def bounded(width: int) -> int:
    """Return the width to write for on a terminal of this many columns."""
    return min(max(width, MIN_WIDTH), MAX_WIDTH)


def size(size_bytes: int | None) -> str:
    """Return a figure of at most eight characters: ``8.1 GiB``, ``512 MiB``, ``0``; ``?`` where it is not known."""
    if size_bytes is None:
        return _UNKNOWN
    for name, unit in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) * KIB >= _FULL * unit:
            value = size_bytes / unit
            return f"{value:.0f} {name}" if abs(value) >= 99.95 else f"{value:.1f} {name}"  # noqa: PLR2004 - rounds to 100.0
    return f"{size_bytes} B" if size_bytes else "0"


def rate(tokens_per_second: float) -> str:
    """Return a predicted speed with as many digits as it can promise."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= _FAST else f"{tokens_per_second:.1f}"


def ranges(layers: Sequence[int]) -> str:
    """Return layer numbers as ranges: ``0-13,20``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def aligned(cells: Sequence[str], widths: Sequence[int], n_left: int = 2) -> str:
    """Return a row of a table: so many cells to the left, the others to the right, each as wide as its column."""
    left, right = zip(cells[:n_left], widths, strict=False), zip(cells[n_left:], widths[n_left:], strict=True)
    return GAP.join([*(cell.ljust(wide) for cell, wide in left), *(cell.rjust(wide) for cell, wide in right)]).rstrip()


def columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return how wide each column of these rows is."""
    return [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]


def wrap(lead: str, text: str, width: int) -> list[str]:
    """Return the text after its lead in lines of at most this width, the later ones indented."""
    indent = " " * (2 if lead.strip() else 4)
    return textwrap.wrap(text, width, initial_indent=lead, subsequent_indent=indent)

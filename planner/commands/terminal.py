"""How wide and how colourful what is printed may be."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from planner.text import Style

DEFAULT_COLUMNS: Final = 80


def style() -> Style:
    """Return how to draw on this stdout: coloured on a terminal, with block characters where it can show them."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return Style(colour=colour, unicode=encoding.startswith("utf"))


def columns() -> int:
    """Return the width of the terminal, where there is one (``shutil`` would take 10 ms to import)."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit():
        return int(told)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return DEFAULT_COLUMNS


def write(text: str) -> None:
    """Print this text as it is."""
    sys.stdout.write(text)


def write_json(document: Any) -> None:
    """Print one object and nothing else."""
    import json

    write(json.dumps(document, indent=2) + "\n")

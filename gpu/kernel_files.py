"""The kernel's small text files, below /proc and /sys. Each is missing somewhere: what cannot be read is empty."""

from __future__ import annotations

import re
from pathlib import Path


def text(path: Path) -> str:
    """Return a file's text without the white space around it, empty where it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:  # no decoder in between: it is read at once, and often
            return file.readall().decode(errors="replace").strip()
    except OSError:
        return ""


def lines(path: Path) -> list[str]:
    """Return a file's lines, none where it cannot be read."""
    return text(path).splitlines()


def number(path: Path) -> int | None:
    """Return the number in a file; None for any other text (``max``) and where it cannot be read."""
    return whole_number(text(path))


def whole_number(written: str) -> int | None:
    """Return a number that the kernel wrote, None for anything that is none (64 bits have 20 digits)."""
    return int(written) if re.fullmatch(r"[0-9]{1,20}", written) else None

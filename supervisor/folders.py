"""What lies in a folder of the operator's: of models, or of a store."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def visible(folder: Path) -> list[Path]:
    """Return what a folder holds in order, hidden entries left out; nothing where it is none or may not be read."""
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return []

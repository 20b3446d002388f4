"""Sizes as people write and read them. Every multiple is binary: llama.cpp, drivers and GGUF all count so."""

from __future__ import annotations

import re
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

_MULTIPLE: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_SIZE: Final = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?:([kmgt])(?:i?b)?|b)?\s*", re.IGNORECASE | re.ASCII)
_NAMES: Final = (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB))


def parse_size(text: str) -> int:
    """Return the bytes of ``24GiB``, ``8G``, ``11500MiB``, ``1.5g`` or a plain number of bytes, rounded down.

    ``GB`` means ``GiB``. Settings are read alike (``config.parse.parse_size``: neither part knows the other). Raises
    ValueError, whose text says what is allowed.
    """
    match = _SIZE.fullmatch(text)
    if match is None or ("." in match[1] and not match[2]):
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with KiB, MiB, GiB or TiB")
    whole, _, fraction = match[1].partition(".")
    multiple = _MULTIPLE[(match[2] or "").lower()]
    return int(whole) * multiple + int(fraction or "0") * multiple // int("1" + "0" * len(fraction))


def format_size(size_bytes: int) -> str:
    """Return the size as people read it: ``3.8 GiB``, ``512.0 MiB``, ``96 B``; the sign is kept."""
    for name, multiple in _NAMES:
        if abs(size_bytes) >= multiple:
            return f"{size_bytes / multiple:.1f} {name}"
    return f"{size_bytes} B"

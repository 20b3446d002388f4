"""How long a model stays loaded after a request, as Ollama's clients write it (api/types.go, ``Duration``)."""

from __future__ import annotations

import math
import re
from typing import Any, Final

from supervisor.gateway.errors import BadRequest

# Go's time.ParseDuration (time/format.go, ``unitMap``).
_UNITS_S: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART: Final = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)")
_GO_KINDS: Final = {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}
# Go counts nanoseconds in 63 bits; what is longer is refused there.
_MAX_S: Final = (2**63 - 1) / 1e9
# A JSON number may have thousands of digits.
_SHOWN_CHARS: Final = 50


def parse_keep_alive(value: Any) -> float | None:
    """Return seconds, ``math.inf`` for a negative one, None where nothing is said. Raises ``BadRequest``.

    A number is seconds, a string a Go duration such as ``5m`` or ``1h30m``.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRequest(f"Unsupported type: '{_GO_KINDS[type(value)]}'", param="keep_alive")
    seconds = parse_duration(value) if isinstance(value, str) else value
    if seconds < 0:
        return math.inf
    if not seconds <= _MAX_S:  # NaN too, which Python's JSON has and no other
        raise _bad("invalid duration", str(value)[:_SHOWN_CHARS])
    return float(seconds)


def parse_duration(text: str) -> float:
    """Return the seconds of a Go duration. Raises ``BadRequest`` in Go's words."""
    rest = text[1:] if text[:1] in {"+", "-"} else text
    if rest == "0":
        return 0.0
    if not rest:
        raise _bad("invalid duration", text)
    seconds = 0.0
    while rest:
        part = _PART.match(rest)
        if part is None:
            raise _bad("invalid duration", text)
        if not part[2]:
            raise _bad("missing unit in duration", text)
        if part[2] not in _UNITS_S:
            raise BadRequest(f'time: unknown unit "{part[2]}" in duration "{text}"', param="keep_alive")
        seconds += float(part[1]) * _UNITS_S[part[2]]
        rest = rest[part.end() :]
    return -seconds if text.startswith("-") else seconds


def _bad(what: str, text: str) -> BadRequest:
    return BadRequest(f'time: {what} "{text}"', param="keep_alive")

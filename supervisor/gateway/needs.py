"""What a request asks of the runner beside its answer: how long it stays loaded, and how long a context it has.

Both may stand in a header, which any client can be told to send with every request, or in the body, as Ollama's clients
write them; the body counts where both are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from config.parse import parse_duration
from planner.types import LoadOptions
from supervisor.api.need import NO_NEED, Need
from supervisor.gateway.errors import BadRequest
from supervisor.gateway.ollama.keep_alive import parse_keep_alive
from supervisor.gateway.peek import Peek

KEEP_ALIVE: Final = "keep_alive"
KEEP_ALIVE_HEADER: Final = "X-Keep-Alive"
NUM_CTX_HEADER: Final = "X-Num-Ctx"
# The longest context that a model's header may claim (planner: 2 to the 27th tokens, as PLANNER_CONTEXT_LENGTH).
MAX_CTX: Final = 1 << 27


def need_of(headers: Mapping[str, str], wanted: Peek) -> Need:
    """Return what this request asks of the runner. Raises ``BadRequest``."""
    says_nothing = wanted.keep_alive is None and wanted.num_ctx is None
    if says_nothing and KEEP_ALIVE_HEADER not in headers and NUM_CTX_HEADER not in headers:
        return NO_NEED
    keep_alive_s = keep_alive_of(wanted.keep_alive)
    if keep_alive_s is None and (text := headers.get(KEEP_ALIVE_HEADER)):
        keep_alive_s = _duration_s(text)
    n_ctx = _tokens(wanted.num_ctx, "num_ctx")
    if wanted.num_ctx is None:
        n_ctx = _tokens(headers.get(NUM_CTX_HEADER), NUM_CTX_HEADER)
    return Need(keep_alive_s=keep_alive_s, load=LoadOptions(n_ctx=n_ctx))


def keep_alive_of(value: Any) -> float | None:
    """Return what ``parse_keep_alive`` does, and refuse in plain words: those of Go are for Ollama's clients."""
    try:
        return parse_keep_alive(value)
    except BadRequest as error:
        raise _no_duration(KEEP_ALIVE, value) from error


def _duration_s(text: str) -> float:
    try:
        return parse_duration(text.strip())
    except ValueError as error:
        raise _no_duration(KEEP_ALIVE_HEADER, text) from error


def _no_duration(param: str, value: Any) -> BadRequest:
    wanted = "a duration such as 5m, 300 (seconds), 0 or -1 (for ever)"
    return BadRequest(f"{param} {str(value)[:50]!r} is not {wanted}", param=param)


def _tokens(value: Any, param: str) -> int | None:
    """Return the number of tokens that ``param`` asks for; None where none is given, or 0, which asks for nothing."""
    if isinstance(value, str):
        value = json.loads(value) if value.strip().isdecimal() else value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_CTX:
        raise BadRequest(f"{param} {str(value)[:50]!r} is not a number of tokens", param=param)
    return value or None

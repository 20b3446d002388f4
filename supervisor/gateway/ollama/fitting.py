"""Makes a conversation fit the runner's context, as Ollama does: the oldest messages go (server/prompt.go)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from supervisor.gateway.ollama.chat import without_oldest
from supervisor.gateway.ollama.errors import INPUT_TOO_LONG, OllamaError
from supervisor.gateway.ollama.messages import USER, Message
from supervisor.gateway.ollama.runner import Runner

COUNT_PATH: Final = "/v1/chat/completions/input_tokens"


async def shortened(
    runner: Runner,
    messages: tuple[Message, ...],
    body_of: Callable[[tuple[Message, ...]], Mapping[str, Any]],
    n_ctx: int,
) -> tuple[Message, ...]:
    """Return the system messages and as many of the latest others as leave room for an answer.

    What is kept begins with a user's message: most templates insist on it. Raises ``OllamaError`` where not even the
    last one fits.
    """
    cuts = [index for index, one in enumerate(messages) if index and one.role == USER]
    low, high = 0, len(cuts)  # the first cut that fits lies in between; len(cuts): none does
    while low < high:
        middle = (low + high) // 2
        counted = await runner.ask(COUNT_PATH, body_of(without_oldest(messages, cuts[middle])))
        if counted["input_tokens"] < n_ctx:
            high = middle
        else:
            low = middle + 1
    if low == len(cuts):
        raise OllamaError(400, INPUT_TOO_LONG)
    return without_oldest(messages, cuts[low])

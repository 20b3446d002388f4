"""Makes a conversation fit the runner's context, as Ollama does: the oldest messages go (server/prompt.go)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from supervisor.gateway.ollama.chat import without_oldest
from supervisor.gateway.ollama.errors import INPUT_TOO_LONG, OllamaError
from supervisor.gateway.ollama.messages import USER, Message

Messages = tuple[Message, ...]


async def shortened(messages: Messages, count: Callable[[Messages], Awaitable[int]], n_ctx: int) -> Messages:
    """Return the system messages and as many of the latest others as leave room for an answer.

    ``count`` tells the tokens that messages take. What is kept begins with a user's message: most templates insist on
    it. Raises ``OllamaError`` where not even the last one fits.
    """
    cuts = [index for index, one in enumerate(messages) if index and one.role == USER]
    low, high = 0, len(cuts)  # the first cut that fits lies in between; len(cuts): none does
    while low < high:
        middle = (low + high) // 2
        if await count(without_oldest(messages, cuts[middle])) < n_ctx:
            high = middle
        else:
            low = middle + 1
    if low == len(cuts):
        raise OllamaError(400, INPUT_TOO_LONG)
    return without_oldest(messages, cuts[low])

"""How many tokens a child has worked through, by its own counters (tools/server/server-task.cpp, ``to_metrics``).

They are read a moment after a request has ended, since a request's generated tokens are counted when it ends
(server-context.cpp, ``metrics_on_prediction``); so a child that nobody uses is never asked. What was not read when it
crashes is lost: what it worked on, and what has ended since it was read last. llama-server answers from its queue,
between two batches or from beside one: reading takes nothing from those whom it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import anyio

from supervisor.api.snapshot import TokenCounts
from supervisor.children.health import fetch

COUNTERS: Final = "/metrics"
# Without this llama-server refuses to tell them. A variable, not a flag: the same flag may stand among the operator's.
ENABLED: Final[Mapping[str, str]] = MappingProxyType({"LLAMA_ARG_ENDPOINT_METRICS": "1"})
# Whoever asks the next question at once is served first.
READ_AFTER_S: Final = 0.1
# More often than anybody scrapes, and seldom enough that it is no work: reading them takes a millisecond. Longer than
# llama-server takes to notice that a client has left (server-context.cpp, HTTP_POLLING_SECONDS).
READ_EVERY_S: Final = 3.0
# An older llama-server computes a batch to its end first; what it has not told by then, it tells the next time.
ANSWER_WITHIN_S: Final = 2.0
# Before it is stopped, while somebody may wait for its memory: an idle one answers within a millisecond.
LAST_ANSWER_WITHIN_S: Final = 0.25
PREFIX: Final = b"llamacpp:"


class TokenWatch:
    """Reads one child's counters; ``tell`` is given what was added since it was told last."""

    def __init__(self, url: str, api_key: str, tell: Callable[[TokenCounts], None]) -> None:
        self._url = url
        self._api_key = api_key
        self._tell = tell
        self._told = TokenCounts()
        self._used = anyio.Event()

    def note_use(self) -> None:
        """Let it be read soon: a request has ended."""
        self._used.set()

    async def follow(self, *, again_s: float = READ_EVERY_S) -> None:
        """Tell what was added soon after it was used, and once more after ``again_s``; for ever.

        Soon, for it may crash; again, for a request whose client has left is counted later.
        """
        while True:
            await self._used.wait()
            await anyio.sleep(READ_AFTER_S)
            await self._tell_added(ANSWER_WITHIN_S)
            await anyio.sleep(again_s)
            await self.read(ANSWER_WITHIN_S)

    async def read(self, within_s: float) -> None:
        """Tell what was added, if the child was used since it was read last and answers within this time."""
        if not self._used.is_set():
            return
        self._used = anyio.Event()
        await self._tell_added(within_s)

    async def _tell_added(self, within_s: float) -> None:
        answer = await fetch(self._url, COUNTERS, self._api_key, within_s=within_s)
        if answer is None or (counts := counts_of(answer)) is None:
            return
        added = _since(counts, self._told)
        self._told += added
        self._tell(added)


def counts_of(answer: bytes) -> TokenCounts | None:
    """Return what llama-server's counters say, None where they are not all there.

    They have six significant digits (an ostream's own precision).
    """
    lines = (line[len(PREFIX) :].rpartition(b" ") for line in answer.splitlines() if line.startswith(PREFIX))
    samples = {name: value for name, _, value in lines}
    try:
        return TokenCounts(
            prompt=int(float(samples[b"prompt_tokens_total"])),
            generated=int(float(samples[b"tokens_predicted_total"])),
            prompt_s=float(samples[b"prompt_seconds_total"]),
            generated_s=float(samples[b"tokens_predicted_seconds_total"]),
        )
    except (KeyError, ValueError, OverflowError):
        return None


def _since(counts: TokenCounts, told: TokenCounts) -> TokenCounts:
    """Return what was added; nothing for a count that was read before and told after a later one."""
    return TokenCounts(
        max(0, counts.prompt - told.prompt),
        max(0, counts.generated - told.generated),
        max(0.0, counts.prompt_s - told.prompt_s),
        max(0.0, counts.generated_s - told.generated_s),
    )

"""What a child says: split into lines, kept within bounds, read for facts, passed on to our own log."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

import anyio
import structlog

from supervisor.core import loglines
from supervisor.core.loglines import BufferKind, BufferSize, ErrorLine, Fact, PromptCache, Shortage

MAX_LINE_BYTES: Final = 4096  # longer lines are metadata dumps (chat templates); their beginning tells all
KEPT_LINES: Final = 200  # a load prints about 170 lines, so the ring holds the story of a failed one
KEPT_ERRORS: Final = 50
TAIL_LINES: Final = 20  # as many as a reader of /status wants to see


class ChildLog:
    """The log of one child, fed with raw output.

    ``measured_bytes`` sums the reported buffers by device: model, context and compute, as llama.cpp's own memory
    breakdown does. It follows the load; what is printed at exit is not counted twice. ``n_lines`` counts what was said.
    """

    def __init__(self, buffer_devices: Mapping[str, str], logger: structlog.typing.FilteringBoundLogger) -> None:
        self._buffer_devices = buffer_devices
        self._log = logger
        self._debug = logger.is_enabled_for(logging.DEBUG)
        self._rest = b""
        self._lines: deque[bytes] = deque(maxlen=KEPT_LINES)  # as they came: hardly any is ever read again
        self._errors: deque[ErrorLine] = deque(maxlen=KEPT_ERRORS)
        self._measured: Counter[str] = Counter()
        self._prompt_cache = PromptCache(0)
        self.n_lines = 0
        self._said: anyio.Event | None = None  # made by whoever waits for more: nearly always nobody does
        self._closed = False

    def feed(self, data: bytes) -> list[Fact]:
        """Take what was read from the pipe; return the facts in the lines that it completed."""
        whole, _, self._rest = (self._rest + data).rpartition(b"\n")
        self._rest = self._rest[:MAX_LINE_BYTES]
        lines = whole.split(b"\n")
        if not self._debug and loglines.state_nothing(whole):
            self._keep(lines)
            facts = []
        else:
            facts = [fact for line in lines if (fact := self._take(line)) is not None]
        cache = loglines.prompt_cache(whole)
        if cache is not None and cache != self._prompt_cache:
            self._prompt_cache = cache
            facts.append(cache)
        self._wake()
        return facts

    def close(self) -> None:
        """Take the last line, which a dying child may have left unfinished."""
        if self._rest:
            self._take(self._rest)
        self._rest = b""
        self._closed = True
        self._wake()

    @property
    def measured_bytes(self) -> dict[str, int]:
        """Return the sums so far, by device name."""
        return dict(self._measured)

    @property
    def last_error(self) -> str | None:
        """Return the line that says most about what went wrong, None where the child never complained."""
        return loglines.last_words(self._errors)

    @property
    def shortage(self) -> Shortage | None:
        """Return whose memory ran out, None where the child did not die of that."""
        return loglines.shortage(self._errors, self._buffer_devices)

    async def lines(self, *, follow: bool) -> AsyncGenerator[str, None]:
        """Yield the kept lines; with ``follow`` also those that come, until the child has ended.

        The child is never kept waiting: who reads too slowly is told how many lines passed meanwhile.
        """
        seen = self.n_lines - len(self._lines)
        while True:
            fresh = list(self._lines)[-new:] if (new := self.n_lines - seen) else []
            if new > len(fresh):
                yield f"({new - len(fresh)} lines are left out here: they came faster than they were read)"
            seen = self.n_lines
            for line in fresh:
                yield _text(line)
            if seen == self.n_lines:
                if not follow or self._closed:
                    return
                self._said = self._said or anyio.Event()
                await self._said.wait()

    @property
    def tail(self) -> tuple[str, ...]:
        """Return the last lines."""
        return tuple(_text(line) for line in list(self._lines)[-TAIL_LINES:])

    def _wake(self) -> None:
        said, self._said = self._said, None
        if said is not None:
            said.set()

    def _keep(self, lines: Sequence[bytes]) -> None:
        self._lines.extend([line[:MAX_LINE_BYTES] for line in lines])
        self.n_lines += len(lines)

    def _take(self, raw: bytes) -> Fact | None:
        if not raw.strip():
            return None
        self._keep([raw])
        text = _text(raw[:MAX_LINE_BYTES])
        self._log.debug("child.says", line=text)
        fact = loglines.read(text)
        match fact:
            case ErrorLine():
                self._errors.append(fact)
            case BufferSize(kind=kind) if kind is not BufferKind.OUTPUT:
                self._measured[loglines.device_of(fact.buffer, self._buffer_devices)] += fact.size_bytes
        return fact


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace").rstrip("\r")

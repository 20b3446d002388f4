"""Finds out that a child which is busy does not answer any more, and does not take hard work for that.

Two questions are asked in turn. ``/health`` needs nothing but a living process: one that was stopped is silent.
``/slots`` needs the loop that serves requests, which may rightly be silent for as long as one batch takes: minutes for
a large model on a CPU or behind a slow worker. So its silence counts soon only beside another sign, that the process
uses no processor time at all; and without that only after very long.

A program that is no llama-server has one address to be asked for its health, which may rightly be silent too: many
serve one request at a time. It is judged as the loop is, together with whatever it has started; but for one that
somebody stopped, which is found out as soon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import anyio

from supervisor.children.health import ALIVE, ANSWER_WITHIN_S, WORKING, ask
from supervisor.children.proc_stat import cpu_seconds, is_stopped, session_of


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a busy child may be silent.

    - ``ask_every_s`` between two questions: a hang is rare, and costs the time of a load anyway.
    - ``answer_within_s``, ``max_unanswered``: an idle thread answers within a millisecond, a machine that swaps takes
      longer. With the pauses this makes about 30 s.
    - ``idle_silence_s``: the loop is silent and the processor idle. Only a remote worker can be computing a batch then,
      and it needs less for 2048 tokens at 10 a second, slower than which nobody would call usable.
    - ``busy_silence_s``: the loop is silent though it computes; as long as llama-server lets a client wait (-to).
    """

    ask_every_s: float = 5.0
    answer_within_s: float = ANSWER_WITHIN_S
    max_unanswered: int = 3
    idle_silence_s: float = 300.0
    busy_silence_s: float = 3600.0


PATIENCE: Final = Patience()
# A thread that waits and now and then looks uses less of a core; one that computes, or spins for a GPU, uses all of it.
IDLE_SHARE: Final = 0.01


class HangWatch:
    """Watches one child. ``is_busy`` says whether it has requests in flight: only then is it asked anything.

    ``program_health`` is the path to be asked of a program that is no llama-server; it leads a session.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        pid: int,
        is_busy: Callable[[], bool],
        patience: Patience = PATIENCE,
        *,
        program_health: str | None = None,
    ) -> None:
        self._url = url
        self._api_key = api_key
        self._pid = pid
        self._is_busy = is_busy
        self._patience = patience
        self._is_program = program_health is not None
        self._working = program_health or WORKING
        self._unanswered = 0
        self._silent_since: float | None = None  # the loop
        self._idle_since = 0.0  # the processor, within that silence
        self._cpu_s = 0.0
        self._looked_at = 0.0

    async def wait_hung(self) -> str:
        """Return, once the child hangs, what it did not answer, in one line."""
        while True:
            await anyio.sleep(self._patience.ask_every_s)
            if not self._is_busy():
                self._unanswered, self._silent_since = 0, None
            elif (reason := await (self._look_at_program() if self._is_program else self._look())) is not None:
                return reason

    async def _look(self) -> str | None:
        within_s, most = self._patience.answer_within_s, self._patience.max_unanswered
        self._unanswered = 0 if await self._ask(ALIVE) else self._unanswered + 1
        if self._unanswered >= most:
            return f"with requests in flight it did not answer {ALIVE}, {most} times within {within_s:g} s"
        if self._unanswered:
            return None
        if await self._ask(self._working):
            self._silent_since = None
            return None
        return self._judge_silence(anyio.current_time())

    async def _look_at_program(self) -> str | None:
        if await self._ask(self._working):
            self._unanswered, self._silent_since = 0, None
            return None
        self._unanswered += 1
        if self._unanswered >= self._patience.max_unanswered and any(map(is_stopped, session_of(self._pid))):
            return f"with requests in flight it was stopped (SIGSTOP), and did not answer {self._working}"
        return self._judge_silence(anyio.current_time())

    async def _ask(self, path: str) -> bool:
        key = "" if self._is_program else self._api_key
        return await ask(self._url, path, key, within_s=self._patience.answer_within_s) is not None

    def _judge_silence(self, now: float) -> str | None:
        """Return why the loop's silence is a hang, None as long as it may be work."""
        cpu_s = sum(map(cpu_seconds, session_of(self._pid) if self._is_program else [self._pid]))
        if self._silent_since is None:
            self._silent_since = self._idle_since = now
        elif cpu_s - self._cpu_s > IDLE_SHARE * (now - self._looked_at):
            self._idle_since = now
        self._cpu_s, self._looked_at = cpu_s, now
        silence = f"with requests in flight it did not answer {self._working} for"
        if now - self._idle_since >= self._patience.idle_silence_s:
            return f"{silence} {self._patience.idle_silence_s:g} s, and computed nothing"
        if now - self._silent_since >= self._patience.busy_silence_s:
            return f"{silence} {self._patience.busy_silence_s:g} s"
        return None

"""Our end of the planning process: started when first needed, asked one question at a time, replaced when it dies."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import anyio
from anyio.abc import Process

from supervisor.children.process import describe_exit, find_setpriv, tied
from supervisor.planning.messages import LENGTH_BYTES, Answer, LookAhead, Question, pack

ANSWER_WITHIN_S: Final = 60.0  # a cold driver takes seconds per card, a scan of a slow disk more; longer is a hang
END_WITHIN_S: Final = 5.0  # of a killed process; one that hangs in a driver goes when the driver lets it
_BROKEN: Final = (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)


class PlanningFailed(Exception):
    """The planning process died or hung; a new one is started for the next question."""


class _Ended(PlanningFailed):
    """It died, and did not hang."""


class PlanningProcess:
    """Asks the worker. Use within ``async with``, which ends the worker.

    ``environ`` is what the worker reads its settings from, ``answer_within_s`` how long it may think.
    """

    def __init__(self, environ: Mapping[str, str], *, answer_within_s: float = ANSWER_WITHIN_S) -> None:
        self._environ = environ
        self._answer_within_s = answer_within_s
        self._process: Process | None = None
        self._turn = anyio.Lock()
        self._was_told = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._end()

    async def ask(
        self, question: Question | Callable[[], Question], *, meanwhile: Callable[[], object] = lambda: None
    ) -> Answer:
        """Return the worker's answer; ``meanwhile`` is called once it has the question. Raises PlanningFailed.

        A question that tells how things stand is a function: it is called when its turn has come. Of a worker that ends
        over it nobody is told, as long as the next one does not end over it too: no question changes anything.
        """
        async with self._turn:
            with suppress(_Ended):
                return await self._ask_once(question, meanwhile)
            return await self._ask_once(question, meanwhile)

    async def tell(self, ahead: LookAhead) -> None:
        """Tell what will be asked about, where there is a worker that has nothing to do and was not told before."""
        if self._was_told or self._turn.locked():
            return
        async with self._turn:
            if self._process is not None and self._process.stdin is not None:
                self._was_told = True
                with suppress(*_BROKEN):  # whoever asks next finds out
                    await self._process.stdin.send(pack(ahead))

    async def _ask_once(self, question: Question | Callable[[], Question], meanwhile: Callable[[], object]) -> Answer:
        try:
            with anyio.fail_after(self._answer_within_s):
                return await self._exchange(question() if callable(question) else question, meanwhile)
        except BaseException as error:
            # Cancellation included: what it still says would be taken for the answer to the next question.
            exit_ = await self._end()
            if isinstance(error, TimeoutError):
                raise PlanningFailed(
                    f"the planning process did not answer within {self._answer_within_s:g} s and was replaced"
                ) from error
            if isinstance(error, _BROKEN):
                raise _Ended(f"the planning process ended ({exit_}), twice, and was replaced: try again") from error
            raise

    async def _exchange(self, question: Question, meanwhile: Callable[[], object]) -> Answer:
        if self._process is None:
            self._process = await self._start()
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        self._was_told = False
        await self._process.stdin.send(pack(question))
        meanwhile()
        size = int.from_bytes(await self._receive(LENGTH_BYTES), "little")
        answer: Any = pickle.loads(await self._receive(size))  # noqa: S301 - from the process that we started
        return answer  # type: ignore[no-any-return]

    async def _start(self) -> Process:
        """Start it tied to our death, and in a session of its own: a Ctrl-C at the terminal is ours to handle."""
        path = os.pathsep.join([str(Path(__file__).parents[2]), self._environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return await anyio.open_process(
            tied([sys.executable, "-m", "supervisor.planning.worker"], find_setpriv(), os.getpid()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            env={**self._environ, "PYTHONPATH": path},
            start_new_session=True,
        )

    async def _receive(self, size: int) -> bytes:
        assert self._process is not None  # noqa: S101 - started before anything is received
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        data = b""
        while len(data) < size:
            data += await self._process.stdout.receive(size - len(data))
        return data

    async def _end(self) -> str:
        """End the worker with all that it started, and return how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "it could not be started"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with anyio.move_on_after(END_WITHIN_S, shield=True):
            returncode = await process.wait()
            await process.aclose()
            return describe_exit(returncode)
        return "it hangs in the kernel and cannot even be killed"

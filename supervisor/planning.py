"""Our end of the planning process: started when first needed, asked one question at a time, replaced when it dies."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import anyio
from anyio.abc import Process

from supervisor.planning_messages import LENGTH_BYTES, Answer, Question, pack
from supervisor.process import SHIM

ANSWER_WITHIN_S: Final = 60.0  # a cold driver takes seconds per card, a scan of a slow disk more; longer is a hang


class PlanningFailed(Exception):
    """The planning process died or hung; a new one is started for the next question."""


class PlanningProcess:
    """Asks the worker. Use within ``async with``, which ends the worker.

    ``environ`` is what the worker reads its settings from.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._process: Process | None = None
        self._turn = anyio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        with anyio.CancelScope(shield=True):
            await self._end()

    async def ask(self, question: Question) -> Answer:
        """Return the worker's answer. Raises PlanningFailed."""
        async with self._turn:
            answered = False
            try:
                with anyio.fail_after(ANSWER_WITHIN_S):
                    answer = await self._exchange(question)
                answered = True
            except TimeoutError as error:
                raise PlanningFailed(f"the planning process did not answer within {ANSWER_WITHIN_S:g} s") from error
            except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                raise PlanningFailed(f"the planning process ended: {await self._story()}") from error
            else:
                return answer
            finally:
                if not answered:  # whatever it still says would be taken for the answer to the next question
                    with anyio.CancelScope(shield=True):
                        await self._end()

    async def _exchange(self, question: Question) -> Answer:
        if self._process is None:
            self._process = await self._start()
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        await self._process.stdin.send(pack(question))
        size = int.from_bytes(await self._receive(LENGTH_BYTES), "little")
        answer: Any = pickle.loads(await self._receive(size))  # noqa: S301 - from the process that we started
        return answer  # type: ignore[no-any-return]

    async def _start(self) -> Process:
        """Start it tied to our death, and in a session of its own: a Ctrl-C at the terminal is ours to handle."""
        shim = [sys.executable, "-I", "-S", str(SHIM), str(os.getpid())]
        path = os.pathsep.join([str(Path(__file__).parents[1]), self._environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return await anyio.open_process(
            [*shim, sys.executable, "-m", "supervisor.planning_worker"],
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

    async def _story(self) -> str:
        if self._process is None:
            return "it could not be started"
        return f"exit code {await self._process.wait()}"

    async def _end(self) -> None:
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.aclose()
            self._process = None

"""A llama-server that was started ahead of its plan and waits at its gate, before it has looked at any model or device.

To link itself, to set itself up and, where it has one, to wake a GPU's driver takes llama-server a third of the load of
a small model. None of it depends on the plan, so it is done while that is made, or before, on the chance that the plan
will be the one of the last time. If it is, to the letter, the gate is opened; else the process is ended.

The gate is a file of further API keys, which is the process's stdin, and empty: llama-server reads it to its end when
it comes to that flag (common/arg.cpp, ``parse_cli_args``), and opens models and makes contexts on devices only after
its last one (tools/server/server.cpp). Whatever else somebody has put in llama-server's place may not pass its stdin
on. Such a program is found out, since it has not opened the gate, and ended.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

from supervisor.children.process import Child, find_setpriv, started, tied

GATE: Final = ("--api-key-file", "/dev/stdin")
N_BEFORE_GATE: Final = 3  # the program, -m, the path (planner/launch.py): what follows may ask devices and workers
ELF: Final = b"\x7fELF"  # how a program begins that the kernel runs itself (elf(5))
# For how long one waits: who changes between models comes back to one of them within that.
WAITS_FOR_S: Final = 60.0
AT_GATE_WITHIN_S: Final = 3.0  # it takes a hundredth of a second, and a good second with several GPUs


@dataclass(frozen=True, slots=True)
class Line:
    """A command, and what joins the environment of whoever starts it."""

    argv: tuple[str, ...]
    env: Mapping[str, str]

    @property
    def has_gate(self) -> bool:
        """Say whether what it starts can be made to wait."""
        return self.argv[N_BEFORE_GATE : N_BEFORE_GATE + len(GATE)] == GATE


def gated(argv: Sequence[str]) -> tuple[str, ...]:
    """Return this command line of llama-server with a gate behind the path of its model, which it only notes.

    A script in its place gets none: who knows what it passes on.
    """
    if not _is_binary(argv[0]):
        return tuple(argv)
    return *argv[:N_BEFORE_GATE], *GATE, *argv[N_BEFORE_GATE:]


def begun(line: Line, environ: Mapping[str, str], api_key: str, *, stdin: int = subprocess.DEVNULL) -> Child:
    """Start a llama-server that asks for this key, its gate open unless ``stdin`` is a pipe. Raises OSError."""
    env = {**environ, **line.env, "LLAMA_API_KEY": api_key}
    return Child(started(tied(line.argv, find_setpriv(), os.getpid()), env, stdin=stdin))


class Spare:
    """One process that waits at its gate, to be this line's. ``hold`` has to be called, and ends it if nobody takes it.

    Construction starts it with this environment and a key that is no part of the line; its death is tied to that of the
    calling thread. Raises OSError.
    """

    def __init__(self, line: Line, environ: Mapping[str, str], api_key: str) -> None:
        self.api_key = api_key
        self._line = line
        self._program = _identity(line.argv[0])
        self._child = begun(line, environ, api_key, stdin=subprocess.PIPE)
        self.is_taken = False
        self._over = anyio.Event()

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self._child.pid

    def is_for(self, line: Line) -> bool:
        """Say whether it waits for this line still, with the program that would be started now."""
        return not self._over.is_set() and self._line == line and self._program == _identity(line.argv[0])

    def take(self) -> Child | None:
        """Open its gate and return it, the caller's from now on; None where it has ended."""
        if self._over.is_set() or self._child.has_exited():
            return None
        self.is_taken = True
        self._over.set()
        self._child.close_stdin()
        return self._child

    def let_go(self) -> None:
        """Have it end."""
        self._over.set()

    async def hold(self, *, at_gate_within_s: float = AT_GATE_WITHIN_S) -> bool:
        """Return when its waiting is over, and end it where nobody took it; False where it did not wait."""
        try:
            with anyio.move_on_after(at_gate_within_s):
                await self._over.wait()
                return True
            if not is_at_gate(self.pid):
                return self._child.has_exited()
            with anyio.move_on_after(WAITS_FOR_S):
                await self._over.wait()
            return True
        finally:
            self._over.set()
            if not self.is_taken:
                self._child.kill()  # before its gate is closed with the pipe
                with anyio.CancelScope(shield=True):
                    await self._child.wait_exit()  # a driver may take its time
                self._child.reap()
                self._child.close()


def is_at_gate(pid: int) -> bool:
    """Say whether this process has opened its stdin, which is a pipe, once more, as a file."""
    descriptors = Path(f"/proc/{pid}/fd")
    with suppress(OSError):
        gate = (descriptors / "0").readlink()
        return gate.name.startswith("pipe:") and any(
            one.readlink() == gate for one in descriptors.iterdir() if one.name != "0"
        )
    return False


def _is_binary(program: str) -> bool:
    with suppress(OSError), Path(program).open("rb") as file:
        return file.read(len(ELF)) == ELF
    return False


def _identity(program: str) -> tuple[int, ...] | None:
    """Return what changes when a program is replaced, None where there is none."""
    with suppress(OSError):
        status = Path(program).stat()
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return None

"""One child process: started in a session of its own, its death tied to ours, its exit noticed at once, always reaped.

The exit is awaited on a pidfd, which becomes readable the moment the process ends: nothing is polled, and the process
id cannot be somebody else's by then, since the child is reaped only afterwards and only here. Whatever is left in its
process group is killed before that, while its id still names the group.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio

from planner.visible_devices import PCI_ORDER

READ_BYTES: Final = 65536  # a full pipe
SHIM: Final = Path(__file__).with_name("exec_child.py")
SHELL: Final = "/bin/sh"
# What the shim does after it has tied the death, for a shell that starts in a millisecond.
CHECK_AND_BECOME: Final = """
fail() { echo "cannot start $1: $2" >&2; exit 127; }
[ "$PPID" = "$0" ] || fail "$1" "the service is gone"
[ -e "$1" ] || fail "$1" "No such file or directory"
[ -x "$1" ] || fail "$1" "Permission denied"
exec "$@"
"""

# What must not reach a child: llama-server's own settings, ours (keys among them), what systemd says to us, and what
# oversubscribes devices. A variable that hides devices is the operator's: the machine was looked at under it, so names
# count under it wherever the plan does not set its own (``planner.visible_devices``).
SCRUBBED_PREFIXES: Final = ("LLAMA_", "PLANNER_", "OLLAMA_", "AIP_", "LISTEN_", "WATCHDOG_")
SCRUBBED_NAMES: Final = frozenset({"NOTIFY_SOCKET", "GGML_CUDA_ENABLE_UNIFIED_MEMORY", "MTMD_BACKEND_DEVICE"})
KEPT_NAMES: Final = frozenset({"LLAMA_CACHE"})


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what would change a runner behind the plan's back."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in KEPT_NAMES or not (name.startswith(SCRUBBED_PREFIXES) or name in SCRUBBED_NAMES)
    }
    return kept | PCI_ORDER  # as the machine was looked at


@functools.cache
def find_setpriv() -> str | None:
    """Return util-linux's setpriv where it is here and can tie a death, as it can since 2018. Asked once."""
    found = shutil.which("setpriv")
    if found is None:
        return None
    command = [found, "--pdeathsig", "KILL", "true"]
    tried = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - found on our own PATH
    return found if tried.returncode == 0 else None


def tied(argv: Sequence[str], setpriv: str | None, parent: int) -> list[str]:
    """Return the command that becomes this one, its death tied to that of the thread of ``parent`` that starts it.

    ``setpriv`` does it in 3 ms; without it our own shim does, in 25.
    """
    if setpriv is None:
        return [sys.executable, "-I", "-S", str(SHIM), str(parent), *argv]
    return [setpriv, "--pdeathsig", "KILL", SHELL, "-c", CHECK_AND_BECOME, str(parent), *argv]


def started(
    command: Sequence[str], env: Mapping[str, str], folder: str | None = None, *, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start this in a session of its own, its stdout and stderr in one pipe. Raises OSError."""
    return subprocess.Popen(  # noqa: S603 - the command line is a plan's
        command,
        bufsize=0,
        env=dict(env),
        cwd=folder,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


class Child:
    """A running process that ``started`` has started, and the read end of its stdout and stderr together.

    Construction raises OSError where it cannot be watched; then it was ended. Whoever constructs it calls ``reap`` and
    ``close`` in the end.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert self._process.stdout is not None  # noqa: S101 - PIPE was asked for
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:  # a sandbox that forbids it, say: a child that nobody can watch must not live
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._output.close()
            raise
        self._exited = anyio.Event()

    @property
    def pid(self) -> int:
        """Return the process id, which is also the id of its process group and session."""
        return self._process.pid

    def has_exited(self) -> bool:
        """Say whether the process has ended; it is not reaped."""
        return os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def close_stdin(self) -> None:
        """Let the process come to the end of its stdin."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def read(self) -> bytes:
        """Return what the child wrote since, as soon as there is anything; empty once nobody can write any more."""
        while True:
            await anyio.wait_readable(self._output)
            with suppress(BlockingIOError):
                return os.read(self._output.fileno(), READ_BYTES)

    async def wait_exit(self) -> None:
        """Return as soon as the process has ended, before it is reaped."""
        await anyio.wait_readable(self._pidfd)
        self._exited.set()

    async def wait_exited(self, within_s: float | None) -> None:
        """Return as soon as ``wait_exit`` has returned, or after so long (None: no limit)."""
        with anyio.move_on_after(within_s):
            await self._exited.wait()

    def reap(self) -> int:
        """Kill what is left of the group, reap the process, return how it ended as ``describe_exit`` reads it."""
        self._signal(signal.SIGKILL)
        returncode = self._process.wait()
        os.close(self._pidfd)
        return returncode

    def close(self) -> None:
        """Give the pipes back."""
        self.close_stdin()
        self._output.close()

    async def stop(self, grace_s: float) -> None:
        """End the process: TERM, TERM (llama-server waits for its clients only once), KILL; each gets its grace.

        Returns when ``wait_exit`` has returned.
        """
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self._exited.is_set():
                return
            self._signal(number)
            await self.wait_exited(grace_s if number != signal.SIGKILL else None)

    def kill(self) -> None:
        """End the process at once, and whatever it has started."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def describe_exit(returncode: int) -> str:
    """Return a subprocess returncode in words: ``exit status N``, or ``killed by SIGNAME`` where it is negative."""
    if returncode >= 0:
        return f"exit status {returncode}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-returncode).name}"
    return f"killed by signal {-returncode}"

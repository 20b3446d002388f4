"""A shell that becomes the next child, started while that child is planned, with its death tied to ours already.

To fork, to tie and to check takes three to five milliseconds on a machine that rests, as long as the plan: so both
happen at a time. The shell does nothing until it is told its command line on its stdin, and ends when that is closed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final, Self

from supervisor.children.process import started, waiting

# What the shell is told: its new arguments and what joins its environment; and that its stdin is nobody's any more.
TOLD: Final = "{exports}\nset -- {argv}\nexec </dev/null\n"


class Spare:
    """One shell that waits. Use within ``with``, which ends it if it has not become a child by then.

    Construction starts it with this environment, its death tied to that of the calling thread. Raises OSError.
    """

    def __init__(self, setpriv: str, environ: Mapping[str, str]) -> None:
        self._shell: subprocess.Popen[bytes] | None
        self._shell = started(waiting(setpriv, os.getpid()), environ, stdin=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        shell, self._shell = self._shell, None
        if shell is not None:
            _end(shell)

    def become(self, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """Return the shell, on its way to be this command with this added to its environment; None where it cannot."""
        shell, self._shell = self._shell, None
        if shell is None:
            return None
        exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in env.items())
        if _tell(shell, os.fsencode(TOLD.format(exports=exports, argv=shlex.join(argv)))):
            return shell
        _end(shell)
        return None


def _tell(shell: subprocess.Popen[bytes], told: bytes) -> bool:
    """Say whether all of this went into the shell's stdin, which is closed then; it is not waited for."""
    assert shell.stdin is not None  # noqa: S101 - a pipe was asked for
    os.set_blocking(shell.stdin.fileno(), False)
    try:
        if os.write(shell.stdin.fileno(), told) < len(told):
            return False
    except OSError:  # somebody has ended it
        return False
    shell.stdin.close()
    return True


def _end(shell: subprocess.Popen[bytes]) -> None:
    shell.kill()  # before its stdin is closed: it must not act on half a line
    shell.wait()
    for pipe in (shell.stdin, shell.stdout):
        if pipe is not None:
            pipe.close()

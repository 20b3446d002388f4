"""Becomes the program named on its command line, with a death tied to that of the process that started it.

    python -I -S exec_child.py PARENT_PID PROGRAM [ARGUMENT ...]

A program of its own, since the kernel's PR_SET_PDEATHSIG has to be set in the child between fork and exec: Python code
run there (``preexec_fn``) can deadlock in a process with threads. The setting survives exec, and the kernel acts on it
however the parent dies. It is tied to the *thread* that forked, so children are started from the service's main thread.
It costs 25 ms per launch, so it is taken only where setpriv is missing (``process.tied``). Needs nothing but the
standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
EXIT_CANNOT_START = 127  # the shell's own for a program that cannot be run


def main() -> None:
    """Tie, check, become."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        _give_up("the kernel refused PR_SET_PDEATHSIG")
    if os.getppid() != parent:  # it died before the line above, and nobody would tell us
        _give_up("the service is gone")
    try:
        os.execv(program[0], program)  # noqa: S606 - a shell in between is what nobody wants
    except OSError as error:
        _give_up(str(error.strerror))


def _give_up(reason: str) -> None:
    sys.stderr.write(f"cannot start {sys.argv[2]}: {reason}\n")
    sys.exit(EXIT_CANNOT_START)


if __name__ == "__main__":
    main()

"""What the kernel says of a process by its id, in one line of ``/proc`` (proc(5), ``/proc/pid/stat``)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")  # in a second
# Columns after the name, which may contain anything.
_STATE: Final = 0
_SESSION: Final = 3
_USER_TICKS: Final = 11
_SYSTEM_TICKS: Final = 12
_START_TICKS: Final = 19


def session_of(pid: int) -> tuple[int, ...]:
    """Return all processes of the session that this one leads: itself, and what it has started."""
    others = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())  # noqa: PTH208 - names only, and fast
    return tuple(one for one in others if (columns := _columns(one)) is not None and int(columns[_SESSION]) == pid)


def is_stopped(pid: int) -> bool:
    """Say whether somebody has stopped this process (state ``T``), so that it does nothing at all."""
    columns = _columns(pid)
    return columns is not None and columns[_STATE] in {b"T", b"t"}


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used; 0 where it is gone."""
    columns = _columns(pid)
    return 0.0 if columns is None else (int(columns[_USER_TICKS]) + int(columns[_SYSTEM_TICKS])) / CLOCK_TICKS


def start_ticks(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since boot, None where it is gone."""
    columns = _columns(pid)
    return None if columns is None else int(columns[_START_TICKS])


def _columns(pid: int) -> list[bytes] | None:
    """Return the columns after the name, None where there is no such process any more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split() or None
    return None

"""Children of an earlier life of this service: recorded while they run, ended before the next life plans anything.

Their death is tied to the service's already; this is for what slips through (a child that was traced, or a kernel that
was busy). A record names a process by its id, the time it was started, and the boot, so that an id which was given to
somebody else since is never signalled.
"""

from __future__ import annotations

import json
import os
import select
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from supervisor.children.proc_stat import start_ticks

GONE_WITHIN_S: Final = 5.0  # for the kernel to take a killed process's memory apart, tens of GiB of it

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Record:
    """One child. ``start_ticks`` is its start time since boot, in clock ticks."""

    pid: int
    start_ticks: int
    boot_id: str
    model: str


def record(folder: Path, pid: int, model: str) -> None:
    """Remember that this child runs; one that has ended already is not remembered. Raises OSError."""
    if (started := start_ticks(pid)) is not None:
        entry = Record(pid, started, _BOOT_ID.read_text().strip(), model)
        (folder / f"{pid}.json").write_text(json.dumps(asdict(entry)))


def forget(folder: Path, pid: int) -> None:
    """Forget a child that was reaped. A record that cannot be removed names a process that is no more: no harm."""
    with suppress(OSError):
        (folder / f"{pid}.json").unlink()


def end_all(folder: Path) -> list[Record]:
    """Kill every recorded child that still runs, wait until it is gone, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = []
    for path in sorted(folder.glob("*.json")):
        entry = _read(path)
        if entry is not None and _end(entry):
            ended.append(entry)
        path.unlink(missing_ok=True)
    return ended


def _read(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None  # half written when the machine went down: its process went down with it


def _end(entry: Record) -> bool:
    try:
        pidfd = os.pidfd_open(entry.pid)
    except OSError:
        return False
    try:  # the pidfd holds the identity from here on; only then is it compared
        same_boot = entry.boot_id == _BOOT_ID.read_text().strip()
        if not same_boot or start_ticks(entry.pid) != entry.start_ticks:
            return False
        with suppress(ProcessLookupError):
            os.killpg(entry.pid, signal.SIGKILL)
        select.select([pidfd], [], [], GONE_WITHIN_S)
        return True
    finally:
        os.close(pidfd)

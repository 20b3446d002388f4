"""One machine, one ledger: a second service would plan with the same bytes, so it is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class AlreadyRunning(Exception):
    """Another service holds the lock of this state folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises AlreadyRunning with the holder's process id, OSError where it cannot be made.

    The kernel drops the lock with the process, however that ends; the file stays, with the last holder's id in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise AlreadyRunning(
                f"another planner serve (process {holder}) uses {folder}: stop it, or give this one a state folder and "
                "devices of its own (PLANNER_STATE_DIR)"
            ) from error
        file.truncate(0)
        with suppress(OSError):  # a full disk: the lock holds all the same, only the holder's name is not told
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield

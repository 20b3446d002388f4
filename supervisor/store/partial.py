"""A blob that is not whole yet: its bytes so far, and which they are, so that any end of us loses next to nothing.

``partial-<key>`` is a file with holes, written in parts at once; ``partial-<key>.parts`` says how much of each part is
there. Bytes are written before they are counted, so the count never promises what a killed process did not write; what
a power cut loses, the digest finds. Whoever writes holds the file's lock, which the kernel drops with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from anyio import to_thread

from supervisor.store.writing import PARTIAL, sync_folder

PART_BYTES: Final = 64 << 20  # a second or so of a fast line: long enough that a request costs nothing beside it
MAX_PARTS: Final = 128  # the counts stay one small write
HASHED_AT_ONCE_BYTES: Final = 16 << 20  # some 10 ms, after which a cancelled pull ends


def _part_bytes(total_bytes: int) -> int:
    return max(PART_BYTES, -(-total_bytes // MAX_PARTS))


class Busy(Exception):
    """Somebody else is writing this blob."""


class Partial:
    """One blob on its way. Use within ``with``, which gives its lock back.

    ``key`` names it and its version, ``total_bytes`` is its length. ``done`` counts the bytes of each part.
    """

    def __init__(self, blobs: Path, key: str, total_bytes: int) -> None:
        self._path = blobs / f"{PARTIAL}{key}"
        self._counts_path = blobs / f"{PARTIAL}{key}.parts"
        self.total_bytes = total_bytes
        self._file = -1
        self._counts = -1
        self._counting = threading.Lock()
        self.part_bytes = _part_bytes(total_bytes)
        self.done = [0] * self._n_parts()

    def __enter__(self) -> Self:
        """Take the lock and read what is there already. Raises Busy, OSError."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take_lock()
        except BaseException:
            self.__exit__()
            raise
        try:
            self._counts = os.open(self._counts_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._resume()
        except OSError:
            self.discard()
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for handle in (self._counts, self._file):
            if handle >= 0:
                os.close(handle)
        self._counts = self._file = -1

    @property
    def done_bytes(self) -> int:
        """Return the bytes that are there."""
        return sum(self.done)

    def span(self, part: int) -> tuple[int, int]:
        """Return from where to where a part is missing: first byte, and the one after the last."""
        first = part * self.part_bytes
        end = min(first + self.part_bytes, self.total_bytes)
        return min(first + self.done[part], end), end

    def restart(self, *, in_one: bool) -> None:
        """Count nothing as there; ``in_one`` makes one part of all, for a server that knows no ranges."""
        self.part_bytes = max(self.total_bytes, 1) if in_one else _part_bytes(self.total_bytes)
        self.done = [0] * self._n_parts()
        os.ftruncate(self._counts, 0)
        self._write_counts()

    async def write(self, part: int, data: bytes | bytearray) -> None:
        """Add bytes to a part. Raises OSError."""
        await to_thread.run_sync(self._write, part, data)

    async def sha256(self) -> str:
        """Return the digest of all the bytes."""
        hasher = hashlib.sha256()

        def more(offset: int) -> int:
            data = os.pread(self._file, HASHED_AT_ONCE_BYTES, offset)
            hasher.update(data)
            return len(data)

        offset = 0
        while read_bytes := await to_thread.run_sync(more, offset):
            offset += read_bytes
        return f"sha256:{hasher.hexdigest()}"

    def head(self, n_bytes: int) -> bytes:
        """Return the first bytes."""
        return os.pread(self._file, n_bytes, 0)

    def finish(self, path: Path) -> None:
        """Give the whole and verified blob its name. Raises OSError."""
        os.fsync(self._file)
        self._path.replace(path)
        self._counts_path.unlink(missing_ok=True)
        sync_folder(path.parent)

    def discard(self) -> None:
        """Leave nothing of it behind, where the lock is ours."""
        if self._file < 0:
            return
        for path in (self._counts_path, self._path):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _n_parts(self) -> int:
        return max(1, -(-self.total_bytes // self.part_bytes))

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy from error
        if not self._path.exists() or self._path.stat().st_ino != os.fstat(self._file).st_ino:
            raise Busy  # it was finished or given up between our opening and locking

    def _write(self, part: int, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, self.span(part)[0])
            self.done[part] += written
            view = view[written:]
        self._write_counts()

    def _write_counts(self) -> None:
        with self._counting:  # counts only grow, so that no text is shorter than the one that it replaces
            counts = {
                "total": self.total_bytes,
                "part": self.part_bytes,
                "done": self.done,
            }
            os.pwrite(self._counts, json.dumps(counts).encode(), 0)

    def _resume(self) -> None:
        """Take over what an earlier process counted, where that is about the same bytes."""
        with suppress(ValueError, KeyError, TypeError):
            counts = json.loads(os.pread(self._counts, os.fstat(self._counts).st_size, 0))
            done, part_bytes = counts["done"], counts["part"]
            same = counts["total"] == self.total_bytes == os.fstat(self._file).st_size
            if same and part_bytes > 0:
                self.part_bytes = part_bytes
                self.done = [min(int(count), part_bytes) for count in done]
                if len(done) == self._n_parts():
                    return
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self.total_bytes)
        self.restart(in_one=False)

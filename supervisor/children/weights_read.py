"""How much of its weights a loading child has read, as the kernel counts it: no word of the child is needed for that.

llama-server tells its progress only to a router of its own, in a protocol that is not meant for others. The kernel
counts what a process reads by read(2) (``rchar``: loads without mmap, and direct ones) and which pages of files it has
mapped in (``RssFile``: mmap, which llama.cpp populates before it uses them, and from which it feeds devices and RPC
workers). Weights go one way or the other, so the larger count is the progress; pages that were given back do not take
it back.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

# The flags of a launch line after which the path of a file with weights stands.
WEIGHT_FLAGS: Final = ("-m", "--mmproj", "-md")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_SHARD: Final = re.compile(r"-00001-of-(\d{5})\.gguf$")
_RCHAR: Final = re.compile(rb"^rchar: (\d+)$", re.MULTILINE)
_SHARED_PAGES: Final = 2  # the column of /proc/PID/statm that counts pages of files


class WeightsRead:
    """Watches one process read the files of its launch line."""

    def __init__(self, pid: int, argv: Sequence[str]) -> None:
        self._proc = Path("/proc") / str(pid)
        self._total_bytes = sum(map(_size, _weight_files(argv)))
        self._most_bytes = 0

    def fraction(self) -> float | None:
        """Return the share that has been read, never less than before; None where nobody can tell."""
        self._most_bytes = max(self._most_bytes, self._read_bytes(), self._mapped_bytes())
        if not self._total_bytes or not self._most_bytes:
            return None
        return min(1.0, self._most_bytes / self._total_bytes)

    def _read_bytes(self) -> int:
        with suppress(OSError):  # it is gone, or the kernel does not count
            if found := _RCHAR.search((self._proc / "io").read_bytes()):
                return int(found[1])
        return 0

    def _mapped_bytes(self) -> int:
        with suppress(OSError, IndexError):
            return int((self._proc / "statm").read_bytes().split()[_SHARED_PAGES]) * PAGE_BYTES
        return 0


def _weight_files(argv: Sequence[str]) -> list[str]:
    """Return the files that this launch line reads weights from, all parts of a split one."""
    first = [path for flag, path in itertools.pairwise(argv) if flag in WEIGHT_FLAGS]
    files: list[str] = []
    for path in first:
        parts = int(found[1]) if (found := _SHARD.search(path)) else 0
        files += [_SHARD.sub(f"-{part:05d}-of-{parts:05d}.gguf", path) for part in range(1, parts + 1)] or [path]
    return files


def _size(path: str) -> int:
    with suppress(OSError):
        return Path(path).stat().st_size
    return 0

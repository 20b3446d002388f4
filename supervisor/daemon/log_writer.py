"""Writes the log from a thread of its own: a reader of stderr that stops reading must not stop the service.

What cannot be written waits in a bounded queue; beyond that lines are dropped and counted, and the count is logged as
soon as there is room again.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable
from typing import Final

# As many as a busy service logs in a minute; at some 300 bytes each they are a megabyte.
MAX_WAITING: Final = 4096
# At the end of the process, for a reader that still reads.
LAST_WORDS_S: Final = 1.0


class LogWriter:
    """The write side of a text file. ``tell_dropped`` logs how many lines were lost; it may write here.

    Threads that write in the same instant may each leave one line more than ``max_waiting``.
    """

    def __init__(self, descriptor: int, tell_dropped: Callable[[int], None], *, max_waiting: int = MAX_WAITING) -> None:
        self._descriptor = descriptor
        self._tell_dropped = tell_dropped
        self._max_waiting = max_waiting
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._dropped = 0
        self._counting = threading.Lock()
        self._thread = threading.Thread(target=self._write_on, name="log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, text: str) -> int:
        """Take this text to be written, or drop it; return its length at once."""
        if self._waiting.qsize() < self._max_waiting:
            self._waiting.put(text.encode("utf-8", "backslashreplace"))
        else:
            with self._counting:
                self._dropped += 1
        return len(text)

    def flush(self) -> None:
        """Do nothing: it is written as soon as that is possible."""

    def close(self) -> None:
        """Give what waits a moment to be written."""
        self._waiting.put(None)
        self._thread.join(LAST_WORDS_S)

    def _write_on(self) -> None:
        while (data := self._waiting.get()) is not None:
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # nobody will ever read again, or the disk is full
                continue
            with self._counting:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                self._tell_dropped(dropped)

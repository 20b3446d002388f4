"""A socket in the loop, without the tasks and futures that asyncio's streams put between it and its owner."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from supervisor.gateway.express.readiness import Heard, Readiness

# As much as a token's event a thousand times; what is left is read when the loop comes round.
READ_BYTES: Final = 64 << 10


class Wire:
    """One connected socket, not blocking. ``close`` has to be called in the end, or ``detach``."""

    def __init__(self, connected: socket.socket, ready: Readiness) -> None:
        self._socket = connected
        self._number = connected.fileno()
        self._ready = ready
        self._loop = asyncio.get_running_loop()
        self._unsent = b""
        self._is_read = False
        self._drained: Heard | None = None

    @property
    def unsent_bytes(self) -> int:
        """How many bytes wait for the other side to take some."""
        return len(self._unsent)

    @property
    def connected(self) -> socket.socket:
        """The socket, to be asked about."""
        return self._socket

    @property
    def is_heard(self) -> bool:
        """Whether what comes is read."""
        return self._is_read

    def when_heard(self, heard: Heard) -> None:
        """Have this, and nothing else, called whenever something is there to be read, or the end; not once closed."""
        if self._socket.fileno() < 0:
            return
        self._ready.hear(self._number, heard)
        self._is_read = True

    def pause(self) -> None:
        """Leave what comes to the kernel."""
        if self._is_read:
            self._ready.ignore(self._number)
            self._is_read = False

    def read(self) -> bytes | None:
        """Return what has come, empty at the end, None where nothing has. Raises OSError."""
        try:
            return self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return None

    def send(self, data: bytes) -> None:
        """Send what the kernel takes now, and the rest when it takes more. Raises OSError where the way is broken."""
        if not self._unsent:
            data = data[self._sent(data) :]
            if not data:
                return
            self._loop.add_writer(self._number, self._flush)
        self._unsent += data

    def when_sent(self, drained: Heard) -> None:
        """Have this called once nothing is unsent, or what is cannot be sent any more."""
        if self._unsent:
            self._drained = drained
        else:
            drained()

    def detach(self) -> socket.socket:
        """Give the socket to somebody else."""
        self.pause()
        return self._socket

    def close(self) -> None:
        """Close it, whatever is unsent. To close it again does nothing."""
        if self._socket.fileno() >= 0:
            self.pause()
            if self._unsent:
                self._loop.remove_writer(self._number)
            self._socket.close()

    def _flush(self) -> None:
        try:
            self._unsent = self._unsent[self._sent(self._unsent) :]
        except OSError:  # whoever reads from it learns how it ended
            self._unsent = b""
        if not self._unsent:
            self._loop.remove_writer(self._number)
            if (drained := self._drained) is not None:
                self._drained = None
                drained()

    def _sent(self, data: bytes) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

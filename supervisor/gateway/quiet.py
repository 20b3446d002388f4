"""An answer's head comes some milliseconds before its first event; nobody is woken for it alone.

Nothing goes on to the client before there is something of the body. To be woken for the head takes a processor from the
runner just when it starts the threads that it computes with: on two cores the kernel may then put them on one, where
they wait for each other for milliseconds (docs/decisions/0011).

So the kernel is told to keep still until more has come than a head (socket(7), SO_RCVLOWAT), as long as those of the
last event streams were: one program writes them all alike. The end of a connection is told at once in any case.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Final

# A first event that together with its head is no longer than the head of another stream, as a program of another kind
# may write it, waits for no longer than this; and what takes longer can be woken for its head, which tells of nothing.
AT_MOST_S: Final = 0.25
ANYTHING: Final = 1  # byte, from which on a socket is usually ready to be read


class _Usual:
    head_bytes = 0  # of the last event stream's head; 0 where none has come yet


def learn_head(n_bytes: int) -> None:
    """Note how long the head of an event stream was."""
    _Usual.head_bytes = n_bytes


class Quiet:
    """Keeps a socket from being ready with a head alone, from construction to ``end``, which may be called twice."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._timer: asyncio.TimerHandle | None = None
        if _Usual.head_bytes:
            self._let(_Usual.head_bytes + 1)
            self._timer = asyncio.get_running_loop().call_later(AT_MOST_S, self.end)

    def end(self) -> None:
        """Let whatever comes be told from now on, and what has come already."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._let(ANYTHING)

    def _let(self, n_bytes: int) -> None:
        with suppress(OSError):  # it is closed
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n_bytes)

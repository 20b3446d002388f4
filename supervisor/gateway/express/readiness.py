"""Which sockets have something to be read, told by one epoll of our own, which is one descriptor to the loop.

For each socket that is ready asyncio looks up a key and runs a handle in a context, and makes both for each that is
added. Of a request's two sockets and a token's event that is a good part of what they cost.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Final

# At a time; those that are still ready are told when the loop comes round, and others have their turn between.
TOLD_AT_ONCE: Final = 64

Heard = Callable[[], object]


class Readiness:
    """Tells of sockets by their numbers: of each as long as it is ready. ``close`` has to be called in the end.

    One that has just taken the number of another may be told of though nothing is there.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._heard: dict[int, Heard] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def hear(self, number: int, heard: Heard) -> None:
        """Have this, and nothing else, called whenever something is there to be read of it, or the end."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._epoll.fileno(), self._tell)
        if number not in self._heard:
            self._epoll.register(number, select.EPOLLIN)
        self._heard[number] = heard

    def ignore(self, number: int) -> None:
        """Have nothing called any more; to be said before a socket that is heard is closed."""
        if self._heard.pop(number, None) is not None:
            self._epoll.unregister(number)

    def close(self) -> None:
        """Tell of nothing any more."""
        if self._loop is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._loop = None
        self._heard.clear()
        self._epoll.close()

    def _tell(self) -> None:
        for number, _ in self._epoll.poll(0, TOLD_AT_ONCE):
            if (heard := self._heard.get(number)) is not None:
                heard()

"""Connections to runners, made after a request for the next one, which then need not wait for its own.

What is saved is not only the making: llama-server gives each connection to a thread, which has to wake as well. Here it
listens already when the request comes.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from functools import partial
from typing import Final
from urllib.parse import SplitResult, urlsplit

from supervisor.gateway.express.readiness import Readiness
from supervisor.gateway.express.wire import Wire
from supervisor.gateway.upstream import connecting

# llama-server hangs up on who says nothing for five seconds (httplib.h, CPPHTTPLIB_KEEPALIVE_TIMEOUT_SECOND). What it
# would close in the moment in which a request is sent must not be used, so it is given up some time before.
KEPT_S: Final = 4.0
# To one runner. A thread there looks after each, of which llama-server has four more than slots (server-http.cpp): two
# are left for those who ask after its health and its counts while all slots are taken.
MOST_KEPT: Final = 2


class ConnectionsAhead:
    """Keeps some for a while, to each address by itself, from ``renew`` until they are taken, or ``close``."""

    def __init__(self, ready: Readiness) -> None:
        self._ready = ready
        self._kept: dict[SplitResult, deque[Wire]] = {}
        self._wanted: Counter[SplitResult] = Counter()  # as soon as the loop comes round
        self._is_open = True

    def take(self, address: SplitResult) -> Wire:
        """Return a connection to this address, a new one where none is kept that is still good. Raises OSError."""
        kept = self._kept.get(address, ())
        while kept:
            wire = kept.pop()
            if not kept:
                del self._kept[address]
            try:
                if wire.read() is None:
                    return wire
            except OSError:
                pass
            wire.close()
        return Wire(connecting(address), self._ready)

    def renew(self, address: SplitResult) -> None:
        """Make one soon for a request to come, now that one to the same address has been served.

        Not at once: others end in the same moment, perhaps, and the runner may have to go for want of this one.
        """
        self._wanted[address] += 1
        asyncio.get_running_loop().call_soon(self._make, address)

    def _make(self, address: SplitResult) -> None:
        wanted = self._wanted.pop(address, 0)
        if wanted > 1:
            self._wanted[address] = wanted - 1
        if not wanted or not self._is_open or len(self._kept.get(address, ())) >= MOST_KEPT:
            return
        try:
            wire = Wire(connecting(address), self._ready)
        except OSError:  # the runner has gone
            return
        self._kept.setdefault(address, deque()).append(wire)
        drop = partial(self._drop, address, wire)
        wire.when_heard(drop)
        asyncio.get_running_loop().call_later(KEPT_S, drop)

    def end(self, base_url: str) -> None:
        """Close those to this address, now: with one open llama-server takes a tenth of a second longer to stop."""
        address = urlsplit(base_url)
        self._wanted.pop(address, None)
        for wire in tuple(self._kept.get(address, ())):
            self._drop(address, wire)

    def close(self) -> None:
        """Close them all, and keep none any more."""
        self._is_open = False
        for address, kept in tuple(self._kept.items()):
            for wire in tuple(kept):
                self._drop(address, wire)

    def _drop(self, address: SplitResult, wire: Wire) -> None:
        """Close one that is still kept: the runner has ended it, or it has been kept for long enough."""
        kept = self._kept.get(address)
        if kept is not None and wire in kept:
            kept.remove(wire)
            wire.close()
            if not kept:
                del self._kept[address]

"""One client's connection, for as long as what it asks is plain; with the first other request it is handed over."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import structlog

from supervisor.gateway.express.lane import Lane
from supervisor.gateway.express.passage import Passage
from supervisor.gateway.express.plain import PlainHead, plain_head
from supervisor.gateway.express.wire import READ_BYTES, Wire
from supervisor.gateway.stalling import GONE, IDLE, Stage, StallWatch, Standing, has_left, taken

_log = structlog.get_logger("loadmaster.gateway")

# Takes a connection over, with what was read from it already.
HandOver = Callable[[socket.socket, bytes], None]


class Visitor:
    """A connection. ``come`` looks at it; ``when_gone`` is called once, when it is closed or handed over."""

    def __init__(
        self,
        connected: socket.socket,
        remote: str | None,
        lane: Lane,
        stalls: StallWatch,
        hand_over: HandOver,
        when_gone: Callable[[Visitor], None],
    ) -> None:
        self.wire = Wire(connected, lane.ready)
        self._remote = remote
        self._lane = lane
        self._stalls = stalls
        self._hand_over = hand_over
        self._when_gone = when_gone
        self._data = b""
        self._head: PlainHead | None = None
        self._passage: Passage | None = None
        self._is_here = True
        self._is_last = False

    def come(self) -> None:
        """Look at what a new connection has brought already, and listen for the rest."""
        self._hear()
        if self._is_here:
            self.wire.when_heard(self._hear)

    def part(self) -> None:
        """End the connection once what was asked is answered."""
        self._is_last = True
        if self._passage is None:
            self.wire.when_sent(self.cut)

    def answered(self, *, keeps: bool) -> None:
        """Go on to what the client asks next, or end."""
        self._passage = None
        self._stalls.restart(self)
        if keeps and not self._is_last:
            self.wire.when_sent(self._listen)
        else:
            self.wire.pause()
            self.wire.when_sent(self.cut)

    def cut(self) -> None:
        """End the connection, whatever is unsent; a request under way is given up."""
        passage, self._passage = self._passage, None
        if passage is not None:
            passage.leave()
        if self._is_here:
            self._is_here = False
            self.wire.close()
            self._when_gone(self)

    def standing(self) -> Standing:
        """Return where the connection stands."""
        if self._passage is not None and not self.wire.is_heard and has_left(self.wire.connected):
            return GONE
        if self._is_answered:
            return taken(self.wire.connected, self.wire.unsent_bytes)
        return Standing(Stage.ASKING, len(self._data)) if self._data else IDLE

    def _listen(self) -> None:
        """Wait for the next request, which may have come already."""
        if self._is_here:
            self.wire.when_heard(self._hear)
            if self._data:
                asyncio.get_running_loop().call_soon(self._look)

    def _hear(self) -> None:
        """Take what the client has sent: a request, or that it has left."""
        try:
            data = self.wire.read()
        except OSError:
            data = b""
        if data is None:
            return
        if not data and self._passage is None:  # it has asked all; what it was answered goes out yet
            self.wire.pause()
            self.wire.when_sent(self.cut)
            return
        if not data:
            self.cut()
            return
        self._data += data
        self._look()
        if self._is_answered and len(self._data) > READ_BYTES:  # it asks on and on before it was answered
            self.wire.pause()

    @property
    def _is_answered(self) -> bool:
        """Whether an answer is on its way, to its last byte: what comes next is looked at after that."""
        return self._passage is not None or self.wire.unsent_bytes > 0

    def _look(self) -> None:
        """Send a plain request on its way as soon as it is whole; hand over whatever else it is."""
        if self._is_answered or not self._is_here:
            return
        try:
            self._go()
        except Exception:  # noqa: BLE001 - the boundary: whatever happens, the lease is given back
            _log.exception("request.failed")
            self.cut()

    def _go(self) -> None:
        self._head = head = self._head or plain_head(self._data)
        if head is not None and len(self._data) < head.end:
            return
        passage = None
        if head is not None:
            passage = self._lane.passage(self, head.fields, self._data[head.body_at : head.end], self._remote)
        if head is None or passage is None:
            self._give_away()
            return
        self._data, self._head, self._passage = self._data[head.end :], None, passage
        passage.begin()
        self._stalls.restart(self)

    def _give_away(self) -> None:
        self._is_here = False
        connected = self.wire.detach()
        self._when_gone(self)
        self._hand_over(connected, self._data)

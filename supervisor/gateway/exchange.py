"""What is known of one request while it is answered; the access log and the metrics are written from it."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from supervisor.gateway.errors import ErrorTeller, answer_to

# The status that the log and the metrics show for a client that left; it is never sent.
CLIENT_CLOSED_REQUEST: Final = 499


@dataclass(slots=True)
class Exchange:
    """One request and its answer so far. ``model`` is set only to ids of the folder, so that it can be a label.

    ``endpoint`` is the route's pattern, ``path`` what was asked, ``status`` what it came to. ``remote`` is the address
    and ``client`` who asks, by the name of a key, else by address. ``tell`` words errors as the client's API does.
    ``begun`` is an event stream that was opened before there was an answer: what goes wrong is told in it.
    """

    endpoint: str
    method: str
    path: str
    remote: str | None
    tell: ErrorTeller = answer_to
    status: int = CLIENT_CLOSED_REQUEST
    request_id: str = field(default_factory=lambda: "req_" + secrets.token_hex(12))
    began_s: float = field(default_factory=time.monotonic)
    model: str | None = None
    stream: bool | None = None
    origin: str | None = None
    client: str = ""
    begun: web.StreamResponse | None = None
    ended_s: float | None = None
    first_byte_s: float | None = None
    first_event_s: float | None = None
    broken: str | None = None

    def elapsed_s(self) -> float:
        """Return the seconds since the request arrived, or from then until it had ended."""
        return (self.ended_s or time.monotonic()) - self.began_s

    def mark_first_byte(self) -> None:
        """Remember when the answer's first byte went out."""
        if self.first_byte_s is None:
            self.first_byte_s = self.elapsed_s()

    def mark_first_event(self) -> None:
        """Remember that the first event of a streamed answer goes out, which has its first token."""
        self.first_event_s = self.elapsed_s()


EXCHANGE: Final = web.RequestKey("exchange", Exchange)

"""Who may take the short way: whoever the long way would let through, and whose runner has a free slot now.

Nothing is refused here. Whatever speaks against a request, the long way finds it again, and tells it.
"""

from __future__ import annotations

import contextvars
from contextlib import ExitStack
from functools import partial
from urllib.parse import SplitResult, urlsplit

import structlog
from aiohttp import hdrs

from supervisor.api.errors import AcquireError
from supervisor.api.lease import Lease, Offer
from supervisor.api.runtime import Runtime
from supervisor.gateway.access import Caller, Clients
from supervisor.gateway.errors import RequestError
from supervisor.gateway.exchange import CLIENT_CLOSED_REQUEST, Exchange
from supervisor.gateway.express.ahead import ConnectionsAhead
from supervisor.gateway.express.passage import Client, Passage
from supervisor.gateway.express.plain import PlainFields
from supervisor.gateway.express.readiness import Readiness
from supervisor.gateway.middleware import checked_origin
from supervisor.gateway.observing import Observer
from supervisor.gateway.openai import amended, asked_of
from supervisor.gateway.options import GatewayOptions
from supervisor.gateway.peek import peek
from supervisor.gateway.tellers import teller_for
from supervisor.gateway.templated import may_be_written
from supervisor.gateway.upstream import is_on_loopback, request_of

_log = structlog.get_logger("loadmaster.gateway")


class Lane:
    """The short way to the runners of this runtime, which knows what the client at hand may use."""

    def __init__(self, runtime: Runtime, clients: Clients, observer: Observer, options: GatewayOptions) -> None:
        self._runtime = runtime
        self._clients = clients
        self._observer = observer
        self._options = options
        self.ready = Readiness()  # whoever is connected listens by it
        self._ahead = ConnectionsAhead(self.ready)
        runtime.when_stopped(self._ahead.end)

    def close(self) -> None:
        """Keep no connection for requests to come."""
        self._ahead.close()

    def passage(self, client: Client, head: PlainFields, body: bytes, remote: str | None) -> Passage | None:
        """Return the request, to begin at once with the lease that is offered to it; None where none is."""
        if len(body) > self._options.max_body_bytes:
            return None
        context = contextvars.copy_context()  # who asks belongs to it alone
        try:
            return context.run(self._offered, context, client, head, body, remote)
        except (RequestError, AcquireError):
            return None
        except Exception:  # noqa: BLE001 - the boundary: the long way finds it as well, and tells the client
            _log.exception("request.failed", path=head.path)
            return None

    def _offered(
        self, context: contextvars.Context, client: Client, head: PlainFields, body: bytes, remote: str | None
    ) -> Passage | None:
        """Return the request with the lease that is offered to it. Raises RequestError, AcquireError."""
        exchange = Exchange(head.path, hdrs.METH_POST, head.path, remote, teller_for(head.path))
        exchange.origin = checked_origin(head.headers, self._options)
        caller = self._clients.identify(head.headers, remote)
        exchange.client = caller.name
        with self._clients.admitted(caller, counts=True):
            wanted = peek(body)
            exchange.stream = wanted.stream
            exchange.model = model = self._runtime.known(wanted.model)
            if model is None:
                return None
            view = self._runtime.model(model)
            if may_be_written(head.path, view):
                return None
            offer = self._runtime.offer(model, *asked_of(head.path, head.headers, wanted, view))
            if offer is None or not is_on_loopback(address := urlsplit(offer.endpoint.base_url)):
                return None
        fields = f"{head.passed_on}{hdrs.AUTHORIZATION}: Bearer {offer.endpoint.api_key}\r\n"
        message = request_of(address, head.target, fields, amended(head.path, body, offer.amendments, view.preset))
        held = ExitStack()
        return Passage(
            client,
            exchange,
            message,
            connect=partial(self._ahead.take, address),
            take=partial(context.run, self._take, exchange, caller, offer, held),
            keeps=head.keeps,
            when_over=partial(context.run, self._end, exchange, address, held),
        )

    def _take(self, exchange: Exchange, caller: Caller, offer: Offer, held: ExitStack) -> Lease:
        """Return the lease that was offered, held with whatever else this request takes up."""
        held.enter_context(self._observer.counted(exchange))
        held.enter_context(self._clients.admitted(caller, counts=True))
        return held.enter_context(offer.take())

    def _end(self, exchange: Exchange, address: SplitResult, held: ExitStack) -> None:
        """Give the lease back, and tell of the request."""
        if exchange.broken is None and exchange.status != CLIENT_CLOSED_REQUEST:
            self._ahead.renew(address)
        held.close()
        self._observer.record(exchange)

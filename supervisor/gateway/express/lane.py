"""Who may take the short way: whoever the long way would let through, and whose runner has a free slot now.

Nothing is refused here. Whatever speaks against a request, the long way finds it again, and tells it.
"""

from __future__ import annotations

import contextvars
from contextlib import ExitStack
from functools import partial
from urllib.parse import urlsplit

import structlog
from aiohttp import hdrs

from supervisor.api.errors import AcquireError
from supervisor.api.runtime import Runtime
from supervisor.gateway.access import Clients
from supervisor.gateway.errors import RequestError
from supervisor.gateway.exchange import Exchange
from supervisor.gateway.express.passage import Client, Passage
from supervisor.gateway.express.plain import PlainHead
from supervisor.gateway.middleware import checked_origin
from supervisor.gateway.observing import Observer
from supervisor.gateway.openai import amended, asked_of
from supervisor.gateway.options import GatewayOptions
from supervisor.gateway.peek import peek
from supervisor.gateway.proxy import NOT_TO_RUNNER, forwarded
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

    def passage(self, client: Client, head: PlainHead, body: bytes, remote: str | None) -> Passage | None:
        """Return the request with the lease that it was granted, to begin; None, and nothing has happened, without."""
        if len(body) > self._options.max_body_bytes:
            return None
        context = contextvars.copy_context()  # who asks belongs to it alone
        try:
            return context.run(self._granted, context, client, head, body, remote)
        except (RequestError, AcquireError):
            return None
        except Exception:  # noqa: BLE001 - the boundary: the long way finds it as well, and tells the client
            _log.exception("request.failed", path=head.path)
            return None

    def _granted(
        self, context: contextvars.Context, client: Client, head: PlainHead, body: bytes, remote: str | None
    ) -> Passage | None:
        """Return the request with its lease. Raises RequestError, AcquireError."""
        exchange = Exchange(head.path, hdrs.METH_POST, head.path, remote, teller_for(head.path))
        with ExitStack() as counted:
            counted.enter_context(self._observer.counted(exchange))
            held = counted.enter_context(ExitStack())
            exchange.origin = checked_origin(head.headers, self._options)
            caller = self._clients.identify(head.headers, remote)
            exchange.client = caller.name
            held.enter_context(self._clients.admitted(caller, counts=True))
            wanted = peek(body)
            exchange.stream = wanted.stream
            exchange.model = model = self._runtime.known(wanted.model)
            if model is None:
                return None
            view = self._runtime.model(model)
            if may_be_written(head.path, view):
                return None
            acquired = self._runtime.acquire_at_once(model, *asked_of(head.path, head.headers, wanted, view))
            if acquired is None:
                return None
            lease = held.enter_context(acquired)
            endpoint, address = lease.endpoint, urlsplit(lease.endpoint.base_url)
            if not is_on_loopback(address):
                return None
            headers = forwarded(head.headers, without=NOT_TO_RUNNER)
            headers[hdrs.AUTHORIZATION] = f"Bearer {endpoint.api_key}"
            message = request_of(address, head.target, headers, amended(head.path, body, lease.amendments, view.preset))
            when_over = partial(context.run, self._end, exchange, held, counted.pop_all())
        return Passage(client, exchange, lease, address, message, keeps=head.keeps, when_over=when_over)

    def _end(self, exchange: Exchange, held: ExitStack, counted: ExitStack) -> None:
        """Give the lease back, and tell of the request."""
        with counted:
            held.close()
            self._observer.record(exchange)

"""HTTP as a pull needs it: TLS unless plain HTTP was allowed, redirects watched, ranges, every wait bounded.

Whoever may pull names a server, this machine's own network included, since registries stand there. What a server says
(where a blob lies, who hands out tokens) reaches less: from a public address no private one, and nobody a link-local
one, where clouds keep the secrets of a machine. Through a proxy, the proxy decides.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final
from urllib.request import getproxies, proxy_bypass

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from supervisor.api.store import RegistryFailed

MAX_REDIRECTS: Final = 5
CONNECT_WITHIN_S: Final = 30.0
STALL_S: Final = 30.0  # without a byte; Ollama gives as long
READ_AHEAD_BYTES: Final = 1 << 20
MAX_ANSWER_BYTES: Final = 4 << 20  # a manifest, a token, an error; Docker's registry takes no larger manifest
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_HEADERS: Final = {"Accept-Encoding": "identity", "User-Agent": "loadmaster"}


def open_session(stall_s: float = STALL_S) -> aiohttp.ClientSession:
    """Return a session for fetchers. A server may be silent for so long.

    What aiohttp takes from the environment by itself is more than the proxies: it would send a user's ``.netrc`` along.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_WITHIN_S, sock_read=stall_s)
    connector = aiohttp.TCPConnector(socket_factory=_socket_to, force_close=True)  # each address is looked at anew
    return aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=READ_AHEAD_BYTES)


class Transient(Exception):
    """It did not work this time; the text says why. Trying again may help."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose body is still to be read. ``linked`` are the headers of the redirect that led to it, if any."""

    response: aiohttp.ClientResponse
    linked: Mapping[str, str]


class Fetcher:
    """Asks one server. ``insecure`` allows plain HTTP; without it no redirect leads there either."""

    def __init__(self, session: aiohttp.ClientSession, *, insecure: bool) -> None:
        self._session = session
        self._insecure = insecure
        self._has_answered = False
        self._is_public = False  # whether an address of the first server is

    @asynccontextmanager
    async def get(self, url: URL, headers: Mapping[str, str]) -> AsyncIterator[Answer]:
        """Ask, and follow redirects; a header of authorization goes to the first server alone.

        Raises Transient where the server cannot be reached or breaks off, also while the answer is read, and
        RegistryFailed where it leads to where we may not go.
        """
        origin, linked = url.origin(), CIMultiDict[str]()
        sent = CIMultiDict({**_HEADERS, **headers})
        try:
            for _ in range(MAX_REDIRECTS + 1):
                self._check(url)
                _asking.set(self)
                if url.origin() != origin:
                    sent.pop("Authorization", None)
                async with self._session.get(
                    url, headers=sent, allow_redirects=False, proxy=_proxy_of(url)
                ) as response:
                    self._has_answered = True
                    location = response.headers.get("Location")
                    if response.status not in _REDIRECTS or location is None:
                        yield Answer(response, linked)
                        return
                    linked.update(response.headers)
                    url = _joined(url, location)
        except TimeoutError as error:
            raise Transient(f"{url.host} sent nothing for {self._session.timeout.sock_read:g} s") from error
        except aiohttp.ClientSSLError as error:
            plain = "; if it speaks plain HTTP, pull with insecure"
            raise Transient(f"{url.host} does not speak TLS as expected ({error.os_error}){plain}") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Transient(f"{url.host}: {str(error) or type(error).__name__}") from error
        raise RegistryFailed(f"{origin} redirects more than {MAX_REDIRECTS} times")

    def admit(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
        """Raise RegistryFailed where nothing of this address is to be asked."""
        if not self._has_answered:
            self._is_public |= address.is_global
        if address.is_link_local or (self._is_public and not address.is_global):
            raise RegistryFailed(f"{address} is of a private network, which a server beyond it may not lead into")

    def _check(self, url: URL) -> None:
        if url.host is None or url.scheme not in {"http", "https"}:
            raise RegistryFailed(f"{url} is no address of a web server")
        if url.scheme == "http" and not self._insecure:
            raise RegistryFailed(f"{url.origin()} is plain HTTP, which was not allowed: pull with insecure to allow it")


_asking: ContextVar[Fetcher] = ContextVar("asking")


def _socket_to(info: tuple[int, int, int, str, tuple[str, int]]) -> socket.socket:
    """Return a socket for an address that a name turned out to have. Raises RegistryFailed."""
    family, kind, protocol, _, (host, *_) = info
    address = ipaddress.ip_address(host)
    _asking.get().admit(getattr(address, "ipv4_mapped", None) or address)
    return socket.socket(family, kind, protocol)


def _proxy_of(url: URL) -> str | None:
    """Return the proxy that the environment has for this address, if any."""
    return None if proxy_bypass(str(url.host)) else getproxies().get(url.scheme)


def _joined(url: URL, location: str) -> URL:
    try:
        return url.join(URL(location))
    except ValueError as error:
        raise RegistryFailed(f"{url.origin()} redirects to what is no address") from error


async def read_answer(response: aiohttp.ClientResponse) -> bytes:
    """Return a small answer's body. Raises RegistryFailed where it is none."""
    data = b""
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise RegistryFailed(f"{response.url.host} answers with more than {MAX_ANSWER_BYTES >> 20} MiB")
    return data

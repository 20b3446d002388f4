"""HTTP as a pull needs it: TLS unless plain HTTP was allowed, redirects watched, ranges, every wait bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from supervisor.api import RegistryFailed

MAX_REDIRECTS: Final = 5
CONNECT_WITHIN_S: Final = 30.0
STALL_S: Final = 30.0  # without a byte; Ollama gives as long
READ_AHEAD_BYTES: Final = 1 << 20
MAX_ANSWER_BYTES: Final = 4 << 20  # a manifest, a token, an error; Docker's registry takes no larger manifest
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_HEADERS: Final = {"Accept-Encoding": "identity", "User-Agent": "loadmaster"}


def open_session(stall_s: float = STALL_S) -> aiohttp.ClientSession:
    """Return a session for fetchers: proxies of the environment count, and a server may be silent for so long."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_WITHIN_S, sock_read=stall_s)
    return aiohttp.ClientSession(timeout=timeout, read_bufsize=READ_AHEAD_BYTES, trust_env=True)


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
                if url.origin() != origin:
                    sent.pop("Authorization", None)
                async with self._session.get(url, headers=sent, allow_redirects=False) as response:
                    location = response.headers.get("Location")
                    if response.status not in _REDIRECTS or location is None:
                        yield Answer(response, linked)
                        return
                    linked.update(response.headers)
                    url = _joined(url, location)
        except TimeoutError as error:
            raise Transient(f"{url.host} sent nothing for {self._session.timeout.sock_read:g} s") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Transient(f"{url.host}: {str(error) or type(error).__name__}") from error
        raise RegistryFailed(f"{origin} redirects more than {MAX_REDIRECTS} times")

    def _check(self, url: URL) -> None:
        if url.host is None or url.scheme not in {"http", "https"}:
            raise RegistryFailed(f"{url} is no address of a web server")
        if url.scheme == "http" and not self._insecure:
            raise RegistryFailed(f"{url.origin()} is plain HTTP, which was not allowed: pull with insecure to allow it")


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

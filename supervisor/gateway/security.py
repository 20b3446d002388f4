"""Which pages and which paths may be asked: the browser's Origin and Host, and what is open to everybody.

A browser lets any page send requests to a service on this machine. Keys stop that where they are set; where they are
not, a foreign Origin is refused, and so is a Host that is not this machine (a page can let its own name resolve to
127.0.0.1 and is then its own origin: DNS rebinding).
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from supervisor.gateway.errors import Forbidden

# Reachable without a key: probes that tell nothing, and the page, which carries no data and has to ask for the key.
OPEN_PATHS: Final = frozenset({"/", "/healthz", "/readyz"})
# What changes the models on disk, or which of them are loaded: not for every key.
_STORE: Final = ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs/")
_MANAGING: Final = ("/manage/", *_STORE)
# What knows no model apart from another: a copy of a model has another name, a blob none, and a device is everybody's.
_UNDIVIDED: Final = (*_STORE, "/manage/yield", "/metrics")
# Pages of this machine itself and of desktop programs, as Ollama allows them.
LOCAL_ORIGINS: Final = (
    *(
        f"{scheme}://{host}{port}"
        for scheme in ("http", "https")
        for host in ("localhost", "127.0.0.1", "0.0.0.0", "[::1]")  # noqa: S104 - compared with, not listened on
        for port in ("", ":*")
    ),
    "app://*",
    "file://*",
    "tauri://*",
    "vscode-webview://*",
    "vscode-file://*",
)
# Names that a public DNS zone cannot hold.
LOCAL_SUFFIXES: Final = (".localhost", ".local", ".internal")
# Clients name the service in a handful of ways, and with each request again.
MAX_KEPT_HOSTS: Final = 64


def is_managing(path: str) -> bool:
    """Say whether a path changes what there is, rather than uses it."""
    return path.startswith(_MANAGING)


def is_undivided(path: str) -> bool:
    """Say whether a path reaches all models at once, so that it is not for a client of a few."""
    return path.startswith(_UNDIVIDED)


def check_origin(headers: Mapping[str, str], origins: tuple[str, ...]) -> str | None:
    """Return the Origin of the page that asks, None where no browser page does. Raises ``Forbidden``.

    ``origins`` are exact origins or patterns with ``*`` (setting ORIGINS).
    """
    origin = headers.get("Origin")
    if origin is None:
        return None
    same = origin.lower().partition("://")[2] == headers.get("Host", "").lower()
    if same or any(_matches(pattern, origin) for pattern in (*LOCAL_ORIGINS, *origins)):
        return origin
    raise Forbidden(f"pages of {origin[:200]} may not use this service; add it to ORIGINS to allow them")


def check_host(headers: Mapping[str, str], origins: tuple[str, ...]) -> None:
    """Raise ``Forbidden`` where the Host header names neither this machine nor a host in ORIGINS."""
    host = _named_host(headers.get("Host", "localhost"))
    if host is None or any(pattern == "*" or _matches(_host_of(pattern), host) for pattern in origins):
        return
    raise Forbidden(f"this service does not answer for the host {host[:200]}; add its origin to ORIGINS to allow it")


@functools.lru_cache(MAX_KEPT_HOSTS)
def _named_host(header: str) -> str | None:
    """Return the host that a Host header names; None for this machine by a name of its own, or by an address."""
    host = _host_of("//" + header)
    is_local = host == "localhost" or host.endswith(LOCAL_SUFFIXES) or _is_address(host)
    return None if is_local else host


def _host_of(url: str) -> str:
    """Return the host name in a URL, lower case and without port; empty where there is none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:  # unbalanced brackets
        return ""


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.IGNORECASE) is not None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

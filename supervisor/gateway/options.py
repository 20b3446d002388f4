"""What the composition root tells the gateway; values only, already checked by ``config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from config.keys_file import Client

# A conversation of 128k tokens is half a megabyte; a dozen photographs in base64 are the large case.
DEFAULT_MAX_BODY_BYTES: Final = 64 << 20
# Browsers send some 20 header fields.
MAX_HEADER_FIELDS: Final = 100
# A client that has connected sends its request's head at once; a slow network needs a second.
HEAD_TIMEOUT_S: Final = 20.0
# So long nothing of a body may come, or of an answer be taken, before the other side counts as gone: TCP repeats what
# was lost for minutes, but within half a minute something gets through on any network that is worth the name.
STALL_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """How the HTTP side behaves.

    ``api_keys`` and the keys of ``clients``: one of them is needed on everything but probes and the page; where there
    are none, none is, unless ``keys_needed``. ``origins``: browser origins that may use the service beside this
    machine's own, ``*`` within them is a wildcard. ``loopback_only``: the service listens on this machine only, so that
    a Host header naming another one is an attack. A connection is cut that brings no request within ``head_timeout_s``,
    or stalls for ``stall_timeout_s``.
    """

    version: str
    api_keys: tuple[str, ...] = ()
    clients: Mapping[str, Client] = field(default_factory=lambda: MappingProxyType({}))
    keys_needed: bool = False
    origins: tuple[str, ...] = ()
    loopback_only: bool = True
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    head_timeout_s: float = HEAD_TIMEOUT_S
    stall_timeout_s: float = STALL_TIMEOUT_S

    def __repr__(self) -> str:
        """Leave the keys out: options end up in logs."""
        return f"GatewayOptions(version={self.version!r}, api_keys=<{len(self.api_keys)}>, origins={self.origins!r})"

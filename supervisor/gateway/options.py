"""What the composition root tells the gateway; values only, already checked by ``config``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# A conversation of 128k tokens is half a megabyte; a dozen photographs in base64 are the large case.
DEFAULT_MAX_BODY_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """How the HTTP side behaves.

    ``api_keys``: one of them is needed on everything but probes and the page; empty: none is. ``origins``: browser
    origins that may use the service beside this machine's own, ``*`` within them is a wildcard. ``loopback_only``: the
    service listens on this machine only, so that a Host header naming another one is an attack.
    """

    version: str
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    loopback_only: bool = True
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES

    def __repr__(self) -> str:
        """Leave the keys out: options end up in logs."""
        return f"GatewayOptions(version={self.version!r}, api_keys=<{len(self.api_keys)}>, origins={self.origins!r})"

"""Who we are to a registry or a hub: what ``docker login`` and its like keep in their file, looked up by host.

The file has a secret for each host under ``auths``: a user and a password, or a token (``registrytoken``). It is read
anew for each pull, so that a login counts from the moment it was made. Programs that keep secrets elsewhere
(``credsStore``, ``credHelpers``) are not asked: the service starts none that a file names.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from supervisor.api.store import RegistryFailed

MAX_FILE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Login:
    """A value for the header of authorization: of a user (``Basic ...``), or a token (``Bearer ...``)."""

    value: str

    @property
    def is_token(self) -> bool:
        """Say whether it is a token, which is shown as it is; a user asks for one where tokens are wanted."""
        return self.value.startswith("Bearer ")

    def __repr__(self) -> str:
        """Leave the secret out."""
        return f"Login({self.value.partition(' ')[0]})"


@dataclass(frozen=True, slots=True)
class Logins:
    """The file, which need not be there."""

    file: Path

    def of(self, host: str) -> Login | None:
        """Return the login for a host (``host`` or ``host:port``). Raises RegistryFailed where the file is wrong."""
        document = self._document()
        for name, entry in _mapping(document.get("auths")).items():
            if _host(name) == host.lower() and entry:
                return self._login(host, _mapping(entry))
        return None

    def _login(self, host: str, entry: Mapping[str, Any]) -> Login | None:
        if token := entry.get("registrytoken"):
            return Login(f"Bearer {token}")
        try:
            user = base64.b64decode(str(entry.get("auth") or ""), validate=True)
        except (binascii.Error, ValueError) as error:
            raise RegistryFailed(f"{self.file}: the auth of {host} is no base64; log in again") from error
        if not user and entry.get("username"):
            user = f"{entry['username']}:{entry.get('password', '')}".encode()
        return Login(f"Basic {base64.b64encode(user).decode()}") if user else None

    def _document(self) -> Mapping[str, Any]:
        try:
            with self.file.open("rb") as file:
                return _mapping(json.loads(file.read(MAX_FILE_BYTES)))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RegistryFailed(f"the logins in {self.file} cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise RegistryFailed(f"{self.file} is no JSON: docker login HOST writes it") from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _host(name: str) -> str:
    """Return the host that an entry is for: older ones are addresses."""
    return name.lower().rpartition("://")[2].partition("/")[0]

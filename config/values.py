"""The values that settings hold where a plain number or text is not enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """A number of bytes for every device, with exceptions by device name. ``default`` None: no figure.

    The same two fields as ``planner.types.PerDevice``: ``PerDevice(value.default, value.by_name)`` converts it.
    """

    default: int | None = None
    by_name: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Address:
    """Where the service listens. An empty host in the environment is every interface, written ``0.0.0.0`` here."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return ``host:port``, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Say whether only this machine can reach it. A name other than localhost is not trusted to be."""
        if self.host.lower() == "localhost":
            return True
        from ipaddress import ip_address  # noqa: PLC0415 - 3 ms that the light door does not need

        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class RpcServer:
    """A llama.cpp RPC worker. ``cap_bytes`` limits each of its devices, since a CPU worker reports all RAM as free."""

    host: str
    port: int
    cap_bytes: int | None = None

    @property
    def endpoint(self) -> str:
        """Return ``host:port``, as ``--rpc`` takes it."""
        return f"{self.host}:{self.port}"

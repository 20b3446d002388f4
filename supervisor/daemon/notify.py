"""What systemd wants to hear from a ``Type=notify`` service (sd_notify(3)), over its datagram socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import anyio

MICROSECONDS: Final = 1_000_000


class Notifier:
    """Sends states to the socket that the environment names; does nothing where there is none.

    ``watchdog_interval_s`` is half of what systemd allows between two signs of life, None where it wants none.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # a leading @ stands for the zero byte of an abstract socket
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_interval_s = _watchdog_interval_s(environ)

    def ready(self, status: str) -> None:
        """Say that the service is up, or that a reload has ended, and in one line how."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """Say in one line what it does."""
        self._send(f"STATUS={status}")

    async def feed_watchdog(self) -> None:
        """Say that the event loop turns, for as long as it does and systemd wants to hear it."""
        while self.watchdog_interval_s is not None:
            self._send("WATCHDOG=1")
            await anyio.sleep(self.watchdog_interval_s)

    def reloading(self) -> None:
        """Say that the operator's files are being read again (sd_notify(3): with the time, for Type=notify-reload)."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the service winds down."""
        self._send("STOPPING=1\nSTATUS=Waiting for requests to finish")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # Nobody listening is systemd's trouble, not a reason to fail a request.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender, suppress(OSError):
            sender.setblocking(False)
            sender.sendto(text.encode(), self._address)


def _watchdog_interval_s(environ: Mapping[str, str]) -> float | None:
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or int(microseconds) == 0:
        return None
    if pid and pid != str(os.getpid()):
        return None  # meant for another process
    return int(microseconds) / MICROSECONDS / 2

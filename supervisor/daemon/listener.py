"""The socket that the service listens on, bound before anything is started, so that a taken port ends the start."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class CannotListen(Exception):
    """The address is taken, not ours, or not known; the text says which, and by whom it is taken."""


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Hold a socket bound to this address; nobody can connect before it is told to listen. Raises CannotListen."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CannotListen(f"{host}: no such address ({error.strerror}); check PLANNER_HOST") from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise CannotListen(_why(error, host, port)) from error
        yield listener


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by {_holder(port)}: stop it, or choose another port (PLANNER_HOST)"
    return f"cannot listen on {host}, port {port}: {error.strerror}; check PLANNER_HOST"


def _holder(port: int) -> str:
    """Return who listens on this port, as far as this user may know."""
    try:
        connections = psutil.net_connections("tcp")
        listening = (one for one in connections if one.status == psutil.CONN_LISTEN)
        pid = next(one.pid for one in listening if getattr(one.laddr, "port", None) == port)
        return "a process of another user" if pid is None else f"process {pid} ({psutil.Process(pid).name()})"
    except (psutil.Error, OSError, StopIteration):
        return "another process"

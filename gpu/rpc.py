"""llama.cpp's RPC workers (``ggml-rpc-server``): which devices they offer and what is free there.

A worker serves one client at a time and has no timeouts. A second client is connected by the kernel but not answered,
and if it goes away the usual way the worker later dies of SIGPIPE while it answers; so every probe here is bounded and
ends with a reset. A worker that a runner of ours holds must not be probed at all: see ``gpu.detect``.

The protocol: ggml/src/ggml-rpc/ggml-rpc.cpp. A request is ``u8 command, u64 length, body``, an answer ``u64 length,
body``, all little endian. There is neither authentication nor encryption.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from gpu import bounded
from gpu.card import Fault

PROBE_TIMEOUT_S: Final = 2.0  # a local network answers in milliseconds; a busy worker never does
# A worker that kept silent is left alone so long: of the time in which loads follow each other, one thirtieth is spent
# on asking it, and it is used again a minute after it is free at the latest.
REST_S: Final = 60.0
_RESOLVER_SLACK_S: Final = 0.1  # beyond the probe's own limit, so that its own reason is the one that is told
_LOOPBACK: Final = "127."  # whatever of it a worker listens at, we ask from 127.0.0.1
_SHORTEST_S: Final = 0.001  # a time limit of zero would mean not to wait at all
MAX_DEVICES: Final = 64  # of one worker; llama.cpp itself takes 16 of all
PINNED_PROTOCOL: Final = "7.0.0"  # RPC_PROTO_*_VERSION in ggml/include/ggml-rpc.h of planner.build.PINNED_COMMIT

_GET_ALIGNMENT: Final = 1
_GET_DEVICE_MEMORY: Final = 11
_HELLO: Final = 14
_DEVICE_COUNT: Final = 15
_CAPABILITIES_BYTES: Final = 24  # RPC_CONN_CAPS_SIZE; all zero: plain TCP. Protocols before 4.0 have none
_NUMBERED_DEVICES: Final = 3  # the major version from which a worker has several devices and is asked by number
_ONE_BUILD: Final = "run ggml-rpc-server of the same llama.cpp build as llama-server"
_CPU_ALIGNMENT: Final = 32  # TENSOR_ALIGNMENT, ggml/src/ggml-impl.h; CUDA, HIP and SYCL use 128


class WorkerState(StrEnum):
    """What a probe found. Only a ready worker's devices can be planned on."""

    READY = "ready"
    BUSY = "busy"  # it took the connection and does not answer: it serves another client
    UNREACHABLE = "unreachable"
    INCOMPATIBLE = "incompatible"  # it answers, but not in our llama.cpp's protocol


@dataclass(frozen=True, slots=True)
class WorkerDevice:
    """One device of a worker. ``is_cpu``: its "free" memory is that machine's whole RAM, in use or not."""

    total_bytes: int
    free_bytes: int
    alignment_bytes: int

    @property
    def is_cpu(self) -> bool:
        """Say whether this is a CPU device: it aligns as one and claims that nothing is in use."""
        return self.alignment_bytes == _CPU_ALIGNMENT and self.free_bytes == self.total_bytes


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker's answer. ``why_not`` is there wherever it is not ready. ``is_here``: it runs on this machine.

    ``address`` is where it was reached, in numbers: of two names for one worker it is the same. ``silent_at_s`` is when
    (``time.monotonic``) it had let us wait for nothing: to ask it again costs as much again.
    """

    endpoint: str
    state: WorkerState
    protocol: str | None = None
    devices: tuple[WorkerDevice, ...] = ()
    why_not: Fault | None = None
    is_here: bool = False
    address: str | None = None
    silent_at_s: float | None = None

    @property
    def is_resting(self) -> bool:
        """Say whether it kept silent so short a time ago that it is not worth while to ask it again."""
        return self.silent_at_s is not None and time.monotonic() < self.silent_at_s + REST_S


class _NotOurProtocolError(Exception):
    """The other side answers something that no worker of ours would."""


class _HungUpError(_NotOurProtocolError):
    """The other side ended the connection, as a worker does that is asked what it does not know."""


def probe_all(
    endpoints: Sequence[str], *, protocol: str | None, timeout_s: float = PROBE_TIMEOUT_S
) -> tuple[Worker, ...]:
    """Return the state of each worker, in order, asking all at the same time. Takes at most ``timeout_s``."""
    if not endpoints:
        return ()
    if len(endpoints) == 1:
        return (probe(endpoints[0], protocol=protocol, timeout_s=timeout_s),)
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - 4 ms that few workers or none need not pay

    with ThreadPoolExecutor(len(endpoints)) as pool:
        return tuple(pool.map(lambda endpoint: probe(endpoint, protocol=protocol, timeout_s=timeout_s), endpoints))


def probe(endpoint: str, *, protocol: str | None, timeout_s: float = PROBE_TIMEOUT_S) -> Worker:
    """Return one worker's state and devices. ``protocol`` is our llama.cpp's RPC version, None where not known."""
    deadline = time.monotonic() + timeout_s
    # The system's resolver of names has no time limit of ours.
    found = bounded.ask(f"rpc {endpoint}", lambda: _probe(endpoint, protocol, deadline), timeout_s + _RESOLVER_SLACK_S)
    if found is not None:
        return found
    what = f"cannot connect to {endpoint} (its name is not resolved in time)"
    why_not = Fault(what, "name it by its address in RPC_SERVERS")
    return Worker(endpoint, WorkerState.UNREACHABLE, why_not=why_not, silent_at_s=time.monotonic())


def _probe(endpoint: str, protocol: str | None, deadline: float) -> Worker:
    try:
        return _asked(endpoint, protocol, deadline, capabilities=_CAPABILITIES_BYTES)
    except _HungUpError:
        pass  # a worker of a protocol before 4.0 does so when it is greeted with capabilities
    except _NotOurProtocolError as error:
        return _not_a_worker(endpoint, error)
    try:
        return _asked(endpoint, protocol, deadline, capabilities=0)
    except _NotOurProtocolError as error:
        return _not_a_worker(endpoint, error)


def _not_a_worker(endpoint: str, error: Exception) -> Worker:
    why_not = Fault(f"{endpoint} does not speak llama.cpp's RPC protocol ({error})", _ONE_BUILD)
    return Worker(endpoint, WorkerState.INCOMPATIBLE, why_not=why_not)


def _asked(endpoint: str, protocol: str | None, deadline: float, *, capabilities: int) -> Worker:
    """Return what the worker answers over a connection of its own. Raises _NotOurProtocolError."""
    host, _, port = endpoint.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=max(deadline - time.monotonic(), _SHORTEST_S))
    except (OSError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        fix = "start ggml-rpc-server there or take it out of RPC_SERVERS"
        why_not = Fault(f"cannot connect to {endpoint} ({reason})", fix)
        silent_at_s = time.monotonic() if isinstance(error, TimeoutError) else None
        return Worker(endpoint, WorkerState.UNREACHABLE, why_not=why_not, silent_at_s=silent_at_s)
    with connection:
        # Close with a reset: a busy worker would later write to a socket that was closed in good order, and die.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            ours, theirs = connection.getsockname()[0], connection.getpeername()[0]
            worker = _ask(_Connection(connection, deadline), endpoint, protocol, capabilities)
        except TimeoutError:
            what = f"{endpoint} does not answer, as a worker does that serves another client"
            why_not = Fault(what, "end that, or start one worker for each")
            return Worker(endpoint, WorkerState.BUSY, why_not=why_not, silent_at_s=time.monotonic())
        except OSError as error:
            raise _HungUpError(error.strerror or str(error)) from None
        is_here = ours == theirs or theirs.startswith(_LOOPBACK)
        return replace(worker, is_here=is_here, address=f"{theirs}:{port}")


def _ask(connection: _Connection, endpoint: str, protocol: str | None, capabilities: int) -> Worker:
    padding = 4 if capabilities else 3  # the three numbers of the version, since 4.0 aligned
    hello = connection.request(_HELLO, bytes(capabilities), answer_bytes=padding + capabilities)
    theirs = f"{hello[0]}.{hello[1]}.{hello[2]}"
    if protocol is not None and not _speaks(theirs, protocol):
        why_not = Fault(f"{endpoint} speaks RPC protocol {theirs}, our llama-server {protocol}", _ONE_BUILD)
        return Worker(endpoint, WorkerState.INCOMPATIBLE, theirs, why_not=why_not)
    if hello[0] < _NUMBERED_DEVICES:
        return Worker(endpoint, WorkerState.READY, theirs, (_device(connection, b""),))
    (count,) = struct.unpack("<I", connection.request(_DEVICE_COUNT, b"", answer_bytes=4))
    if not 0 < count <= MAX_DEVICES:
        what = f"{endpoint} offers {count} devices, where 1 to {MAX_DEVICES} belong"
        why_not = Fault(what, "start it with -d and their names")
        return Worker(endpoint, WorkerState.INCOMPATIBLE, theirs, why_not=why_not)
    devices = tuple(_device(connection, struct.pack("<I", index)) for index in range(count))
    return Worker(endpoint, WorkerState.READY, theirs, devices)


def _speaks(theirs: str, ours: str) -> bool:
    """Mirror negotiate_hello: the major versions are equal, and the worker's minor one is not newer than ours."""
    their_major, their_minor = (int(part) for part in theirs.split(".")[:2])
    our_major, our_minor = (int(part) for part in ours.split(".")[:2])
    return their_major == our_major and their_minor <= our_minor


def _device(connection: _Connection, which: bytes) -> WorkerDevice:
    free, total = struct.unpack("<QQ", connection.request(_GET_DEVICE_MEMORY, which, answer_bytes=16))
    (alignment,) = struct.unpack("<Q", connection.request(_GET_ALIGNMENT, which, answer_bytes=8))
    return WorkerDevice(total, min(free, total), alignment)


class _Connection:
    """Requests over one socket, all of them within one deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._socket = connection
        self._deadline = deadline

    def request(self, command: int, body: bytes, *, answer_bytes: int) -> bytes:
        """Return the answer's body. Raises TimeoutError, OSError, _NotOurProtocolError."""
        self._limit()
        self._socket.sendall(struct.pack("<BQ", command, len(body)) + body)
        (length,) = struct.unpack("<Q", self._read(8))
        if length != answer_bytes:
            raise _NotOurProtocolError(f"an answer of {length} bytes where {answer_bytes} belong")
        return self._read(length)

    def _read(self, wanted: int) -> bytes:
        data = b""
        while len(data) < wanted:
            self._limit()
            part = self._socket.recv(wanted - len(data))
            if not part:
                raise _HungUpError("it hung up")
            data += part
        return data

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

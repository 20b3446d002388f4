"""RPC workers that are odd: other protocols, garbage, halves, silence, many devices or none, two names for one."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from file_trees import MEMINFO, host_tree

from config.values import RpcServer
from gpu import host
from gpu.detect import detect
from gpu.rpc import PINNED_PROTOCOL, REST_S, Worker, WorkerDevice, WorkerState, probe
from gpu.rpc_devices import RpcDevices, ask_workers, rpc_devices
from planner.types import HOST_POOL, Machine, MemoryPool

GIB = 1024**3
SHORT_S = 0.3  # what one that never answers is given
HELLO, COUNT, MEMORY, ALIGNMENT = 14, 15, 11, 1


@dataclass
class Scripted:
    """What a worker says: a protocol's greeting, or raw bytes in its place."""

    version: tuple[int, int, int] = (7, 0, 0)
    n_devices: int = 1
    free_bytes: int = 3 * GIB
    total_bytes: int = 4 * GIB
    alignment_bytes: int = 128
    raw: bytes | None = None
    silent_after: int = 1 << 30  # bytes, of all that it says
    port: int = field(init=False, default=0)

    @property
    def endpoint(self) -> str:
        """Return where it listens."""
        return f"127.0.0.1:{self.port}"

    def serve(self, listener: socket.socket) -> None:
        """Serve one client after the other until the listener is closed."""
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with closing(connection), suppress(OSError):
                    self._client(connection)

    def _client(self, connection: socket.socket) -> None:
        if self.raw is not None:
            connection.sendall(self.raw)
            connection.recv(1024)
            return
        left = self.silent_after
        while head := connection.recv(9, socket.MSG_WAITALL):
            command, length = struct.unpack("<BQ", head)
            body = connection.recv(length, socket.MSG_WAITALL) if length else b""
            answer = self._answer(command, body)
            if answer is None:
                return  # as ggml-rpc-server does with what it does not know
            data = struct.pack("<Q", len(answer)) + answer
            connection.sendall(data[:left])
            left -= len(data[:left])
            if left == 0:
                while connection.recv(1024):  # until the client gives up
                    pass

    def _answer(self, command: int, body: bytes) -> bytes | None:
        major = self.version[0]
        capabilities = b"" if major < 4 else bytes(24)
        index = b"" if major < 3 else body[:4]
        if command == HELLO:
            padding = b"" if major < 4 else b"\0"
            return bytes(self.version) + padding + capabilities if len(body) == len(capabilities) else None
        if command == COUNT and major >= 3:
            return struct.pack("<I", self.n_devices)
        if body != index or (major >= 3 and len(body) != 4):
            return None
        if command == MEMORY:
            return struct.pack("<QQ", self.free_bytes, self.total_bytes)
        return struct.pack("<Q", self.alignment_bytes) if command == ALIGNMENT else None


Start = Callable[[Scripted], Scripted]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that lets a scripted worker listen."""
    with ExitStack() as stack:

        def run(worker: Scripted) -> Scripted:
            listener = socket.create_server(("127.0.0.1", 0))
            worker.port = listener.getsockname()[1]
            thread = threading.Thread(target=worker.serve, args=(listener,))
            stack.callback(thread.join)
            stack.callback(listener.close)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            thread.start()
            return worker

        yield run


def look(*workers: Scripted, cap_bytes: int | None = None, protocol: str | None = PINNED_PROTOCOL) -> RpcDevices:
    servers = [RpcServer("127.0.0.1", worker.port, cap_bytes) for worker in workers]
    asked = ask_workers(servers, protocol=protocol)
    return rpc_devices(servers, asked, protocol=protocol, memory=host.HostMemory(64 * GIB, 32 * GIB))


@pytest.mark.parametrize("version", [(1, 0, 0), (2, 0, 0), (3, 6, 0), (4, 0, 0), (5, 1, 0), (7, 0, 0)])
def test_where_our_own_protocol_is_not_known_no_worker_is_called_incompatible(
    start: Start, version: tuple[int, int, int]
) -> None:
    worker = start(Scripted(version))
    found = look(worker, protocol=None)
    (device,) = found.devices
    assert (device.free_bytes, device.total_bytes) == (3 * GIB, 4 * GIB)
    (warning,) = found.warnings
    assert f"speaks protocol {'.'.join(map(str, version))}" in warning
    assert "not known" in warning


@pytest.mark.parametrize("version", [(1, 0, 0), (3, 6, 0), (6, 0, 0), (7, 1, 0), (8, 0, 0)])
def test_a_worker_of_another_protocol_is_incompatible_and_both_versions_are_told(
    start: Start, version: tuple[int, int, int]
) -> None:
    found = look(start(Scripted(version)))
    assert found.devices == ()
    (warning,) = found.warnings
    assert f"speaks RPC protocol {'.'.join(map(str, version))}, our llama-server 7.0.0" in warning


@pytest.mark.parametrize(
    "raw", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(8), b"\xff" * 64, struct.pack("<Q", 28) + b"abc"]
)
def test_garbage_is_one_line_and_no_worker(start: Start, raw: bytes) -> None:
    found = probe(start(Scripted(raw=raw)).endpoint, protocol=PINNED_PROTOCOL, timeout_s=SHORT_S)
    assert found.state in {WorkerState.INCOMPATIBLE, WorkerState.BUSY}
    assert found.why_not is not None
    assert "\n" not in str(found.why_not)


@pytest.mark.parametrize("n_bytes", [1, 8, 20, 36, 40, 60])
def test_one_that_falls_silent_anywhere_is_given_up_in_time(start: Start, n_bytes: int) -> None:
    found = probe(start(Scripted(silent_after=n_bytes)).endpoint, protocol=PINNED_PROTOCOL, timeout_s=SHORT_S)
    assert found.state is WorkerState.BUSY


def test_one_that_kept_silent_is_left_alone_for_a_while_unless_the_caller_insists(start: Start) -> None:
    worker = start(Scripted(silent_after=1))
    servers = [RpcServer("127.0.0.1", worker.port, None)]
    before = (probe(worker.endpoint, protocol=PINNED_PROTOCOL, timeout_s=SHORT_S),)
    worker.silent_after = 1 << 30
    assert ask_workers(servers, protocol=PINNED_PROTOCOL, before=before) == before
    insisted = ask_workers(servers, protocol=PINNED_PROTOCOL, before=before, insist=frozenset({worker.endpoint}))
    long_ago = (replace(before[0], silent_at_s=time.monotonic() - REST_S),)
    rested = ask_workers(servers, protocol=PINNED_PROTOCOL, before=long_ago)
    assert [one.state for one in (*insisted, *rested)] == [WorkerState.READY, WorkerState.READY]


def test_one_that_refuses_costs_no_time_and_is_asked_each_time() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    found = probe(f"127.0.0.1:{port}", protocol=PINNED_PROTOCOL)
    assert (found.state, found.is_resting) == (WorkerState.UNREACHABLE, False)


def test_sixty_four_devices_are_numbered_through_and_one_more_is_refused(start: Start) -> None:
    names = [device.name for device in look(start(Scripted(n_devices=64))).devices]
    assert names == [f"RPC{number}" for number in range(64)]
    for n_devices in (0, 65, 2**32 - 1):
        found = look(start(Scripted(n_devices=n_devices)))
        assert found.devices == ()
        assert f"offers {n_devices} devices" in found.warnings[0]


def test_figures_that_cannot_be_are_bounded(start: Start) -> None:
    worker = start(Scripted(free_bytes=2**64 - 1, total_bytes=8 * GIB))
    (device,) = look(worker).devices
    assert (device.free_bytes, device.total_bytes) == (8 * GIB, 8 * GIB)
    (capped,) = look(worker, cap_bytes=GIB).devices
    assert (capped.free_bytes, capped.total_bytes) == (GIB, GIB)


def test_a_worker_under_two_names_is_used_once(start: Start) -> None:
    worker = start(Scripted())
    servers = [RpcServer("127.0.0.1", worker.port), RpcServer("localhost", worker.port)]
    asked = ask_workers(servers, protocol=PINNED_PROTOCOL)
    found = rpc_devices(servers, asked, protocol=PINNED_PROTOCOL, memory=host.HostMemory(64 * GIB, 32 * GIB))
    assert [device.name for device in found.devices] == ["RPC0"]
    (absent,) = found.absent
    assert f"localhost:{worker.port} is the same worker as 127.0.0.1:{worker.port}" in str(absent.why_not)


def test_a_cpu_worker_at_this_machines_own_address_shares_the_hosts_memory_and_a_card_there_does_not(
    start: Start,
) -> None:
    processor = Scripted(alignment_bytes=32, free_bytes=64 * GIB, total_bytes=64 * GIB)
    card = Scripted(alignment_bytes=128)
    first, second = look(start(processor), start(card)).devices
    assert (first.pool, first.free_bytes) == (HOST_POOL, 32 * GIB)
    assert (second.pool == HOST_POOL, second.free_bytes) == (False, 3 * GIB)


def test_workers_on_one_far_machine_share_all_of_its_memory_and_not_the_least_that_one_of_them_may_use() -> None:
    processor = WorkerDevice(64 * GIB, 64 * GIB, 32)
    servers = [RpcServer("10.0.0.2", 1, 4 * GIB), RpcServer("10.0.0.2", 2, 8 * GIB)]
    asked = [Worker(one.endpoint, WorkerState.READY, PINNED_PROTOCOL, (processor,)) for one in servers]
    memory = host.HostMemory(64 * GIB, 32 * GIB)
    found = rpc_devices(servers, asked, protocol=PINNED_PROTOCOL, memory=memory)
    first, second = found.devices
    assert (first.free_bytes, second.free_bytes, first.pool) == (4 * GIB, 8 * GIB, second.pool)
    assert found.pools == (MemoryPool(first.pool, 64 * GIB, 64 * GIB),)
    known = Machine(found.devices, memory.device(), found.pools)
    held = rpc_devices(servers, (), protocol=PINNED_PROTOCOL, memory=memory, known=known)
    assert (held.devices, held.pools) == (found.devices, found.pools), "nobody was asked"


def test_a_worker_at_any_loopback_address_runs_on_this_machine() -> None:
    worker = Scripted(alignment_bytes=32, free_bytes=64 * GIB, total_bytes=64 * GIB)
    with closing(socket.create_server(("127.0.0.2", 0))) as listener:
        thread = threading.Thread(target=worker.serve, args=(listener,))
        thread.start()
        found = probe(f"127.0.0.2:{listener.getsockname()[1]}", protocol=PINNED_PROTOCOL)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert found.is_here


def test_the_host_is_read_after_a_worker_of_it_has_answered_since_that_gives_back_memory_first(
    start: Start, tmp_path: Path
) -> None:
    root = host_tree(tmp_path / "root")

    class Finishing(Scripted):
        def _answer(self, command: int, body: bytes) -> bytes | None:
            host_tree(root, **{"proc/meminfo": MEMINFO.replace("33554432", "50331648")})
            return super()._answer(command, body)

    worker = start(Finishing(alignment_bytes=32, free_bytes=64 * GIB, total_bytes=64 * GIB))
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""}
    servers = [RpcServer("127.0.0.1", worker.port, None)]
    machine = detect(environ, llama_server=tmp_path / "none", rpc_servers=servers, root=root).machine
    assert [device.free_bytes for device in (*machine.devices, machine.host)] == [48 * GIB, 48 * GIB]


def test_an_address_that_is_none_is_unreachable_in_one_line() -> None:
    for endpoint in ("[::1]:50052", "127.0.0.1:0", "127.0.0.1:99999", "256.1.1.1:1", "a..b:1", "x" * 300 + ":1"):
        found = probe(endpoint, protocol=None, timeout_s=SHORT_S)
        assert found.state is WorkerState.UNREACHABLE
        assert endpoint in str(found.why_not)

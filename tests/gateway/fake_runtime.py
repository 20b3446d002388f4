"""The one stand-in of these tests: a runtime that grants leases on llama-servers which run already."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import secrets
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import aiohttp
import pytest

from planner.types import Role
from supervisor.api.errors import UnknownModel, WrongRole
from supervisor.api.lease import Amendments, Endpoint, Lease, Offer
from supervisor.api.models import ModelView
from supervisor.api.need import NO_NEED, Need
from supervisor.api.runtime import LoadProgress, YieldResult
from supervisor.api.snapshot import Snapshot

LISTENING = re.compile(rb"listening on (http://127\.0\.0\.1:\d+)")
ROLE_FLAGS = {Role.CHAT: (), Role.EMBEDDING: ("--embeddings",), Role.RERANK: ("--reranking",)}


@dataclass
class LlamaServer:
    """A llama-server that is ready, with a key of its own."""

    process: subprocess.Popen[bytes]
    endpoint: Endpoint
    model: str
    role: Role
    log: queue.SimpleQueue[bytes]
    reader: threading.Thread

    async def wait_exit(self) -> str:
        """Return how the process ended, as soon as it has."""
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(self.process.pid)
        ended = asyncio.Event()
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        return f"llama-server (pid {self.process.pid}) was killed by SIGKILL"

    async def busy_slots(self) -> int:
        """Ask the server itself how many requests it works on."""
        url, headers = f"{self.endpoint.base_url}/slots", {"Authorization": f"Bearer {self.endpoint.api_key}"}
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, headers=headers) as answer,
        ):
            return sum(slot["is_processing"] for slot in await answer.json())

    async def wait_log(self, words: bytes) -> None:
        """Return once the server has logged these words.

        To ask it for its slots instead would keep it from noticing that a client has left: every result of any task
        restarts its wait (tools/server/server-queue.cpp, ``recv_with_timeout``).
        """
        while words not in (line := await asyncio.to_thread(self.log.get)):
            assert line, "the server ended before it said so"

    def stop(self) -> None:
        """Kill and reap it; idempotent."""
        self.process.kill()
        self.process.wait()
        self.reader.join()


def _read_log(stream: IO[bytes], log: queue.SimpleQueue[bytes]) -> None:
    """Keep the pipe empty, whoever looks at the lines; an empty one says that there are no more."""
    with stream:
        for line in stream:
            log.put(line)
    log.put(b"")


def start_llama_server(tools: Path, model: Path, role: Role = Role.CHAT, *, n_ctx: int = 2048) -> LlamaServer:
    """Start a llama-server on a port of the system's choice and return it as soon as it listens: it has loaded then."""
    key = secrets.token_hex(16)
    command = [
        str(tools / "llama-server"),
        "-m",
        str(model),
        "--alias",
        model.stem,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    command += [
        "-c",
        str(n_ctx),
        "-np",
        "1",
        "-lv",
        "4",
        "-t",
        "1",
        "--no-ui",
        "--offline",
        "--slots",
        "-fit",
        "off",
        *ROLE_FLAGS[role],
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={"LLAMA_API_KEY": key})
    assert process.stderr is not None
    log: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_log, args=(process.stderr, log), daemon=True)
    reader.start()
    while line := log.get():
        if found := LISTENING.search(line):
            return LlamaServer(process, Endpoint(found[1].decode(), key), model.stem, role, log, reader)
    pytest.fail(f"llama-server ended with {process.wait()} before it listened")


@dataclass(frozen=True, slots=True)
class FakeLease:
    """A lease on one of the servers."""

    endpoint: Endpoint
    model: str
    lost: asyncio.Future[str]
    amendments: Amendments | None = None

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Tell the story of the server's end."""
        self.lost.add_done_callback(lambda lost: None if lost.cancelled() else tell(lost.result()))


@dataclass
class FakeRuntime:
    """Grants leases on servers that run already, and counts them; ``refusal`` is raised instead where it is set.

    ``at_once``: whoever need not wait is granted in the same moment. ``endpoints`` are scripted servers; ``loss`` is
    settled with the story of their end.
    """

    servers: dict[str, LlamaServer] = field(default_factory=dict)
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    loss: asyncio.Future[str] = field(default_factory=asyncio.Future)
    refusal: Exception | None = None
    at_once: bool = True
    draining: bool = False
    not_ready: tuple[str, ...] = ()
    granted: int = 0
    released: int = 0
    returned: asyncio.Event = field(default_factory=asyncio.Event)
    needs: list[Need] = field(default_factory=list)
    gate: asyncio.Event | None = None
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    unloaded: list[str] = field(default_factory=list)
    loading: dict[str, LoadProgress] = field(default_factory=dict)
    headers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)
    scans: int = 0
    told_of_stops: list[Callable[[str], None]] = field(default_factory=list)

    def snapshot(self) -> Snapshot:
        """Return a machine-less snapshot that lists the servers' models."""
        names = {name: server.role for name, server in self.servers.items()}
        names |= dict.fromkeys(self.endpoints, Role.CHAT)
        models = tuple(_view(name, role) for name, role in names.items())
        return Snapshot(
            version="0.1.0",
            started_at=time.time(),
            now=time.time(),
            draining=self.draining,
            not_ready=self.not_ready,
            llama_server=None,
            llama_version=None,
            machine=None,
            runners=(),
            models=models,
            queue_length=0,
            queue_limit=512,
        )

    def model(self, model: str) -> ModelView:
        """Return a model of the snapshot."""
        return _view(model, self.servers[model].role if model in self.servers else Role.CHAT)

    async def resolve(self, name: str) -> str:
        """Know the servers' models by their names in any case."""
        name = {known.lower(): known for known in (*self.servers, *self.endpoints)}.get(name.lower(), name)
        if self.refusal is None and name not in self.servers and name not in self.endpoints:
            raise UnknownModel(f"there is no model {name!r}", closest=(*self.servers, *self.endpoints))
        return name

    def known(self, name: str) -> str | None:
        """Know what ``resolve`` knows."""
        return {one.lower(): one for one in (*self.servers, *self.endpoints)}.get(name.lower())

    def when_stopped(self, tell: Callable[[str], None]) -> None:
        """Remember whom to tell: these runners are stopped by nobody but the tests."""
        self.told_of_stops.append(tell)

    def offer(self, model: str, role: Role, need: Need = NO_NEED) -> Offer | None:
        """Grant where nothing stands in the way, unless nothing is to be granted at once."""
        is_free = self.at_once and self.gate is None and self.refusal is None
        if not is_free or (model in self.servers and self.servers[model].role is not role):
            return None
        with ExitStack() as unused:
            lease = self._lease(model, role, unused)
        return Offer(lease.endpoint, lease.amendments, partial(self._granted, model, role, need))

    @contextmanager
    def _granted(self, model: str, role: Role, need: Need) -> Iterator[Lease]:
        self.needs.append(need)
        self.waiting.set()
        self.granted += 1
        with ExitStack() as stack:
            stack.callback(self._take_back)
            yield self._lease(model, role, stack)

    @asynccontextmanager
    async def acquire(self, model: str, role: Role, need: Need = NO_NEED) -> AsyncIterator[Lease]:
        """Grant or refuse: at once, or once the gate is open."""
        self.waiting.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.refusal is not None:
            self.needs.append(need)
            raise self.refusal
        with self._granted(model, role, need) as lease:
            yield lease

    def _take_back(self) -> None:
        self.released += 1
        self.returned.set()

    async def unload(self, model: str) -> bool:
        """Remember who was to go; say whether it was there."""
        self.unloaded.append(model)
        return model in self.servers or model in self.endpoints

    def reset(self, model: str) -> bool:
        """Have nothing to forgive."""
        del model
        return False

    def progress(self, model: str) -> LoadProgress | None:
        """Tell what was put there for it to tell."""
        return self.loading.get(model)

    async def yield_memory(self, device: str, wanted_bytes: int, for_s: float) -> YieldResult:
        """Free nothing, since nothing is held."""
        return YieldResult(device, 0, wanted_bytes, 0, {}, time.time() + for_s)

    async def end_yield(self, device: str) -> bool:
        """End nothing, since nothing was yielded."""
        del device
        return False

    async def forget(self, model: str) -> None:
        """Remember who was to go."""
        self.unloaded.append(model)

    async def rescan(self) -> None:
        """Count how often it was asked."""
        self.scans += 1

    async def details(self, model: str, *, whole: bool = False) -> Mapping[str, Any]:
        """Return what was put there for this model."""
        del whole
        return self.headers[await self.resolve(model)]

    async def log_lines(self, model: str, *, follow: bool) -> AsyncGenerator[str, None]:
        """Yield what was put there for this model; there is nothing to follow."""
        del follow
        try:
            for line in self.logs[await self.resolve(model)]:
                yield line
        finally:
            self.returned.set()

    def _lease(self, model: str, role: Role, stack: ExitStack) -> FakeLease:
        if model in self.endpoints:
            return FakeLease(self.endpoints[model], model, self.loss)
        server = self.servers[model]
        if role != server.role:
            raise WrongRole(f"{model} is served for {server.role}, not for {role}")
        waiting = asyncio.create_task(server.wait_exit())
        stack.callback(waiting.cancel)
        return FakeLease(server.endpoint, model, waiting)


Serve = Callable[..., Awaitable[str]]


def _view(name: str, role: Role) -> ModelView:
    return ModelView(name, f"/models/{name}.gguf", role, "llama", 1000, 1_700_000_000.5, 4096, 2048)

"""A supervisor over real llama-servers, and its log to wait on."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
from event_log import WITHIN_S, EventLog
from running_service import Serve, Service, environment, serving
from supervising import Supervising
from terminal import Terminal

from supervisor.children import tending
from supervisor.children.hanging import PATIENCE, Patience
from supervisor.core.invariants import violations
from supervisor.core.types import Limits
from supervisor.inventory import Inventory
from supervisor.planning.process import PlanningProcess
from supervisor.runtime import RuntimeOptions, Supervisor

LIMITS = Limits(max_loaded_models=2, max_queue=4, keep_alive_s=60.0, load_timeout_s=30.0, drain_timeout_s=5.0)


@pytest.fixture
def anyio_backend() -> str:
    """Run coroutine tests on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture
def log() -> Iterator[EventLog]:
    """Return everything that is logged while the test runs."""
    entries = EventLog()
    structlog.configure(processors=[entries])
    yield entries
    structlog.reset_defaults()


@pytest.fixture
def models(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies these models into the test's models folder and returns it."""
    folder = tmp_path / "models"
    folder.mkdir()

    def gather(*paths: Path) -> Path:
        for path in paths:
            shutil.copy(path, folder)
        return folder

    return gather


@pytest.fixture
def supervising(tmp_path: Path, llama_tools: Path, free_environment: dict[str, str], log: EventLog) -> Supervising:
    """Return a function that runs a supervisor over a models folder; its invariants hold when it ends."""

    @asynccontextmanager
    async def run(
        folder: Path, environ: dict[str, str] | None = None, *, patience: Patience = PATIENCE, **limits: Any
    ) -> AsyncIterator[Supervisor]:
        environ = {**free_environment, "PLANNER_CONTEXT_LENGTH": "512", **(environ or {})}
        options = RuntimeOptions(
            version="test",
            limits=replace(LIMITS, **limits),
            state_dir=tmp_path / "state",
            stop_grace_s=5.0,
            n_ctx_per_slot=512,
            environ=environ,
            patience=patience,
        )
        tending.prepare(options.state_dir)
        async with PlanningProcess(environ) as planning, anyio.create_task_group() as tasks:
            supervisor = Supervisor(options, partial(Inventory, folder, planning))
            await tasks.start(supervisor.run)
            await supervisor.inventory.look_around()
            try:
                yield supervisor
                assert violations(supervisor._writer.pool) == []
            finally:
                supervisor.shut_down()
                supervisor.shut_down()
                with anyio.CancelScope(shield=True), anyio.fail_after(WITHIN_S):
                    await supervisor.wait_stopped()

    return run


@pytest.fixture
def environ(free_environment: dict[str, str], model_folder: Path, tmp_path: Path) -> dict[str, str]:
    return environment(free_environment, model_folder, tmp_path)


@pytest.fixture
def serve(environ: dict[str, str], llama_tools: Path) -> Iterator[Serve]:
    """Return a function that starts a service and waits until it is ready; it is killed after the test."""
    with ExitStack() as stack:

        def start(**settings: str) -> Service:
            return stack.enter_context(serving({**environ, **settings}))

        yield start


@pytest.fixture
def terminal(environ: dict[str, str]) -> Iterator[Terminal]:
    """Return a function that runs the command in a terminal of its own and returns its process and the other end."""
    with ExitStack() as stack:

        def run(service: Service, *words: str) -> tuple[subprocess.Popen[bytes], int]:
            ours, its = pty.openpty()
            stack.callback(os.close, ours)
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "planner", *words],
                    stdin=its,
                    stdout=its,
                    stderr=its,
                    env={**environ, "PLANNER_HOST": f"127.0.0.1:{service.port}", "TERM": "dumb"},
                    start_new_session=True,
                )
            )
            stack.callback(process.kill)
            os.close(its)
            return process, ours

        yield run


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Return a pipe: a launch of the ``held_back`` llama-server begins only once a line is written to it."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture
def held_back(gate: Path, llama_tools: Path, tmp_path: Path) -> Path:
    """Return what stands in front of the real llama-server and lets a launch begin only when the test says so."""
    path = tmp_path / "llama-server"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *--port*) read -r _ < {gate} ;; esac\nexec {llama_tools}/llama-server "$@"\n'
    )
    path.chmod(0o755)
    return path

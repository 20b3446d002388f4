"""A real runner that comes up on other devices than planned is stopped, and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from event_log import EventLog
from supervising import Supervising

from planner.types import Role
from supervisor.api.errors import LoadFailed

pytestmark = [pytest.mark.anyio, pytest.mark.llama]


@pytest.fixture
def swapping_server(llama_tools: Path, tmp_path: Path) -> Path:
    """Return a llama-server that takes two workers in the other order than it is told."""
    script = tmp_path / "bin/llama-server"
    script.parent.mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libggml-rpc.so").touch()
    script.write_text(
        f"""#!/bin/bash
arguments=("$@")
for i in "${{!arguments[@]}}"; do
    if [ "${{arguments[$i]}}" = --rpc ]; then
        IFS=, read -r first second <<< "${{arguments[$((i + 1))]}}"
        arguments[$((i + 1))]=$second,$first
    fi
done
exec {llama_tools}/llama-server "${{arguments[@]}}"
"""
    )
    script.chmod(0o755)
    return script


async def test_a_runner_on_other_devices_than_planned_is_stopped_and_says_why(
    supervising: Supervising,
    models: Callable[..., Path],
    chat_model: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    swapping_server: Path,
    log: EventLog,
) -> None:
    workers = [worker.endpoint for worker in rpc_workers(2)]
    environ = {
        "PLANNER_RPC_SERVERS": ",".join(f"{endpoint}=64MiB" for endpoint in workers),
        "PLANNER_SCHED_SPREAD": "1",
        "PLANNER_LLAMA_SERVER": str(swapping_server),
    }
    async with supervising(models(chat_model), environ) as supervisor:
        with pytest.raises(LoadFailed) as caught, anyio.fail_after(30):
            async with supervisor.acquire("tiny-chat", Role.CHAT):
                pytest.fail("it must not be served from the wrong devices")
        assert f"RPC0 is the worker {workers[1]}, planned was {workers[0]}" in str(caught.value)
        assert "not on the planned devices" in (await log.wait("load.failed"))["reason"]

"""A llama-server that waits at its gate: it becomes the one that is wanted, or ends, and loads nothing meanwhile."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import psutil
import pytest

from supervisor.children.process import Child
from supervisor.children.spare import Line, Spare, begun, gated, is_at_gate

pytestmark = pytest.mark.anyio

WITHIN_S = 30.0
GONE_WITHIN_S = 2.0  # what is promised for children of a killed service
LISTENS = b"listening on http"


@pytest.fixture
def line(llama_tools: Path, chat_model: Path) -> Line:
    """Return how a real llama-server is started."""
    return Line(gated((str(llama_tools / "llama-server"), "-m", str(chat_model), "--port", "0", "-c", "512")), {})


@asynccontextmanager
async def waiting(line: Line) -> AsyncIterator[Spare]:
    """Yield a spare that is held; whoever takes it ends it."""
    async with anyio.create_task_group() as tasks:
        spare = Spare(line, os.environ, "key")
        tasks.start_soon(spare.hold)
        yield spare
        spare.let_go()


async def until(holds: Callable[[], bool]) -> None:
    """Return once this holds."""
    with anyio.fail_after(WITHIN_S):
        while not holds():  # noqa: ASYNC110 - of this the kernel tells nobody
            await anyio.sleep(0.01)


def mapped_by(pid: int) -> str:
    """Return what the kernel says that this process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


async def serves(child: Child | None) -> bool:
    """Say whether the child says that it listens before it ends; it is ended."""
    assert child is not None
    said = b""
    with anyio.fail_after(WITHIN_S):
        while LISTENS not in said and (data := await child.read()):
            said += data
    child.kill()
    child.reap()
    child.close()
    return LISTENS in said


async def test_at_its_gate_it_has_opened_neither_its_model_nor_a_port(line: Line, chat_model: Path) -> None:
    async with waiting(line) as spare:
        await until(lambda: is_at_gate(spare.pid))
        process = psutil.Process(spare.pid)
        assert line.argv[0] in mapped_by(spare.pid)
        assert str(chat_model) not in mapped_by(spare.pid)
        assert str(chat_model) not in {one.path for one in process.open_files()}
        assert not process.net_connections()


async def test_taken_it_goes_on_to_serve(line: Line) -> None:
    async with waiting(line) as spare:
        await until(lambda: is_at_gate(spare.pid))
        assert spare.is_for(line)
        assert await serves(spare.take())


async def test_taken_before_it_has_come_to_its_gate_it_serves_too(line: Line) -> None:
    async with waiting(line) as spare:
        assert await serves(spare.take())


async def test_without_a_spare_the_same_line_serves(line: Line) -> None:
    assert await serves(begun(line, os.environ, "key"))


async def test_it_is_taken_once(line: Line) -> None:
    async with waiting(line) as spare:
        child = spare.take()
        assert not spare.is_for(line)
        assert spare.take() is None
        assert await serves(child)


async def test_it_is_for_its_own_line_alone(line: Line) -> None:
    async with waiting(line) as spare:
        assert spare.is_for(replace(line))
        assert not spare.is_for(replace(line, argv=(*line.argv, "--alias", "a")))
        assert not spare.is_for(replace(line, env={"CUDA_VISIBLE_DEVICES": "1"}))


async def test_it_is_for_no_program_that_was_replaced_since(tmp_path: Path) -> None:
    program, newer = tmp_path / "llama-server", tmp_path / "newer"
    for one in (program, newer):
        one.write_text("#!/bin/sh\nexec cat /dev/stdin\n")
        one.chmod(0o755)
    line = Line(gated((str(program),)), {})
    async with waiting(line) as spare:
        assert spare.is_for(line)
        newer.replace(program)
        assert not spare.is_for(line)


async def test_one_that_somebody_ended_cannot_be_taken(line: Line) -> None:
    async with waiting(line) as spare:
        process = psutil.Process(spare.pid)
        process.kill()
        await until(lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert spare.take() is None


async def test_let_go_it_ends(line: Line) -> None:
    async with waiting(line) as spare:
        process = psutil.Process(spare.pid)
    assert not process.is_running()


async def test_a_program_that_does_not_wait_is_found_out_and_ended(tmp_path: Path) -> None:
    """It might load what nothing was reserved for."""
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    spare = Spare(Line(gated((str(program),)), {}), os.environ, "key")
    process = psutil.Process(spare.pid)
    assert not await spare.hold(at_gate_within_s=0.1)
    assert not process.is_running()


@pytest.mark.parametrize("taken", [False, True], ids=["waiting", "taken"])
def test_its_death_is_tied_to_that_of_whoever_started_it(taken: bool) -> None:  # noqa: FBT001 - a case
    """Waiting or taken: whoever is killed takes it along."""
    program = (
        "import os, time; from supervisor.children.spare import Line, Spare\n"
        "spare = Spare(Line(('/bin/sleep', '60'), {}), os.environ, 'key')\n"
        f"child = {taken} and spare.take()\n"
        "print(spare.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        assert select.select([pidfd], [], [], GONE_WITHIN_S)[0]
        os.close(pidfd)


def test_a_program_that_has_one_file_for_its_input_and_its_output_is_at_no_gate() -> None:
    """Any may be started so, with /dev/null for both: only a pipe can be kept from ending."""
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as sleeping:
        try:
            assert not is_at_gate(sleeping.pid)
        finally:
            sleeping.kill()

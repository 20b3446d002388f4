"""A child that hangs is found out, one that works hard is left alone, and one that loads is seen to read."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from supervisor.children.hanging import HangWatch, Patience
from supervisor.children.health import LOADING, wait_serving
from supervisor.children.proc_stat import is_stopped
from supervisor.children.weights_read import WeightsRead

pytestmark = pytest.mark.anyio

SHORT = Patience(ask_every_s=0.01, answer_within_s=0.2, max_unanswered=2, idle_silence_s=0.5, busy_silence_s=60.0)
SILENT = 0
IDLE = "import sys; print(flush=True); sys.stdin.read()"
BURNING = "print(flush=True)\nwhile True: pass"


@contextmanager
def running(*command: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program; its first line has come when this returns."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, **options) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@asynccontextmanager
async def server(*silent: str, statuses: dict[str, list[int]] | None = None) -> AsyncIterator[tuple[str, list[str]]]:
    """Serve every path but the silent ones, and yield the address and the paths that were asked for."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not (line := await reader.readline()):  # whoever asked was cancelled
            writer.close()
            return
        path = line.decode().split()[1]
        asked.append(path)
        told = (statuses or {}).get(path, [])
        status = told.pop(0) if told else 200
        if path in silent or status == SILENT:
            await reader.read()  # until whoever asks hangs up
        else:
            writer.write(f"HTTP/1.1 {status} So\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        yield f"http://{host}:{port}", asked


async def test_a_stopped_llama_server_is_found_out(llama_tools: Path, chat_model: Path) -> None:
    """It still takes connections: the kernel does that for it."""
    flags = ("-m", str(chat_model), "--port", "0", "-c", "512", "-fit", "off", "--no-ui")
    with running(str(llama_tools / "llama-server"), *flags, env={"LLAMA_API_KEY": "key"}) as process:
        assert process.stdout is not None
        url = next(line for line in process.stdout if b"listening on" in line).split()[-1].decode()
        await wait_serving(url, "key")
        process.send_signal(signal.SIGSTOP)
        with anyio.fail_after(30):
            reason = await HangWatch(url, "key", process.pid, lambda: True, SHORT).wait_hung()
    assert "did not answer /health" in reason


async def test_who_is_not_busy_is_asked_nothing() -> None:
    looks = 0

    def is_busy() -> bool:
        nonlocal looks
        looks += 1
        if looks == 10:
            enough.set()
        return False

    enough = asyncio.Event()
    async with server("/health", "/slots") as (url, asked), anyio.create_task_group() as tasks:
        tasks.start_soon(HangWatch(url, "key", os.getpid(), is_busy, SHORT).wait_hung)
        await enough.wait()
        tasks.cancel_scope.cancel()
    assert asked == []


async def test_a_loop_that_is_silent_and_computes_nothing_hangs() -> None:
    with running(sys.executable, "-c", IDLE) as process:
        async with server("/slots") as (url, _):
            with anyio.fail_after(30):
                reason = await HangWatch(url, "key", process.pid, lambda: True, SHORT).wait_hung()
    assert "did not answer /slots for 0.5 s, and computed nothing" in reason


async def test_a_program_that_somebody_stopped_is_found_out_though_its_wrapper_is_not() -> None:
    wrapped = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {IDLE!r}])"
    with running(sys.executable, "-c", wrapped, start_new_session=True) as process:
        (worker,) = psutil.Process(process.pid).children()
        try:
            worker.suspend()
            async with server("/ready") as (url, asked):
                watch = HangWatch(url, "", process.pid, lambda: True, SHORT, program_health="/ready")
                with anyio.fail_after(30):
                    reason = await watch.wait_hung()
        finally:
            worker.kill()
    assert reason == "with requests in flight it was stopped (SIGSTOP), and did not answer /ready"
    assert set(asked) == {"/ready"}


async def test_a_program_that_is_silent_while_what_it_started_computes_is_left_alone() -> None:
    """For as long as a request may take, and not for ever."""
    patience = Patience(ask_every_s=0.01, answer_within_s=0.1, idle_silence_s=1.0, busy_silence_s=2.5)
    wrapped = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURNING!r}])"
    with running(sys.executable, "-c", wrapped, start_new_session=True) as process:
        (worker,) = psutil.Process(process.pid).children()
        try:
            async with server("/ready") as (url, _):
                watch = HangWatch(url, "", process.pid, lambda: True, patience, program_health="/ready")
                with anyio.fail_after(60):
                    reason = await watch.wait_hung()
        finally:
            worker.kill()
    assert reason.endswith("/ready for 2.5 s")


async def test_a_loop_that_is_silent_while_it_computes_is_left_alone() -> None:
    """For as long as a batch may take, and not for ever."""
    patience = Patience(ask_every_s=0.01, answer_within_s=0.1, idle_silence_s=1.0, busy_silence_s=2.5)
    with running(sys.executable, "-c", BURNING) as process:
        async with server("/slots") as (url, _):
            with anyio.fail_after(60):
                reason = await HangWatch(url, "key", process.pid, lambda: True, patience).wait_hung()
    assert reason.endswith("/slots for 2.5 s")


async def test_one_lost_answer_is_no_hang() -> None:
    """A machine that swaps may miss one; what counts is several in a row."""
    statuses = {"/health": [200, SILENT, 200, SILENT, 200, SILENT, 200]}
    with running(sys.executable, "-c", IDLE) as process:
        async with server(statuses=statuses) as (url, _), anyio.create_task_group() as tasks:
            enough = asyncio.Event()
            hung: list[str] = []

            def is_busy() -> bool:
                if not statuses["/health"]:
                    enough.set()
                return True

            async def watch() -> None:
                hung.append(await HangWatch(url, "key", process.pid, is_busy, SHORT).wait_hung())

            tasks.start_soon(watch)
            await enough.wait()
            tasks.cancel_scope.cancel()
    assert hung == []


async def test_a_server_serves_once_its_loop_answers() -> None:
    """That it listens is not enough, nor that its other threads do."""
    async with server(statuses={"/slots": [LOADING, LOADING, 200]}) as (url, asked):
        with anyio.fail_after(30):
            await wait_serving(url, "key")
    assert asked == ["/slots"] * 3


@pytest.mark.parametrize(
    "way",
    [
        "f.read(half); wait(); f.read()",
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); sum(m[:half:4096]); wait(); sum(m[::4096])",
    ],
)
def test_what_a_process_reads_of_its_weights_is_seen_either_way(tmp_path: Path, way: str) -> None:
    """Read or mapped, in the one file or in the parts of a split one; what it gives back does not count against it."""
    first, second = (tmp_path / f"model-0000{part}-of-00002.gguf" for part in (1, 2))
    first.write_bytes(bytes(48 << 20))
    second.write_bytes(bytes(16 << 20))
    program = (
        "import mmap, sys\nhalf = 32 << 20\ndef wait(): print(flush=True); sys.stdin.readline()\nwait()\n"
        f"with open({str(first)!r}, 'rb') as f: {way}; wait()"
    )
    with running(sys.executable, "-c", program) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        read = WeightsRead(process.pid, ["llama-server", "-m", str(first), "-c", "512"])
        fractions = [read.fraction()]
        for _ in range(2):
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            fractions.append(read.fraction())
        process.kill()
        process.wait()
        fractions.append(read.fraction())
    before, half, all_of_the_first, after = (fraction or 0.0 for fraction in fractions)
    assert before < 0.25 < half < 0.7 < all_of_the_first <= 1.0
    assert after == all_of_the_first


def test_where_nothing_can_be_seen_the_progress_is_not_known(tmp_path: Path) -> None:
    assert WeightsRead(os.getpid(), ["llama-server", "-hf", "somebody/something"]).fraction() is None
    assert WeightsRead(2**22 + 1, ["llama-server", "-m", str(tmp_path / "none.gguf")]).fraction() is None


def test_a_process_that_somebody_stopped_is_told_from_one_that_waits() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        try:
            assert not is_stopped(process.pid)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert is_stopped(process.pid)
        finally:
            process.kill()
    assert not is_stopped(process.pid)

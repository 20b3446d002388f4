"""What stands around the runtime: the lock, systemd's socket, the listening socket, the alarm, a child's log."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import anyio
import pytest
import structlog

from supervisor.children.logs import KEPT_LINES, MAX_LINE_BYTES, TAIL_LINES, ChildLog
from supervisor.daemon import listener, lock
from supervisor.daemon.notify import Notifier
from supervisor.timers import Alarm


def test_a_second_service_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    with (
        lock.held(tmp_path),
        pytest.raises(lock.AlreadyRunning, match=rf"process {os.getpid()}\).*PLANNER_STATE_DIR"),
        lock.held(tmp_path),
    ):
        pass
    with lock.held(tmp_path):
        pass


def test_a_disk_without_room_for_a_word_is_no_reason_to_serve_nobody(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with lock.held(tmp_path), pytest.raises(lock.AlreadyRunning, match="process unknown"), lock.held(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_of_every_state(tmp_path: Path, abstract: bool) -> None:  # noqa: FBT001 - a parameter
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + path if abstract else path)
        systemd.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": "@" + path if abstract else path, "WATCHDOG_USEC": "30000000"})
        assert notifier.watchdog_interval_s == 15.0
        notifier.ready("3 models")
        notifier.stopping()
        heard = [systemd.recv(1000).decode() for _ in range(2)]
    assert heard[0] == "READY=1\nSTATUS=3 models"
    assert heard[1].startswith("STOPPING=1\n")


@pytest.mark.anyio
async def test_the_watchdog_is_fed_by_the_event_loop_alone(tmp_path: Path) -> None:
    """The loop is hung for real, by this test, which waits within it for what only the loop can send."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "20000"})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(notifier.feed_watchdog)
            await anyio.wait_readable(systemd)
            systemd.settimeout(0.5)  # fifty times as long as between two signs of life
            assert systemd.recv(1000) == b"WATCHDOG=1"
            with pytest.raises(TimeoutError):
                systemd.recv(1000)
            await anyio.wait_readable(systemd)
            assert systemd.recv(1000) == b"WATCHDOG=1"
            tasks.cancel_scope.cancel()


def test_without_systemd_nothing_is_said(tmp_path: Path) -> None:
    Notifier({}).ready("up")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready("up")
    assert Notifier({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}).watchdog_interval_s is None


def test_a_taken_port_names_its_holder() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(listener.CannotListen, match=rf"port {port} .* process {os.getpid()} .*PLANNER_HOST"),
            listener.bound("127.0.0.1", port),
        ):
            pass


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(listener.CannotListen, match=r"192\.0\.2\.1.*PLANNER_HOST"), listener.bound("192.0.2.1", 1):
        pass


@pytest.mark.anyio
async def test_an_alarm_can_be_moved_while_it_is_awaited() -> None:
    alarm = Alarm()
    alarm.set(anyio.current_time() + 3600)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(alarm.wait)
            await anyio.wait_all_tasks_blocked()
            alarm.set(anyio.current_time())
    alarm.set(anyio.current_time() + 3600)
    alarm.set(None)
    with anyio.move_on_after(0) as gave_up:
        await alarm.wait()
    assert gave_up.cancelled_caught


def test_a_child_s_log_is_bounded_and_read_across_chunks() -> None:
    log = ChildLog({"RPC0[h:1]": "RPC3"}, structlog.get_logger().bind())
    text = b"0.00.001.000 I load_tensors: RPC0[h:1] model buffer size =     0.50 MiB\n"
    assert log.feed(text[:20]) == []
    assert len(log.feed(text[20:])) == 1
    log.feed(b"0.00.001.000 I sched_reserve: RPC0[h:1] compute buffer size =     1.00 MiB\n")
    log.feed(b"0.00.001.000 I llama_context:  CPU  output buffer size =     9.00 MiB\n")
    assert log.measured_bytes == {"RPC3": 3 * 2**19}
    log.feed(b"x" * (3 * MAX_LINE_BYTES))
    log.feed(b"\n" + b"line\n" * (2 * KEPT_LINES) + b"0.00.001.000 E srv  llama_server: boom")
    assert log.last_error is None
    log.close()
    assert log.last_error == "llama_server: boom"
    assert len(log.tail) == TAIL_LINES

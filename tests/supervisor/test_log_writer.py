"""A log that nobody reads stops nobody, and says afterwards what is missing."""

from __future__ import annotations

import os
import sys
from subprocess import PIPE, Popen

import pytest

from supervisor.daemon.log_writer import LogWriter

PIPE_BYTES = 1 << 16
LINE = "x" * 999 + "\n"


def test_a_pipe_that_nobody_reads_keeps_nobody_waiting_and_what_was_dropped_is_counted() -> None:
    """Far more than the pipe and the queue hold is taken at once; then it is read."""
    read_end, write_end = os.pipe()
    told: list[int] = []
    writer = LogWriter(write_end, told.append, max_waiting=10)
    written = 200
    for _ in range(written):
        assert writer.write(LINE) == len(LINE)
    received = b""
    while not told:
        received += os.read(read_end, PIPE_BYTES)
    writer.close()
    os.close(write_end)
    while more := os.read(read_end, PIPE_BYTES):
        received += more
    os.close(read_end)
    assert received.count(b"\n") + sum(told) == written
    assert sum(told) > 0


def test_the_last_lines_of_a_process_are_written() -> None:
    program = (
        "from supervisor.daemon import log_setup; import structlog; log_setup.configure('json', debug=False); "
        "[structlog.get_logger().info('said', number=n) for n in range(100)]"
    )
    with Popen([sys.executable, "-c", program], stderr=PIPE) as process:
        assert process.stderr is not None
        said = process.stderr.read()
    assert said.count(b'"event": "said"') == 100


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_failure_is_told_by_its_places_and_not_with_the_prompts_and_keys_at_hand(style: str) -> None:
    program = (
        f"from supervisor.daemon import log_setup; import structlog; log_setup.configure({style!r}, debug=False)\n"
        "def fail(prompt):\n    raise ValueError('it failed')\n"
        "try:\n    fail('a ' + 'secret')\nexcept ValueError:\n    structlog.get_logger().exception('told')\n"
    )
    with Popen([sys.executable, "-c", program], stderr=PIPE) as process:
        assert process.stderr is not None
        said = process.stderr.read()
    assert b"it failed" in said
    assert b"a secret" not in said


def test_a_process_whose_log_nobody_reads_still_ends() -> None:
    program = (
        "from supervisor.daemon import log_setup; import structlog; log_setup.configure('json', debug=False); "
        "[structlog.get_logger().info('said', number=n) for n in range(10_000)]"
    )
    with Popen([sys.executable, "-c", program], stderr=PIPE) as process:
        assert process.wait(60) == 0

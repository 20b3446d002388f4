"""A shell that waits to become a child: it becomes just that, or ends, and leaves nothing."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys

import pytest

from supervisor.children.process import find_setpriv
from supervisor.children.spare import Spare

GONE_WITHIN_S = 2.0  # what is promised for children of a killed service
TELL_ALL = (
    "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['ODD'], os.environ['OLD'], sys.stdin.read()]))"
)


@pytest.fixture(scope="module")
def setpriv() -> str:
    if (found := find_setpriv()) is None:
        pytest.skip("setpriv is not here")
    return found


def said(process: subprocess.Popen[bytes] | None) -> str:
    """Return what the process said until it ended."""
    assert process is not None
    assert process.stdout is not None
    with process:
        return process.stdout.read().decode()


def test_it_becomes_the_command_that_it_is_told(setpriv: str) -> None:
    """Spaces, quotes and what a shell would take for its own arrive as they are; its stdin is at its end."""
    odd = ["", "a b", "$HOME", "'", '"', "*", "-c", "a\nb", "x" * 5000]
    with Spare(setpriv, {"OLD": "old", "ODD": "not this"}) as spare:
        process = spare.become([sys.executable, "-c", TELL_ALL, *odd], {"ODD": "$(x) 'y'"})
        assert json.loads(said(process)) == [odd, "$(x) 'y'", "old", ""]


def test_it_becomes_one_child_only(setpriv: str) -> None:
    with Spare(setpriv, {}) as spare:
        assert said(spare.become(["/bin/echo", "once"], {})) == "once\n"
        assert spare.become(["/bin/echo", "twice"], {}) is None


@pytest.mark.parametrize(
    "program,why", [("/nowhere/llama-server", "No such file or directory"), ("/etc/passwd", "Permission denied")]
)
def test_a_program_that_cannot_be_run_says_so(setpriv: str, program: str, why: str) -> None:
    with Spare(setpriv, {}) as spare:
        process = spare.become([program], {})
        assert said(process) == f"cannot start {program}: {why}\n"
        assert process is not None
        assert process.returncode == 127


@pytest.mark.parametrize("told", [None, ["/bin/sleep", "60"]], ids=["waiting", "told"])
def test_its_death_is_tied_to_that_of_whoever_started_it(setpriv: str, told: list[str] | None) -> None:
    """Waiting or told: whoever is killed takes it along."""
    program = (
        "import psutil, time; from supervisor.children.spare import Spare\n"
        f"with Spare({setpriv!r}, {{}}) as spare:\n"
        f"    told = {told!r} and spare.become({told!r}, {{}})\n"
        "    print(psutil.Process().children()[0].pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        assert select.select([pidfd], [], [], GONE_WITHIN_S)[0]
        os.close(pidfd)

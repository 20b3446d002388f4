"""One child: heard, ended by force where it must be, never outliving whoever started it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from supervisor.children import strays
from supervisor.children.process import Child, describe_exit, find_setpriv, scrubbed, started, tied

GONE_WITHIN_S = 2.0  # what is promised for children of a killed service

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
CLEAN = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); "
    "print('up', flush=True); time.sleep(60)"
)
PARENT = (
    "import subprocess, sys; "
    "print(subprocess.Popen(['sleep', '60']).pid, flush=True)"  # it inherits our pipe, and outlives us
)
pytestmark = pytest.mark.anyio


@contextmanager
def running(program: str) -> Iterator[Child]:
    child = Child(started(tied([sys.executable, "-c", program], find_setpriv(), os.getpid()), scrubbed(os.environ)))
    try:
        yield child
    finally:
        child.close()


async def ended(child: Child) -> str:
    with anyio.fail_after(30):
        await child.wait_exit()
    return describe_exit(child.reap())


async def stopped(child: Child, grace_s: float) -> str:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child.stop, grace_s)
        return await ended(child)


async def test_what_a_child_writes_is_read_to_the_end() -> None:
    with running("import sys; print('out'); sys.stdout.flush(); print('err', file=sys.stderr)") as child:
        assert await ended(child) == "exit status 0"
        data = b""
        while more := await child.read():
            data += more
        assert data == b"out\nerr\n"


async def first_line(child: Child) -> bytes:
    """Return what the child said up to its first line's end, which may come in pieces."""
    said = b""
    while not said.endswith(b"\n"):
        more = await child.read()
        assert more, "it ended before it had said a line"
        said += more
    return said


async def test_a_child_that_obeys_ends_with_the_first_term() -> None:
    with running(CLEAN) as child:
        assert await first_line(child) == b"up\n"
        assert await stopped(child, grace_s=30.0) == "exit status 3"


async def test_a_child_that_ignores_term_is_killed() -> None:
    with running(DEAF) as child:
        assert await first_line(child) == b"deaf\n"
        assert await stopped(child, grace_s=0.05) == "killed by SIGKILL"


async def test_nothing_of_a_child_s_group_is_left_when_it_is_reaped() -> None:
    """A grandchild that held the pipe would keep us reading for ever."""
    with running(PARENT) as child:
        grandchild = os.pidfd_open(int(await first_line(child)))
        assert await ended(child) == "exit status 0"
        assert await child.read() == b""
        assert is_gone(grandchild)


def is_gone(pidfd: int) -> bool:
    try:
        return bool(select.select([pidfd], [], [], GONE_WITHIN_S)[0])
    finally:
        os.close(pidfd)


@pytest.fixture(params=["setpriv", "our own shim"])
def setpriv(request: pytest.FixtureRequest) -> str | None:
    """Return what ties a child's death to ours: the system's program, or None for our own."""
    if request.param != "setpriv":
        return None
    if (found := find_setpriv()) is None:
        pytest.skip("setpriv is not here")
    return found


@pytest.mark.parametrize(
    "program,why", [("/nowhere/llama-server", "No such file or directory"), ("/etc/passwd", "Permission denied")]
)
def test_a_program_that_cannot_be_run_says_so(setpriv: str | None, program: str, why: str) -> None:
    answer = subprocess.run(tied([program], setpriv, os.getpid()), capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (127, f"cannot start {program}: {why}\n")


def test_arguments_and_environment_arrive_as_they_are(setpriv: str | None) -> None:
    """Spaces, quotes and what a shell would take for its own."""
    odd = ["", "a b", "$HOME", "'", '"', "*", "-c", "a\nb"]
    program = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['ODD']]))"
    command = tied([sys.executable, "-c", program, *odd], setpriv, os.getpid())
    answer = subprocess.run(command, capture_output=True, check=True, env={"ODD": "$(x) 'y'"})
    assert json.loads(answer.stdout) == [odd, "$(x) 'y'"]


def test_a_child_dies_with_its_parent_however_that_dies() -> None:
    program = (
        "import os, sys, time; from supervisor.children.process import find_setpriv, started, tied; "
        f"command = tied([sys.executable, '-c', {DEAF!r}], find_setpriv(), os.getpid()); "
        "print(started(command, {}).pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        assert is_gone(child)


def test_a_child_whose_parent_was_faster_in_dying_does_not_start(setpriv: str | None) -> None:
    """The parent's id is checked after the death was tied: no moment is left in between."""
    answer = subprocess.run(tied(["/bin/true"], setpriv, 1), capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (127, "cannot start /bin/true: the service is gone\n")


def test_death_is_tied_either_way(setpriv: str | None) -> None:
    """To that of whoever starts it, however that dies."""
    command = tied(["/bin/sleep", "60"], setpriv, 0)
    at = command.index("0")
    program = (
        f"import os, subprocess, time; command = {command!r}; command[{at}] = str(os.getpid()); "
        "print(subprocess.Popen(command).pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(pid := int(parent.stdout.readline()))
        while Path(f"/proc/{pid}/comm").read_text() != "sleep\n":
            pass
        parent.kill()
        assert is_gone(child)


def test_what_would_change_a_runner_behind_the_plan_s_back_is_scrubbed() -> None:
    kept = {"PATH": "/bin", "LLAMA_CACHE": "/c", "HOME": "/h", "LD_LIBRARY_PATH": "/l"}
    gone = {
        "LLAMA_ARG_CTX_SIZE": "1",
        "LLAMA_API_KEY": "k",
        "LLAMA_SERVER_ROUTER_PORT": "1",
        "AIP_HTTP_PORT": "1",
        "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1",
        "NOTIFY_SOCKET": "/run/n",
        "PLANNER_API_KEYS": "secret",
        "OLLAMA_HOST": "x",
    }
    assert scrubbed({**kept, **gone}) == {**kept, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_what_the_operator_hides_stays_hidden_and_numbers_count_as_when_the_machine_was_looked_at() -> None:
    operators = {"CUDA_VISIBLE_DEVICES": "1", "GGML_VK_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert scrubbed(operators) == {**operators, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(
    "returncode, words",
    [(0, "exit status 0"), (1, "exit status 1"), (-9, "killed by SIGKILL"), (-6, "killed by SIGABRT")],
)
def test_an_exit_in_words(returncode: int, words: str) -> None:
    assert describe_exit(returncode) == words


# ---------------------------------------------------------------------------------------------------------------------
# Strays


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_a_child_of_an_earlier_life_is_ended(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    strays.record(tmp_path, sleeper.pid, "m")
    (ended,) = strays.end_all(tmp_path)
    assert (ended.pid, ended.model) == (sleeper.pid, "m")
    assert sleeper.wait() == -signal.SIGKILL
    assert strays.end_all(tmp_path) == []


def test_a_process_that_only_has_the_same_id_is_left_alone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    strays.record(tmp_path, sleeper.pid, "m")
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace('"start_ticks": ', '"start_ticks": 1'))
    assert strays.end_all(tmp_path) == []
    assert sleeper.poll() is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text("{")
    assert strays.end_all(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_reaped_child_is_forgotten(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    strays.record(tmp_path, sleeper.pid, "m")
    strays.forget(tmp_path, sleeper.pid)
    assert strays.end_all(tmp_path) == []
    assert sleeper.poll() is None

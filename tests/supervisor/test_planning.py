"""The planning process: asked, killed, hung, replaced."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import psutil
import pytest
from event_log import EventLog
from store_layout import HOST, put_model
from supervising import Holding, Supervising

from planner.types import Role
from planner.units import GIB, MIB
from supervisor.inventory import Inventory
from supervisor.planning.messages import LookAhead, ScanModels, Situation
from supervisor.planning.process import PlanningFailed, PlanningProcess
from supervisor.store.folder import StoreFolder


def worker() -> psutil.Process:
    """Return the planning process of this test."""
    (found,) = (one for one in psutil.Process().children() if "supervisor.planning.worker" in one.cmdline())
    return found


async def killed_in_the_middle(asking: Callable[[], Awaitable[object]]) -> None:
    """Ask while the worker is held up, and kill it -9 before it can answer."""
    held_up = worker()
    held_up.suspend()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(asking)
        await anyio.wait_all_tasks_blocked()
        held_up.send_signal(signal.SIGKILL)
    assert not held_up.is_running(), "it is reaped"


@pytest.mark.anyio
async def test_a_worker_that_is_killed_is_replaced_and_whoever_asked_it_is_told_nothing(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    async with PlanningProcess({}) as planning:

        async def ask() -> None:
            assert await planning.ask(ScanModels(tmp_path)) == ()

        await ask()
        first = worker().pid
        await killed_in_the_middle(ask)
        assert worker().pid != first
        await ask()
    assert set(psutil.Process().children()) == before, "none is left behind"


@pytest.mark.anyio
async def test_a_worker_that_ends_each_time_gives_one_clear_error(tmp_path: Path) -> None:
    async with PlanningProcess({"PYTHONHOME": str(tmp_path)}) as planning:
        with pytest.raises(PlanningFailed, match=r"ended \(exit status 1\), twice, .*try again"):
            await planning.ask(ScanModels(tmp_path))


@pytest.mark.anyio
async def test_a_worker_that_hangs_is_given_up_and_replaced(tmp_path: Path) -> None:
    async with PlanningProcess({}, answer_within_s=5.0) as planning:
        await planning.ask(ScanModels(tmp_path))
        hung = worker()
        hung.suspend()
        with pytest.raises(PlanningFailed, match="did not answer within 5 s"):
            await planning.ask(ScanModels(tmp_path))
        assert not hung.is_running()
        assert await planning.ask(ScanModels(tmp_path)) == ()


@pytest.mark.anyio
async def test_a_question_that_is_given_up_does_not_spoil_the_next_answer(tmp_path: Path) -> None:
    (tmp_path / "noise.gguf").write_bytes(b"noise")
    async with PlanningProcess({}) as planning:
        assert len(await planning.ask(ScanModels(tmp_path))) == 1  # type: ignore[arg-type]
        worker().suspend()
        with anyio.CancelScope() as given_up:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(planning.ask, ScanModels(tmp_path))
                await anyio.wait_all_tasks_blocked()
                given_up.cancel()
        (tmp_path / "noise.gguf").unlink()
        assert await planning.ask(ScanModels(tmp_path)) == ()


@pytest.mark.anyio
async def test_models_that_come_and_go_are_noticed_without_being_asked_for(
    tmp_path: Path, chat_model: Path, log: EventLog
) -> None:
    async with PlanningProcess({}) as planning, anyio.create_task_group() as tasks:
        inventory = Inventory(tmp_path, planning, Holding(), rescan_every_s=0.0)
        await inventory.look_around()
        assert inventory.entries == ()
        shutil.copy(chat_model, tmp_path)
        tasks.start_soon(inventory.keep_looking)
        assert (await log.wait("models.scanned", count=2))["models"] == 1
        tasks.cancel_scope.cancel()


@pytest.mark.llama
@pytest.mark.anyio
async def test_a_file_or_a_stores_model_that_came_is_noticed_long_before_everything_is_read_again(
    tmp_path: Path, chat_model: Path, log: EventLog
) -> None:
    folder, store = tmp_path / "models", StoreFolder(tmp_path / "store")
    folder.mkdir()
    async with PlanningProcess({}) as planning, anyio.create_task_group() as tasks:
        inventory = Inventory(folder, planning, Holding(), store=store, rescan_every_s=math.inf)
        await inventory.look_around()
        assert inventory.not_ready == ()
        tasks.start_soon(inventory.keep_looking)
        put_model(store.root, f"{HOST}/library/of-a-store/1", [("model", chat_model)])
        assert (await log.wait("models.scanned", count=2))["models"] == 1
        shutil.copy(chat_model, folder)
        assert (await log.wait("models.scanned", count=3))["models"] == 2
        tasks.cancel_scope.cancel()


@pytest.mark.llama
@pytest.mark.anyio
async def test_a_request_whose_planner_is_killed_is_served(
    supervising: Supervising, models: Callable[..., Path], chat_model: Path
) -> None:
    async with supervising(models(chat_model)) as supervisor:

        async def request() -> None:
            async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
                assert lease.model == "tiny-chat"

        await killed_in_the_middle(request)


CARD = """card NVIDIA_GeForce_RTX_4090 GPU-aaaa 0 41 0
memory 25757220864 393216000 {used}
"""
LISTED = "Available devices:\\n  CUDA0: NVIDIA GeForce RTX 4090 (24189 MiB, 24000 MiB free)\\n"


@pytest.fixture
def stubbed(tmp_path: Path, nvml_folder: Path) -> dict[str, str]:
    """Return an environment with one card, as ``FAKE_NVML`` says, and a llama-server that lists it while it is there.

    The llama-server writes what it is asked to ``asked``.
    """
    cards, server = tmp_path / "nvml.txt", tmp_path / "llama-server"
    server.write_text(f"""#!/bin/sh
echo $1 >> {tmp_path}/asked
[ $1 = --version ] && echo 'version: 1 (abc)' && exit
grep -q error {cards} || printf '{LISTED}'
""")
    server.chmod(0o755)
    cards.write_text(CARD.format(used=0))
    return {
        "PLANNER_LLAMA_SERVER": str(server),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "LD_LIBRARY_PATH": str(nvml_folder),
        "FAKE_NVML": str(cards),
    }


# What a planning process sees of a card while a runner is on it, and once that has gone.
LOOKS = """
import os
import sys

from planner.units import MIB
from supervisor.planning.messages import LookAround, Situation
from supervisor.planning.worker import Worker

worker, runner = Worker(os.environ, settle_within_s=float(sys.argv[1])), {"CUDA0": 40 * MIB}
for held, gone in ((runner, {}), ({}, runner)):
    print(worker.answer(LookAround(Situation(None, held, {}, gone))).machine.devices[0].free_bytes // MIB)
"""


@pytest.mark.parametrize(
    "readings_mib, settle_within_s, believed_mib", [((50, 50, 55, 88), 60.0, 88), ((50,), 0.1, 50)]
)
def test_a_plan_waits_for_the_driver_to_show_that_a_runner_has_gone_but_not_for_ever(
    stubbed: dict[str, str], readings_mib: tuple[int, ...], settle_within_s: float, believed_mib: int
) -> None:
    """A driver that keeps the bytes holds up one plan, within its bound."""
    card, _ = CARD.splitlines()
    memory = (f"memory {100 * MIB} 0 {(100 - free_mib) * MIB}" for free_mib in readings_mib)
    Path(stubbed["FAKE_NVML"]).write_text("\n".join((card, *memory)) + "\n")
    command = [sys.executable, "-c", LOOKS, str(settle_within_s)]
    done = subprocess.run(command, env=os.environ | stubbed, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["50", str(believed_mib)]


# What is free on a card in the plans of a planning process that was told of them before, or was not.
AHEAD = """
import math
import os
import sys

from planner.types import PlanRequest
from planner.units import MIB
from supervisor.core.types import ModelId
from supervisor.planning.messages import MakePlan, Situation
from supervisor.planning.worker import Worker

worker = Worker(os.environ, ahead_for_s=float(sys.argv[2]))
nobody, somebody = (Situation(None, held, {}, {}) for held in ({}, {"CUDA0": MIB}))
for told, asked in ((None, nobody), (nobody, nobody), (None, nobody), (nobody, somebody)):
    if told:
        worker.look_ahead(told)
    question = MakePlan(ModelId("a"), sys.argv[1], PlanRequest(n_ctx=512), asked, (), 0, (), {}, {})
    print(worker.answer(question).surroundings.machine.devices[0].free_bytes // MIB)
"""


@pytest.mark.parametrize("ahead_for_s, seen_mib", [(math.inf, (50, 51, 52, 54)), (0.0, (50, 52, 53, 55))])
def test_a_plan_is_made_for_what_was_seen_ahead_once_and_only_where_nothing_has_changed_since(
    stubbed: dict[str, str], chat_model: Path, ahead_for_s: float, seen_mib: tuple[int, ...]
) -> None:
    """Each look finds a MiB more."""
    card, _ = CARD.splitlines()
    memory = (f"memory {100 * MIB} 0 {(100 - free_mib) * MIB}" for free_mib in range(50, 60))
    Path(stubbed["FAKE_NVML"]).write_text("\n".join((card, *memory)) + "\n")
    command = [sys.executable, "-c", AHEAD, str(chat_model), str(ahead_for_s)]
    done = subprocess.run(command, env=os.environ | stubbed, capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(map(str, seen_mib))


@pytest.mark.anyio
async def test_a_worker_that_is_told_what_comes_answers_what_it_is_asked_and_nothing_else(tmp_path: Path) -> None:
    """Told twice, told while there is none, and told when it has died."""
    ahead = LookAhead(Situation(None, {}, {}, {}))
    async with PlanningProcess({}) as planning:
        await planning.tell(ahead)
        for _ in range(2):
            assert await planning.ask(ScanModels(tmp_path)) == ()
            await planning.tell(ahead)
            await planning.tell(ahead)
        assert await planning.ask(ScanModels(tmp_path)) == ()
        killed = worker()
        killed.kill()
        killed.wait()
        await planning.tell(ahead)
        assert await planning.ask(ScanModels(tmp_path)) == ()


@pytest.mark.anyio
async def test_a_load_that_fails_before_it_took_anything_is_not_waited_for(
    tmp_path: Path, stubbed: dict[str, str]
) -> None:
    """At rest, while it loads and once it has failed the driver calls the same free; nobody asks a fourth time."""
    card, _ = CARD.splitlines()
    memory = (f"memory {100 * MIB} 0 {(100 - free_mib) * MIB}" for free_mib in (50, 50, 50, 77))
    (tmp_path / "nvml.txt").write_text("\n".join((card, *memory)) + "\n")
    async with PlanningProcess(stubbed) as planning:
        runners, load = Holding(), {"CUDA0": 40 * MIB}
        inventory = Inventory(tmp_path, planning, runners)
        await inventory.look_around()
        runners.held = runners.promised = load
        await inventory.refresh({})
        runners.held = runners.promised = {}
        await inventory.refresh(load)
        assert inventory.machine is not None
        assert inventory.machine.device("CUDA0").free_bytes == 50 * MIB


async def seen(inventory: Inventory) -> list[tuple[str, int]]:
    """Look at what is shown, let it be followed, and return each device with what is free there."""
    inventory.was_shown()
    await inventory.follow_what_is_shown()
    assert inventory.machine is not None
    return [(str(one.name), one.free_bytes or 0) for one in inventory.machine.devices]


@pytest.mark.anyio
async def test_what_is_shown_is_read_again_when_it_is_old_and_not_while_nobody_looks(
    tmp_path: Path, stubbed: dict[str, str]
) -> None:
    async with PlanningProcess(stubbed) as planning:
        young, old = Inventory(tmp_path, planning, Holding()), Inventory(tmp_path, planning, Holding(), shown_for_s=0.0)
        await young.look_around()
        await old.look_around()
        before, asked = old.machine, (tmp_path / "asked").read_text()
        (tmp_path / "nvml.txt").write_text(CARD.format(used=20 * GIB))
        await old.follow_what_is_shown()
        assert old.machine == before, "nobody looked"
        busy = 25757220864 - 393216000 - 20 * GIB
        assert await seen(young) != [("CUDA0", busy)], "its reading is not old yet"
        assert await seen(old) == [("CUDA0", busy)]
        assert (tmp_path / "asked").read_text() == asked, "llama-server would make a context on every card"


@pytest.mark.anyio
async def test_a_card_that_falls_off_the_bus_and_comes_back_is_followed_by_what_is_shown(
    tmp_path: Path, stubbed: dict[str, str]
) -> None:
    async with PlanningProcess(stubbed) as planning:
        inventory = Inventory(tmp_path, planning, Holding(), shown_for_s=0.0)
        await inventory.look_around()
        for error, names, n_warnings in (("", ["CUDA0"], 0), ("error 15\n", [], 1), ("", ["CUDA0"], 0)):
            (tmp_path / "nvml.txt").write_text(CARD.format(used=0) + error)
            assert [name for name, _ in await seen(inventory)] == names
            assert inventory.machine is not None
            assert len(inventory.machine.warnings) == n_warnings

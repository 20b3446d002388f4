"""The runtime with real llama-servers: models come, serve, die, come back and go."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import aiohttp
import anyio
import psutil
import pytest
import tiny_models
from event_log import EventLog
from supervising import Models, Supervising, story_of_loss

from planner.types import Role
from supervisor.api.errors import (
    BadModel,
    CannotFit,
    LoadFailed,
    PlannerFailed,
    QueueFull,
    ShuttingDown,
    UnknownDevice,
    UnknownModel,
    WrongRole,
)
from supervisor.api.lease import Lease
from supervisor.api.need import LoadOptions, Need
from supervisor.api.snapshot import RunnerView
from supervisor.hanging import Patience
from supervisor.runtime import Supervisor

pytestmark = [pytest.mark.anyio, pytest.mark.llama]

PRINTED_TO = 0.01 * 1024 * 1024  # llama-server prints MiB with two decimals


class Worker(Protocol):
    endpoint: str

    def stop(self) -> None: ...


async def ask(lease: Lease, **body: object) -> str:
    headers = {"Authorization": f"Bearer {lease.endpoint.api_key}"}
    body = {"messages": [{"role": "user", "content": "hello"}], **body}
    async with (
        aiohttp.ClientSession(lease.endpoint.base_url, headers=headers) as session,
        session.post("/v1/chat/completions", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        answer = await response.json()
    return str(answer["choices"][0]["message"]["content"])


def only_runner(supervisor: Supervisor) -> RunnerView:
    (runner,) = supervisor.snapshot().runners
    return runner


def pid_of(supervisor: Supervisor) -> int:
    pid = only_runner(supervisor).pid
    assert pid is not None
    return pid


async def test_a_model_is_loaded_when_it_is_asked_for(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    """It answers under its key, its buffers are those that were planned, and the plan is logged once, just before."""
    async with supervising(models(chat_model)) as supervisor:
        assert supervisor.snapshot().runners == ()
        async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            assert only_runner(supervisor).in_flight == 1
            assert (await ask(lease)).startswith("Hello!")
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            pass
        runner = only_runner(supervisor)
        assert (runner.state, runner.in_flight, runner.n_ctx_per_slot) == ("ready", 0, 512)
        assert runner.uses
        for use in runner.uses:
            assert use.planned_bytes is not None
            assert use.measured_bytes is not None
            assert abs(use.measured_bytes - use.planned_bytes) <= 3 * PRINTED_TO
        final = log.of("plan.final")
        assert [entry["plan"] for entry in final] == [runner.plan]
        at = log.entries.index(final[0])
        assert log.entries[at + 1]["event"] == "runner.loading"
        counters = supervisor.snapshot().counters["tiny-chat"]
        assert (counters.launches, counters.requests_granted) == (1, 2)


async def test_workers_serve_one_model_at_a_time_with_the_bytes_that_were_planned(
    supervising: Supervising,
    models: Models,
    chat_model: Path,
    embedding_model: Path,
    rpc_workers: Callable[[int], tuple[Worker, ...]],
) -> None:
    """A worker serves one client, so the second model waits for the first, idle, to be stopped."""
    endpoints = ",".join(worker.endpoint for worker in rpc_workers(2))
    settings = {"PLANNER_RPC_SERVERS": endpoints, "PLANNER_SCHED_SPREAD": "1"}
    async with supervising(models(chat_model, embedding_model), settings) as supervisor:
        for model, role in (("tiny-chat", Role.CHAT), ("tiny-embedding", Role.EMBEDDING)):
            async with supervisor.acquire(model, role):
                runner = only_runner(supervisor)
            assert runner.model == model
            assert [use.device for use in runner.uses] == ["RPC0", "RPC1", "Host"]
            for use in runner.uses:
                assert use.planned_bytes is not None
                assert use.measured_bytes is not None
                assert abs(use.measured_bytes - use.planned_bytes) <= 3 * PRINTED_TO


async def test_a_worker_in_use_keeps_its_name_when_another_vanishes(
    supervising: Supervising,
    models: Models,
    chat_model: Path,
    embedding_model: Path,
    rpc_workers: Callable[[int], tuple[Worker, ...]],
) -> None:
    """Else what is held there would be booked under another worker's name; also when the planner is replaced."""
    small, first, second = rpc_workers(3)
    settings = {"PLANNER_RPC_SERVERS": f"{small.endpoint}=1KiB,{first.endpoint}=8GiB,{second.endpoint}=8GiB"}
    async with supervising(models(chat_model, embedding_model), settings) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            assert [use.device for use in only_runner(supervisor).uses] == ["RPC1", "Host"]
            small.stop()
            planning = next(one for one in psutil.Process().children() if "planning_worker" in one.cmdline()[-1])
            planning.kill()
            planning.wait()
            with suppress(PlannerFailed):  # whoever asks first is told
                await hold_named(supervisor, "tiny-embedding", Role.EMBEDDING)
            async with supervisor.acquire("tiny-embedding", Role.EMBEDDING):
                runners = supervisor.snapshot().runners
        machine = supervisor.snapshot().machine
    assert machine is not None
    endpoints = {str(device.name): device.endpoint for device in machine.devices}
    assert endpoints.pop("RPC1") == first.endpoint
    on = {runner.model: runner.uses[0].device for runner in runners}
    assert on["tiny-chat"] == "RPC1"
    assert endpoints[on["tiny-embedding"]] == second.endpoint


async def test_the_key_is_needed_and_not_on_the_command_line(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    async with supervising(models(chat_model)) as supervisor, supervisor.acquire("tiny-chat", Role.CHAT) as lease:
        assert lease.endpoint.base_url.startswith("http://127.0.0.1:")
        async with (
            aiohttp.ClientSession(lease.endpoint.base_url) as session,
            session.post("/v1/chat/completions", json={}) as response,
        ):
            assert response.status == 401
        command_line = " ".join(psutil.Process(pid_of(supervisor)).cmdline())
        assert lease.endpoint.api_key not in command_line
        assert " --port 0 " in command_line, "the kernel chooses the port, so nobody can take it meanwhile"


async def test_an_idle_model_is_unloaded(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model), keep_alive_s=0.0) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            pid = pid_of(supervisor)
        await log.wait("runner.stopped")
        assert supervisor.snapshot().runners == ()
        assert not psutil.pid_exists(pid), "it is reaped"
        assert list((supervisor._options.state_dir / "runners").iterdir()) == []


async def test_a_killed_runner_is_noticed_at_once_and_replaced(
    supervising: Supervising, models: Models, endless_model: Path, log: EventLog
) -> None:
    """In mid-stream: the holder of the lease is told, the status shows it, the next request gets a new child."""
    async with supervising(models(endless_model)) as supervisor:
        async with supervisor.acquire("tiny-endless", Role.CHAT) as lease:
            pid = pid_of(supervisor)
            os.kill(pid, signal.SIGKILL)
            with anyio.fail_after(30):
                story = await story_of_loss(lease)
            assert story == "killed by SIGKILL"
            runner = only_runner(supervisor)
            assert runner.state != "ready"
            assert runner.last_failure is not None
            assert runner.last_failure.exit == "killed by SIGKILL"
        async with supervisor.acquire("tiny-endless", Role.CHAT) as lease:
            assert pid_of(supervisor) != pid
            assert await ask(lease, max_tokens=3)
        assert only_runner(supervisor).restarts == 1
        counters = supervisor.snapshot().counters["tiny-endless"]
        assert (counters.launches, counters.crashes, counters.load_failures) == (2, 1, 0)
        assert len(log.of("plan.final")) == 2, "once per launch"


async def test_the_machine_is_read_again_when_memory_was_taken_or_given_back(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    """What the status calls free is not what was free before the load."""
    async with supervising(models(chat_model), keep_alive_s=0.0) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            planned_on = supervisor.snapshot().machine
            await log.wait("machine.read")
            loaded = supervisor.snapshot().machine
        await log.wait("machine.read", count=2)
        readings = [planned_on, loaded, supervisor.snapshot().machine]
        assert len({id(one) for one in readings}) == len(readings)


async def test_a_model_that_crashed_in_use_comes_back_by_itself(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            pass
        os.kill(pid_of(supervisor), signal.SIGKILL)
        await log.wait("runner.ready", count=2)
        assert only_runner(supervisor).state == "ready"


async def test_a_runner_that_stops_answering_is_ended_its_clients_told_and_another_serves(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    patience = Patience(ask_every_s=0.05, answer_within_s=1.0)
    async with supervising(models(chat_model), patience=patience) as supervisor:
        with anyio.fail_after(30):
            async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
                pid = only_runner(supervisor).pid
                assert pid is not None
                os.kill(pid, signal.SIGSTOP)
                assert "it hung: with requests in flight it did not answer" in await story_of_loss(lease)
            async with supervisor.acquire("tiny-chat", Role.CHAT):
                assert only_runner(supervisor).pid != pid
                assert only_runner(supervisor).restarts == 1


async def test_a_load_that_is_killed_is_tried_again_for_who_waits(
    supervising: Supervising, models: Models, chat_model: Path, llama_tools: Path, tmp_path: Path
) -> None:
    """The first llama-server to load a model kills itself, as somebody else might."""
    server, was_here = tmp_path / "llama-server", tmp_path / "was-here"
    server.write_text(
        f'#!/bin/sh\ncase "$1" in -m) [ -e {was_here} ] || {{ touch {was_here}; kill -9 $$; }};; esac\n'
        f'exec {llama_tools}/llama-server "$@"\n'
    )
    server.chmod(0o755)
    async with supervising(models(chat_model), {"PLANNER_LLAMA_SERVER": str(server)}) as supervisor:
        await hold_named(supervisor, "tiny-chat", Role.CHAT)
        assert supervisor.snapshot().counters["tiny-chat"].load_failures == 1
    assert was_here.exists()


async def test_a_load_that_fails_tells_the_child_s_last_error_line(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    """The header is in order as far as planning goes; llama.cpp misses the tokenizer."""
    folder = models()
    write_without_tokenizer(chat_model, folder / "broken.gguf")
    async with supervising(folder) as supervisor:
        with pytest.raises(LoadFailed, match=r"exit status 1: .*tokenizer.*$") as refused:
            async with supervisor.acquire("broken", Role.CHAT):
                pass
        assert refused.value.retry_after_s is not None
        failure = only_runner(supervisor).last_failure
        assert failure is not None
        assert failure.log_tail
        assert supervisor.snapshot().counters["broken"].load_failures == 1


def write_without_tokenizer(model: Path, broken: Path) -> None:
    broken.write_bytes(model.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mod_l"))


async def test_a_load_that_runs_out_of_memory_is_planned_again_with_more_room_and_where_there_is_none_says_so(
    supervising: Supervising, models: Models, llama_tools: Path, tmp_path: Path
) -> None:
    """The server gets less address space than its cache needs, which the machine has to spare."""
    folder = models()
    tiny_models.write_chat_model(folder / "long.gguf", n_layer=8, n_embd=256, n_ctx_train=500_000)
    server = tmp_path / "llama-server"
    server.write_text(f'#!/bin/sh\nulimit -v 1500000\nexec {llama_tools}/llama-server "$@"\n')
    server.chmod(0o755)
    settings = {"PLANNER_LLAMA_SERVER": str(server), "PLANNER_CONTEXT_LENGTH": "500000"}
    async with supervising(folder, settings) as supervisor:
        with pytest.raises(LoadFailed, match="out of memory on Host: ") as refused:
            await hold_named(supervisor, "long", Role.CHAT)
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s > 10
        runner = only_runner(supervisor)
        assert runner.state == "failed"
        assert runner.last_failure is not None
        assert "out of memory on Host" in runner.last_failure.reason
        assert {step.step for step in runner.remedies} == {"out of memory"}
        assert supervisor.reset("long")
        assert supervisor.snapshot().runners[0].remedies == ()


async def test_a_runner_that_cannot_be_started_is_said_so(
    supervising: Supervising, models: Models, chat_model: Path, llama_tools: Path, tmp_path: Path
) -> None:
    """It answered when it was looked for, and cannot be run any more."""
    server = tmp_path / "llama-server"
    server.write_text(f'#!/bin/sh\nexec {llama_tools}/llama-server "$@"\n')
    server.chmod(0o755)
    async with supervising(models(chat_model), {"PLANNER_LLAMA_SERVER": str(server)}) as supervisor:
        server.chmod(0o644)
        with pytest.raises(LoadFailed, match=f"cannot start {server}: Permission denied"):
            async with supervisor.acquire("tiny-chat", Role.CHAT):
                pass


async def test_a_llama_server_that_is_removed_is_missed_with_the_next_load(
    supervising: Supervising, models: Models, chat_model: Path, llama_tools: Path, tmp_path: Path
) -> None:
    server = tmp_path / "llama-server"
    server.symlink_to(llama_tools / "llama-server")
    async with supervising(models(chat_model), {"PLANNER_LLAMA_SERVER": str(server)}) as supervisor:
        server.unlink()
        with pytest.raises(PlannerFailed, match=f"no llama-server found.*{server}"):
            await hold_named(supervisor, "tiny-chat", Role.CHAT)
        assert supervisor.snapshot().not_ready


async def test_models_are_swapped_where_only_one_may_be_loaded(
    supervising: Supervising, models: Models, chat_model: Path, embedding_model: Path
) -> None:
    async with supervising(models(chat_model, embedding_model), max_loaded_models=1) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            pass
        async with supervisor.acquire("tiny-embedding", Role.EMBEDDING):
            assert [runner.model for runner in supervisor.snapshot().runners] == ["tiny-embedding"]


async def test_more_requests_than_slots_wait_their_turn(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    order: list[str] = []

    async def request(name: str, supervisor: Supervisor) -> None:
        async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            order.append(f"{name} begins")
            await ask(lease, max_tokens=2)
            order.append(f"{name} ends")

    async with supervising(models(chat_model)) as supervisor, anyio.create_task_group() as tasks:
        tasks.start_soon(request, "first", supervisor)
        await anyio.lowlevel.checkpoint()
        tasks.start_soon(request, "second", supervisor)
    assert order == ["first begins", "first ends", "second begins", "second ends"]


async def test_a_full_queue_refuses(supervising: Supervising, models: Models, chat_model: Path) -> None:
    async with supervising(models(chat_model), max_queue=1) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT), anyio.create_task_group() as tasks:
            tasks.start_soon(hold, supervisor)
            await anyio.wait_all_tasks_blocked()
            assert supervisor.snapshot().queue_length == 1
            with pytest.raises(QueueFull):
                await hold(supervisor)
            tasks.cancel_scope.cancel()
        assert supervisor.snapshot().queue_length == 0, "who was cancelled waits no more"
        assert only_runner(supervisor).in_flight == 0


async def hold(supervisor: Supervisor) -> None:
    async with supervisor.acquire("tiny-chat", Role.CHAT):
        await anyio.sleep_forever()


async def test_a_lease_comes_back_when_its_holder_is_cancelled(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        with anyio.CancelScope() as scope:
            async with supervisor.acquire("tiny-chat", Role.CHAT):
                scope.cancel()
                await anyio.sleep_forever()
        assert only_runner(supervisor).in_flight == 0


async def test_names_roles_and_files_that_cannot_be_served(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    folder = models(chat_model)
    (folder / "noise.gguf").write_bytes(b"no model")
    async with supervising(folder) as supervisor:
        with pytest.raises(UnknownModel, match="did you mean tiny-chat") as unknown:
            await hold_named(supervisor, "tiny-chatt", Role.CHAT)
        assert unknown.value.closest == ("tiny-chat",)
        with pytest.raises(WrongRole, match="served for chat requests, not for embedding"):
            await hold_named(supervisor, "tiny-chat", Role.EMBEDDING)
        with pytest.raises(BadModel, match=r"noise cannot be served: .*noise.gguf"):
            await hold_named(supervisor, "noise", Role.CHAT)


async def hold_named(supervisor: Supervisor, name: str, role: Role) -> None:
    async with supervisor.acquire(name, role):
        pass


async def test_shutting_down_lets_requests_finish_and_takes_no_new_ones(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    async with supervising(models(chat_model), drain_timeout_s=60.0) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            supervisor.shut_down()
            assert supervisor.snapshot().draining
            assert supervisor.snapshot().not_ready
            with pytest.raises(ShuttingDown):
                await hold_named(supervisor, "tiny-chat", Role.CHAT)
            assert (await ask(lease)).startswith("Hello!")
        with anyio.fail_after(30):
            await supervisor.wait_stopped()


async def test_a_client_that_leaves_while_its_model_loads_leaves_the_load_to_the_next_one(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold, supervisor)
            await log.wait("runner.loading")
            tasks.cancel_scope.cancel()
        assert supervisor.snapshot().queue_length == 0
        await log.wait("runner.ready")
        assert only_runner(supervisor).in_flight == 0
        await hold_named(supervisor, "tiny-chat", Role.CHAT)
        assert len(log.of("plan.final")) == 1


async def test_shutting_down_ends_a_load_and_refuses_who_waits_for_it(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model)) as supervisor:

        async def wait_in_vain() -> None:
            with pytest.raises(ShuttingDown):
                await hold(supervisor)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_in_vain)
            child = psutil.Process((await log.wait("runner.loading"))["pid"])
            supervisor.shut_down()
        with anyio.fail_after(30):
            await supervisor.wait_stopped()
        assert not child.is_running()


async def test_a_stream_that_does_not_finish_in_time_is_told_before_its_child_has_gone(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    """The child is stopped from running at all, so nothing can come from its exit."""
    async with (
        supervising(models(chat_model), drain_timeout_s=0.0) as supervisor,
        supervisor.acquire("tiny-chat", Role.CHAT) as lease,
    ):
        child = psutil.Process(pid_of(supervisor))
        child.suspend()
        try:
            supervisor.shut_down()
            with anyio.fail_after(30):
                assert "0 s of DRAIN_TIMEOUT" in await story_of_loss(lease)
            assert child.is_running()
            assert only_runner(supervisor).state == "stopping"
        finally:
            child.resume()


async def test_the_service_is_not_ready_without_a_llama_server(
    supervising: Supervising, models: Models, chat_model: Path, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    async with supervising(models(chat_model), {"PLANNER_LLAMA_SERVER": nowhere}) as supervisor:
        (reason,) = supervisor.snapshot().not_ready
        assert nowhere in reason
        assert "make llama" in reason


async def test_two_models_load_side_by_side_on_the_host(
    supervising: Supervising, models: Models, chat_model: Path, embedding_model: Path, log: EventLog
) -> None:
    """Neither waits until the other is ready."""
    async with supervising(models(chat_model, embedding_model)) as supervisor, anyio.create_task_group() as tasks:
        tasks.start_soon(hold_named, supervisor, "tiny-chat", Role.CHAT)
        tasks.start_soon(hold_named, supervisor, "tiny-embedding", Role.EMBEDDING)
        await log.wait("runner.ready", count=2)
        events = [entry["event"] for entry in log.entries]
        assert len([event for event in events[: events.index("runner.ready")] if event == "plan.final"]) == 2
    (host,) = [one for one in supervisor.snapshot().ledger if one.device == "Host"]
    assert host.held_bytes == 0, "all are gone"


async def test_a_longer_context_loads_the_model_again_and_a_shorter_one_does_not(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        lengths = []
        for n_ctx in (None, 1024, 256, None, 10_000_000):
            async with supervisor.acquire("tiny-chat", Role.CHAT, Need(load=LoadOptions(n_ctx=n_ctx))):
                lengths.append(only_runner(supervisor).n_ctx_per_slot)
        trained = supervisor.snapshot().models[0].n_ctx_train
        assert trained is not None
        assert lengths == [512, 1024, 1024, 1024, trained]
        assert len(log.of("plan.final")) == 3


async def test_a_request_says_how_long_its_model_stays(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT, Need(keep_alive_s=math.inf)):
            pass
        assert (only_runner(supervisor).expires_at, only_runner(supervisor).keep_alive_s) == (None, math.inf)
        async with supervisor.acquire("tiny-chat", Role.CHAT, Need(keep_alive_s=0.0)):
            assert (only_runner(supervisor).expires_at, only_runner(supervisor).keep_alive_s) == (None, 0.0)
        await log.wait("runner.stopped")


async def test_unloading_lets_streams_finish_and_returns_once_the_child_is_gone(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        assert not await supervisor.unload("tiny-chat"), "nothing was loaded"
        async with anyio.create_task_group() as tasks, supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            pid = pid_of(supervisor)
            tasks.start_soon(supervisor.unload, "tiny-chat")
            await anyio.wait_all_tasks_blocked()
            assert only_runner(supervisor).state == "draining"
            assert (await ask(lease)).startswith("Hello!")
        assert not psutil.pid_exists(pid)
        assert supervisor.snapshot().runners == ()


async def test_memory_is_yielded_by_runners_that_are_idle_or_fall_idle_and_left_alone_for_a_while(
    supervising: Supervising, models: Models, chat_model: Path, embedding_model: Path, log: EventLog
) -> None:
    """All that is free and more is asked for: the idle one goes, the busy one once it is idle, and none is loaded."""
    async with supervising(models(chat_model, embedding_model)) as supervisor:
        await hold_named(supervisor, "tiny-embedding", Role.EMBEDDING)
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            result = await supervisor.yield_memory("Host", 1 << 60, 60.0)
            assert only_runner(supervisor).state == "draining"
            assert supervisor.snapshot().counters["tiny-embedding"].evictions == 1
            assert set(result.awaited_bytes) == {"tiny-chat"}
            assert result.until > time.time()
            with pytest.raises(CannotFit, match="planner yield") as refused:
                await hold_named(supervisor, "tiny-embedding", Role.EMBEDDING)
        await log.wait("runner.stopped", count=2)
        assert supervisor.snapshot().counters["tiny-chat"].evictions == 1
        assert result.freed_bytes > 0
        assert result.short_bytes
        assert not refused.value.never
        assert 0 < (refused.value.retry_after_s or 0) <= 60
        with pytest.raises(UnknownDevice, match=r"there are: .*Host"):
            await supervisor.yield_memory("CUDA7", 1, 1.0)


async def test_what_a_header_says_is_told_without_its_vocabulary(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        details = await supervisor.details("tiny-chat")
        assert details["metadata"]["general.architecture"] == "llama"
        names = {tensor["name"]: tensor for tensor in details["tensors"]}
        assert names["token_embd.weight"]["shape"]
        with pytest.raises(UnknownModel):
            await supervisor.details("nobody")


async def test_a_runner_s_log_can_be_read_while_it_runs_and_after_it_failed(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    folder = models(chat_model)
    write_without_tokenizer(chat_model, folder / "broken.gguf")
    async with supervising(folder) as supervisor:
        with pytest.raises(UnknownModel, match="has said anything"):
            [_ async for _ in supervisor.log_lines("tiny-chat", follow=False)]
        await hold_named(supervisor, "tiny-chat", Role.CHAT)
        assert any(
            "listening" in line for line in [one async for one in supervisor.log_lines("tiny-chat", follow=False)]
        )
        with pytest.raises(LoadFailed):
            await hold_named(supervisor, "broken", Role.CHAT)
        assert any("tokenizer" in line for line in [one async for one in supervisor.log_lines("broken", follow=False)])

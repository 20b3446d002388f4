"""Real llama-servers that die, hang or cannot be loaded: whoever uses them is told, and another one serves."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import anyio
import pytest
import tiny_models
from event_log import EventLog
from supervising import Models, Supervising, ask, load, only_runner, pid_of, story_of_loss

from config.model_settings import ExternalRunner, ModelsFile
from planner.types import Role
from supervisor.api.errors import (
    LoadFailed,
    PlannerFailed,
    UnknownModel,
)
from supervisor.children.hanging import Patience

pytestmark = [pytest.mark.anyio, pytest.mark.llama]


def write_without_tokenizer(model: Path, broken: Path) -> None:
    broken.write_bytes(model.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mod_l"))


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


async def test_a_model_that_crashed_in_use_comes_back_by_itself(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        await load(supervisor, "tiny-chat", Role.CHAT)
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


async def test_a_program_that_stops_answering_is_ended_its_clients_told_and_another_serves(
    supervising: Supervising, models: Models
) -> None:
    folder = models()
    cmd = (sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1")
    program = ExternalRunner(cmd, "http://127.0.0.1:{port}", "/", {"Host": 1 << 20}, folder=folder)
    patience = Patience(ask_every_s=0.05, answer_within_s=1.0)
    async with supervising(folder, patience=patience) as supervisor:
        supervisor.configure(ModelsFile(external={"files": program}))
        with anyio.fail_after(30):
            async with supervisor.acquire("files", Role.CHAT) as lease:
                pid = pid_of(supervisor)
                os.kill(pid, signal.SIGSTOP)
                assert "it was stopped (SIGSTOP), and did not answer /" in await story_of_loss(lease)
            async with supervisor.acquire("files", Role.CHAT):
                assert pid_of(supervisor) != pid


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
        await load(supervisor, "tiny-chat", Role.CHAT)
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
            await load(supervisor, "broken", Role.CHAT)
        assert refused.value.retry_after_s is not None
        failure = only_runner(supervisor).last_failure
        assert failure is not None
        assert failure.log_tail
        assert supervisor.snapshot().counters["broken"].load_failures == 1


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
            await load(supervisor, "long", Role.CHAT)
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
            await load(supervisor, "tiny-chat", Role.CHAT)


async def test_a_llama_server_that_is_removed_is_missed_with_the_next_load(
    supervising: Supervising, models: Models, chat_model: Path, llama_tools: Path, tmp_path: Path
) -> None:
    server = tmp_path / "llama-server"
    server.symlink_to(llama_tools / "llama-server")
    async with supervising(models(chat_model), {"PLANNER_LLAMA_SERVER": str(server)}) as supervisor:
        server.unlink()
        with pytest.raises(PlannerFailed, match=f"no llama-server found.*{server}"):
            await load(supervisor, "tiny-chat", Role.CHAT)
        assert supervisor.snapshot().not_ready


async def test_the_service_is_not_ready_without_a_llama_server(
    supervising: Supervising, models: Models, chat_model: Path, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    async with supervising(models(chat_model), {"PLANNER_LLAMA_SERVER": nowhere}) as supervisor:
        (reason,) = supervisor.snapshot().not_ready
        assert nowhere in reason
        assert "make llama" in reason


async def test_a_runner_s_log_can_be_read_while_it_runs_and_after_it_failed_or_was_unloaded(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    folder = models(chat_model)
    write_without_tokenizer(chat_model, folder / "broken.gguf")
    async with supervising(folder) as supervisor:
        with pytest.raises(UnknownModel, match="not loaded, and was not since the service started"):
            [_ async for _ in supervisor.log_lines("tiny-chat", follow=False)]
        await load(supervisor, "tiny-chat", Role.CHAT)
        assert any(
            "listening" in line for line in [one async for one in supervisor.log_lines("tiny-chat", follow=False)]
        )
        with pytest.raises(LoadFailed):
            await load(supervisor, "broken", Role.CHAT)
        assert any("tokenizer" in line for line in [one async for one in supervisor.log_lines("broken", follow=False)])
        await supervisor.unload("tiny-chat")
        assert any(
            "listening" in line for line in [one async for one in supervisor.log_lines("tiny-chat", follow=True)]
        )

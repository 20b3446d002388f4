"""The runtime with a real llama-server: a model is loaded for who asks, as it was planned, and told of."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import aiohttp
import anyio
import psutil
import pytest
from event_log import WITHIN_S, EventLog
from supervising import Models, Supervising, ask, load, only_runner, pid_of, took_what_was_planned

from planner.types import HOST, LoadOptions, Role
from planner.units import MIB
from supervisor.api.errors import (
    BadModel,
    UnknownModel,
    WrongRole,
)
from supervisor.api.need import Need
from supervisor.core.types import ModelId

pytestmark = [pytest.mark.anyio, pytest.mark.llama]


async def test_a_model_is_loaded_when_it_is_asked_for(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    """It answers under its key, its buffers are those that were planned, and the plan is logged once, just before."""
    async with supervising(models(chat_model)) as supervisor:
        assert supervisor.snapshot().runners == ()
        async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            assert only_runner(supervisor).in_flight == 1
            assert (await ask(lease)).startswith("Hello!")
        await load(supervisor, "tiny-chat", Role.CHAT)
        runner = only_runner(supervisor)
        assert (runner.state, runner.in_flight, runner.n_ctx_per_slot) == ("ready", 0, 512)
        assert runner.uses
        assert took_what_was_planned(runner)
        final = log.of("plan.final")
        assert [entry["plan"] for entry in final] == [runner.plan]
        at = log.entries.index(final[0])
        assert log.entries[at + 1]["event"] == "runner.loading"
        counters = supervisor.snapshot().counters["tiny-chat"]
        assert (counters.launches, counters.requests_granted) == (1, 2)


async def test_a_lease_is_offered_only_while_it_can_be_had_at_once(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    """An offer changes nothing until it is taken, and a taken one counts as any lease."""
    async with supervising(models(chat_model)) as supervisor:
        assert supervisor.offer("tiny-chat", Role.CHAT) is None, "it is not loaded"
        await load(supervisor, "tiny-chat", Role.CHAT)
        assert supervisor.offer("tiny-chat", Role.EMBEDDING) is None
        n_slots = only_runner(supervisor).n_parallel or 0
        with ExitStack() as taken:
            for n_taken in range(n_slots):
                assert only_runner(supervisor).in_flight == n_taken
                offer = supervisor.offer("tiny-chat", Role.CHAT)
                assert offer is not None
                assert only_runner(supervisor).in_flight == n_taken
                lease = taken.enter_context(offer.take())
                assert lease.endpoint == offer.endpoint
            assert supervisor.offer("tiny-chat", Role.CHAT) is None, "all slots are taken"
            assert (await ask(lease)).startswith("Hello!")
        assert only_runner(supervisor).in_flight == 0
        assert supervisor.offer("tiny-chat", Role.CHAT) is not None


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


async def test_names_roles_and_files_that_cannot_be_served(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    folder = models(chat_model)
    (folder / "noise.gguf").write_bytes(b"no model")
    async with supervising(folder) as supervisor:
        with pytest.raises(UnknownModel, match="did you mean tiny-chat") as unknown:
            await load(supervisor, "tiny-chatt", Role.CHAT)
        assert unknown.value.closest == ("tiny-chat",)
        assert "GET /v1/models lists the names" in str(unknown.value)
        assert str(folder) not in str(unknown.value), "clients need not know where the models lie"
        assert str(folder) in log.of("model.unknown")[0]["looked_in"]
        with pytest.raises(WrongRole, match="served for chat requests, not for embedding"):
            await load(supervisor, "tiny-chat", Role.EMBEDDING)
        with pytest.raises(BadModel, match=r"noise cannot be served: .*noise.gguf"):
            await load(supervisor, "noise", Role.CHAT)


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


async def test_what_a_prompt_cache_has_filled_is_not_promised_to_it_any_more(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    reserve = 64 * MIB
    async with supervising(models(chat_model), {"PLANNER_CACHE_RAM": str(reserve)}) as supervisor:
        for words in ("the one thing ", "quite another "):
            async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
                await ask(lease, messages=[{"role": "user", "content": words * 20}])
        with anyio.fail_after(WITHIN_S):
            await supervisor._writer.until(
                lambda pool: 0 < pool.runner(ModelId("tiny-chat")).later_bytes()[HOST] < reserve
            )
        assert next(row for row in supervisor.snapshot().ledger if row.device == HOST).held_bytes > reserve

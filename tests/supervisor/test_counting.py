"""A child's tokens are read off it after use, as llama-server writes them, and never from one that rests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
from supervising import Models, Supervising, ask

from planner.types import Role
from supervisor.api.snapshot import TokenCounts
from supervisor.children.counting import TokenWatch, counts_of
from supervisor.runtime import Supervisor

pytestmark = pytest.mark.anyio

WITHIN_S = 60.0


def exposition(prompt: str, generated: str) -> bytes:
    """Return what llama-server tells: six digits, times in seconds, gauges among the counters."""
    return (
        "# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens\n"
        "# TYPE llamacpp:prompt_tokens_total counter\n"
        f"llamacpp:prompt_tokens_total {prompt}\n"
        "llamacpp:prompt_seconds_total 0.25\n"
        f"llamacpp:tokens_predicted_total {generated}\n"
        "llamacpp:tokens_predicted_seconds_total 1.5\n"
        "llamacpp:predicted_tokens_seconds -nan\n"
        'llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 7\n'
    ).encode()


@asynccontextmanager
async def telling(*answers: bytes) -> AsyncIterator[tuple[str, list[str]]]:
    """Serve these answers one after the other, then silence; yield the address and what was asked for."""
    asked: list[str] = []
    left = list(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        if left:
            writer.write(left.pop(0))
        else:
            await reader.read()  # until whoever asks hangs up
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        yield f"http://{host}:{port}", asked


def told_too_much(tokens: TokenCounts) -> None:
    pytest.fail(f"{tokens} were made up")


def good(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def read_after_use(answers: Sequence[bytes], n_reads: int) -> list[TokenCounts]:
    """Return what is told by a child that was used before each read, and answers so."""
    told: list[TokenCounts] = []
    async with telling(*answers) as (url, _):
        watch = TokenWatch(url, "key", told.append)
        for _ in range(n_reads):
            watch.note_use()
            await watch.read(WITHIN_S)
    return told


def test_large_counts_are_read_as_they_are_written() -> None:
    """An ostream writes a million and more with an exponent."""
    assert counts_of(exposition("1.23457e+06", "42")) == TokenCounts(1_234_570, 42, 0.25, 1.5)


@pytest.mark.parametrize(
    "odd", [b"", b"hello\xff", b"llamacpp:prompt_tokens_total 1 2\n", exposition("many", "1"), exposition("inf", "nan")]
)
def test_what_is_not_all_there_is_not_known(odd: bytes) -> None:
    assert counts_of(odd) is None


async def test_only_what_was_added_is_told() -> None:
    answers = [good(exposition("10", "5")), good(exposition("30", "12"))]
    assert await read_after_use(answers, 2) == [TokenCounts(10, 5, 0.25, 1.5), TokenCounts(20, 7, 0.0, 0.0)]


async def test_a_child_that_refuses_has_told_nothing_and_what_it_tells_later_is_whole() -> None:
    """Neither an older one's refusal nor a broken answer counts as none."""
    refusal = b"HTTP/1.1 501 Not Implemented\r\nContent-Length: 0\r\n\r\n"
    answers = [refusal, b"", good(b"nonsense"), good(exposition("10", "5"))]
    assert await read_after_use(answers, 4) == [TokenCounts(10, 5, 0.25, 1.5)]


async def test_a_child_that_nobody_used_is_asked_nothing() -> None:
    async with telling() as (url, asked):
        await TokenWatch(url, "key", told_too_much).read(WITHIN_S)
        assert asked == []


async def test_a_child_is_asked_once_for_many_uses_and_with_its_key() -> None:
    told: list[TokenCounts] = []
    async with telling(good(exposition("10", "5"))) as (url, asked):
        watch = TokenWatch(url, "its-key", told.append)
        for _ in range(3):
            watch.note_use()
        await watch.read(WITHIN_S)
        await watch.read(WITHIN_S)
    assert len(asked) == len(told) == 1
    assert "Authorization: Bearer its-key\r\n" in asked[0]


async def test_a_child_is_read_soon_after_use_and_once_more_for_what_it_counts_later() -> None:
    """It may crash any time; and a request whose client has left goes on until llama-server notices."""
    told, all_told = list[TokenCounts](), anyio.Event()

    def tell(added: TokenCounts) -> None:
        told.append(added)
        if len(told) == 2:
            all_told.set()

    async with telling(good(exposition("10", "5")), good(exposition("10", "7"))) as (url, asked):
        watch = TokenWatch(url, "key", tell)
        watch.note_use()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(watch.follow, again_s=0.0))
            with anyio.fail_after(WITHIN_S):
                await all_told.wait()
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
    assert (told, len(asked)) == ([TokenCounts(10, 5, 0.25, 1.5), TokenCounts(0, 2, 0.0, 0.0)], 2)


async def test_a_silent_child_is_not_waited_for() -> None:
    async with telling() as (url, asked):
        watch = TokenWatch(url, "key", told_too_much)
        watch.note_use()
        with anyio.fail_after(WITHIN_S):
            await watch.read(0.05)
        assert len(asked) == 1


async def answered_and_unloaded(supervisor: Supervisor) -> TokenCounts:
    """Return what is counted once a child has answered one question and is gone."""
    async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
        await ask(lease)
    await supervisor.unload("tiny-chat")
    tokens = supervisor.snapshot().counters["tiny-chat"].tokens
    assert tokens is not None
    return tokens


@pytest.mark.llama
async def test_tokens_are_counted_to_the_last_and_go_on_over_restarts(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    """A child is asked once more before it is stopped, though its last request has only just ended."""
    async with supervising(models(chat_model)) as supervisor:
        first = await answered_and_unloaded(supervisor)
        both = await answered_and_unloaded(supervisor)
    assert first.prompt > 0
    assert first.generated > 0
    assert (both.prompt, both.generated) == (2 * first.prompt, 2 * first.generated)
    assert both.generated_s > first.generated_s

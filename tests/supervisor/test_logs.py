"""What a child says is kept within bounds, and told to whoever follows without keeping the child waiting."""

from __future__ import annotations

import anyio
import pytest
import structlog

from supervisor.children.logs import KEPT_LINES, ChildLog
from supervisor.core.loglines import PromptCache

pytestmark = pytest.mark.anyio


@pytest.fixture
def log() -> ChildLog:
    return ChildLog({}, structlog.get_logger())


async def test_the_last_lines_are_told(log: ChildLog) -> None:
    log.feed(b"".join(b"line %d\n" % number for number in range(KEPT_LINES + 10)))
    lines = [line async for line in log.lines(follow=False)]
    assert lines == [f"line {number}" for number in range(10, KEPT_LINES + 10)]


def test_of_the_prompt_cache_the_last_word_is_told_where_it_is_another_than_before(log: ChildLog) -> None:
    def said(*mib: str) -> list[object]:
        lines = (
            f"0.00.381.622 I srv        update:  - cache state: 2 prompts, {each} MiB (limits: 64.000 MiB"
            for each in mib
        )
        return list(log.feed("".join(f"{line}\n" for line in lines).encode()))

    assert said("0.000") == []
    assert said("1.000", "1.500") == [PromptCache(3 << 19)]
    assert said("1.500") == []
    assert said("0.000") == [PromptCache(0)]
    assert log.feed(b" - cache state: many prompts\n") == []


async def test_a_follower_hears_each_line_once_until_the_child_has_ended(log: ChildLog) -> None:
    heard: list[str] = []
    log.feed(b"one\ntwo\n")

    async def follow() -> None:
        async for line in log.lines(follow=True):
            heard.append(line)
            if line == "two":
                listening.set()

    listening = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        await listening.wait()
        log.feed(b"three\nfo")
        log.feed(b"ur\nfive")
        log.close()
    assert heard == ["one", "two", "three", "four", "five"]


async def test_a_follower_that_is_too_slow_is_told_what_it_missed(log: ChildLog) -> None:
    """Nothing waits for it, and nothing is kept for it."""
    log.feed(b"first\n")
    lines = log.lines(follow=True)
    assert await anext(lines) == "first"
    log.feed(b"".join(b"line %d\n" % number for number in range(KEPT_LINES + 7)))
    log.close()
    note, *rest = [line async for line in lines]
    assert note.startswith("(7 lines are left out here")
    assert len(rest) == KEPT_LINES
    assert rest[-1] == f"line {KEPT_LINES + 6}"

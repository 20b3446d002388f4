"""Many clients, more models than fit, and everything killed again and again: what must hold, holds.

    python bench/chaos.py [--minutes M] [--clients N] [--seed S]

A real ``planner serve`` over real llama-servers and RPC workers. Five models share it, two of which fit on its workers
at a time. The clients stream, ask for whole answers and embeddings, and vanish at any point; meanwhile runners are
killed and stopped (-9, -STOP) and workers lost. Every answer is known beforehand, so that a lost, a doubled and a
mixed-up one is seen.

Printed is what happened, and what was broken of: every request is answered once, with the right words or an error; no
runner outlives the service's wish or the service; nothing is in flight, waiting or promised in the end; the service's
memory stays flat. Ends with 1 where something was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil
from measuring import Way, get, post, service

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import tiny_encoders
import tiny_models
from rpc_worker import RpcWorker, start_worker

TOOLS: Final = Path(sysconfig.get_path("platlib")) / "bin"
# Each model says its own words, so that an answer of another one is seen.
WORDS: Final = {name: f"I am {name} and nobody else ever says what {name}s say." for name in ("one", "two", "three")}
ENDLESS: Final = "endless"
EMBEDDING: Final = "embedding"
DONE: Final = "done"
LEFT: Final = "left"
HELLO: Final = [{"role": "user", "content": "hello"}]
N_WORKERS: Final = 2
WORKER_CAP: Final = "32MiB"  # of the tens of GiB that a worker on a CPU would offer; each serves one runner at a time
SETTINGS: Final = {
    "PLANNER_CONTEXT_LENGTH": "512",
    "PLANNER_NUM_PARALLEL": "2",
    "PLANNER_KEEP_ALIVE": "3s",
    "PLANNER_STOP_GRACE": "2s",
    "PLANNER_DRAIN_TIMEOUT": "5s",
}

# Longer than anything should take: a hang (30 s to be found out), a load behind others, a place in the queue.
ANSWER_WITHIN_S: Final = 180.0
QUIET_WITHIN_S: Final = 90.0
ENDS_WITHIN_S: Final = 30.0
# Between two blows: a load takes a tenth of a second, so most fall on runners that serve.
BLOW_EVERY_S: Final = (0.5, 2.5)
# Who is refused waits so long: asked at once again, the service would do little but refuse.
PAUSE_S: Final = (0.1, 1.0)
WORKER_AWAY_S: Final = 3.0
SAMPLE_EVERY_S: Final = 1.0
# What may come on top of the memory of the first minutes: caches of libraries fill up late.
MAX_GROWTH_BYTES: Final = 8 << 20


@dataclass
class Report:
    """What happened, by name and number, and what should not have."""

    answers: Counter[str] = field(default_factory=Counter)
    blows: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def show(self) -> None:
        """Print it."""
        for title, counts in (("answers", self.answers), ("blows", self.blows)):
            print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        if self.resident_bytes:
            first, last = self.resident_bytes[0], self.resident_bytes[-1]
            print(f"service: {first / 1e6:.1f} MB resident at first, {last / 1e6:.1f} MB at last, ", end="")
            print(f"{self.descriptors[0]} descriptors at first, {self.descriptors[-1]} at last")
        for line in self.broken[:20]:
            print(f"BROKEN: {line}")
        print(f"{len(self.broken)} broken promises")


class Client:
    """One of the many: asks, and judges what it is told."""

    def __init__(self, session: aiohttp.ClientSession, url: str, report: Report, dice: random.Random) -> None:
        self._session = session
        self._url = url
        self._report = report
        self._dice = dice

    async def ask_until(self, end: float) -> None:
        """Ask one thing after the other."""
        while time.monotonic() < end:
            kind = self._dice.choices(
                [self._stream, self._whole, self._embed, self._vanish, self._vanish_early], [5, 3, 2, 3, 2]
            )[0]
            try:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    outcome = await kind()
            except TimeoutError:
                self._report.broken.append(f"{kind.__name__}: no answer within {ANSWER_WITHIN_S:g} s")
                continue
            except aiohttp.ServerDisconnectedError:
                self._report.broken.append(f"{kind.__name__}: the connection was closed without an answer")
                continue
            self._report.answers[f"{kind.__name__.strip('_')} {outcome}"] += 1
            if outcome not in {DONE, LEFT}:
                await asyncio.sleep(self._dice.uniform(*PAUSE_S))

    async def _stream(self) -> str:
        model = self._dice.choice(list(WORDS))
        async with self._post("chat/completions", model, messages=HELLO, stream=True) as answer:
            if answer.status != 200:
                return await self._refusal(answer)
            events = [line[6:] async for line in answer.content if line.startswith(b"data: ")]
        ended = [event for event in events if event.strip() == b"[DONE]"]
        told = [json.loads(event) for event in events if event.strip() != b"[DONE]"]
        failed = [one["error"] for one in told if "error" in one]
        if len(ended) + len(failed) != 1:
            self._report.broken.append(f"stream of {model}: {len(ended)} ends and {len(failed)} errors")
        words = "".join(choice["delta"].get("content") or "" for one in told for choice in one.get("choices", ()))
        if not WORDS[model].startswith(words) or (ended and words != WORDS[model]):
            self._report.broken.append(f"stream of {model}: {words!r}")
        return "broken off with an error" if failed else DONE

    async def _whole(self) -> str:
        model = self._dice.choice(list(WORDS))
        async with self._post("chat/completions", model, messages=HELLO) as answer:
            if answer.status != 200:
                return await self._refusal(answer)
            try:
                words = (await answer.json())["choices"][0]["message"]["content"]
            except aiohttp.ClientPayloadError:
                return "cut off"
        if words != WORDS[model]:
            self._report.broken.append(f"answer of {model}: {words!r}")
        return DONE

    async def _embed(self) -> str:
        async with self._post("embeddings", EMBEDDING, input=["one", "two"]) as answer:
            if answer.status != 200:
                return await self._refusal(answer)
            try:
                vectors = (await answer.json())["data"]
            except aiohttp.ClientPayloadError:
                return "cut off"
        if len(vectors) != 2:
            self._report.broken.append(f"{len(vectors)} vectors for two texts")
        return DONE

    async def _vanish(self) -> str:
        """Read a little of an answer that would not end, and leave."""
        async with self._post("chat/completions", ENDLESS, messages=HELLO, stream=True) as answer:
            if answer.status != 200:
                return await self._refusal(answer)
            for _ in range(self._dice.randrange(40)):
                if not await answer.content.readline():
                    return "broken off with an error"
        return LEFT

    async def _vanish_early(self) -> str:
        """Leave while the request waits, loads, or has just begun."""
        model = self._dice.choice([*WORDS, ENDLESS])
        with suppress(TimeoutError, aiohttp.ClientPayloadError):
            async with asyncio.timeout(self._dice.random() * 0.5):
                async with self._post("chat/completions", model, messages=HELLO, stream=True) as answer:
                    await answer.read()
                    return DONE
        return LEFT

    def _post(self, path: str, model: str, **fields: Any) -> Any:
        return self._session.post(f"{self._url}/v1/{path}", json={"model": model, **fields})

    async def _refusal(self, answer: aiohttp.ClientResponse) -> str:
        """Return the code of an error, which has to be in its envelope."""
        body = await answer.read()
        try:
            error = json.loads(body)["error"]
            if error.get("code") == "internal_error":
                self._report.broken.append(f"an internal error: {error['message']}")
            return f"refused: {error.get('code')}"
        except (ValueError, KeyError, AttributeError):
            self._report.broken.append(f"status {answer.status} without an envelope: {body[:200]!r}")
            return "refused without a word"


class Monkey:
    """Kills and stops what the service runs, and the workers that it runs on."""

    def __init__(self, through: Way, workers: list[RpcWorker], report: Report, dice: random.Random) -> None:
        self._through = through
        self._workers = workers
        self._report = report
        self._dice = dice
        self._away: list[tuple[float, int]] = []

    async def strike_until(self, end: float) -> None:
        """Strike again and again."""
        while time.monotonic() < end:
            await asyncio.sleep(self._dice.uniform(*BLOW_EVERY_S))
            blow = self._dice.choices([self._kill, self._stop, self._lose_worker], [6, 1, 2])[0]
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                blow()
            await self._bring_back(time.monotonic())
            await self._forgive()
        await self._bring_back(float("inf"))

    def _kill(self) -> None:
        if runners := runners_of(self._through):
            self._dice.choice(runners).send_signal(signal.SIGKILL)
            self._report.blows["runners killed"] += 1

    def _stop(self) -> None:
        if runners := runners_of(self._through):
            self._dice.choice(runners).send_signal(signal.SIGSTOP)
            self._report.blows["runners stopped"] += 1

    def _lose_worker(self) -> None:
        number = self._dice.randrange(len(self._workers))
        if number not in {lost for _, lost in self._away}:
            self._workers[number].process.kill()
            self._workers[number].stop()
            self._away.append((time.monotonic() + WORKER_AWAY_S, number))
            self._report.blows["workers lost"] += 1

    async def _forgive(self) -> None:
        """Let models be tried again that failed too often, as an operator would: else all would soon have."""
        for runner in (await asyncio.to_thread(get, self._through.url, "/status"))["runners"]:
            if runner["state"] == "failed":
                await asyncio.to_thread(post, self._through, "/manage/reset", {"model": runner["model"]})
                self._report.blows["models given up, and reset"] += 1

    async def _bring_back(self, now: float) -> None:
        for due, number in [one for one in self._away if one[0] <= now]:
            endpoint = self._workers[number].endpoint
            self._workers[number] = await asyncio.to_thread(start_worker, TOOLS, endpoint)
            self._away.remove((due, number))


def runners_of(through: Way) -> list[psutil.Process]:
    """Return the llama-servers that the service runs."""
    found = []
    for child in through.process.children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == "llama-server" and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


async def follow_memory(through: Way, report: Report, end: float) -> None:
    """Note what the service takes."""
    while time.monotonic() < end:
        report.resident_bytes.append(through.process.memory_info().rss)
        report.descriptors.append(through.process.num_fds())
        await asyncio.sleep(SAMPLE_EVERY_S)


async def rage(
    through: Way, workers: list[RpcWorker], report: Report, *, seconds: float, clients: int, seed: int
) -> None:
    """Let everybody loose for so long."""
    end = time.monotonic() + seconds
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        await asyncio.gather(
            Monkey(through, workers, report, random.Random(seed)).strike_until(end),  # noqa: S311 - not a secret
            follow_memory(through, report, end),
            *(
                Client(session, through.url, report, random.Random(f"{seed}.{number}")).ask_until(end)  # noqa: S311 - likewise
                for number in range(clients)
            ),
        )


async def settle(through: Way, report: Report) -> None:
    """Wait until nothing is left of it all; whatever stays is a broken promise."""
    give_up_at = time.monotonic() + QUIET_WITHIN_S
    while left := leftovers(through):
        if time.monotonic() > give_up_at:
            report.broken += [f"{QUIET_WITHIN_S:g} s after the last request: {one}" for one in left]
            return
        await asyncio.sleep(0.2)


def leftovers(through: Way) -> list[str]:
    """Return what the service still holds."""
    told = get(through.url, "/status")
    left = [f"runner {one['id']} is {one['state']}" for one in told["runners"] if one["pid"] is not None]
    left += [f"{one['id']} has {one['in_flight']} in flight" for one in told["runners"] if one["in_flight"]]
    left += [f"{told['queue']['waiting']} wait"] if told["queue"]["waiting"] else []
    left += [
        f"{device['planned_bytes']} bytes are promised on {device['name']}"
        for device in told["devices"] or ()
        if device["planned_bytes"]
    ]
    return left + [f"llama-server {child.pid} runs" for child in runners_of(through)]


def judge_memory(report: Report) -> None:
    """Compare what the service took in the second quarter with the last: before that it warms up."""
    samples = report.resident_bytes
    if (quarter := len(samples) // 4) == 0:
        return
    early, late = (statistics.median(part) for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
    if late - early > MAX_GROWTH_BYTES:
        report.broken.append(f"the service grew from {early / 1e6:.1f} to {late / 1e6:.1f} MB")


@contextmanager
def many_models(folder: Path) -> Iterator[Path]:
    """Write the models."""
    models = folder / "models"
    models.mkdir()
    for name, words in WORDS.items():
        tiny_models.write_chat_model(models / f"{name}.gguf", text=words)
    tiny_models.write_chat_model(models / f"{ENDLESS}.gguf", n_layer=8, n_embd=256, n_ff=768, endless=True)
    tiny_encoders.write_embedding_model(models / f"{EMBEDDING}.gguf")
    yield models


def run(*, seconds: float, clients: int, seed: int) -> Report:
    """Let it all happen once, and return what came of it."""
    report = Report()
    workers = [start_worker(TOOLS) for _ in range(N_WORKERS)]
    try:
        with tempfile.TemporaryDirectory() as name, many_models(Path(name)) as models:
            servers = ",".join(f"{worker.endpoint}={WORKER_CAP}" for worker in workers)
            settings = {**SETTINGS, "PLANNER_RPC_SERVERS": servers, "PLANNER_LLAMA_SERVER": str(TOOLS / "llama-server")}
            with service(models, Path(name) / "state", **settings) as through:
                asyncio.run(rage(through, workers, report, seconds=seconds, clients=clients, seed=seed))
                asyncio.run(settle(through, report))
                judge_memory(report)
                end_service(through, report)
            orphans = [one.pid for one in psutil.process_iter() if str(models) in " ".join(command_of(one))]
            report.broken += [f"llama-server {pid} outlived the service" for pid in orphans]
    finally:
        for worker in workers:
            worker.stop()
    return report


def end_service(through: Way, report: Report) -> None:
    """Have the service end by itself."""
    through.process.terminate()
    try:
        through.process.wait(ENDS_WITHIN_S)
    except psutil.TimeoutExpired:
        report.broken.append(f"the service did not end within {ENDS_WITHIN_S:g} s")
        through.process.kill()


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process that may just have ended."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def main() -> int:
    """Let it all happen, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=os.getpid())
    args = parser.parse_args()
    print(f"{args.clients} clients, {args.minutes:g} minutes, seed {args.seed}")
    report = run(seconds=args.minutes * 60, clients=args.clients, seed=args.seed)
    report.show()
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())

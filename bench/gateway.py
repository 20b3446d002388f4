"""What the way through ``planner serve`` costs, beside llama-server asked directly and beside its own router mode.

    python bench/gateway.py [--pairs N] [--streams N] [--tokens N] [--threads N] [--client bare|openai] [--awake]
                            [--singles N] [--bursts N]

One model, as many streams as slots, and one thread that computes; with ``--threads 0`` as many as llama-server takes by
itself, where every proxy has to fight for its time. The client does as little as one can, on a connection of its own
for each request, or is the openai package, which keeps its connections where it may. In each pair every way is taken in
turn: straight to the llama-server that the service started, through the service, through a bare relay (the least that a
proxy made with aiohttp does) to the same llama-server, and through llama-server's router mode, which starts a
llama-server of its own with the same flags, and straight to that one: no two processes are equally fast, so each proxy
is compared with what it stands before. Compared are medians over the pairs: tokens per second with all streams,
seconds to the first token of a single stream and of all at once, processor seconds of the proxy itself. With
``--awake`` every processor is kept awake meanwhile (``measuring.awake``). Few long streams tell little where a machine
scatters; many short ones tell more: ``--streams 16 --tokens 60 --pairs 90 --singles 1 --bursts 0``, where the streams
themselves are the burst. Ends with 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp
import openai
import psutil
from aiohttp import web
from measuring import (
    PATH,
    Stream,
    Way,
    awake,
    drain,
    get,
    llama_server,
    llama_server_of,
    median,
    post,
    quartiles,
    resampled,
    running,
    service,
    stream,
    verdict,
    write_model,
)

MODEL: Final = "tiny-endless"
N_CTX: Final = 1024
SINGLES: Final = 25  # streams in each pair, for the time to the first token: differences are tenths of a millisecond
# Bursts of all streams in each pair, for the time to the first token then, which differs by tens of milliseconds.
BURSTS: Final = 8
BURST_TOKENS: Final = 20
IDLE_S: Final = 10.0
BARE: Final = "bare"
DIRECT: Final = "direct"
SERVICE: Final = "planner serve"
RELAY: Final = "bare relay"
ROUTER: Final = "router mode"
ROUTERS: Final = "direct, router's"
RELAY_KEY: Final = "RELAY_KEY"  # no argument: a key may begin with a dash

MIN_RATE: Final = 0.97
MAX_FIRST_TOKEN_MS: Final = 4.0
MAX_CPU: Final = 1.5
MAX_IDLE_PERCENT: Final = 0.5
MAX_RESIDENT_MB: Final = 90.0


async def relay(upstream: str, key: str) -> None:
    """Serve a relay that does nothing but relay, and print its address."""
    # llama-server closes a connection after a stream without saying so: one that was kept fails the next request.
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        async with session.post(upstream + request.path, data=await request.read(), headers=headers) as answer:
            response = web.StreamResponse(status=answer.status)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_post(PATH, forward)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    print(f"http://{host}:{port}", flush=True)
    await asyncio.Event().wait()


@dataclass(frozen=True, slots=True)
class Pair:
    """What each way is asked for in a pair: so many streams of so many tokens at once, bursts of them, single ones."""

    streams: int
    tokens: int
    bursts: int
    singles: int


@dataclass(frozen=True, slots=True)
class Sums:
    """What one way took, pair by pair."""

    rates: list[float] = field(default_factory=list)
    busy_first_token_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


Ask = Callable[[Way, int], Awaitable[Stream]]


async def ask_bare(way: Way, n_tokens: int) -> Stream:
    """Ask for so many tokens on a connection of its own."""
    return await stream(way, MODEL, n_tokens)


class Package:
    """The openai package's clients, one for each way. Use within ``async with``, which closes them."""

    def __init__(self, ways: Sequence[Way]) -> None:
        self._clients = {way.name: openai.AsyncOpenAI(base_url=f"{way.url}/v1", api_key=way.key or "-") for way in ways}
        self._closing = AsyncExitStack()

    async def __aenter__(self) -> Ask:
        for client in self._clients.values():
            await self._closing.enter_async_context(client)
        return self._ask

    async def __aexit__(self, *_exception: object) -> None:
        await self._closing.aclose()

    async def _ask(self, way: Way, n_tokens: int) -> Stream:
        """Ask for so many tokens. Ends the program where fewer come."""
        began, first_token_s, n_came = time.perf_counter(), 0.0, 0
        answer = await self._clients[way.name].chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=n_tokens,
            stream=True,
            extra_body={"cache_prompt": False},
        )
        async for chunk in answer:
            if chunk.choices and chunk.choices[0].delta.content:
                n_came += 1
                first_token_s = first_token_s or time.perf_counter() - began
        if n_came < n_tokens:
            raise SystemExit(f"{way.name} sent {n_came} tokens of {n_tokens}")
        return Stream(first_token_s, n_came)


async def burst(ask: Ask, way: Way, streams: int) -> float:
    """Return the seconds to the first token where so many ask at once, as the median over them."""
    return median(
        [one.first_token_s for one in await asyncio.gather(*(ask(way, BURST_TOKENS) for _ in range(streams)))]
    )


async def take(ask: Ask, way: Way, sums: Sums, pair: Pair) -> None:
    """Take one way: all streams at once, then bursts of them, then single ones."""
    cpu_s, began = way.cpu_s(), time.perf_counter()
    answers = await asyncio.gather(*(ask(way, pair.tokens) for _ in range(pair.streams)))
    sums.rates.append(sum(one.n_tokens for one in answers) / (time.perf_counter() - began))
    sums.cpu_s.append(way.cpu_s() - cpu_s)
    bursts = [await burst(ask, way, pair.streams) for _ in range(pair.bursts)]
    sums.busy_first_token_s.append(median(bursts or [one.first_token_s for one in answers]))
    sums.first_token_s.append(median([(await ask(way, 1)).first_token_s for _ in range(pair.singles)]))


async def compare(ask: Ask, ways: Sequence[Way], pairs: int, pair: Pair) -> dict[str, Sums]:
    """Take every way in turn, each pair beginning with another one; the first round is not counted."""
    for round_ in range(pairs + 1):
        if round_ <= 1:
            sums = {way.name: Sums() for way in ways}
        for index in range(len(ways)):
            way = ways[(round_ + index) % len(ways)]
            await take(ask, way, sums[way.name], pair)
    return sums


async def measured(client: str, ways: Sequence[Way], pairs: int, pair: Pair) -> dict[str, Sums]:
    """Take every way by this client."""
    if client == BARE:
        return await compare(ask_bare, ways, pairs, pair)
    async with Package(ways) as ask:
        return await compare(ask, ways, pairs, pair)


def later_ms(ours: Sequence[float], direct: Sequence[float]) -> list[float]:
    """Return by how much one way's first tokens come later, pair by pair."""
    return [(mine - theirs) * 1e3 for mine, theirs in zip(ours, direct, strict=True)]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return how much one way has of another, pair by pair."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def idle_percent(process: psutil.Process) -> float:
    """Return how much of a core a process takes while nobody asks it for anything."""
    process.cpu_percent()
    time.sleep(IDLE_S)
    return float(process.cpu_percent())


def report(sums: dict[str, Sums], through: Way) -> bool:
    """Print what came out, and return whether all bounds hold."""
    direct, ours, bare, router, routers = (sums[name] for name in (DIRECT, SERVICE, RELAY, ROUTER, ROUTERS))
    for name, one in sums.items():
        first_ms = median(one.first_token_s) * 1e3
        print(
            f"  {name:<16} {median(one.rates):8.0f} tokens/s  {first_ms:7.2f} ms to the first token"
            f"  {median(one.cpu_s):7.3f} s of processor"
        )
    rates, later, busy_later = [], [], []
    for name, one, its in ((SERVICE, ours, direct), (ROUTER, router, routers)):
        rates.append(ratios(one.rates, its.rates))
        later.append(later_ms(one.first_token_s, its.first_token_s))
        busy_later.append(later_ms(one.busy_first_token_s, its.busy_first_token_s))
        print(
            f"  {name:<16} of direct's tokens/s{quartiles(rates[-1])}, first token later than direct"
            f" {quartiles(later[-1])} ms, all at once {quartiles(busy_later[-1])} ms"
        )
        print(
            f"  95 % of resampled medians: {resampled(rates[-1])}, {resampled(later[-1])}, {resampled(busy_later[-1])}"
        )
    held = [
        verdict("tokens per second, of direct", median(rates[0]), MIN_RATE, at_least=True),
        verdict("tokens per second, of direct; router mode's", median(rates[0]), median(rates[1]), at_least=True),
        verdict("later first token than direct", median(later[0]), MAX_FIRST_TOKEN_MS, " ms"),
        verdict("later first token than direct; router mode's", median(later[0]), median(later[1]), " ms"),
        verdict("all streams at once", median(busy_later[0]), MAX_FIRST_TOKEN_MS, " ms"),
        verdict(
            "the same with all streams at once; router mode's", median(busy_later[0]), median(busy_later[1]), " ms"
        ),
        verdict("processor seconds, of the bare relay", median(ratios(ours.cpu_s, bare.cpu_s)), MAX_CPU),
        verdict("idle, of one core", idle_percent(through.process), MAX_IDLE_PERCENT, " %"),
        verdict("resident memory of the service", through.process.memory_info().rss / 1e6, MAX_RESIDENT_MB, " MB"),
    ]
    for child in through.process.children():
        if any("planning.worker" in word for word in child.cmdline()):
            print(f"  its planning process holds {child.memory_info().rss / 1e6:.0f} MB")
    return all(held)


def behind(router: Way) -> Way:
    """Return the straight way to the llama-server that a router has started. Ends the program where there is none."""
    for child in router.process.children():
        if "--port" in (line := child.cmdline()):
            return Way(ROUTERS, f"http://127.0.0.1:{line[line.index('--port') + 1]}", "", child)
    raise SystemExit("router mode has no llama-server")


def key_of(pid: int) -> str:
    """Return the key that a llama-server of ours was given."""
    return psutil.Process(pid).environ()["LLAMA_API_KEY"]


def measure(folder: Path, args: argparse.Namespace) -> bool:
    """Start everything, compare, report."""
    pairs, threads = args.pairs, args.threads
    pair = Pair(args.streams, args.tokens, args.bursts, args.singles)
    models = folder / "models"
    models.mkdir()
    write_model(models / f"{MODEL}.gguf")
    settings = {
        "PLANNER_LLAMA_SERVER": str(llama_server_of(folder, threads)),
        "PLANNER_NUM_PARALLEL": str(pair.streams),
        "PLANNER_CONTEXT_LENGTH": str(N_CTX),
    }
    with service(models, folder / "state", **settings) as through:
        hello = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        post(through, PATH, hello)
        (runner,) = get(through.url, "/status")["runners"]
        direct = Way(DIRECT, runner["url"], key_of(runner["pid"]), psutil.Process(runner["pid"]))
        flags = runner["plan"]["launch"]["argv"]
        router_line = [flags[0], "--models-dir", str(models), *flags[flags.index("--fit") :]]
        command = [sys.executable, __file__, "--relay", direct.url]
        with (
            running(command, {**os.environ, RELAY_KEY: direct.key}) as bare,
            llama_server(ROUTER, router_line) as router,
        ):
            relayed = (bare.stdout or sys.stdin).readline().strip()
            drain(bare)
            post(router, PATH, hello)
            ways = [direct, through, Way(RELAY, relayed, "", psutil.Process(bare.pid)), router, behind(router)]
            conditions = f"threads: {threads or 'all'}, client: {args.client}, {pairs} pairs{', awake' * args.awake}"
            print(f"{pair.streams} streams of {pair.tokens} tokens, {conditions}")
            return report(asyncio.run(measured(args.client, ways, pairs, pair)), through)


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--client", choices=(BARE, "openai"), default=BARE)
    parser.add_argument("--singles", type=int, default=SINGLES)
    parser.add_argument("--bursts", type=int, default=BURSTS)
    parser.add_argument("--awake", action="store_true")
    parser.add_argument("--relay", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.relay:
        asyncio.run(relay(args.relay, os.environ[RELAY_KEY]))
    with tempfile.TemporaryDirectory() as folder, awake(wanted=args.awake):
        return 0 if measure(Path(folder), args) else 1


if __name__ == "__main__":
    sys.exit(main())

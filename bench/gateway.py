"""Times a one-token chat three ways: straight to llama-server, through ``planner serve``, and through a bare relay.

    python bench/gateway.py [ROUNDS]

All ask the same llama-server, which the service has started, in turn, over one kept connection each. The bare relay
is the least that a proxy made with aiohttp does; it shows what of the way through the service is not ours to save.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = "tiny-chat"
PATH = "/v1/chat/completions"
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
ROUNDS = 500
WARM_UP_ROUNDS = 50


async def relay(upstream: str) -> None:
    """Serve a relay that does nothing but relay, and print its address."""
    session = aiohttp.ClientSession()

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = {"Authorization": request.headers["Authorization"], "Content-Type": "application/json"}
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


@contextmanager
def running(command: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a child and stop it at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environ) as child:
        try:
            yield child
        finally:
            child.terminate()
            child.wait()


def service_address(child: subprocess.Popen[str]) -> str:
    """Return where the service listens, once it is ready. Raises where it ends before."""
    address = ""
    for line in child.stdout or ():
        entry = json.loads(line) if line.startswith("{") else {}
        address = str(entry.get("url", address))
        if entry.get("event") == "serve.ready":
            threading.Thread(target=child.communicate, daemon=True).start()  # a full pipe would stop it
            return address
    raise SystemExit("planner serve ended before it was ready")


def status_of(url: str) -> dict[str, object]:
    """Return the runner of the service's status."""
    with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
        connection.request("GET", "/status")
        (runner,) = json.load(connection.getresponse())["runners"]
    return dict(runner)


def key_of(pid: object) -> str:
    """Return the key that a llama-server of ours was given."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(one for one in variables if one.startswith(b"LLAMA_API_KEY=")).partition(b"=")[2].decode()


def timed(connection: HTTPConnection, key: str) -> float:
    """Return the seconds from the request's first byte to the answer's last. Raises where it is no answer."""
    began = time.perf_counter()
    connection.request("POST", PATH, BODY, {"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
    answer = connection.getresponse()
    body = answer.read()
    seconds = time.perf_counter() - began
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {body.decode()}")
    return seconds


def main() -> None:
    """Run the comparison and print it."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        write = [sys.executable, str(FIXTURES / "tiny_models.py"), "--chat", f"{folder}/{MODEL}.gguf"]
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
        settings = {
            "PLANNER_MODELS": folder,
            "PLANNER_STATE_DIR": f"{folder}/state",
            "PLANNER_HOST": "127.0.0.1:0",
            "PLANNER_CONTEXT_LENGTH": "4096",
            "PLANNER_LOG_FORMAT": "json",
        }
        with running([sys.executable, "-m", "planner", "serve"], {**os.environ, **settings}) as service:
            through = service_address(service)
            timed(HTTPConnection(urlsplit(through).netloc), "")  # loads the model
            runner = status_of(through)
            direct, key = str(runner["url"]), key_of(runner["pid"])
            with running([sys.executable, __file__, "relay", direct], dict(os.environ)) as bare:
                relayed = (bare.stdout or sys.stdin).readline().strip()
                compare({"direct": direct, "planner serve": through, "bare relay": relayed}, key, rounds)


def compare(ways: dict[str, str], key: str, rounds: int) -> None:
    """Ask every way in turn and print the medians, each with its ratio to the first."""
    connections = {way: HTTPConnection(urlsplit(url).netloc) for way, url in ways.items()}
    seconds = [{way: timed(connections[way], key) for way in ways} for _ in range(WARM_UP_ROUNDS + rounds)]
    medians = {way: statistics.median(one[way] for one in seconds[WARM_UP_ROUNDS:]) for way in ways}
    first = next(iter(medians.values()))
    for way, median in medians.items():
        print(f"{way:<14} {median * 1e3:6.2f} ms  {median / first:5.2f} x")


if __name__ == "__main__":
    if sys.argv[1:2] == ["relay"]:
        asyncio.run(relay(sys.argv[2]))
    else:
        main()

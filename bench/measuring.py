"""What the benchmarks of the service share: models, processes that listen, streams that are timed, bounds that hold."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import tiny_models

PATH: Final = "/v1/chat/completions"
LLAMA_SERVER: Final = Path(sysconfig.get_path("platlib")) / "bin" / "llama-server"
# The processor clock of another process (glibc: sysdeps/unix/sysv/linux/clock_getcpuclockid.c).
CPUCLOCK_SCHED: Final = 2
# What keeps a processor awake. It takes no time that anybody else wants (sched(7): SCHED_IDLE, and the least share for
# the group that a session may be, autogroup), and ends with whoever started it.
SPINNER: Final = """
import os, sys
parent = os.getppid()
os.sched_setaffinity(0, [int(sys.argv[1])])
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
if os.path.exists("/proc/self/autogroup"):
    open("/proc/self/autogroup", "w").write("19")
while os.getppid() == parent:
    for _ in range(1 << 16):
        pass
"""
RESAMPLED: Final = 2000  # samples: the ends of the interval then stand still in their second digit
TOKEN: Final = b'"delta":{"content":"'  # how llama-server begins each token of a streamed chat


def write_model(path: Path) -> None:
    """Write a model that talks until it is stopped, a few hundred words a second on one thread."""
    tiny_models.write_chat_model(path, n_layer=8, n_embd=256, n_ff=768, n_ctx_train=32_768, endless=True)


def write_small_model(path: Path) -> None:
    """Write a model that loads in a hundredth of a second."""
    tiny_models.write_chat_model(path)


def llama_server_of(folder: Path, threads: int) -> Path:
    """Write and return a llama-server that computes with so many threads, whoever starts it; 0: as many as it likes."""
    script, flags = folder / "llama-server", f"-t {threads} -tb {threads}" if threads else ""
    script.write_text(f'#!/bin/sh\nexec {LLAMA_SERVER} "$@" {flags}\n')
    script.chmod(0o755)
    return script


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a model: an address, the key it wants, and the process whose time is counted."""

    name: str
    url: str
    key: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """Return the seconds that the process has computed, threads that have ended included, to the nanosecond.

        Ends the program where the process is gone.
        """
        try:
            return time.clock_gettime(~self.process.pid << 3 | CPUCLOCK_SCHED)
        except OSError as error:
            raise SystemExit(f"the process of {self.name} has ended") from error


@contextmanager
def running(command: Sequence[str], environ: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a child, its output in a pipe, and stop it at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environ) as child:
        try:
            yield child
        finally:
            child.terminate()
            child.wait()


def drain(child: subprocess.Popen[str]) -> None:
    """Read on and forget what it writes: a full pipe would stop it."""
    threading.Thread(target=child.communicate, daemon=True).start()


@contextmanager
def awake(*, wanted: bool = True) -> Iterator[None]:
    """Keep every processor awake meanwhile, where this is ``wanted``.

    A virtual machine's processor that sleeps is woken by its host, and a guest's kernel may rather have a thread wait
    for one that is awake and busy, as that of docs/decisions/0011 seems to. That hides what is to be compared.
    """
    with ExitStack() as spinners:
        for processor in sorted(os.sched_getaffinity(0)) if wanted else ():
            command = [sys.executable, "-c", SPINNER, str(processor)]
            spinner = spinners.enter_context(subprocess.Popen(command, start_new_session=True))
            spinners.callback(spinner.kill)
        yield


@contextmanager
def service(models: Path, state: Path, **settings: str) -> Iterator[Way]:
    """Run ``planner serve`` and yield the way through it, once it is ready."""
    ours = {
        "PLANNER_MODELS": str(models),
        "PLANNER_STATE_DIR": str(state),
        "PLANNER_HOST": "127.0.0.1:0",
        "PLANNER_LOG_FORMAT": "json",
    }
    with running([sys.executable, "-m", "planner", "serve"], {**os.environ, **ours, **settings}) as child:
        address = ""
        for line in child.stdout or ():
            entry = json.loads(line) if line.startswith("{") else {}
            address = str(entry.get("url", address))
            if entry.get("event") == "serve.ready":
                drain(child)
                yield Way("planner serve", address, "", psutil.Process(child.pid))
                return
        raise SystemExit("planner serve ended before it was ready")


@contextmanager
def llama_server(name: str, argv: Sequence[str]) -> Iterator[Way]:
    """Run a llama-server on a free port and yield the way to it, as soon as it says that it listens."""
    with running([*argv, "--host", "127.0.0.1", "--port", "0"], dict(os.environ)) as child:
        for line in child.stdout or ():
            if (at := line.find("listening on http")) >= 0:
                url = line[at:].split()[2]
                drain(child)
                yield Way(name, url, "", psutil.Process(child.pid))
                return
        raise SystemExit(f"{name} ended before it listened")


def get(url: str, path: str) -> Any:
    """Return what a JSON endpoint answers."""
    with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
        connection.request("GET", path)
        return json.load(connection.getresponse())


def post(way: Way, path: str, body: Mapping[str, Any]) -> Any:
    """Return what it answers to this body. Ends the program where that is an error."""
    with closing(HTTPConnection(urlsplit(way.url).netloc)) as connection:
        headers = {"Authorization": f"Bearer {way.key}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{way.name} answered {answer.status}: {text.decode()}")
        return json.loads(text)


@dataclass(frozen=True, slots=True)
class Stream:
    """A streamed answer: how long its first token took, and how many came."""

    first_token_s: float
    n_tokens: int


async def stream(way: Way, model: str, n_tokens: int) -> Stream:
    """Ask for so many tokens and read them to the end. Ends the program where fewer come."""
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": n_tokens,
            "stream": True,
            "cache_prompt": False,
        }
    )
    address = urlsplit(way.url)
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        f"POST {PATH} HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {way.key}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    received, first_token_s = bytearray(), 0.0
    while chunk := await reader.read(1 << 16):
        received += chunk
        if not first_token_s and TOKEN in received:
            first_token_s = time.perf_counter() - began
    writer.close()
    if (n_came := received.count(TOKEN)) < n_tokens:
        raise SystemExit(f"{way.name} sent {n_came} tokens of {n_tokens}: {bytes(received[-500:])!r}")
    return Stream(first_token_s, n_came)


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def quartiles(values: Sequence[float]) -> str:
    """Return the median and, in brackets, the quartiles."""
    low, middle, high = statistics.quantiles(values if len(values) > 1 else [*values, *values], n=4)
    return f"{middle:7.2f} [{low:6.2f} .. {high:6.2f}]"


def resampled(values: Sequence[float]) -> str:
    """Return between what the medians of 95 of 100 samples lie that are drawn from these values (bootstrap)."""
    chance = random.Random(0)  # noqa: S311 - no secret
    medians = sorted(median(chance.choices(values, k=len(values))) for _ in range(RESAMPLED))
    return f"[{medians[RESAMPLED // 40]:.3f} .. {medians[-RESAMPLED // 40]:.3f}]"


def verdict(what: str, value: float, bound: float, unit: str = "", *, at_least: bool = False) -> bool:
    """Print a figure beside its bound, and return whether it holds."""
    holds = value >= bound if at_least else value <= bound
    word = "at least" if at_least else "at most"
    print(f"  {'holds ' if holds else 'BROKEN'}  {what:<58} {value:8.3f}{unit}  ({word} {bound:g}{unit})")
    return holds

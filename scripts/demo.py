"""The whole path once, on this machine: make a model, explain it, serve it, ask it, look at the status, stop.

Run it with `make demo`, which prepares what it needs. Everything is written below `.demo/`, or the folder named.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "tiny-chat"
QUESTION = "Who are you?"
CONTEXT = "4096"  # what the small model was made for

FOREIGN_PREFIXES = ("PLANNER_", "OLLAMA_", "LLAMA_ARG_")  # settings of another service on this machine
READY_TIMEOUT_S = 60.0
READY_POLL_S = 0.05
ANSWER_TIMEOUT_S = 120.0  # the first question loads the model
STOP_TIMEOUT_S = 60.0
SHOWN_LOG_LINES = 30


class DemoError(Exception):
    """What went wrong, in one line."""


def main(folder: Path) -> int:
    """Run the demo with its files in this folder, and return its exit status."""
    planner = Path(sys.executable).with_name("planner")
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    model_path = models / f"{MODEL}.gguf"
    large_path = folder / "header-of-8b.gguf"
    log_path = log_of(folder)
    try:
        narrate("writes a small model that really tokenizes and generates")
        run([sys.executable, str(ROOT / "fixtures" / "tiny_models.py"), "--chat", str(model_path)])
        narrate("says what will fit on this machine, before anything is loaded")
        run([str(planner), "explain", str(model_path), "--ctx-size", CONTEXT])
        narrate("says how an 8B model would lie on two small cards that are not here")
        run([sys.executable, str(ROOT / "fixtures" / "tiny_models.py"), "--large", str(large_path)])
        run(
            [str(planner), "explain", str(large_path), "-c", "8192", "--device", "CUDA0=4GiB", "--device", "CUDA1=3GiB"]
        )
        with served(planner, folder) as address:
            narrate(f"asks the service at http://{address}: {QUESTION}")
            ask(address)
            narrate("GET /status, the plan left out")
            print(json.dumps(shortened(get(address, "/status")), indent=2))
            narrate("stops the service with SIGTERM")
        print("it exited with status 0")
    except DemoError as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        if log_path.exists():
            tail = log_path.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
            print(f"the end of {log_path}:", *tail, sep="\n  ", file=sys.stderr)
        return 1
    return 0


def log_of(folder: Path) -> Path:
    """Return where the service's log is written."""
    return folder / "serve.log"


def narrate(text: str) -> None:
    """Say what happens next."""
    print(f"\n\033[1m==> {text}\033[0m" if sys.stdout.isatty() else f"\n==> {text}", flush=True)


def own_environment() -> dict[str, str]:
    """Return the environment without settings that were meant for another service."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)}


def run(command: list[str]) -> None:
    """Show the command and run it. Raises DemoError where it fails."""
    shown = [os.path.relpath(word, ROOT) if word.startswith(str(ROOT)) else word for word in command]
    print(f"$ {shlex.join(shown)}", flush=True)
    status = subprocess.run(command, env=own_environment(), stdin=subprocess.DEVNULL, check=False).returncode
    if status != 0:
        raise DemoError(f"{shlex.join(shown)} ended with status {status}")


@contextmanager
def served(planner: Path, folder: Path) -> Iterator[str]:
    """Run the service on a free port of loopback, yield its address when it is ready, and stop it."""
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "PLANNER_MODELS": str(folder / "models"),
        "PLANNER_HOST": address,
        "PLANNER_CONTEXT_LENGTH": CONTEXT,
        "PLANNER_STATE_DIR": str(folder / "state"),
    }
    narrate("starts the service")
    print("$", *(f"{name}={value}" for name, value in settings.items()), "planner serve", flush=True)
    with log_of(folder).open("w") as log:
        process = subprocess.Popen(
            [str(planner), "serve"],
            env=own_environment() | settings,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready(process, address)
        yield address
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the service did not stop within {STOP_TIMEOUT_S:.0f} s") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if status != 0:
        raise DemoError(f"the service exited with status {status} after SIGTERM")


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(process: subprocess.Popen[bytes], address: str) -> None:
    """Return when /readyz answers 200. Raises DemoError where the service dies or is not ready in time."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(DemoError, OSError):
            get(address, "/readyz")
            print("it is ready", flush=True)
            return
        if process.poll() is not None:
            raise DemoError(f"the service exited with status {process.returncode} before it was ready")
        time.sleep(READY_POLL_S)
    raise DemoError(f"the service was not ready within {READY_TIMEOUT_S:.0f} s")


def get(address: str, path: str) -> Any:
    """Return the JSON at this path. Raises DemoError for another status than 200, OSError without a connection."""
    with closing(http.client.HTTPConnection(address, timeout=ANSWER_TIMEOUT_S)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    if response.status != http.HTTPStatus.OK:
        raise DemoError(f"GET {path} answered {response.status}: {body.decode(errors='replace')}")
    return json.loads(body)


def ask(address: str) -> None:
    """Ask the question and print the answer as it arrives. Raises DemoError where none does."""
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": QUESTION}]}
    with closing(http.client.HTTPConnection(address, timeout=ANSWER_TIMEOUT_S)) as connection:
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise DemoError(f"the question was answered {response.status}: {response.read().decode()}")
            words = list(echoed(response))
        except OSError as error:
            raise DemoError(f"the answer broke off: {error}") from error
    if not words:
        raise DemoError("the answer is empty")


def echoed(response: http.client.HTTPResponse) -> Iterator[str]:
    """Yield the pieces of a streamed answer, each printed as it came."""
    for line in response:
        data = line.decode().removeprefix("data: ").strip()
        if data == "[DONE]":
            print(flush=True)
            return
        if data:
            event = json.loads(data)
            if "error" in event:
                raise DemoError(f"the stream ended with an error: {event['error']}")
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    print(piece, end="", flush=True)
                    yield piece
    raise DemoError("the stream ended without [DONE]")


def shortened(status: dict[str, Any]) -> dict[str, Any]:
    """Return the status without each runner's plan, which `planner explain` has shown."""
    return status | {"runners": [{**runner, "plan": "..."} for runner in status["runners"]]}


if __name__ == "__main__":
    sys.exit(main(Path(*sys.argv[1:]) if sys.argv[1:] else ROOT / ".demo"))

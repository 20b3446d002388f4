"""``planner serve`` as a process of its own, asked over HTTP and followed by its log."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

WITHIN_S = 60.0
NOT_INHERITED = ("LLAMA_ARG_", "PLANNER_", "OLLAMA_")


@dataclass
class Service:
    """A running ``planner serve`` and its log."""

    process: subprocess.Popen[str]
    port: int
    log: list[dict[str, Any]]
    closing: ExitStack

    def request(self, method: str, path: str, body: object = None, *, key: str | None = None) -> HTTPResponse:
        connection = self.closing.enter_context(closing(HTTPConnection("127.0.0.1", self.port, timeout=WITHIN_S)))
        headers = {} if key is None else {"X-Api-Key": key}
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, sent, headers)
        return self.closing.enter_context(connection.getresponse())

    def get(self, path: str) -> Any:
        return json.loads(self.request("GET", path).read())

    def chat(self, model: str, **more: object) -> HTTPResponse:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}
        return self.request("POST", "/v1/chat/completions", body)

    def model(self, name: str) -> dict[str, Any]:
        [model] = [one for one in self.get("/status")["models"] if one["id"] == name]
        return dict(model)

    def runner(self) -> dict[str, Any]:
        (runner,) = self.get("/status")["runners"]
        return dict(runner)

    def read_log(self, event: str) -> dict[str, Any]:
        """Read the log on until this event."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            entry = json.loads(line)
            self.log.append(entry)
            if entry["event"] == event:
                return dict(entry)
        pytest.fail(f"the service ended without {event}: {self.log}")

    def events(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log if entry["event"] == event]


Serve = Callable[..., Service]


def run(environ: dict[str, str]) -> subprocess.Popen[str]:
    """Start it, its log in a pipe."""
    return subprocess.Popen([sys.executable, "-m", "planner", "serve"], stderr=subprocess.PIPE, text=True, env=environ)


def environment(inherited: Mapping[str, str], models: Path, scratch: Path) -> dict[str, str]:
    """Return the environment of a service over this folder of models, all of whose own files lie in ``scratch``."""
    return {
        **{name: value for name, value in inherited.items() if not name.startswith(NOT_INHERITED)},
        "XDG_CONFIG_HOME": str(scratch / "no-config"),
        "PLANNER_MODELS": str(models),
        "PLANNER_STORE": str(scratch / "store"),
        "PLANNER_STATE_DIR": str(scratch / "state"),
        "PLANNER_HOST": "127.0.0.1:0",
        "PLANNER_CONTEXT_LENGTH": "4096",
        "PLANNER_LOG_FORMAT": "json",
    }


@contextmanager
def serving(environ: dict[str, str]) -> Iterator[Service]:
    """Run a service that is ready. It is killed in the end."""
    with ExitStack() as stack:
        process = stack.enter_context(run(environ))
        stack.callback(process.kill)
        service = Service(process, 0, [], stack)
        service.port = int(service.read_log("serve.listening")["url"].rpartition(":")[2])
        service.read_log("serve.ready")
        yield service


@contextmanager
def shared(environ: dict[str, str]) -> Iterator[Service]:
    """Run a service that many tests ask and whose log none reads. It is told to stop in the end."""
    with serving(environ) as service:
        assert service.process.stderr is not None
        Thread(target=service.process.stderr.read, daemon=True).start()  # a full pipe would stop the service
        yield service
        service.process.terminate()
        service.process.wait(WITHIN_S)

"""Ctrl-C while a model loads, in every client that people use: the request leaves at once, the load goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from running_service import WITHIN_S, Serve, Service
from terminal import Terminal, read_to_end, read_until

pytestmark = pytest.mark.llama

MESSAGES = '[{"role": "user", "content": "hello"}]'
OLLAMA = f"import ollama; print(list(ollama.Client().chat('tiny-chat', {MESSAGES}, stream=True)))"
OLLAMA_ASYNC = f"import asyncio, ollama; asyncio.run(ollama.AsyncClient().chat('tiny-chat', {MESSAGES}))"
CURL = ("curl", "-sN", "-d", f'{{"model": "tiny-chat", "messages": {MESSAGES}}}')
PLANNER = (sys.executable, "-m", "planner")
KILLED = -signal.SIGINT


def wait_for_waiting(service: Service, count: int) -> None:
    while service.get("/status")["queue"]["waiting"] != count:
        pass  # it is on its way; each question takes its time


def load_goes_on(service: Service, gate: Path) -> None:
    """Let the load go on that nobody waits for any more; it is the first and serves the next request."""
    assert service.get("/status")["queue"]["waiting"] == 0
    gate.write_text("go\n")
    service.read_log("runner.ready")
    assert service.runner()["in_flight"] == 0
    assert service.chat("tiny-chat").status == 200
    assert len(service.events("runner.ready")) == 1


def test_every_client_may_be_interrupted_and_leaves_the_queue_at_once(
    serve: Serve, environ: dict[str, str], chat_model: Path, held_back: Path, gate: Path
) -> None:
    service = serve(PLANNER_LLAMA_SERVER=str(held_back))
    address = f"127.0.0.1:{service.port}"
    on_load = b"tiny-chat goes on loading; `planner unload tiny-chat` stops that\n"
    for command, status, last_line in (
        ((*CURL, f"http://{address}/api/chat"), KILLED, b""),
        ((*CURL, f"http://{address}/v1/chat/completions"), KILLED, b""),
        ((sys.executable, "-c", OLLAMA), KILLED, b"KeyboardInterrupt\n"),
        ((sys.executable, "-c", OLLAMA_ASYNC), KILLED, b"KeyboardInterrupt\n"),
        ((*PLANNER, "run", "tiny-chat", "hello"), 130, b""),
        ((*PLANNER, "load", "tiny-chat"), 130, on_load),
    ):
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environ, "PLANNER_HOST": address, "OLLAMA_HOST": address},
        ) as client:
            wait_for_waiting(service, 1)
            client.send_signal(signal.SIGINT)
            said, complaint = client.communicate(timeout=WITHIN_S)
        assert (client.returncode, said) == (status, b""), command
        assert complaint.endswith(last_line) if last_line else complaint == b"", command
        wait_for_waiting(service, 0)
    load_goes_on(service, gate)


def test_a_conversation_shows_how_the_load_goes_and_clears_that_away_when_it_is_interrupted_or_answered(
    serve: Serve, terminal: Terminal, chat_model: Path, held_back: Path, gate: Path
) -> None:
    service = serve(PLANNER_LLAMA_SERVER=str(held_back))
    process, screen = terminal(service, "run", "tiny-chat")
    read_until(screen, ">>> ")
    os.write(screen, b"hello\n")
    read_until(screen, "\r\x1b[Kloading")
    process.send_signal(signal.SIGINT)
    assert read_until(screen, ">>> ").endswith("\r\x1b[K(stopped)\r\n>>> ")
    wait_for_waiting(service, 0)
    os.write(screen, b"hello\n")
    read_until(screen, "\r\x1b[Kloading")
    gate.write_text("go\n")
    answered = read_until(screen, ">>> ")
    assert answered.endswith(f"\r\x1b[K{tiny_models.TEXT}\r\n>>> "), "word by word, and none is cleared away"
    os.write(screen, b"/bye\n")
    assert process.wait(WITHIN_S) == 0


def test_a_question_in_a_terminal_that_is_interrupted_leaves_an_empty_line(
    serve: Serve, terminal: Terminal, chat_model: Path, held_back: Path, gate: Path
) -> None:
    service = serve(PLANNER_LLAMA_SERVER=str(held_back))
    process, screen = terminal(service, "run", "tiny-chat", "hello")
    read_until(screen, "\r\x1b[Kloading")
    process.send_signal(signal.SIGINT)
    assert process.wait(WITHIN_S) == 130
    assert read_to_end(screen).endswith("\r\x1b[K")
    wait_for_waiting(service, 0)
    load_goes_on(service, gate)

"""The models file in a running service: names, contexts, requests changed, programs beside, and reading it again."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running_service import Serve, Service

PROGRAM = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, text):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_GET(self):
        self.answer(b"{}")
    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

Configured = Callable[[str], Service]


@pytest.fixture
def models_file(tmp_path: Path) -> Path:
    return tmp_path / "models.toml"


@pytest.fixture
def configured(serve: Serve, models_file: Path) -> Configured:
    """Return a function that starts a service with this models file."""

    def start(text: str) -> Service:
        models_file.write_text(text)
        return serve(PLANNER_MODELS_FILE=str(models_file))

    return start


@pytest.fixture
def program(tmp_path: Path) -> str:
    """Return the section of a program that answers each request with its body."""
    script = tmp_path / "echo.py"
    script.write_text(PROGRAM)
    cmd = json.dumps([sys.executable, str(script), "{port}"])
    url = "http://127.0.0.1:{port}"
    return (
        f'[external.echo]\ncmd = {cmd}\nurl = "{url}"\nhealth = "/health"\nmemory = {{ Host = "64MiB" }}\nslots = 2\n'
    )


def post(service: Service, **body: Any) -> Any:
    answer = service.request("POST", "/v1/chat/completions", body)
    return json.loads(answer.read())


def test_a_model_answers_to_its_aliases_with_the_context_that_it_was_given(
    configured: Configured, chat_model: Path
) -> None:
    service = configured('[models.tiny-chat]\naliases = ["Assistant"]\ncontext = 1024\nslots = 2\n')
    assert service.chat("assistant:latest").status == 200
    runner = service.runner()
    assert (runner["model"], runner["context_per_slot"], runner["slots"]) == ("tiny-chat", 1024, 2)


def test_requests_get_the_fields_that_the_operator_sets_forces_and_strips(
    configured: Configured, program: str, chat_model: Path
) -> None:
    """Seen through a program that sends each request back; what a client sends stays where nothing is set for it."""
    text = '[models.tiny-chat]\nset = { max_tokens = 3 }\nforce = { n = 1 }\nstrip = ["logprobs"]\n'
    service = configured(text)
    answer = post(service, model="tiny-chat", messages=[{"role": "user", "content": "hello"}], logprobs=True)
    assert answer["usage"]["completion_tokens"] == 3
    assert "logprobs" not in answer["choices"][0] or answer["choices"][0]["logprobs"] is None
    answer = post(service, model="tiny-chat", messages=[{"role": "user", "content": "hello"}], max_tokens=5)
    assert answer["usage"]["completion_tokens"] == 5


def test_what_is_forced_holds_through_every_api(configured: Configured, chat_model: Path) -> None:
    service = configured("[models.tiny-chat]\nforce = { max_tokens = 3 }\n")
    messages = [{"role": "user", "content": "hello"}]
    openai = post(service, model="tiny-chat", messages=messages, max_tokens=9)
    assert openai["usage"]["completion_tokens"] == 3
    body = {"model": "tiny-chat", "messages": messages, "max_tokens": 9}
    anthropic = json.loads(service.request("POST", "/v1/messages", body).read())
    assert anthropic["usage"]["output_tokens"] == 3
    body = {"model": "tiny-chat", "messages": messages, "stream": False, "options": {"num_predict": 9}}
    ollama = json.loads(service.request("POST", "/api/chat", body).read())
    assert ollama["eval_count"] == 3


def test_a_loaded_model_whose_file_goes_is_unloaded(serve: Serve, chat_model: Path, tmp_path: Path) -> None:
    """Nobody can ask for it any more, nor unload it."""
    models = tmp_path / "few"
    models.mkdir()
    file = models / "passing.gguf"
    file.write_bytes(chat_model.read_bytes())
    service = serve(PLANNER_MODELS=str(models), PLANNER_KEEP_ALIVE="-1")
    assert service.chat("passing").status == 200
    file.unlink()
    service.read_log("model.gone")
    service.read_log("runner.stopped")
    assert service.chat("passing").status == 404


@pytest.mark.parametrize("says", ["", "print('no card is free')"], ids=["without a word", "with its last words"])
def test_a_program_that_does_not_start_is_told_with_its_last_words(configured: Configured, says: str) -> None:
    cmd = json.dumps([sys.executable, "-c", f"{says}\nraise SystemExit(7)"])
    url = "http://127.0.0.1:{port}"
    service = configured(f'[external.broken]\ncmd = {cmd}\nurl = "{url}"\nhealth = "/"\nmemory = {{ Host = "1MiB" }}\n')
    answer = service.request("POST", "/v1/chat/completions", {"model": "broken"})
    assert answer.status == 502
    told = json.loads(answer.read())["error"]["message"]
    assert told.endswith("exit status 7: no card is free" if says else "exit status 7")


def test_a_program_that_answers_but_never_gets_ready_is_given_up_though_it_logs_every_question(
    serve: Serve, models_file: Path, tmp_path: Path
) -> None:
    script = tmp_path / "sick.py"
    script.write_text(PROGRAM.replace("send_response(200)", "send_response(503)").replace("def log_message", "def _"))
    models_file.write_text(
        f"[external.sick]\ncmd = {json.dumps([sys.executable, str(script), '{port}'])}\n"
        'url = "http://127.0.0.1:{port}"\nhealth = "/health"\nmemory = { Host = "1MiB" }\n'
    )
    service = serve(PLANNER_MODELS_FILE=str(models_file), PLANNER_LOAD_TIMEOUT="1s")
    answer = service.request("POST", "/v1/chat/completions", {"model": "sick"})
    assert answer.status == 503
    assert "LOAD_TIMEOUT" in json.loads(answer.read())["error"]["message"]
    service.read_log("load.failed")  # its client is told before it has ended
    assert any('"GET /health' in line for line in service.runner()["last_failure"]["log_tail"])


def test_a_program_that_is_no_llama_server_is_started_asked_and_counted(
    configured: Configured, program: str, chat_model: Path
) -> None:
    service = configured(program)
    assert post(service, model="echo", said="hello") == {"model": "echo", "said": "hello"}
    runner = service.runner()
    assert (runner["model"], runner["state"], runner["slots"]) == ("echo", "ready", 2)
    assert runner["devices"] == [{"device": "Host", "planned_bytes": 64 << 20, "measured_bytes": None}]
    unloaded = json.loads(service.request("POST", "/manage/unload", {"model": "echo"}).read())
    assert unloaded == {"model": "echo", "unloaded": True}


def test_a_program_that_needs_more_than_there_is_never_starts(configured: Configured, program: str) -> None:
    service = configured(program.replace("64MiB", "900TiB"))
    answer = service.request("POST", "/v1/chat/completions", {"model": "echo"})
    assert answer.status == 507
    assert "Host" in json.loads(answer.read())["error"]["message"]


def test_a_changed_file_touches_only_the_runners_that_it_changes(
    configured: Configured, models_file: Path, program: str, chat_model: Path
) -> None:
    service = configured(program + "[models.tiny-chat]\ncontext = 1024\n")
    assert service.chat("tiny-chat").status == 200
    post(service, model="echo")
    before = {runner["model"]: runner["pid"] for runner in service.get("/status")["runners"]}
    models_file.write_text(program + "[models.tiny-chat]\ncontext = 2048\n")
    service.process.send_signal(signal.SIGHUP)
    service.read_log("config.reloaded")
    service.read_log("runner.ready")
    after = {runner["model"]: runner for runner in service.get("/status")["runners"]}
    assert after["echo"]["pid"] == before["echo"]
    assert after["tiny-chat"]["pid"] != before["tiny-chat"]
    assert after["tiny-chat"]["context_per_slot"] == 2048


def test_what_a_changed_file_says_in_vain_is_told_in_the_log_and_in_the_status(
    configured: Configured, models_file: Path, chat_model: Path, embedding_model: Path
) -> None:
    service = configured("")
    assert service.get("/status")["warnings"] == []
    models_file.write_text('[models.nobody]\n[models.tiny-chat]\naliases = ["tiny-embedding"]\n')
    service.process.send_signal(signal.SIGHUP)
    logged = [service.read_log("models_file.odd")["warning"] for _ in range(2)]
    assert "'nobody': there is no model of this id" in logged[0]
    assert "tiny-chat: its alias 'tiny-embedding' is a name of tiny-embedding" in logged[1]
    assert service.get("/status")["warnings"] == logged


def test_a_model_that_is_to_be_preloaded_is_there_without_being_asked_for(
    configured: Configured, chat_model: Path
) -> None:
    service = configured("[models.tiny-chat]\npreload = true\n")
    if not service.events("runner.ready"):
        service.read_log("runner.ready")
    assert service.runner()["state"] == "ready"


def test_a_file_with_a_flag_that_no_model_may_set_changes_nothing_and_the_flag_is_named(
    configured: Configured, models_file: Path, chat_model: Path
) -> None:
    service = configured("[models.tiny-chat]\ncontext = 1024\n")
    assert service.chat("tiny-chat").status == 200
    before = service.runner()["pid"]
    models_file.write_text('[defaults]\nflags = ["--portly"]\n[models.tiny-chat]\nflags = ["--port", "8080"]\n')
    service.process.send_signal(signal.SIGHUP)
    unknown, owned = service.read_log("config.not_reloaded")["problems"]
    assert "[defaults] flags: --portly" in unknown
    assert '[models."tiny-chat"] flags: --port 8080' in owned
    assert service.chat("tiny-chat").status == 200
    assert service.runner()["pid"] == before

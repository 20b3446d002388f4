"""The whole service as a process of its own: started, asked, killed, stopped."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
from pathlib import Path

import pytest
from running_service import WITHIN_S, Serve, run

pytestmark = pytest.mark.llama

GONE_WITHIN_S = 2.0


def test_a_model_is_loaded_on_demand_and_its_plan_logged_once(serve: Serve, chat_model: Path) -> None:
    service = serve()
    assert service.get("/readyz")["ready"]
    for _ in range(2):
        answer = json.loads(service.chat("tiny-chat").read())
        assert answer["choices"][0]["message"]["content"].startswith("Hello!")
    runner = service.runner()
    service.process.terminate()
    service.read_log("serve.stopped")
    assert service.process.wait(WITHIN_S) == 0
    (final,) = service.events("plan.final")
    assert final["plan"] == runner["plan"]
    assert len(service.events("config.effective")) == 1


def test_no_child_is_left_when_the_service_is_killed(serve: Serve, endless_model: Path) -> None:
    service = serve()
    stream = service.chat("tiny-endless", stream=True)
    assert stream.read(10)
    child = os.pidfd_open(service.runner()["pid"])
    service.process.kill()
    gone, _, _ = select.select([child], [], [], GONE_WITHIN_S)
    os.close(child)
    assert gone


def test_a_killed_child_ends_its_stream_with_an_error_and_is_replaced(serve: Serve, endless_model: Path) -> None:
    service = serve()
    stream = service.chat("tiny-endless", stream=True)
    assert stream.read(10)
    pid = service.runner()["pid"]
    os.kill(pid, signal.SIGKILL)
    rest = stream.read().decode()
    assert '"error"' in rest
    assert "[DONE]" not in rest
    assert "killed by SIGKILL" in service.runner()["last_failure"]["reason"]
    assert service.chat("tiny-endless", max_tokens=2).status == 200
    assert service.runner()["pid"] != pid


def test_sigterm_refuses_new_work_first_and_then_ends_streams_and_children(serve: Serve, endless_model: Path) -> None:
    service = serve(PLANNER_DRAIN_TIMEOUT="1s", PLANNER_STOP_GRACE="200ms")
    stream = service.chat("tiny-endless", stream=True)
    assert stream.read(10)
    child = os.pidfd_open(service.runner()["pid"])
    service.process.terminate()
    service.read_log("serve.stopping")
    assert service.request("GET", "/readyz").status == 503
    assert service.request("GET", "/healthz").status == 200
    assert service.chat("tiny-endless").status == 503
    assert stream.read(10), "what had begun goes on"
    rest = stream.read().decode()
    assert '"error"' in rest
    assert service.process.wait(WITHIN_S) == 0
    assert select.select([child], [], [], 0)[0], "no child outlives the service"
    os.close(child)


def test_a_second_signal_hurries(serve: Serve, endless_model: Path) -> None:
    service = serve(PLANNER_DRAIN_TIMEOUT="1h", PLANNER_STOP_GRACE="200ms")
    stream = service.chat("tiny-endless", stream=True)
    assert stream.read(10)
    service.process.send_signal(signal.SIGINT)
    service.read_log("serve.stopping")
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(WITHIN_S) == 0


def test_bad_settings_are_all_listed(environ: dict[str, str]) -> None:
    with run({**environ, "PLANNER_KEEP_ALIVE": "soon", "PLANNER_MAX_QUEUE": "many"}) as process:
        _, errors = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 2
    assert [line.startswith("planner: error: PLANNER_") for line in errors.splitlines()] == [True, True]


def test_a_taken_port_ends_the_start_with_its_holder(environ: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with run({**environ, "PLANNER_HOST": f"127.0.0.1:{port}"}) as process:
            _, errors = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert f"process {os.getpid()}" in line


def test_a_missing_models_folder_and_llama_server_make_it_unready_not_dead(serve: Serve, tmp_path: Path) -> None:
    service = serve(PLANNER_MODELS=str(tmp_path / "nothing"), PLANNER_LLAMA_SERVER=str(tmp_path / "nowhere"))
    response = service.request("GET", "/readyz")
    assert response.status == 503
    text = response.read().decode()
    assert "PLANNER_MODELS" in text
    assert "make llama" in text


def test_a_llama_server_and_models_that_come_later_are_found_without_a_restart(
    serve: Serve, chat_model: Path, llama_tools: Path, tmp_path: Path
) -> None:
    folder, server = tmp_path / "later", tmp_path / "llama-server"
    service = serve(PLANNER_MODELS=str(folder), PLANNER_LLAMA_SERVER=str(server))
    folder.mkdir()
    shutil.copy(chat_model, folder)
    assert service.read_log("found")["what"] == "models"
    assert str(server) in service.chat("tiny-chat").read().decode()
    server.symlink_to(llama_tools / "llama-server")
    assert service.read_log("found")["what"] == "llama-server"
    assert service.request("GET", "/readyz").status == 200
    assert service.chat("tiny-chat").status == 200


def test_systemd_is_told(environ: dict[str, str], llama_tools: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(WITHIN_S)
        with run({**environ, "NOTIFY_SOCKET": path, "WATCHDOG_USEC": "60000000"}) as process:
            heard = {systemd.recv(1000).decode().partition("\n")[0] for _ in range(2)}
            assert heard == {"READY=1", "WATCHDOG=1"}
            process.terminate()
            assert systemd.recv(1000).startswith(b"STOPPING=1")
            process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0

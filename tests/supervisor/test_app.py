"""The whole service as a process of its own: started, asked, killed, stopped."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rpc_worker import RpcWorker
from running_service import WITHIN_S, Serve, Service, run
from supervising import PRINTED_TO

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


def test_a_context_of_one_token_is_made_long_enough_to_load_at_all(serve: Serve, chat_model: Path) -> None:
    service = serve(PLANNER_CONTEXT_LENGTH="0")
    asked = {"model": "tiny-chat", "messages": [{"role": "user", "content": "hello"}], "options": {"num_ctx": 1}}
    assert service.request("POST", "/api/chat", asked).status == 200
    assert len(service.events("config.effective")) == 1


def test_what_explain_prints_is_what_is_launched_and_what_llama_server_reserves(
    serve: Serve, environ: dict[str, str], endless_model: Path, rpc_workers: Callable[[int], tuple[RpcWorker, ...]]
) -> None:
    """Over three workers that take different shares. What is free on the host right now is each one's own reading."""
    caps = (15, 18, 23)
    servers = ",".join(f"{one.endpoint}={mib}MiB" for one, mib in zip(rpc_workers(3), caps, strict=True))
    environ = {**environ, "PLANNER_RPC_SERVERS": servers}
    explain = [sys.executable, "-m", "planner", "explain", str(endless_model), "--json"]
    told = json.loads(subprocess.run(explain, env=environ, check=True, capture_output=True, timeout=WITHIN_S).stdout)
    service = serve(PLANNER_RPC_SERVERS=servers)
    assert service.chat("tiny-endless", max_tokens=2).status == 200
    runner = service.runner()
    service.process.terminate()
    service.read_log("serve.stopped")
    (final,) = service.events("plan.final")
    assert without_live_figures(final["plan"]) == without_live_figures(told)
    assert runner["plan"] == final["plan"]
    assert [device["device"] for device in runner["devices"]] == ["RPC0", "RPC1", "RPC2", "Host"]
    for device in runner["devices"]:
        assert device["planned_bytes"] > 0
        assert abs(device["measured_bytes"] - device["planned_bytes"]) <= PRINTED_TO


def without_live_figures(plan: dict[str, Any]) -> dict[str, Any]:
    live = {"free_bytes", "budget_bytes"}
    devices = [
        {key: value for key, value in device.items() if device["kind"] != "host" or key not in live}
        for device in plan["devices"]
    ]
    return {**plan, "devices": devices}


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


def test_a_model_that_never_loads_is_tried_less_and_less_and_then_given_up(
    serve: Serve, chat_model: Path, llama_tools: Path, tmp_path: Path
) -> None:
    """All of it as a client and an operator see it; the pauses between the tries are 0, 1, 2 and 4 seconds."""
    server = tmp_path / "llama-server"
    server.write_text(
        f'#!/bin/sh\ncase "$1" in --*) exec {llama_tools}/llama-server "$@";; esac\n'
        "echo '0.00.000.001 E srv  load_model: no luck today'\nexit 1\n"
    )
    server.chmod(0o755)
    service = serve(PLANNER_LLAMA_SERVER=str(server))
    for tries in range(1, 6):
        refused = service.chat("tiny-chat")
        assert refused.status == 502
        assert refused.headers["Retry-After"]
        assert "exit status 1: load_model: no luck today" in refused.read().decode()
        runner = service.runner()
        assert runner["state"] in ({"backoff", "stopped"} if tries < 5 else {"failed"})
        assert "no luck today" in runner["last_failure"]["reason"]
    assert runner["retry_at"] > service.get("/status")["now"] + 200
    for _ in range(3):
        assert service.chat("tiny-chat").status == 502, "at once: nothing is started any more"
    (model,) = (one for one in service.get("/status")["models"] if one["id"] == "tiny-chat")
    assert (model["counters"]["launches"], model["counters"]["load_failures"]) == (5, 5)
    assert service.request("GET", "/readyz").status == 200


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


def test_a_second_service_is_refused_while_the_first_goes_on(serve: Serve, environ: dict[str, str]) -> None:
    first = serve()
    with run(environ) as second:
        _, errors = second.communicate(timeout=WITHIN_S)
    assert second.returncode == 1
    (line,) = errors.splitlines()
    assert f"process {first.process.pid}" in line
    assert first.request("GET", "/readyz").status == 200


@pytest.mark.parametrize("taken", ["state", "state/runners", "state/no-config", "state/lock"])
def test_a_state_folder_that_cannot_be_used_is_said_in_one_line(environ: dict[str, str], taken: str) -> None:
    """Something else has the name of what the service would make."""
    path = Path(environ["PLANNER_STATE_DIR"]).parent / taken
    path.parent.mkdir(exist_ok=True)
    if path.name == "lock":
        path.mkdir()
    else:
        path.write_text("in the way")
    with run(environ) as process:
        _, errors = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert str(path) in line
    assert "PLANNER_STATE_DIR" in line


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


def test_a_gpu_that_no_llama_server_can_use_is_said_loudly(
    serve: Serve, chat_model: Path, nvml_folder: Path, tmp_path: Path
) -> None:
    """The driver knows a card, the one llama-server here is a CPU build: the card idles, and everything says so."""
    card = tmp_path / "nvml.txt"
    card.write_text("card NVIDIA_GeForce_RTX_3060 GPU-bbbb 0 1 0\nmemory 12884901888 134217728 0\ncapability 8 6\n")
    service = serve(LD_LIBRARY_PATH=str(nvml_folder), FAKE_NVML=str(card))
    (warned,) = service.events("machine.warning")
    assert warned["level"] == "warning"
    for words in ("CUDA0", "RTX 3060", "left idle", "without CUDA", "make llama BACKEND=cuda"):
        assert words in warned["warning"]
    status = service.get("/status")
    assert warned["warning"] in status["warnings"]
    assert [device["usable"] for device in status["devices"] if device["name"] == "CUDA0"] == [False]
    assert service.chat("tiny-chat").status == 200


def test_a_log_that_nobody_reads_stops_nothing(environ: dict[str, str], llama_tools: Path, chat_model: Path) -> None:
    """The pipe is small and much is logged; once somebody reads again, what was lost is counted."""
    with ExitStack() as stack:
        process = stack.enter_context(run({**environ, "PLANNER_DEBUG": "2"}))
        stack.callback(process.kill)
        service = Service(process, 0, [], stack)
        service.port = int(service.read_log("serve.listening")["url"].rpartition(":")[2])
        service.read_log("serve.ready")
        assert process.stderr is not None
        fcntl.fcntl(process.stderr.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        for _ in range(3):
            assert service.chat("tiny-chat").status == 200
        service.read_log("request")


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

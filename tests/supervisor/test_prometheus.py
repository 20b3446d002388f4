"""A real Prometheus reads a real service."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from threading import Thread
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from running_service import WITHIN_S, Serve

WITHOUT = "no prometheus here: /metrics is read by no real one (Debian: apt-get install prometheus)"

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not (shutil.which("prometheus") and shutil.which("promtool")), reason=WITHOUT),
]

CONFIGURATION = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs: [{{job_name: loadmaster, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]
"""
LISTENING = re.compile(r'msg="Listening on" address=(\S+)')


# What an operator is told of a model and of a device, once it has served.
TOLD = """
    loadmaster_runner_planned_bytes loadmaster_runner_measured_bytes loadmaster_runner_deviation_bytes
    loadmaster_device_planned_bytes loadmaster_device_measured_bytes loadmaster_device_free_bytes
    loadmaster_runner_requests_in_flight loadmaster_runner_requests_waiting loadmaster_requests_granted_total
    loadmaster_http_requests_total loadmaster_queue_length
    loadmaster_prompt_tokens_total loadmaster_prompt_seconds_total loadmaster_generated_tokens_total
    loadmaster_generated_seconds_total loadmaster_first_token_seconds_bucket loadmaster_runner_load_seconds
    loadmaster_evictions_total loadmaster_runner_restarts loadmaster_out_of_memory_total
"""


@contextmanager
def prometheus(folder: Path, port: int) -> Iterator[str]:
    """Run a Prometheus that scrapes this port of loopback; yield its address once it is ready."""
    configuration = folder / "prometheus.yml"
    configuration.write_text(CONFIGURATION.format(port=port))
    command = [
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            log = list(takewhile(lambda line: "Server is ready" not in line, process.stderr))
            Thread(target=process.stderr.read, daemon=True).start()  # keeps the pipe empty
            (address,) = (found[1] for found in map(LISTENING.search, log) if found)
            yield f"http://{address}"
        finally:
            process.terminate()


def samples(address: str, query: str) -> dict[str, float]:
    """Return what Prometheus knows: value by the labels' text."""
    with urlopen(f"{address}/api/v1/query?{urlencode({'query': query})}", timeout=WITHIN_S) as answer:  # noqa: S310 - ours
        found = json.load(answer)["data"]["result"]
    return {json.dumps(one["metric"], sort_keys=True): float(one["value"][1]) for one in found}


def until_told(address: str, query: str, value: float) -> None:
    """Return once this is what Prometheus knows; each question takes its time, and the whole test is bounded."""
    while list(samples(address, query).values()) != [value]:
        pass


def test_prometheus_scrapes_it_and_promtool_finds_nothing_to_object_to(
    serve: Serve, chat_model: Path, tmp_path: Path
) -> None:
    service = serve()
    answered = json.loads(service.chat("tiny-chat", max_tokens=3).read())["usage"]
    service.chat("tiny-chat", max_tokens=4, stream=True).read()
    n_generated = answered["completion_tokens"] + 4
    while (service.model("tiny-chat")["tokens"] or {}).get("generated") != n_generated:
        pass  # a runner is asked some seconds after it was used
    text = service.request("GET", "/metrics").read()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    with prometheus(tmp_path, service.port) as address:
        until_told(address, 'up{job="loadmaster"}', 1.0)
        launches = samples(address, 'loadmaster_launches_total{model="tiny-chat"}')
        assert list(launches.values()) == [1.0]
        generated = samples(address, 'loadmaster_generated_tokens_total{model="tiny-chat"}')
        assert list(generated.values()) == [n_generated]
        streamed = samples(address, 'loadmaster_first_token_seconds_count{model="tiny-chat"}')
        assert list(streamed.values()) == [1.0]
        state = samples(address, "loadmaster_runner_state == 1")
        assert [json.loads(labels)["state"] for labels in state] == ["ready"]
        names = {json.loads(labels)["__name__"] for labels in samples(address, '{__name__=~"loadmaster_.+"}')}
    with_samples = {line.partition("{")[0].split()[0] for line in text.decode().splitlines() if line[:1] != "#"}
    assert set(TOLD.split()) <= with_samples <= names


def test_prometheus_is_told_of_a_crash_a_restart_and_an_eviction(
    serve: Serve, chat_model: Path, tmp_path: Path
) -> None:
    service = serve()
    service.chat("tiny-chat").read()
    os.kill(service.runner()["pid"], signal.SIGKILL)
    service.read_log("runner.crashed")
    answered = json.loads(service.chat("tiny-chat").read())["usage"]
    with prometheus(tmp_path, service.port) as address:
        until_told(address, 'loadmaster_crashes_total{model="tiny-chat"}', 1.0)
        until_told(address, 'loadmaster_runner_restarts{model="tiny-chat"}', 1.0)
        service.request("POST", "/manage/yield", {"device": "Host", "bytes": 1 << 60, "for_seconds": 1}).read()
        until_told(address, 'loadmaster_evictions_total{model="tiny-chat"}', 1.0)
        # The last one's tokens are all told; of the killed one's what it had told.
        counted = f'loadmaster_generated_tokens_total{{model="tiny-chat"}} >= bool {answered["completion_tokens"]}'
        until_told(address, counted, 1.0)

"""A real Prometheus reads a real service."""

from __future__ import annotations

import json
import re
import shutil
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


def test_prometheus_scrapes_it_and_promtool_finds_nothing_to_object_to(
    serve: Serve, chat_model: Path, tmp_path: Path
) -> None:
    service = serve()
    service.chat("tiny-chat").read()
    text = service.request("GET", "/metrics").read()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    with prometheus(tmp_path, service.port) as address:
        while 1.0 not in samples(address, 'up{job="loadmaster"}').values():
            pass  # each question takes its time, and the whole test is bounded
        launches = samples(address, 'loadmaster_launches_total{model="tiny-chat"}')
        assert list(launches.values()) == [1.0]
        state = samples(address, "loadmaster_runner_state == 1")
        assert [json.loads(labels)["state"] for labels in state] == ["ready"]
        names = {json.loads(labels)["__name__"] for labels in samples(address, '{__name__=~"loadmaster_.+"}')}
    declared = {line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE")}
    with_samples = {line.partition("{")[0].split()[0] for line in text.decode().splitlines() if line[:1] != "#"}
    assert with_samples <= names
    assert "loadmaster_http_request_seconds" in declared

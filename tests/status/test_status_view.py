"""``/status`` and ``/metrics`` say what the snapshot says, under names that the documents list."""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from snapshots import GIB, LOADING, READY, busy_machine, empty_machine

from planner.types import Role
from supervisor.api.lease import Lease
from supervisor.api.snapshot import Snapshot
from supervisor.gateway.errors import HTTP_CODES, RULES
from supervisor.status.metric_table import METRICS
from supervisor.status.metrics import Exposition
from supervisor.status.view import status

GOLDEN = Path(__file__).with_name("golden_status.json")
DOCS = Path(__file__).parents[2] / "docs"
# Keys below these are another document's: a plan is explain's JSON.
OPAQUE = {"runners[].plan"}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class StillRuntime:
    """A runtime in which nothing moves."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def snapshot(self) -> Snapshot:
        return self._snapshot

    def acquire(self, model: str, role: Role) -> AbstractAsyncContextManager[Lease]:
        raise NotImplementedError


def scrape(snapshot: Snapshot) -> Samples:
    """Return what Prometheus's own parser reads from the exposition; a sample that stands twice is an error."""
    samples: Samples = {}
    for family in text_string_to_metric_families(Exposition(StillRuntime(snapshot)).text().decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"loadmaster_{name}", frozenset(labels.items())))


def test_the_status_is_the_golden_one() -> None:
    """Scripts rely on every key: a change here is a change of the contract."""
    assert json.loads(json.dumps(status(busy_machine()))) == json.loads(GOLDEN.read_text())


def test_what_is_not_known_is_null() -> None:
    """Neither an empty list of devices nor zero bytes stand for not knowing."""
    told = status(empty_machine())
    assert told["devices"] is None
    assert told["ready"] is False
    host = status(busy_machine())["devices"][-1]
    assert host["planned_bytes"] == GIB + GIB // 2
    assert host["measured_bytes"] is None  # one of the two runners has not reported yet


@pytest.mark.parametrize(
    "model,state", [(READY.model, "ready"), (LOADING.model, "loading"), ("idle-7b", "unloaded"), ("broken", "unusable")]
)
def test_a_model_has_its_runners_state(model: str, state: str) -> None:
    """One without a runner is either to be loaded or cannot be."""
    [entry] = [entry for entry in status(busy_machine())["models"] if entry["id"] == model]
    assert entry["state"] == state


def test_a_draining_service_is_not_ready() -> None:
    """Also where nothing else is the matter."""
    assert status(dataclasses.replace(busy_machine(), draining=True))["ready"] is False


def keys_of(node: Any, path: str = "") -> set[str]:
    """Return the paths of all leaves and lists of objects, as the document writes them."""
    if isinstance(node, dict) and path not in OPAQUE:
        return set().union({path} - {""}, *(keys_of(child, f"{path}.{key}".lstrip(".")) for key, child in node.items()))
    if isinstance(node, list):
        return set().union({f"{path}[]"}, *(keys_of(child, f"{path}[]") for child in node))
    return {path}


def test_every_key_of_the_status_is_documented() -> None:
    """A row names a key, or describes an object and names its keys within the row."""
    rows = (DOCS / "status.md").read_text().splitlines()
    documented: set[str] = set()
    for row in rows:
        if found := re.match(r"\| `([^`]+)` \| (.*) \|", row):
            documented |= {found[1]} | {f"{found[1]}.{key}" for key in re.findall(r"`(\w+)`", found[2])}
    leaves = {
        key for key in keys_of(status(busy_machine())) if not any(other.startswith(f"{key}.") for other in documented)
    }
    assert leaves <= documented


def test_the_metrics_document_lists_the_table() -> None:
    """Name, type, labels and meaning, in order."""
    rows = [f"| `{row.name}` | {row.kind} | {', '.join(row.labels)} | {row.help} |" for row in METRICS]
    assert [line for line in (DOCS / "metrics.md").read_text().splitlines() if line.startswith("| `")] == rows


def test_the_error_document_lists_the_table() -> None:
    """Status, type, code and time to wait of every row, and nothing else."""
    rows = re.findall(r"\| (\d+) \| (\w+) \| (\w+) \| (?:(\d+) s)? ?\|", (DOCS / "http.md").read_text())
    table = {(str(r.status), r.type, r.code, f"{r.retry_after_s:g}" if r.retry_after_s else "") for r in RULES}
    table |= {(str(status), type_, code, "") for status, (type_, code) in HTTP_CODES.items()}
    assert set(rows) == table | {("500", "server_error", "internal_error", "")}


def test_metrics_agree_with_the_snapshot() -> None:
    """Odd names survive the text format, unknown figures have no sample, strangers become no label."""
    samples = scrape(busy_machine())
    assert value(samples, "runner_state", model=READY.model, role="chat", state="ready") == 1
    assert value(samples, "runner_state", model=LOADING.model, role="embedding", state="loading") == 1
    assert value(samples, "runner_planned_bytes", model=READY.model, device="CUDA0") == 17 * GIB
    assert value(samples, "runner_deviation_bytes", model=READY.model, device="CUDA0") == -4096
    assert value(samples, "runner_measured_bytes", model=LOADING.model, device="Host") is None
    assert value(samples, "device_measured_bytes", device="Host", kind="host") is None
    assert value(samples, "device_free_bytes", device="CUDA1", kind="cuda") == 11 * GIB
    assert value(samples, "device_usable", device="CUDA1", kind="cuda") == 0
    assert value(samples, "models", role="chat") == 3
    assert value(samples, "models_unusable") == 1
    assert value(samples, "crashes_total", model=READY.model) == 1
    assert value(samples, "requests_granted_total", model="idle-7b") == 0
    assert value(samples, "generated_tokens_total", model=READY.model) == 12_000
    assert value(samples, "generated_seconds_total", model=READY.model) == 300
    assert value(samples, "prompt_tokens_total", model=READY.model) == 90_000
    assert value(samples, "generated_tokens_total", model="idle-7b") is None
    assert value(samples, "runner_restarts", model=READY.model) == 1
    assert value(samples, "queue_length") == 3
    assert not any("was-here-once" in dict(labels).values() for _, labels in samples)


def test_two_runners_of_one_model_are_one_line() -> None:
    """Their figures are added up: Prometheus refuses a sample that stands twice."""
    machine = busy_machine()
    twice = dataclasses.replace(machine, runners=(READY, dataclasses.replace(READY, id="runner-3")))
    assert value(scrape(twice), "runner_requests_in_flight", model=READY.model) == 2


def test_every_sample_belongs_to_a_row_with_exactly_its_labels() -> None:
    """What is exposed is what the table says, whatever the snapshot; no file name breaks the text."""
    odd = dataclasses.replace(busy_machine().models[0], id="caf\udce9\n")
    names = {row.name: set(row.labels) for row in METRICS}
    for snapshot in (busy_machine(), empty_machine(), dataclasses.replace(busy_machine(), models=(odd,))):
        for name, labels in scrape(snapshot):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert {label for label, _ in labels} - {"le"} == names[base]

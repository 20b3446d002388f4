"""Plans of every kind, started by ``planner serve`` over workers: what llama-server reserves is what was planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from published_models import dimensions, write_model
from rpc_worker import RpcWorker
from running_service import Serve
from supervising import PRINTED_TO

pytestmark = pytest.mark.llama

AUTO = {"PLANNER_CONTEXT_LENGTH": ""}


class Case(NamedTuple):
    """A model, what it may take of each worker in MiB, settings, and what is to be chosen."""

    model: str
    budgets_mib: tuple[int, ...]
    placement: str
    settings: dict[str, str] = {}  # noqa: RUF012 - nobody changes it
    flags: str = ""


CASES = {
    "one worker holds it": Case("small-llama", (400,), "gpu"),
    "two workers hold it": Case("small-llama", (70, 60), "gpu"),
    "three unequal workers hold it": Case("small-llama", (52, 50, 46), "gpu"),
    "spread over three": Case("small-llama", (400, 400, 400), "gpu", {"PLANNER_SCHED_SPREAD": "1"}),
    "some layers stay on the CPU": Case("small-llama", (45,), "gpu+cpu"),
    "some layers stay on the CPU beside two workers": Case("small-llama", (30, 25), "gpu+cpu"),
    "experts of two layers stay on the CPU": Case("small-qwen3moe", (90,), "gpu", flags="-ncmoe 2"),
    "experts of two workers' layers stay on the CPU": Case(
        "small-qwen3moe", (90, 60), "gpu", flags=r"-ts 3,4 -ot blk\.(1|4)\.ffn_up_exps=CPU"
    ),
    "as long a context as fits": Case("small-llama", (130,), "gpu", AUTO),
    "as long a context as fits on two workers": Case("small-llama", (90, 60), "gpu", AUTO),
    "as long a context as takes no speed": Case("small-llama", (40, 25), "gpu+cpu", AUTO),
    "two conversations with a smaller cache": Case(
        "small-llama", (70, 70), "gpu", {"PLANNER_NUM_PARALLEL": "2", "PLANNER_KV_CACHE_TYPE": "q8_0"}
    ),
    "as many conversations as cost no layer": Case("small-llama", (130, 130), "gpu", {"PLANNER_NUM_PARALLEL": "auto"}),
    "no worker is large enough": Case("small-llama", (1,), "cpu"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_llama_server_reserves_what_was_planned(
    case: Case, serve: Serve, tmp_path: Path, rpc_workers: Callable[[int], tuple[RpcWorker, ...]]
) -> None:
    folder = tmp_path / "chosen"
    folder.mkdir()
    write_model(folder / "chosen.gguf", dimensions("small")[case.model])
    workers = zip(rpc_workers(len(case.budgets_mib)), case.budgets_mib, strict=True)
    servers = ",".join(f"{worker.endpoint}={mib}MiB" for worker, mib in workers)
    own = tmp_path / "models.toml"
    own.write_text(f"[models.chosen]\nflags = {json.dumps(case.flags.split())}\n", encoding="utf-8")
    given = {"PLANNER_MODELS": str(folder), "PLANNER_MODELS_FILE": str(own), "PLANNER_RPC_SERVERS": servers}
    service = serve(**given, **case.settings)
    service.chat("chosen", max_tokens=1).read()
    runner = service.runner()
    plan: dict[str, Any] = runner["plan"]
    assert plan["placement"] == case.placement, plan["decisions"]
    assert runner["devices"]
    for device in runner["devices"]:
        assert device["measured_bytes"] == pytest.approx(device["planned_bytes"], abs=PRINTED_TO), device["device"]

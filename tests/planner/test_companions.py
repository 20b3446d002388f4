"""What is loaded beside a model: charged to the byte where it lies, refused where llama.cpp would not load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import companion_models
import pytest
from live_server import assert_as_planned, explain

from planner import companions
from planner.build import PINNED_BUILD
from planner.errors import ModelFileError
from planner.model import read_model
from planner.placement import search
from planner.types import HOST, HOST_POOL, Device, DeviceKind, Machine, PlanRequest, Policy, Refused

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
HOST_ALONE = Machine((), Device(HOST, DeviceKind.HOST, 64 << 30, 64 << 30, HOST_POOL))


@pytest.fixture(scope="module")
def adapters(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two adapters of the model: a small one, and a large one that changes embedding and output too."""
    folder = tmp_path_factory.mktemp("adapters")
    small, large = folder / "small.gguf", folder / "large.gguf"
    companion_models.write_lora(small, endless_model, rank=12)
    companion_models.write_lora(large, endless_model, rank=70, extra=(EMBEDDING, OUTPUT))
    return small, large


def outcome(model: Path, **knobs: Any) -> Any:
    """Return the answer to this request on a host without devices."""
    request = PlanRequest(**knobs)
    facts = companions.attach(read_model(str(model)), request)
    return search(facts, request, HOST_ALONE, Policy(), PINNED_BUILD)


@pytest.mark.llama
@pytest.mark.parametrize(
    "flags", [(), ("-ngl", "3", "-lm", "none"), ("-nkvo", "-fa", "off"), ("-ncffn", "4")], ids=" ".join
)
def test_adapters_take_what_the_plan_says(
    flags: tuple[str, ...],
    endless_model: Path,
    adapters: tuple[Path, Path],
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """Two adapters lie where the matrices lie that they change, and widen the graphs that they are part of."""
    workers = rpc_workers(2)
    devices = (f"RPC{i}@{worker.endpoint}=1GiB" for i, worker in enumerate(workers))
    words = [word for device in devices for word in ("--device", device)]
    files = ",".join(map(str, adapters))
    fixed = ("-c", "4096", "-ts", "3,2", "--lora", files, "--no-oracle")
    plan = explain(str(endless_model), *words, *fixed, *flags, environment=free_environment)

    places = {"Host": "Host"} | {f"RPC{i}": worker.endpoint for i, worker in enumerate(workers)}
    # The log has one line for the model and one for each adapter, each rounded.
    assert_as_planned(plan, places, free_environment, resolution=0.01)
    assert {source for device in plan["devices"] for source in device["source"].values()} == {"exact", "simulated"}


def test_an_adapter_of_another_architecture_is_refused(endless_model: Path, tmp_path: Path) -> None:
    companion_models.write_lora(tmp_path / "other.gguf", endless_model, architecture="qwen3")
    refused = outcome(endless_model, lora=(str(tmp_path / "other.gguf"),))
    assert isinstance(refused, Refused)
    assert "is an adapter for qwen3, the model is llama" in refused.reason


def test_an_adapter_of_another_size_is_refused(endless_model: Path, chat_model: Path, tmp_path: Path) -> None:
    companion_models.write_lora(tmp_path / "other.gguf", chat_model)
    refused = outcome(endless_model, lora=(str(tmp_path / "other.gguf"),))
    assert isinstance(refused, Refused)
    assert "blk.0.attn_k.weight has another shape" in refused.reason


def test_a_model_is_no_adapter(endless_model: Path) -> None:
    refused = outcome(endless_model, lora=(str(endless_model),))
    assert isinstance(refused, Refused)
    assert "is no LoRA adapter" in refused.reason


def test_an_adapter_that_is_missing_is_named(endless_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"missing\.gguf: there is no such file"):
        outcome(endless_model, lora=(str(tmp_path / "missing.gguf"),))

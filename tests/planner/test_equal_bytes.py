"""The promise of the house: what a plan says per device is what llama-server then reserves there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_server import MIB, assert_as_planned, device_words, explain, places_of
from published_models import dimensions, write_model

pytestmark = pytest.mark.llama


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-c", "8192", "-np", "2"),
        ("-ctk", "q8_0", "-ctv", "q8_0", "-ub", "256"),
        ("-fa", "off", "-c", "2048"),
        ("-ngl", "6", "-kvu", "-np", "2"),
        ("-nkvo", "-ncffn", "3"),
        ("-ts", "1,2,5", "-ot", r"blk\.1\.ffn_up=RPC2"),
    ],
    ids=" ".join,
)
def test_every_device_gets_the_bytes_that_the_plan_says(
    flags: tuple[str, ...],
    endless_model: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """A model is planned over three unequal devices and launched on three workers; each figure is as planned."""
    workers = rpc_workers(3)
    sizes = (120 * MIB, 90 * MIB, 140 * MIB)
    words = device_words(workers, sizes)
    context = () if "-c" in flags else ("-c", "4096")
    plan = explain(
        str(endless_model),
        *words,
        *context,
        *flags,
        "--no-oracle",
        environment=free_environment | {"PLANNER_SCHED_SPREAD": "1"},
    )
    planned = {device["name"]: device for device in plan["devices"]}
    used = [name for name in ("RPC0", "RPC1", "RPC2") if planned[name]["layers"]]
    assert used == ["RPC0", "RPC1", "RPC2"], "the sizes were chosen so that every device is needed"

    assert_as_planned(plan, places_of(workers), free_environment)


@pytest.mark.parametrize(
    "model_name, sizes, chosen",
    [
        ("small-llama", ("28MiB", "20MiB"), "gpu+cpu"),
        ("small-qwen3moe", ("20MiB", "16MiB"), "experts on the CPU"),
        ("small-qwen3moe", ("28MiB", "35MiB"), "experts on the next device"),
    ],
)
def test_what_the_search_divides_is_reserved_where_it_says(
    model_name: str,
    sizes: tuple[str, ...],
    chosen: str,
    tmp_path: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """Two workers too small for whole layers: these stay behind, or experts, or go on; each figure is as planned."""
    model = write_model(tmp_path / "model.gguf", dimensions("small")[model_name])
    workers = rpc_workers(2)
    words = device_words(workers, sizes)
    plan = explain(str(model), *words, "-c", "4096", "-ub", "64", "--no-oracle", environment=free_environment)
    assert chosen in {plan["placement"], *(decision["step"] for decision in plan["decisions"])}
    assert_as_planned(plan, places_of(workers), free_environment)


@pytest.mark.parametrize(
    "flags",
    [
        ("-ngl", "99", "-ts", "2,1", "-ot", "token_embd=CPU"),
        ("-ngl", "0", "-ot", r"blk\.1\.ffn=RPC1"),
        ("-ngl", "3", "-sm", "none", "-mg", "1", "-ts", "1,0"),
    ],
    ids=" ".join,
)
def test_flags_that_name_a_place_are_followed(
    flags: tuple[str, ...],
    tmp_path: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """An embedding that is the output too, parts of layers that stay on the host, one device of several."""
    model = write_model(tmp_path / "model.gguf", dimensions("small")["small-gemma2"])
    workers = rpc_workers(2)
    words = device_words(workers)
    plan = explain(str(model), *words, "-c", "2048", *flags, "--no-oracle", environment=free_environment)
    assert_as_planned(plan, places_of(workers), free_environment)


@pytest.mark.parametrize("family", sorted(dimensions("small")))
def test_a_family_of_models_gets_the_bytes_that_its_plan_says(
    family: str,
    tmp_path: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """Dense, windowed and mixed-expert models of their makers' proportions, really loaded over two devices."""
    model = write_model(tmp_path / f"{family}.gguf", dimensions("small")[family])
    workers = rpc_workers(2)
    words = device_words(workers, [400 * MIB] * 2)
    spread = free_environment | {"PLANNER_SCHED_SPREAD": "1"}
    plan = explain(str(model), *words, "-c", "4096", "--no-oracle", environment=spread)
    assert [len(device["layers"]) > 0 for device in plan["devices"]] == [True, True, False]
    assert_as_planned(plan, places_of(workers), free_environment)

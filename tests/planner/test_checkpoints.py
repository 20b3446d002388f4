"""What llama-server keeps of a conversation to go back to: counted on the host, and no less than it really takes."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from machines import machine_of
from published_models import dimensions, write_model
from recorded_models import ReadModel, reader

from planner import budget, cache
from planner.build import PINNED_BUILD
from planner.context import context_params
from planner.flags import CommandLine, parse
from planner.model import ModelFacts, read_model
from planner.search.placement import search
from planner.types import DeviceKind, Machine, Plan, PlanRequest, Policy
from planner.units import GIB, MIB

SAMPLE = json.loads((Path(__file__).parents[2] / "fixtures/truth/sample.json").read_text())
WITHIN_S = 60.0
LISTENS = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")
CREATED = re.compile(r"created context checkpoint \d+ of (\d+) .*size = ([0-9.]+) MiB")
PRINTED_MIB = 0.0005  # three decimals
PROMPT = [3 + number % 20 for number in range(230)]


@pytest.fixture(scope="module")
def sample_model(tmp_path_factory: pytest.TempPathFactory) -> ReadModel:
    """Return a reader of the sample's models, which llama-server can load: they have a vocabulary."""
    words = {"model": "gpt2", "pre": "llama-bpe", "merges": [f"{number:x}a b" for number in range(128)]}
    more = {f"tokenizer.ggml.{key}": value for key, value in words.items()} | {"attention.layer_norm_rms_epsilon": 1e-6}
    entries = {name: {**entry, "metadata": entry["metadata"] | more} for name, entry in SAMPLE.items()}
    return reader(tmp_path_factory.mktemp("checkpoints"), entries)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    """Return a model of whose checkpoints each takes two thirds of a gigabyte."""
    path = tmp_path_factory.mktemp("windowed") / "gemma.gguf"
    return read_model(str(write_model(path, dimensions("full")["gemma-2-9b"], vocabulary=False)))


def flags_of(*words: str) -> CommandLine:
    return parse(words)


def created(
    model: ModelFacts, llama_tools: Path, environment: Mapping[str, str], *flags: str
) -> list[tuple[int, float]]:
    """Return of each checkpoint that a prompt makes how many there may be, and its MiB."""
    words = ["-m", model.summary.path, "--port", "0", "-lv", "5", "-np", "1", "-c", "2048", "-ub", "64", *flags]
    lines: list[str] = []
    command = [str(llama_tools / "llama-server"), *words]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=dict(environment)
    ) as server:
        assert server.stderr is not None
        port = next(int(found[1]) for line in server.stderr if (found := LISTENS.search(line)))
        rest = Thread(target=lambda: lines.extend(server.stderr or ()))
        rest.start()
        try:
            with closing(HTTPConnection("127.0.0.1", port, timeout=WITHIN_S)) as connection:
                connection.request("POST", "/completion", json.dumps({"prompt": PROMPT, "n_predict": 1}))
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()
        finally:
            server.terminate()
            server.wait()
            rest.join()
    return [(int(found[1]), float(found[2])) for line in lines if (found := CREATED.search(line))]


@pytest.mark.llama
@pytest.mark.parametrize(
    "name, flags",
    [
        ("gemma3-dense", ("-ctxcp", "7")),
        ("gemma3-dense", ("-ctk", "q8_0", "-ctv", "q8_0", "-np", "2")),
        ("gemma3-dense", ("-fa", "off", "-kvu", "-np", "2")),
        ("gpt-oss-moe", ()),
        ("lfm2-dense", ()),
        ("mamba-dense", ()),
    ],
)
def test_a_checkpoint_takes_no_more_than_is_counted_and_hardly_less(
    sample_model: ReadModel, name: str, flags: tuple[str, ...], llama_tools: Path, free_environment: dict[str, str]
) -> None:
    """Of windows and of recurrent states, whatever the type of the cache and however many slots there are."""
    model, request = sample_model(name), flags_of("-c", "2048", "-ub", "64", *flags).request
    params = context_params(model, request)
    told = cache.checkpoint_bytes(model, params) / MIB
    found = created(model, llama_tools, free_environment, *flags)
    assert {most for most, _ in found} == {params.n_ctx_checkpoints}
    assert all(mib - PRINTED_MIB <= told <= 1.05 * mib + PRINTED_MIB for _, mib in found)


@pytest.mark.llama
@pytest.mark.parametrize("name, flags", [("llama-dense", ()), ("gemma3-dense", ("--swa-full",))])
def test_where_nothing_is_forgotten_there_are_no_checkpoints(
    sample_model: ReadModel, name: str, flags: tuple[str, ...], llama_tools: Path, free_environment: dict[str, str]
) -> None:
    model = sample_model(name)
    assert created(model, llama_tools, free_environment, *flags) == []
    assert cache.checkpoint_bytes(model, context_params(model, flags_of("-c", "2048", *flags).request)) == 0


def on_card(host_bytes: int) -> Machine:
    """Return a machine with room for everything on its device, and that much on the host."""
    whole = machine_of(DeviceKind.RPC, 1)
    return replace(whole, host=replace(whole.host, free_bytes=host_bytes))


def planned(model: ModelFacts, host_bytes: int = 64 * GIB, **knobs: Any) -> Plan:
    request = PlanRequest(n_ctx_per_slot=8192, **knobs)
    plan = search(model, request, on_card(host_bytes), Policy(), PINNED_BUILD)
    assert isinstance(plan, Plan)
    return plan


def test_there_are_as_many_as_take_a_gibibyte_and_two_of_each_conversation_at_least(windowed: ModelFacts) -> None:
    one = cache.checkpoint_bytes(windowed, context_params(windowed, PlanRequest(n_ctx=8192)))
    for slots, chosen in ((1, 2), (4, 2)):
        plan = planned(windowed, n_parallel=slots)
        assert plan.host.checkpoint_bytes == chosen * slots * one
        assert plan.launch.argv[plan.launch.argv.index("-ctxcp") + 1] == str(chosen)
        (decision,) = [each for each in plan.decisions if each.step == "context checkpoints"]
        assert "MiB of the host's memory" in decision.because


def test_where_they_are_small_or_pinned_there_are_as_many_as_llama_server_would_have(
    windowed: ModelFacts, sample_model: ReadModel
) -> None:
    plan, small = planned(windowed, ctx_checkpoints=9), planned(sample_model("gemma3-dense"), n_ubatch=64)
    assert (plan.request.ctx_checkpoints, small.request.ctx_checkpoints) == (9, 32)
    assert plan.host.checkpoint_bytes == 9 * cache.checkpoint_bytes(windowed, context_params(windowed, plan.request))


def test_they_give_way_before_a_model_is_refused(windowed: ModelFacts) -> None:
    """They count on the host as the prompt cache does, which goes first."""
    there = planned(windowed).usages[-1]
    needed = budget.host_bytes(there.context, there.compute, planned(windowed).host)
    whole, without_cache = planned(windowed, there.occupied_bytes or 0), planned(windowed, needed - MIB)
    without_both = planned(windowed, needed - GIB - MIB - (there.compute.bytes or 0))
    assert [each.request.ctx_checkpoints for each in (whole, without_cache, without_both)] == [2, 2, 0]
    assert [each.request.cache_ram_mib for each in (whole, without_cache)] == [1024, 0]
    assert without_both.host.checkpoint_bytes == 0

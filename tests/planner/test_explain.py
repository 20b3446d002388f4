"""What explain prints is frozen: scripts read the JSON, people the text.

After a change that is meant, ``python tests/planner/test_explain.py`` writes the golden files again; read the diff.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from planner import explain
from planner.explain_text import to_text
from planner.text import Style, ranges, size
from planner.types import (
    UNKNOWN_DETAIL,
    UNKNOWN_FIGURE,
    Decision,
    DecodeEstimate,
    DeviceKind,
    DeviceUsage,
    Figure,
    HostDetail,
    LaunchSpec,
    LlamaBuild,
    ModelSummary,
    NearestChange,
    NoFit,
    Placement,
    Plan,
    PlanOutcome,
    PlanRequest,
    Refused,
    Role,
    Shortfall,
    Source,
)

GOLDEN = Path(__file__).parents[2] / "fixtures/golden"
MIB = 1024**2
GIB = 1024**3

MODEL = ModelSummary(
    "/models/qwen3-14b.gguf", "Qwen3 14B", "qwen3", "Q4_K_M", 9 * GIB, 9 * GIB - MIB, 14_800_000_000, 40, 40_960
)
BUILD = LlamaBuild("/bin/llama-server", "0.5.0-dev", "0c1e570")
REQUEST = PlanRequest(
    n_ctx=40_960,
    n_parallel=1,
    devices=("CUDA0", "CUDA1"),
    n_gpu_layers=41,
    tensor_split=(15.0, 26.0),
    flash_attn="on",
    passthrough=("--top-k", "40"),
)
HOST = DeviceUsage(
    "Host", DeviceKind.HOST, 64 * GIB, 60 * GIB, 60 * GIB,
    model=Figure(417 * MIB, Source.EXACT), compute=Figure(30 * MIB, Source.SIMULATED),
    needed_bytes=380 * MIB + 607_744 + GIB,
)  # fmt: skip
DETAIL = HostDetail(417 * MIB, 350 * MIB, output_buffer_bytes=607_744, prompt_cache_bytes=GIB)
DECISIONS = (
    Decision("context", "40,960 tokens", "it is the trained length, and it fits"),
    Decision("batch", "2048", "it is llama-server's default"),
    Decision("split mode", "layer", "it is llama-server's default"),
)


def usage(name: str, layers: range, free: int, model: int, *, output: bool = False) -> DeviceUsage:
    return DeviceUsage(
        name,
        DeviceKind.CUDA,
        free + GIB,
        free,
        free - GIB // 2,
        tuple(layers),
        output,
        Figure(model, Source.EXACT),
        Figure(len(layers) * 160 * MIB, Source.EXACT),
        Figure(300 * MIB, Source.SIMULATED),
        307 * MIB,
    )


PLAN = Plan(
    model=MODEL,
    request=REQUEST,
    build=BUILD,
    placement=Placement(("CUDA0", "CUDA1"), (0,) * 15 + (1,) * 25, 1, 41, (15.0, 26.0)),
    usages=(
        usage("CUDA0", range(15), 7 * GIB, 3 * GIB),
        usage("CUDA1", range(15, 40), 12 * GIB, 6 * GIB - 12_345_678, output=True),
        DeviceUsage("CUDA2", DeviceKind.CUDA, None, None, None),
        HOST,
    ),
    host=DETAIL,
    n_ctx_per_slot=40_960,
    launch=LaunchSpec(
        (
            "/bin/llama-server",
            "-m",
            "/models/a model.gguf",
            "--fit",
            "off",
            "-ngl",
            "41",
            "-ts",
            "15,26",
            "-kvo",
            "-lv",
            "4",
        ),
        MappingProxyType({"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}),
    ),
    decode=DecodeEstimate(31.5, "bytes read per token over each card's bandwidth"),
    decisions=DECISIONS,
    warnings=("CUDA2 (Some Card) is left idle: its driver does not answer",),
)
PARTIAL = replace(PLAN, placement=Placement(("CUDA0",), (-1,) * 26 + (0,) * 14, 0, 15, (15.0,)))
ON_HOST = replace(PLAN, placement=Placement((), (-1,) * 40, -1, 0, ()))
UNKNOWN = replace(
    PLAN,
    placement=Placement(("CUDA0",), (), -1, 0, ()),
    usages=(
        replace(PLAN.usages[0], layers=(), model=UNKNOWN_FIGURE, context=UNKNOWN_FIGURE, compute=UNKNOWN_FIGURE),
        replace(HOST, model=UNKNOWN_FIGURE, context=UNKNOWN_FIGURE, compute=UNKNOWN_FIGURE),
    ),
    host=UNKNOWN_DETAIL,
    n_ctx_per_slot=None,
    decode=None,
    fit_by_llama=True,
)
PARTLY_KNOWN = replace(
    PLAN,
    usages=tuple(replace(usage, compute=UNKNOWN_FIGURE) if usage.layers else usage for usage in PLAN.usages),
    warnings=("how much compute takes is unknown: there is no rule here for the compute graph of brandnew",),
)
NO_FIT = NoFit(
    model=MODEL,
    request=REQUEST,
    build=BUILD,
    usages=(usage("CUDA0", range(40), 7 * GIB, 9 * GIB, output=True), HOST),
    host=DETAIL,
    n_ctx_per_slot=40_960,
    causes=(Shortfall("CUDA0", 12 * GIB, 7 * GIB), Shortfall("Host", 61 * GIB, 60 * GIB)),
    nearest=(NearestChange("--ctx-size 8192", fits=True), NearestChange("-ctk q8_0 -ctv q8_0", fits=False)),
    decisions=DECISIONS,
)
REFUSED = Refused(MODEL, REQUEST, BUILD, "a quantized V cache (q8_0) needs flash attention", DECISIONS)

OUTCOMES: dict[str, PlanOutcome] = {
    "plan": PLAN,
    "unknown": UNKNOWN,
    "partly_known": PARTLY_KNOWN,
    "no_fit": NO_FIT,
    "refused": REFUSED,
}
WIDTHS = (80, 120)


def as_json(outcome: PlanOutcome) -> str:
    return json.dumps(explain.to_json(outcome), indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", OUTCOMES)
def test_the_json_is_the_golden_one(name: str) -> None:
    assert as_json(OUTCOMES[name]) == (GOLDEN / f"{name}.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OUTCOMES)
def test_the_text_is_the_golden_one(name: str, width: int) -> None:
    assert to_text(OUTCOMES[name], width) == (GOLDEN / f"{name}-{width}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OUTCOMES)
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    assert max(len(line) for line in to_text(OUTCOMES[name], width).splitlines()) <= width


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_narrow_terminal_gets_a_narrow_table(name: str) -> None:
    """The parts are in the bars then."""
    lines = to_text(OUTCOMES[name], 60).splitlines()
    assert max(len(line) for line in lines) <= 60


def test_a_long_device_name_does_not_widen_the_table() -> None:
    """A worker out of reach is called by its address."""
    far = replace(PLAN.usages[0], name="RPC[gpu-worker-7.rack-3.example:50052]")
    text = to_text(replace(PLAN, usages=(far, *PLAN.usages[1:])))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "RPC[gpu" in text


@pytest.mark.parametrize(
    "outcome, sentence",
    [
        (PLAN, "Fits on 2 GPUs: 40 of 40 layers, one conversation of 40,960 tokens"),
        (replace(PLAN, usages=PLAN.usages[:1]), "Fits on the GPU: 40 of 40 layers, one conversation of 40,960 tokens"),
        (PARTIAL, "Runs, but slowly: 14 of 40 layers fit on 2 GPUs, one conversation of 40,960 tokens"),
        (ON_HOST, "Runs on the CPU alone, slowly: one conversation of 40,960 tokens"),
        (
            replace(PLAN, request=replace(REQUEST, n_cpu_moe=12, n_parallel=4), n_ctx_per_slot=8192),
            "Runs on 2 GPUs: 40 of 40 layers, experts of 12 layers on the CPU, 4 conversations of 8,192 tokens each",
        ),
        (
            replace(PLAN, request=replace(REQUEST, role=Role.EMBEDDING), n_ctx_per_slot=512),
            "Fits on 2 GPUs: 40 of 40 layers, texts of up to 512 tokens",
        ),
        (NO_FIT, "Does not fit: CUDA0 lacks 5.0 GiB"),
        (REFUSED, "llama.cpp would refuse this: a quantized V cache (q8_0) needs flash attention"),
    ],
)
def test_the_headline_says_it_in_one_sentence(outcome: PlanOutcome, sentence: str) -> None:
    assert explain.headline(outcome) == sentence


def test_what_is_not_known_is_null_and_a_question_mark() -> None:
    """Never 0: nobody may take an unknown figure for a small one."""
    document = explain.to_json(UNKNOWN)
    assert document["placement"] is None
    assert document["context_per_slot"] is None
    device = document["devices"][0]
    assert device["planned_bytes"] is None
    assert device["source"] == {"model": "unknown", "context": "unknown", "compute": "unknown"}
    assert "?" in to_text(UNKNOWN)


def test_what_is_known_in_part_is_told_as_far_as_it_is() -> None:
    document = explain.to_json(PARTLY_KNOWN)
    assert document["fits"]
    assert document["headline"].startswith("Probably fits on ")
    device = document["devices"][0]
    assert (device["compute_bytes"], device["planned_bytes"]) == (None, None)
    assert device["model_bytes"] > 0


def test_colours_change_nothing_but_colours() -> None:
    text = to_text(NO_FIT, style=Style(colour=True))
    assert "\x1b[" in text
    for code in ("1;31", "31", "34", "36", "35", "33", "2", "1", "0"):
        text = text.replace(f"\x1b[{code}m", "")
    assert text == to_text(NO_FIT)


def test_a_plain_terminal_gets_plain_characters() -> None:
    assert to_text(PLAN, style=Style(unicode=False)).isascii()


@pytest.mark.parametrize(
    "size_bytes, text",
    [
        (None, "?"),
        (0, "0"),
        (96, "96 B"),
        (1000, "1.0 KiB"),
        (150 * MIB, "150 MiB"),
        (1023 * MIB, "1.0 GiB"),
        (-4 * GIB, "-4.0 GiB"),
    ],
)
def test_figures_are_short(size_bytes: int | None, text: str) -> None:
    assert size(size_bytes) == text


def test_layers_are_ranges() -> None:
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert ranges(()) == ""


def write_golden_files() -> None:
    for name, outcome in OUTCOMES.items():
        (GOLDEN / f"{name}.json").write_text(as_json(outcome), encoding="utf-8")
        for width in WIDTHS:
            (GOLDEN / f"{name}-{width}.txt").write_text(to_text(outcome, width), encoding="utf-8")


if __name__ == "__main__":
    write_golden_files()

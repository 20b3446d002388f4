"""Holds the planner's placements against those of llama-fit-params, and writes docs/placement.md.

    python bench/placement.py [CASES] [CACHE]

Machines and models of real sizes are drawn from a seed. Each is asked once with a context that is pinned and once
with one that is free; both programs get the same budgets. Stand-ins for the devices are those of one
``ggml-rpc-server``: llama-fit-params reads sizes only, and the margin that it is to leave on each (``-fitt``) makes up
the difference between what the stand-in has and the budget; where the budget is larger, the margin is negative.
Both placements are then accounted for and timed by ``planner`` on the same machine. CACHE keeps what llama-fit-params
answered, so that a run that was broken off goes on where it was.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

FOLDER = Path(__file__).parents[1]
sys.path += [str(FOLDER), str(FOLDER / "fixtures")]

from published_models import dimensions, write_model
from rpc_worker import start_worker

from planner import flags
from planner.build import PINNED_BUILD
from planner.model import ModelFacts, read_model
from planner.search.placement import search
from planner.speed import EQUAL_SPEED
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    PlacementKind,
    Plan,
    PlanRequest,
    Policy,
    PoolId,
)
from planner.units import GIB, MIB

DOCUMENT = FOLDER / "docs" / "placement.md"
TOOLS = Path(sysconfig.get_path("platlib")) / "bin"
SEED = 20261121
CASES = 200
MAX_DEVICES = 8
LEAST_MODEL_BYTES = 7 * GIB
LEAST_BUDGET_BYTES = GIB
HOST_BYTES = 768 * GIB
ROOMY_BYTES = 1 << 45
CONTEXTS = (4096, 8192, 16_384, 32_768)
TIGHT = (0.3, 1.1)  # budgets together, as a share of the file's size
WIDE = (1.1, 1.6)
TIGHT_SHARE = 0.9  # of the cases
MOST_FREE = 0.97  # of a card's memory; the driver holds the rest
FIT_TIMEOUT_S = 300
# Memory in GiB and bandwidth in GB/s, from the vendors' data sheets.
CARDS = {
    "RTX 2060": (6, 336),
    "RTX 3070": (8, 448),
    "RTX 2080 Ti": (11, 616),
    "RTX 3060": (12, 360),
    "RTX 4080": (16, 717),
    "Tesla T4": (16, 320),
    "RTX 3090": (24, 936),
    "RTX 4090": (24, 1008),
    "Tesla P40": (24, 347),
    "RTX 5090": (32, 1792),
    "A40": (48, 696),
    "A100 80GB": (80, 2039),
    "H100": (80, 3350),
    "H200": (141, 4800),
}

COLUMNS = ("tokens/s, planner", "fit", "free context: planner", "fit", "tokens/s, planner", "fit")

Answers = dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Case:
    """A model on a machine: the cards with their budgets, in whole MiB below what a stand-in has, and a context."""

    number: int
    model: str
    cards: tuple[str, ...]
    budgets: tuple[int, ...]
    n_ctx: int

    def machine(self, *, roomy: bool = False) -> Machine:
        """Return the machine of this case, or one that holds everything and is as fast."""
        devices = tuple(
            Device(
                name=DeviceName(f"RPC{index}"),
                kind=DeviceKind.RPC,
                total_bytes=ROOMY_BYTES if roomy else CARDS[card][0] * GIB,
                free_bytes=ROOMY_BYTES if roomy else budget,
                pool=PoolId(f"card{index}"),
                bandwidth_bytes_per_s=CARDS[card][1] * 10**9,
            )
            for index, (card, budget) in enumerate(zip(self.cards, self.budgets, strict=True))
        )
        return Machine(devices, Device(HOST, DeviceKind.HOST, HOST_BYTES, HOST_BYTES, HOST_POOL), what_if=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """One program's placement: tokens per second, context, where it overruns a budget, and whether all is on devices.

    None in ``tokens_per_s``: it found no placement.
    """

    tokens_per_s: float | None
    n_ctx: int
    over: tuple[str, ...] = ()
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One case, answered: pinned and free contexts, ours first."""

    case: Case
    pinned: tuple[Answer, Answer]
    free: tuple[Answer, Answer]


# ---------------------------------------------------------------------------------------------------------------------
# The cases


def drawn(models: Mapping[str, ModelFacts], count: int, stand_in_bytes: int) -> Iterator[Case]:
    """Yield that many cases, always the same ones."""
    dice = random.Random(SEED)  # noqa: S311 - the same cases every time is what is wanted
    names = sorted(models)
    for number in range(count):
        name = names[number % len(names)]
        cards, budgets = _budgets(dice, models[name].summary.tensor_bytes, stand_in_bytes)
        trained = models[name].hparams.n_ctx_train or CONTEXTS[0]
        n_ctx = dice.choice([length for length in CONTEXTS if length <= trained])
        yield Case(number, name, cards, budgets, n_ctx)


def _budgets(dice: random.Random, model_bytes: int, stand_in_bytes: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return cards, and on each a budget, such that together they have a drawn share of the model's size."""
    while True:
        cards = tuple(dice.choices(sorted(CARDS), k=dice.randint(1, MAX_DEVICES)))
        wanted = model_bytes * dice.uniform(*(TIGHT if dice.random() < TIGHT_SHARE else WIDE))
        shares = [CARDS[card][0] * dice.uniform(0.4, 1) for card in cards]
        budgets = [wanted * share / sum(shares) for share in shares]
        pairs = list(zip(cards, budgets, strict=True))
        if all(LEAST_BUDGET_BYTES <= budget <= CARDS[card][0] * GIB * MOST_FREE for card, budget in pairs):
            # Margins are whole MiB.
            return cards, tuple(stand_in_bytes - round((stand_in_bytes - budget) / MIB) * MIB for budget in budgets)


# ---------------------------------------------------------------------------------------------------------------------
# The two programs


def ours(model: ModelFacts, case: Case, *, pinned: bool) -> Answer:
    """Return the planner's placement; the flags that it launches are held against the budgets once more."""
    request = PlanRequest(n_ctx=case.n_ctx if pinned else "auto", n_parallel=1)
    plan = search(model, request, case.machine(), Policy(), PINNED_BUILD)
    if not isinstance(plan, Plan) or plan.decode is None or plan.n_ctx_per_slot is None:
        return Answer(None, 0)
    again = search(model, plan.request, case.machine(), Policy(), PINNED_BUILD)
    if not isinstance(again, Plan) or again.usages != plan.usages:
        raise SystemExit(f"case {case.number}: the forward model says otherwise of {shlex.join(plan.launch.argv)}")
    return Answer(plan.decode.tokens_per_second, plan.n_ctx_per_slot, (), _is_whole(model, plan))


def fitted(model: ModelFacts, case: Case, told: str | None) -> Answer:
    """Return the placement of these flags, which llama-fit-params printed."""
    if told is None:
        return Answer(None, 0)
    words = shlex.split(re.sub(r"(=RPC\d+)\[[^\]]*\]", r"\1", told))
    if words[words.index("-ngl") + 1] == "-1":  # nothing changed: its own shares, of stand-ins that have the same
        words = [*words[: words.index("-ngl")], "-ngl", "all", "-ts", ",".join("1" * len(case.cards))]
    elif len(case.cards) == 1:
        words += ["-ts", "1"]
    request = replace(flags.parse(words).request, n_parallel=1)
    plan = search(model, request, case.machine(roomy=True), Policy(), PINNED_BUILD)
    if not isinstance(plan, Plan) or plan.decode is None or plan.n_ctx_per_slot is None:
        raise SystemExit(f"case {case.number}: {told} has no figures")
    over = tuple(
        usage.name for usage, budget in zip(plan.usages, case.budgets, strict=False) if usage.known_bytes > budget
    )
    return Answer(plan.decode.tokens_per_second, plan.n_ctx_per_slot, over, _is_whole(model, plan))


def _is_whole(model: ModelFacts, plan: Plan) -> bool:
    """Say whether every layer and every part of one is on a device."""
    request = plan.request
    patterns = [re.compile(pattern) for pattern, place in request.override_tensor or () if place == "CPU"]
    away = any(pattern.search(tensor.name) for pattern in patterns for tensor in model.tensors)
    layers = plan.placement.kind is PlacementKind.GPU and plan.placement.output_device >= 0
    return layers and not (away or request.n_cpu_moe or request.n_cpu_ffn)


def asked(path: Path, case: Case, endpoint: str, stand_in_bytes: int, *, pinned: bool) -> str | None:
    """Return what llama-fit-params prints; None where it gives up."""
    margins = ",".join(str((stand_in_bytes - budget) // MIB) for budget in case.budgets)
    devices = ",".join(f"RPC{index}" for index in range(len(case.cards)))
    context = ("-c", str(case.n_ctx)) if pinned else ()
    command = [str(TOOLS / "llama-fit-params"), "-m", str(path), "--rpc", endpoint, "-dev", devices, "-np", "1"]
    done = subprocess.run(
        [*command, *context, "-fitt", margins],
        capture_output=True,
        text=True,
        timeout=FIT_TIMEOUT_S,
        env={"PATH": os.environ.get("PATH", "")},
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else None


def measured(folder: Path, count: int, cache: Path | None) -> Iterator[Row]:
    """Yield the cases with both programs' answers."""
    stand_in_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # as ggml's CPU backend says
    known: Answers = json.loads(cache.read_text()) if cache and cache.exists() else {}
    described = {**dimensions("full"), **dimensions("large")}
    paths = {name: write_model(folder / f"{name}.gguf", each, vocabulary=False) for name, each in described.items()}
    models = {name: read_model(str(path)) for name, path in paths.items()}
    models = {name: each for name, each in models.items() if each.summary.tensor_bytes >= LEAST_MODEL_BYTES}
    worker = start_worker(TOOLS, n_devices=MAX_DEVICES)
    try:
        for case in drawn(models, count, stand_in_bytes):
            pairs = []
            for pinned in (True, False):
                key = repr((PINNED_BUILD.commit, case, pinned))
                if key not in known:
                    known[key] = asked(paths[case.model], case, worker.endpoint, stand_in_bytes, pinned=pinned)
                    if cache:
                        cache.write_text(json.dumps(known))
                model = models[case.model]
                pairs.append((ours(model, case, pinned=pinned), fitted(model, case, known[key])))
            yield Row(case, pairs[0], pairs[1])
    finally:
        worker.stop()


# ---------------------------------------------------------------------------------------------------------------------
# The document


def verdict(mine: float, theirs: float, equal: float) -> str:
    """Return who has more."""
    if mine > theirs * equal:
        return "more"
    return "fewer" if mine * equal < theirs else "as many"


def counts(verdicts: Sequence[str]) -> str:
    """Return how often each verdict was given."""
    return ", ".join(f"{name}: {verdicts.count(name)}" for name in ("more", "as many", "fewer"))


def document(rows: Sequence[Row]) -> str:
    """Return the document."""
    speeds = [verdict(_speed(row.pinned[0]), _speed(row.pinned[1]), EQUAL_SPEED) for row in rows]
    contexts = [verdict(row.free[0].n_ctx, row.free[1].n_ctx, 1) for row in rows]
    tight = sum(not row.pinned[1].whole for row in rows)
    over = [
        sum(bool(pair[1].over) for pair in pairs) for pairs in zip(*((r.pinned, r.free) for r in rows), strict=True)
    ]
    none = sum(row.pinned[1].tokens_per_s is None for row in rows)
    gains = sorted(
        _speed(row.pinned[0]) / row.pinned[1].tokens_per_s for row in rows if row.pinned[1].tokens_per_s is not None
    )
    lines = [
        "# Placements beside those of llama-fit-params",
        "",
        "Written by `python bench/placement.py`; every number was measured by that command.",
        "",
        f"{len(rows)} machines and models of real sizes, drawn from the seed {SEED}: one to {MAX_DEVICES}",
        "unequal cards, models of 8 to 378 GiB, dense, with experts, with latent attention, with sliding windows.",
        "Both programs place them under the same budgets.",
        "",
        f"llama.cpp {PINNED_BUILD.version} ({PINNED_BUILD.commit}), {datetime.now(UTC):%F}, {os.cpu_count()} cores",
        "",
        "Speeds are predicted, both by `planner.speed` for the same machine; those within 1 % count as equal.",
        "Bandwidths are those of the cards' data sheets, the host's is assumed. The flags of each of our plans were",
        "planned once more, and fit.",
        "",
        f"- The context pinned: tokens per second beside llama-fit-params: {counts(speeds)}.",
        f"  In the median {gains[len(gains) // 2]:.2f} times as many, at most {gains[-1]:.2f} times.",
        f"- The context free: tokens of context beside llama-fit-params: {counts(contexts)}.",
        f"- With a pinned context llama-fit-params leaves some on the host in {tight} cases, in {none} it gives up.",
        f"- Its placements exceed a budget in {over[0]} cases with a pinned context, in {over[1]} with a free one;",
        "  ours in none.",
        "",
        "`w`: everything is on cards. `!`: more than a budget. `<`: fewer than llama-fit-params.",
        "",
        "Where all cards together have hardly a layer's room left, both may send some of a layer's experts to the next",
        "card (`--override-tensor`, [decision 0006](decisions/0006-the-objective-of-the-search.md)).",
        "",
        f"| model | cards: GiB | context | {' | '.join(COLUMNS)} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def _line(row: Row) -> str:
    cards = ", ".join(f"{budget / GIB:.1f}" for budget in row.case.budgets)
    pinned = [_cell(answer) for answer in row.pinned]
    free = [f"{answer.n_ctx:,}" if answer.tokens_per_s is not None else "none" for answer in row.free]
    if verdict(_speed(row.pinned[0]), _speed(row.pinned[1]), EQUAL_SPEED) == "fewer":
        pinned[0] += " <"
    if verdict(row.free[0].n_ctx, row.free[1].n_ctx, 1) == "fewer":
        free[0] += " <"
    cells = (row.case.model, cards, f"{row.case.n_ctx:,}", *pinned, *free, *map(_cell, row.free))
    return f"| {' | '.join(cells)} |"


def _cell(answer: Answer) -> str:
    if answer.tokens_per_s is None:
        return "none"
    return f"{answer.tokens_per_s:,.4g}{' w' if answer.whole else ''}{' !' if answer.over else ''}"


def _speed(answer: Answer) -> float:
    return answer.tokens_per_s or 0.0


def main() -> int:
    """Measure and write the document."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else CASES
    cache = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measured(Path(folder), count, cache):
            rows.append(row)
            print(f"{row.case.number + 1} of {count}: {_line(row)}", flush=True)
    DOCUMENT.write_text(document(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

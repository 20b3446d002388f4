"""In a small problem no placement that fits is better than the one that is chosen: all of them are looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, permutations, product
from pathlib import Path

import pytest
from gguf_files import write_header
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner import budget, speed
from planner.build import PINNED_BUILD
from planner.context import context_params
from planner.model import ModelFacts, read_model
from planner.overrides import UNPIPELINED
from planner.search import knobs
from planner.search.candidates import Accountant, Candidate
from planner.search.learned import Learned, Mode
from planner.search.placement import search
from planner.search.problems import Question, SpillPart
from planner.speed import EQUAL_SPEED
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    Plan,
    PlanRequest,
    Policy,
    PoolId,
)

MIB = 1024 * 1024
HOST_BYTES = 8 * 1024 * MIB
N_CTX = 2048
REQUEST = PlanRequest(n_ctx=N_CTX, n_ubatch=8)
TYPES = st.sampled_from(["q4_0", "q8_0", "f16", "f32"])
BANDWIDTHS = st.sampled_from([None, 200 * 10**9, 800 * 10**9])
ROUNDING = 1e-9
DIVIDED, WITH_HOST = 2, 3  # kinds of placement; before them everything is on devices, pipelined and not
N_EMBD, N_FF = 256, 768


@dataclass(frozen=True, slots=True)
class Layers:
    """A model's layers by their types (attention, feed-forward, the way down), with or without experts."""

    types: tuple[tuple[str, str, str], ...]
    output: str
    n_expert: int

    def write(self, path: Path) -> ModelFacts:
        """Write the header and read it."""
        n_ff, suffix = (N_FF // 2, "_exps") if self.n_expert else (4 * N_FF, "")
        experts = (self.n_expert,) if self.n_expert else ()
        tensors: list[tuple[str, str, tuple[int, ...]]] = [
            ("token_embd.weight", "q8_0", (N_EMBD, 2048)),
            ("output_norm.weight", "f32", (N_EMBD,)),
            ("output.weight", self.output, (N_EMBD, 2048)),
        ]
        for layer, (attention, up, down) in enumerate(self.types):
            rows = [
                ("attn_norm", "f32", (N_EMBD,)),
                *((f"attn_{name}", attention, (N_EMBD, N_EMBD)) for name in ("q", "output")),
                *((f"attn_{name}", attention, (N_EMBD, 64)) for name in ("k", "v")),
                ("ffn_norm", "f32", (N_EMBD,)),
                *([("ffn_gate_inp", "f32", (N_EMBD, *experts))] if experts else []),
                (f"ffn_gate{suffix}", up, (N_EMBD, n_ff, *experts)),
                (f"ffn_up{suffix}", up, (N_EMBD, n_ff, *experts)),
                (f"ffn_down{suffix}", down, (n_ff, N_EMBD, *experts)),
            ]
            tensors += [(f"blk.{layer}.{name}.weight", type_, shape) for name, type_, shape in rows]
        metadata = {
            "block_count": len(self.types),
            "context_length": 8192,
            "embedding_length": N_EMBD,
            "feed_forward_length": n_ff,
            "attention.head_count": 4,
            "attention.head_count_kv": 1,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 64,
        } | ({"expert_count": self.n_expert, "expert_used_count": 2} if self.n_expert else {})
        return read_model(str(write_header(path, "llama", metadata, tensors, tokens=2048)))


@dataclass(frozen=True, slots=True)
class Cards:
    """Unequal devices: their shares of what they have together, in all this part of the model, and bandwidths."""

    shares: tuple[float, ...]
    together: float
    bandwidths: tuple[int | None, ...]

    def machine(self, model: ModelFacts) -> Machine:
        """Return the machine."""
        each = model.summary.tensor_bytes * self.together / sum(self.shares)
        sizes = [int(each * share) + 3 * MIB for share in self.shares]
        devices = tuple(
            Device(DeviceName(f"CUDA{i}"), DeviceKind.CUDA, size, size, PoolId(f"p{i}"),
                   bandwidth_bytes_per_s=bandwidth, overhead_bytes=0)
            for i, (size, bandwidth) in enumerate(zip(sizes, self.bandwidths, strict=True))
        )  # fmt: skip
        return Machine(devices, Device(HOST, DeviceKind.HOST, HOST_BYTES, HOST_BYTES, HOST_POOL), what_if=True)


@st.composite
def models(draw: st.DrawFn, most: int) -> Layers:
    """Draw two to ``most`` layers, each of its own size."""
    types = draw(st.lists(st.tuples(TYPES, TYPES, TYPES), min_size=2, max_size=most))
    return Layers(tuple(types), draw(TYPES), draw(st.sampled_from([0, 8])))


@st.composite
def cards(draw: st.DrawFn, most: int) -> Cards:
    """Draw one to ``most`` devices that hold a third of the model or all of it."""
    shares = draw(st.lists(st.floats(0.3, 1.0), min_size=1, max_size=most))
    bandwidths = draw(st.lists(BANDWIDTHS, min_size=len(shares), max_size=len(shares)))
    return Cards(tuple(shares), draw(st.floats(0.3, 1.6)), tuple(bandwidths))


@dataclass(frozen=True, slots=True)
class BruteForce:
    """Every placement of the three kinds, by the order in which they are to be preferred."""

    model: ModelFacts
    machine: Machine

    def better(self, kind: int, below_s: float) -> Iterator[Candidate]:
        """Yield what fits of a kind in less than these seconds: 0 all on devices, 1 not pipelined, 3 some on the host.

        Of layers whose experts lie on two devices, which is 2, none are gone through.
        Only what weights and caches alone would allow is accounted for.
        """
        if kind == DIVIDED:
            return
        settled, _ = knobs.settle(self.model, REQUEST, Policy(), self.machine.devices)
        settled = knobs.with_context(settled, N_CTX)
        limits = budget.budgets(self.machine, Policy())
        devices = self.machine.devices
        accountant = Accountant(self.model, self.machine, limits, PINNED_BUILD, None, devices, spread=False)
        params = context_params(self.model, settled)
        question = Question(self.model, params, self.machine, devices, limits, Learned())
        for n_slots in range(1, question.n_slots + 1) if kind == WITH_HOST else (question.n_slots,):
            for count in range(2 if kind == 1 else 1, min(len(devices), n_slots) + 1):
                for cuts in combinations(range(question.n_slots - n_slots + 1, question.n_slots), count - 1):
                    runs = list(pairwise((question.n_slots - n_slots, *cuts, question.n_slots)))
                    for group in permutations(devices, count):
                        for away in self._ways(question, kind, runs, group, below_s):
                            override = UNPIPELINED if kind == 1 else _left_out(away)
                            request = replace(settled, override_tensor=override)
                            found = accountant.candidate(request, group, n_slots, [float(b - a) for a, b in runs])
                            if found.fits:
                                yield found

    def _ways(
        self,
        question: Question,
        kind: int,
        runs: list[tuple[int, int]],
        group: tuple[Device, ...],
        below_s: float,
    ) -> Iterator[list[SpillPart]]:
        """Yield the parts that are left to the host where these devices take these runs of layers, in time."""
        problem = question.problem(Mode.WITH_HOST)
        host = problem.host_bytes_per_s
        seconds = problem.fixed_s + sum(problem.reads[: runs[0][0]]) / host
        options = [
            list(self._parts_away(question, problem.reads, run, device, host, spills=kind == WITH_HOST))
            for run, device in zip(runs, group, strict=True)
        ]
        if seconds + sum(min((s for s, _ in each), default=1e9) for each in options) < below_s:
            for way in product(*options):
                if seconds + sum(s for s, _ in way) < below_s:
                    yield [part for _, parts in way for part in parts]

    @staticmethod
    def _parts_away(
        question: Question, reads: tuple[float, ...], run: tuple[int, int], device: Device, host: float, *, spills: bool
    ) -> Iterator[tuple[float, list[SpillPart]]]:
        """Yield the seconds of a run of layers and its first parts that stay on the host: as need be, or more."""
        start, end = run
        pace = speed.pace(device)
        room = question.limits.of(device.name) or 0
        size = sum(question.sizes(device)[start:end])
        seconds = sum(reads[start:end]) / pace.bytes_per_s + 2 * pace.crossing_s
        away: list[SpillPart] = []
        if size <= room:
            yield seconds, []
        for part, part_size in zip(question.parts, question.spill_sizes(device), strict=True) if spills else ():
            if start <= part.slot < end:
                seconds += part.read * (1 / host - 1 / pace.bytes_per_s)
                seconds += 0 if part.slot in {each.slot for each in away} else 2 * pace.crossing_s
                size -= part_size
                away.append(part)
                if size <= room:
                    yield seconds, list(away)


def _left_out(parts: list[SpillPart]) -> tuple[tuple[str, str], ...] | None:
    return (("|".join(re.escape(part.tensor.name) for part in parts), "CPU"),) if parts else None


def kind_of(plan: Plan, model: ModelFacts) -> int:
    """Return which kind of placement it is."""
    away = plan.request.n_cpu_moe or plan.request.n_cpu_ffn
    overrides = plan.request.override_tensor
    if overrides and all(place != "CPU" for _, place in overrides):
        return DIVIDED
    if plan.placement.n_gpu_layers <= model.hparams.n_layer_all or away or overrides not in {None, UNPIPELINED}:
        return WITH_HOST
    return int(overrides == UNPIPELINED)


def assert_best(model: ModelFacts, machine: Machine) -> None:
    """Hold the plan against brute force: no better kind, none faster by more than is equal, none on fewer devices."""
    plan = search(model, REQUEST, machine, Policy(), PINNED_BUILD)
    assert isinstance(plan, Plan)
    assert plan.decode is not None
    seconds = 1 / plan.decode.tokens_per_second
    everything, kind = BruteForce(model, machine), kind_of(plan, model)
    for better in range(kind):
        assert not list(everything.better(better, below_s=1e9))
    assert not list(everything.better(kind, below_s=seconds / EQUAL_SPEED * (1 - ROUNDING)))


@settings(max_examples=40)
@given(layers=models(most=4), where=cards(most=3))
def test_no_placement_is_better_than_the_chosen_one(
    layers: Layers, where: Cards, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every order of every devices, every cut, every part of layers that may stay on the host; budgets to the byte."""
    model = layers.write(tmp_path_factory.getbasetemp() / "layers.gguf")
    assert_best(model, where.machine(model))


@settings(max_examples=25)
@example(  # three devices, two and one, each 1 % slower than the one before
    layers=Layers(
        (
            ("q4_0", "q4_0", "f16"),
            ("q4_0", "q8_0", "q4_0"),
            ("q4_0", "q8_0", "f16"),
            ("q8_0", "f32", "q4_0"),
            ("f16", "f32", "q4_0"),
            ("q8_0", "f32", "q4_0"),
        ),
        "f32",
        8,
    ),
    where=Cards(
        (0.9022467434362083, 0.5362030560780474, 0.4286024247650455, 0.4286024247650455),
        0.3,
        (200 * 10**9, None, None, None),
    ),
)
@given(layers=models(most=10), where=cards(most=4))
def test_no_placement_of_ten_layers_on_four_devices_is_better(
    layers: Layers, where: Cards, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = layers.write(tmp_path_factory.getbasetemp() / "layers.gguf")
    assert_best(model, where.machine(model))

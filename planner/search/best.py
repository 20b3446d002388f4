"""The best placement under the stated objective: the solver's splits, confirmed by accounting.

A layer's weights and cache have fixed sizes; what a device takes beyond them, compute buffers above all, depends on
where the layers lie. So a split is solved with what earlier splits showed of that, accounted for, learned from, and
solved again until the answer stands. Nothing is called fitting that ``accounting`` has not confirmed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Final, NamedTuple

from planner import budget, cache, weights
from planner.context import context_params
from planner.flag_values import MAX_DEVICES
from planner.overrides import UNPIPELINED
from planner.search.bounds import ROUNDING, bound_s
from planner.search.candidates import Accountant, Candidate
from planner.search.chain import Chain
from planner.search.exhaust import SMALL, improved
from planner.search.learned import Learned, Mode
from planner.search.problems import Question, SpillPart, slot_count, spill_pattern
from planner.search.solver import Problem, Solver, Split
from planner.speed import EQUAL_SPEED
from planner.types.machine import Device
from planner.types.plan import Placement
from planner.types.request import PlanRequest

MAX_ROUNDS: Final = 8  # of solving and accounting; three are usual, since only compute buffers move
MAX_SPILL_ORDERS: Final = 6  # devices whose orders are all tried where parts of layers may be left to the host
LIKELY: Final = 1.1  # times the seconds that no split is below: the fastest splits of most models are within
_PERMILLE: Final = 1000


@dataclass(frozen=True, slots=True)
class Choice:
    """A solved split, not yet accounted for."""

    mode: Mode
    split: Split
    fastest_s: float  # of all splits: this one may be slower by what counts as equal


class Way(NamedTuple):
    """A problem in one mode, and how many devices at least and at most make a split of that mode."""

    mode: Mode
    problem: Problem
    least: int = 0
    most: int = MAX_DEVICES

    def chained(self, limit_s: float, *, counted: bool = True) -> Chain:
        """Return the fastest splits within these seconds by number of devices, the devices in order."""
        most = min(self.most, len(self.problem.bins))
        return Chain(replace(self.problem, max_bins=most, limit_s=limit_s), counted=counted)

    def least_s(self, limit_s: float) -> float:
        """Return the least seconds of all splits, infinite where none is within these."""
        if bound_s(self.problem) > limit_s * (1 + ROUNDING):
            return inf
        return min(self.by_count(self.chained(limit_s, counted=self._counts)).values(), default=inf)

    def fastest(self, limit_s: float) -> Chain:
        """Return the splits within these seconds: at least the fastest, and all that count as equal to it.

        Where any number of devices will do, there are very many; those that are not as fast are not told apart.
        """
        if self._counts:
            return self.chained(limit_s)
        likely_s = bound_s(self.problem) * LIKELY
        if likely_s >= limit_s:
            return self.chained(limit_s)
        fastest_s = self.chained(likely_s, counted=False).least_s
        if fastest_s == inf:
            fastest_s = self.chained(limit_s, counted=False).least_s
        return self.chained(min(fastest_s * EQUAL_SPEED, limit_s))

    @property
    def _counts(self) -> bool:
        """Say whether it matters for the answer how many devices there are."""
        return self.least > 0 or self.most < len(self.problem.bins)

    def by_count(self, chain: Chain) -> dict[int, float]:
        """Return the least seconds for each number of devices that makes a split of this mode."""
        return {count: s for count, s in chain.seconds.items() if self.least <= count <= self.most}

    def has(self, mode: Mode, split: Split) -> bool:
        """Say whether this split in that mode is one of this way."""
        return mode is self.mode and self.least <= len(split.segments) <= self.most


class Found(NamedTuple):
    """A placement that fits, and the choice that it was."""

    candidate: Candidate
    choice: Choice


@dataclass
class Best:
    """One question to the solver, and what accounting has shown so far.

    ``order_is_settled`` keeps the devices in the order given; only ``modes`` are of interest.
    """

    accountant: Accountant
    order_is_settled: bool
    learned: Learned = field(default_factory=Learned)
    devices: tuple[Device, ...] = ()
    modes: frozenset[Mode] = frozenset(Mode)
    reordered: bool = False

    def __post_init__(self) -> None:
        """Begin with llama-server's own order."""
        self.devices = self.devices or self.accountant.devices

    def applies(self, request: PlanRequest) -> bool:
        """Say whether the solver covers this question: whole layers over devices of their own memory, sizes known.

        Where shares are pinned, tensors sent to other devices or memory is shared there are fewer choices or other
        ones; ``candidates`` packs those.
        """
        accountant = self.accountant
        params = context_params(accountant.model, request)
        nothing = Placement((), (), -1, 0, ())
        return (
            bool(accountant.devices)
            and request.n_gpu_layers != 0
            and request.tensor_split is None
            and params.split_mode == "layer"
            and all(place == "CPU" for _, place in params.overrides)
            and not accountant.limits.shared_pools
            and not params.not_built
            and weights.not_built(accountant.model, params, nothing, accountant.machine) is None
            and cache.not_built(accountant.model) is None
        )

    @property
    def is_small(self) -> bool:
        """Say whether every split can be looked at."""
        return slot_count(self.accountant.model) * len(self.devices) <= SMALL and not self.accountant.spread

    def at(self, request: PlanRequest, limit_s: float = inf) -> Candidate | None:
        """Return the best placement with at most these seconds a token; None where none is confirmed."""
        found = self.found(request, limit_s)
        return None if found is None else found.candidate

    def found(self, request: PlanRequest, limit_s: float = inf, expected: Choice | None = None) -> Found | None:
        """Return what solving finds, or what is better in a small problem; None where nothing is confirmed.

        Solving begins with the ``expected`` choice.
        """
        found = self._solved(request, limit_s, expected)
        if found is not None and found.candidate.unknown:
            return None
        return improved(self, request, limit_s, found)

    def _solved(self, request: PlanRequest, limit_s: float, expected: Choice | None) -> Found | None:
        """Solve, account and learn until the answer stands; one whose figures are unknown is returned as it is."""
        best: Found | None = None
        tried: set[tuple[str, ...]] = set()
        for _ in range(MAX_ROUNDS):
            choice, expected = expected or self.choice(request, limit_s), None
            if choice is None:
                break
            name = (choice.mode.name, *(str((self.devices[s.bin].name, *s[1:])) for s in choice.split.segments))
            stands = name in tried
            if not stands:
                tried.add(name)
                attempt, stands = self._accounted(request, choice)
                if attempt.unknown:
                    return Found(attempt, choice)
                best = Found(attempt, choice) if attempt.fits else best
                stands = stands and attempt.fits
            if stands and (best is None or not self.reordered_for(request, choice)):
                break
        return best

    # -----------------------------------------------------------------------------------------------------------------
    # One context: which split

    def question(self, request: PlanRequest, *, told: bool = True) -> Question:
        """Return the question, with what was learned of the devices, or with nothing told of them."""
        accountant = self.accountant
        params = context_params(accountant.model, request)
        learned = self.learned if told else Learned()
        return Question(accountant.model, params, accountant.machine, self.devices, accountant.limits, learned)

    def tiers(self, question: Question, request: PlanRequest) -> Iterator[tuple[Way, ...]]:
        """Yield ways that compete, the better ones first: all on devices; then not pipelined; then some on the host.

        The next tier is of interest only where the one before has no answer: prompts are computed on devices, and the
        faster the more copies of its inputs a graph may have.
        """
        n_slots, pinned, params = question.n_slots, request.n_gpu_layers, question.params
        if isinstance(pinned, int) and 0 <= pinned < n_slots:
            yield (Way(Mode.WITH_HOST, question.problem(Mode.WITH_HOST, on_host=n_slots - pinned)),)
            return
        if Mode.UNPIPELINED in self.modes:
            several = question.problem(Mode.UNPIPELINED)
            if params.kv_offload and not params.overrides:
                pipelined = question.problem(Mode.PIPELINED)
                yield (Way(Mode.UNPIPELINED, several, most=1), Way(Mode.PIPELINED, pipelined, least=2))
            yield (Way(Mode.UNPIPELINED, several),)
        if Mode.WITH_HOST in self.modes and pinned in {None, "auto"}:
            yield (Way(Mode.WITH_HOST, question.problem(Mode.WITH_HOST, on_host=None, spills=bool(question.parts))),)

    def least_s(self, request: PlanRequest, limit_s: float) -> float:
        """Return the seconds of a split that is expected to fit and to be this fast, infinite where there is none."""
        ways = (way for tier in self.tiers(self.question(request), request) for way in tier)
        return next((s for way in ways if (s := way.least_s(limit_s)) < inf), inf)

    def choice(self, request: PlanRequest, limit_s: float = inf) -> Choice | None:
        """Return the split that the objective puts first, by what is expected of every device."""
        question = self.question(request)
        for tier in self.tiers(question, request):
            chains = [(way, way.chained(inf) if self.accountant.spread else way.fastest(limit_s)) for way in tier]
            fastest_s = min((s for way, chain in chains for s in way.by_count(chain).values()), default=inf)
            if fastest_s < inf and fastest_s <= limit_s:
                return self._preferred(question, chains, fastest_s, limit_s)
        return None

    def _preferred(
        self, question: Question, chains: list[tuple[Way, Chain]], fastest_s: float, limit_s: float
    ) -> Choice:
        """Return the split on the fewest devices of those as fast as the fastest; on the most where they are spread.

        Of sets of as many devices the one with the most room is taken, then the first in order. Where some of the
        model is left to the host, it is the fastest. A limit that was given says itself what counts as equal.
        """
        spread = self.accountant.spread
        equal_s = limit_s if limit_s < inf else fastest_s * EQUAL_SPEED
        equal_s = inf if spread else equal_s
        splits = [(count, s, i) for i, (way, chain) in enumerate(chains) for count, s in way.by_count(chain).items()]
        count, seconds, which = min((-n if spread else n, s, i) for n, s, i in splits if s <= equal_s)
        way, chain = chains[which]
        if way.problem.on_host is not None:
            split, seconds = self._roomiest(question, way, abs(count), equal_s)
        else:
            split = chain.split(abs(count))
        return Choice(way.mode, split, seconds if spread else fastest_s)

    def _roomiest(self, question: Question, way: Way, count: int, equal_s: float) -> tuple[Split, float]:
        """Return the split on that many devices with the most room, and the seconds of the fastest one on them."""

        def rank(used: int) -> tuple[float, float]:
            room = sum(max(each.rooms) for i, each in enumerate(way.problem.bins) if used >> i & 1)
            return -room, _reversed_bits(used)

        solver = Solver(replace(way.problem, max_bins=count, limit_s=equal_s))
        used = min((used for used in solver.seconds if used.bit_count() == count), key=rank)
        split = solver.split(used)
        most_s = max(split.seconds, split.seconds * EQUAL_SPEED if equal_s == inf else equal_s)
        return self._even(question, way, split, most_s), solver.seconds[used]

    def _even(self, question: Question, way: Way, split: Split, limit_s: float) -> Split:
        """Return the split over these devices that fills the fullest least, in permille of its budget."""
        used = [segment.bin for segment in split.segments]
        low, high = 0, _PERMILLE
        while high - low > 1:
            middle = (low + high) // 2
            bins = (question.bin(way.mode, index, middle / _PERMILLE) for index in used)
            emptier = tuple(replace(each, spill_sizes=()) for each in bins)
            chain = Chain(replace(way.problem, bins=emptier, all_bins=True, limit_s=limit_s))
            if chain.seconds:
                found = chain.split(len(used))
                segments = tuple(segment._replace(bin=used[segment.bin]) for segment in found.segments)
                high, split = middle, Split(segments, found.seconds)
            else:
                low = middle
        return split

    def reordered_for(self, request: PlanRequest, choice: Choice) -> bool:
        """Put the devices into the order of a split that is faster by more than what is equal, where there is one.

        Every order is tried once, with what accounting has shown of the devices in their own order.
        """
        if self.order_is_settled or self.reordered:
            return False
        self.reordered = True
        question = self.question(request)
        for tier in self.tiers(question, request):
            for way in tier:
                limit_s = choice.fastest_s / EQUAL_SPEED
                problem = replace(way.problem, ordered=False, max_bins=way.most, limit_s=limit_s)
                many = bool(problem.spill_slots) and len(problem.bins) > MAX_SPILL_ORDERS
                if way.mode is not choice.mode or many or bound_s(problem) >= limit_s:
                    continue
                solver = Solver(problem)
                enough = [used for used in solver.seconds if used.bit_count() >= max(way.least, 1)]
                used = min(enough, key=lambda each: solver.seconds[each], default=0)
                if used and solver.seconds[used] < limit_s:
                    first = [question.devices[segment.bin] for segment in solver.split(used).segments]
                    self.devices = (*first, *(device for device in question.devices if device not in first))
                    return True
        return False

    # -----------------------------------------------------------------------------------------------------------------
    # What the choice really takes

    def accounted(self, request: PlanRequest, mode: Mode, split: Split) -> Found:
        """Return this split, accounted for."""
        choice = Choice(mode, split, split.seconds)
        return Found(self._accounted(request, choice)[0], choice)

    def _accounted(self, request: PlanRequest, choice: Choice) -> tuple[Candidate, bool]:
        """Return the accounted placement of a choice, having learned from it.

        Also say whether the choice stands where it fits: no device takes less than was expected of it, so that none
        was left out that there is room for.
        """
        accountant, segments = self.accountant, choice.split.segments
        question = self.question(request)
        group = [self.devices[segment.bin] for segment in segments]
        shares = [segment.end - segment.start for segment in segments]
        attempt = accountant.candidate(_flagged(question, request, choice), group, sum(shares), shares)
        taken = {row.name: row.claimed_bytes for row in attempt.usages}
        stands, n_ctx = True, question.params.n_ctx_seq
        for place, segment in enumerate(segments):
            device = self.devices[segment.bin]
            spilled = question.spill_sizes(device)[segment.spill_start : segment.spill_end]
            own = sum(question.sizes(device)[segment.start : segment.end]) - sum(spilled)
            part = question.part(choice.mode, segment.bin, first=place == 0, output=segment.end == question.n_slots)
            beyond = taken[device.name] - own - budget.overhead_bytes(device)
            stands = stands and beyond >= question.expected(part)
            self.learned.learn(part, n_ctx, beyond)
        return attempt, stands


def _reversed_bits(used: int) -> int:
    """Return a number that is the smaller the earlier the bins of a set are."""
    return -sum(1 << (MAX_DEVICES - index) for index in range(used.bit_length()) if used >> index & 1)


def _flagged(question: Question, request: PlanRequest, choice: Choice) -> PlanRequest:
    """Return the request with the flags that this choice needs beside devices, layers and shares."""
    spilled = [part for s in choice.split.segments for part in question.parts[s.spill_start : s.spill_end]]
    if spilled:
        return _spilling(question, request, spilled)
    several = len(choice.split.segments) > 1
    everything = several and choice.split.segments[0].start == 0
    if (
        everything
        and choice.mode is not Mode.PIPELINED
        and question.params.kv_offload
        and not question.params.overrides
    ):
        return replace(request, override_tensor=UNPIPELINED)
    return request


def _spilling(question: Question, request: PlanRequest, spilled: Sequence[SpillPart]) -> PlanRequest:
    """Return the request with the flags that leave these tensors to the host.

    Layers whose parts all stay are named by number; where they are the first, llama.cpp has a flag for that.
    """
    by_slot: dict[int, list[SpillPart]] = {}
    for part in spilled:
        by_slot.setdefault(part.slot, []).append(part)
    counts = Counter(part.slot for part in question.parts)
    whole = [slot for slot, parts in by_slot.items() if len(parts) == counts[slot]]
    names = [part.tensor.name for slot, parts in by_slot.items() if slot not in whole for part in parts]
    overrides = [("|".join(re.escape(name).replace("\\_", "_") for name in names), "CPU")] if names else []
    if whole and whole == [slot for slot in counts if slot <= whole[-1]]:
        count = whole[-1] + 1
        experts = bool(question.model.hparams.n_expert)
        request = replace(request, n_cpu_moe=count) if experts else replace(request, n_cpu_ffn=count)
    elif whole:
        layers = "|".join(map(str, whole))
        overrides.append((rf"blk\.({layers}){spill_pattern(question.model)}", "CPU"))
    return replace(request, override_tensor=tuple(overrides)) if overrides else request

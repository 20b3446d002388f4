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
from planner.context import CONTEXT_ALIGNMENT, MAX_DEVICES, context_params
from planner.overrides import UNPIPELINED
from planner.search import knobs
from planner.search.candidates import Candidate, Finder
from planner.search.learned import Learned, Mode
from planner.search.problems import Question, SpillPart, spill_pattern
from planner.search.solver import Problem, Solver, Split, bound_s
from planner.types import Device, Placement, PlanRequest

EQUAL_SPEED: Final = 1.01  # speeds this close count as equal: the figures they are computed from are no better
MAX_ROUNDS: Final = 8  # of solving and accounting; three are usual, since only compute buffers move
MAX_SPILL_ORDERS: Final = 6  # devices whose orders are all tried where parts of layers may be left to the host
MAX_CONTEXT_ROUNDS: Final = 8  # of bisecting; three are usual: what a device takes grows nearly in proportion
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

    def solved(self, limit_s: float) -> Solver:
        """Return the problem solved within these seconds, the devices in order."""
        return Solver(replace(self.problem, max_bins=self.most, limit_s=limit_s))

    def on(self, indices: Sequence[int]) -> Way:
        """Return the way with these devices and no others, all of them used."""
        bins = tuple(self.problem.bins[index] for index in indices)
        return self._replace(problem=replace(self.problem, bins=bins, all_bins=True))

    def of(self, solver: Solver) -> dict[int, float]:
        """Return the seconds of the sets of devices that have a split of this mode."""
        return {used: s for used, s in solver.seconds.items() if self.least <= used.bit_count() <= self.most}


@dataclass
class Best:
    """One question to the solver, and what accounting has shown so far.

    ``order_is_settled`` keeps the devices in the order given; ``stays_whole`` leaves nothing to the host that is not
    pinned there.
    """

    finder: Finder
    order_is_settled: bool
    learned: Learned = field(default_factory=Learned)
    devices: tuple[Device, ...] = ()
    stays_whole: bool = False

    def __post_init__(self) -> None:
        """Begin with llama-server's own order."""
        self.devices = self.devices or self.finder.devices

    def applies(self, request: PlanRequest) -> bool:
        """Say whether the solver covers this question: whole layers over devices of their own memory, sizes known.

        Where shares are pinned, tensors sent to other devices or memory is shared there are fewer choices or other
        ones; ``candidates`` packs those.
        """
        finder = self.finder
        params = context_params(finder.model, request)
        nothing = Placement((), (), -1, 0, ())
        return (
            bool(finder.devices)
            and request.n_gpu_layers != 0
            and request.tensor_split is None
            and params.split_mode == "layer"
            and all(place == "CPU" for _, place in params.overrides)
            and not finder.limits.shared_pools
            and not params.not_built
            and weights.not_built(finder.model, params, nothing, finder.machine) is None
            and cache.not_built(finder.model) is None
        )

    def at(self, request: PlanRequest, limit_s: float = inf) -> Candidate | None:
        """Return the best placement with at most these seconds a token; None where none is confirmed."""
        best: Candidate | None = None
        tried: set[tuple[str, ...]] = set()
        for _ in range(MAX_ROUNDS):
            choice = self._choice(request, limit_s)
            if choice is None:
                break
            name = (choice.mode.name, *(str((self.devices[s.bin].name, *s[1:])) for s in choice.split.segments))
            if name in tried:
                if best is None or not self._reordered(request, choice):
                    break
                continue
            tried.add(name)
            attempt = self._accounted(request, choice)
            if attempt.unknown:
                return None
            best = attempt if attempt.fits else best
        return best

    def longest(self, settled: PlanRequest, floor: int, trained: int) -> Candidate | None:
        """Return the best placement with the longest context; None where not even the floor fits.

        Where everything lies on devices at the floor, that is the longest with which it still does. Where not, it is
        the longest with which decoding is as fast: a longer one would push more to the host. The trained length is
        tried first. Below it, multiples of 256 are bisected by what is expected to fit; what accounting then shows is
        learned, until no longer context is expected to fit.
        """
        best = self.at(knobs.with_context(settled, floor))
        at_floor = self._choice(knobs.with_context(settled, floor)) if best else None
        if best is None or at_floor is None or floor >= trained:
            return best
        self.stays_whole = at_floor.mode is not Mode.WITH_HOST
        limit_s = inf if self.stays_whole else at_floor.fastest_s * EQUAL_SPEED
        whole = self.at(knobs.with_context(settled, trained), limit_s)
        if whole is not None:
            return whole
        low, high = floor // CONTEXT_ALIGNMENT, -(-trained // CONTEXT_ALIGNMENT)
        for _ in range(MAX_CONTEXT_ROUNDS):
            guess = self._longest_expected(settled, low, high, limit_s, best)
            if guess == low:
                break
            attempt = self.at(knobs.with_context(settled, guess * CONTEXT_ALIGNMENT), limit_s)
            if attempt is None:
                high = guess
            else:
                low, best = guess, attempt
        return best

    def _longest_expected(self, settled: PlanRequest, low: int, high: int, limit_s: float, near: Candidate) -> int:
        """Return the largest number of steps between these for which a split is expected to fit, as one near did."""
        while high - low > 1:
            middle = (low + high) // 2
            request = knobs.with_context(settled, middle * CONTEXT_ALIGNMENT)
            low, high = (middle, high) if self._fits(request, limit_s, near) else (low, middle)
        return low

    # -----------------------------------------------------------------------------------------------------------------
    # One context: which split

    def _question(self, request: PlanRequest) -> Question:
        finder = self.finder
        params = context_params(finder.model, request)
        return Question(finder.model, params, finder.machine, self.devices, finder.limits, self.learned)

    def _tiers(self, question: Question, request: PlanRequest) -> Iterator[tuple[Way, ...]]:
        """Yield ways that compete, the better ones first: all on devices; then not pipelined; then some on the host.

        The next tier is of interest only where the one before has no answer: prompts are computed on devices, and the
        faster the more copies of its inputs a graph may have.
        """
        n_slots, pinned, params = question.n_slots, request.n_gpu_layers, question.params
        if isinstance(pinned, int) and 0 <= pinned < n_slots:
            yield (Way(Mode.WITH_HOST, question.problem(Mode.WITH_HOST, on_host=n_slots - pinned)),)
            return
        several = question.problem(Mode.UNPIPELINED)
        if params.kv_offload and not params.overrides:
            pipelined = question.problem(Mode.PIPELINED)
            yield (Way(Mode.UNPIPELINED, several, most=1), Way(Mode.PIPELINED, pipelined, least=2))
        yield (Way(Mode.UNPIPELINED, several),)
        if pinned in {None, "auto"} and not self.stays_whole:
            yield (Way(Mode.WITH_HOST, question.problem(Mode.WITH_HOST, on_host=None, spills=bool(question.parts))),)

    def _fits(self, request: PlanRequest, limit_s: float, near: Candidate) -> bool:
        """Say whether some split is expected to fit and to be this fast; the devices of one near are tried first."""
        question = self._question(request)
        same = [index for index, device in enumerate(self.devices) if device.name in near.placement.devices]
        ways = [way for tier in self._tiers(question, request) for way in tier if bound_s(way.problem) <= limit_s]
        return any(
            s <= limit_s
            for way in (*(way.on(same) for way in ways), *ways)
            for s in way.of(way.solved(limit_s)).values()
        )

    def _choice(self, request: PlanRequest, limit_s: float = inf) -> Choice | None:
        """Return the split that the objective puts first, by what is expected of every device."""
        question = self._question(request)
        for tier in self._tiers(question, request):
            solved = [(way, way.solved(inf if self.finder.spread else limit_s)) for way in tier]
            fastest_s = min((s for way, solver in solved for s in way.of(solver).values()), default=inf)
            if fastest_s < inf and fastest_s <= limit_s:
                return self._preferred(question, solved, fastest_s, limit_s)
        return None

    def _preferred(
        self, question: Question, solved: list[tuple[Way, Solver]], fastest_s: float, limit_s: float
    ) -> Choice:
        """Return the split on the fewest devices of those as fast as the fastest; on the most where they are spread.

        Of sets of as many devices the one with the most room is taken, then the first in order.
        """
        spread = self.finder.spread
        equal_s = inf if spread else min(fastest_s * EQUAL_SPEED, limit_s) if limit_s == inf else limit_s

        def rank(found: tuple[Way, Solver, int]) -> tuple[float, ...]:
            way, solver, used = found
            count = used.bit_count()
            room = sum(max(each.rooms) for i, each in enumerate(way.problem.bins) if used >> i & 1)
            on_host = way.problem.on_host is None
            return (-count if spread else count, solver.seconds[used] if on_host else -room, _reversed_bits(used))

        sets = [(way, solver, used) for way, solver in solved for used, s in way.of(solver).items() if s <= equal_s]
        way, solver, used = min(sets, key=rank)
        split = solver.split(used)
        most_s = max(split.seconds, split.seconds * EQUAL_SPEED if equal_s == inf else equal_s)
        split = split if way.problem.on_host is None else self._even(question, way, split, most_s)
        return Choice(way.mode, split, solver.seconds[used] if spread else fastest_s)

    def _even(self, question: Question, way: Way, split: Split, limit_s: float) -> Split:
        """Return the split over these devices that fills the fullest least, in permille of its budget.

        Where some of the model is left to the host, the devices are full, and it is the fastest split that counts.
        """
        if way.problem.on_host is None:
            return split
        used = [segment.bin for segment in split.segments]
        low, high = 0, _PERMILLE
        while high - low > 1:
            middle = (low + high) // 2
            bins = (question.bin(way.mode, index, middle / _PERMILLE) for index in used)
            emptier = tuple(replace(each, spill_sizes=()) for each in bins)
            solver = Solver(replace(way.problem, bins=emptier, all_bins=True))
            everyone = (1 << len(used)) - 1
            if solver.seconds.get(everyone, inf) <= limit_s:
                found = solver.split(everyone)
                segments = tuple(segment._replace(bin=used[segment.bin]) for segment in found.segments)
                high, split = middle, Split(segments, found.seconds)
            else:
                low = middle
        return split

    def _reordered(self, request: PlanRequest, choice: Choice) -> bool:
        """Put the devices into the order of a split that is faster by more than what is equal, where there is one.

        Every order is tried once, with what accounting has shown of the devices in their own order.
        """
        if self.order_is_settled:
            return False
        self.order_is_settled = True
        question = self._question(request)
        for tier in self._tiers(question, request):
            for way in tier:
                problem = replace(way.problem, ordered=False, max_bins=way.most)
                limit_s = choice.fastest_s / EQUAL_SPEED
                many = bool(problem.spill_slots) and len(problem.bins) > MAX_SPILL_ORDERS
                if way.mode is not choice.mode or many or bound_s(problem) >= limit_s:
                    continue
                solver = Solver(problem)
                used = min(way.of(solver), key=lambda each: solver.seconds[each], default=0)
                if used and solver.seconds[used] < limit_s:
                    first = [question.devices[segment.bin] for segment in solver.split(used).segments]
                    self.devices = (*first, *(device for device in question.devices if device not in first))
                    return True
        return False

    # -----------------------------------------------------------------------------------------------------------------
    # What the choice really takes

    def _accounted(self, request: PlanRequest, choice: Choice) -> Candidate:
        """Return the accounted placement of a choice, having learned from it."""
        finder, segments = self.finder, choice.split.segments
        question = self._question(request)
        group = [self.devices[segment.bin] for segment in segments]
        shares = [segment.end - segment.start for segment in segments]
        attempt = finder.attempt(_flagged(question, request, choice), group, sum(shares), shares)
        taken = {row.name: row.known_bytes for row in attempt.usages}
        for place, segment in enumerate(segments):
            device = self.devices[segment.bin]
            spilled = question.spill_sizes(device)[segment.spill_start : segment.spill_end]
            own = sum(question.sizes(device)[segment.start : segment.end]) - sum(spilled)
            part = question.part(choice.mode, segment.bin, first=place == 0, output=segment.end == question.n_slots)
            beyond = taken[device.name] - own - budget.overhead_bytes(device)
            self.learned.learn(part, question.params.n_ctx_seq, beyond)
        return attempt


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
    if whole == [slot for slot in counts if slot <= whole[-1]] if whole else False:
        count = whole[-1] + 1
        experts = bool(question.model.hparams.n_expert)
        request = replace(request, n_cpu_moe=count) if experts else replace(request, n_cpu_ffn=count)
    elif whole:
        layers = "|".join(map(str, whole))
        overrides.append((rf"blk\.({layers}){spill_pattern(question.model)}", "CPU"))
    return replace(request, override_tensor=tuple(overrides)) if overrides else request

"""The best placement under the stated objective: the solver's splits, confirmed by accounting.

A layer's weights and cache have fixed sizes; what a device takes beyond them, compute buffers above all, depends on
where the layers lie. So a split is solved with what earlier splits showed of that, accounted for, learned from, and
solved again until the answer stands. Nothing is called fitting that ``accounting`` has not confirmed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Final, NamedTuple

from planner import budget, cache, weights
from planner.context import context_params
from planner.search.bounds import bound_s
from planner.search.candidates import Accountant, Candidate
from planner.search.exhaust import SMALL, improved
from planner.search.learned import Learned, Mode
from planner.search.preference import preferred
from planner.search.problems import Question, slot_count
from planner.search.proposals import Proposal, flagged
from planner.search.solver import Solver
from planner.search.splits import Split
from planner.search.subproblems import Subproblem
from planner.speed import EQUAL_SPEED
from planner.types.machine import Device
from planner.types.plan import Placement
from planner.types.request import PlanRequest

MAX_ROUNDS: Final = 8  # of solving and accounting; three are usual, since only compute buffers move
MAX_SPILL_ORDERS: Final = 6  # devices whose orders are all tried where parts of layers may be left to the host


class Evaluation(NamedTuple):
    """A proposal, what accounting says of it, and the optimizer to go on with: it may have another order of devices."""

    candidate: Candidate
    proposal: Proposal
    optimizer: Optimizer


@dataclass(frozen=True, slots=True)
class Optimizer:
    """The search for the best split of one model over ``devices``, in that order of preference.

    ``learned`` grows with each candidate, and those made from one another share it; all else is fixed. No other order
    is looked for where it is pinned or where all ``orders_were_tried``. Only ``modes`` are of interest.
    """

    accountant: Accountant
    devices: tuple[Device, ...]
    order_is_pinned: bool
    learned: Learned = field(default_factory=Learned)
    modes: frozenset[Mode] = frozenset(Mode)
    orders_were_tried: bool = False

    def only(self, *modes: Mode) -> Optimizer:
        """Return the same where only these modes are of interest."""
        return replace(self, modes=frozenset(modes))

    def applies(self, request: PlanRequest) -> bool:
        """Say whether the solver covers this question: whole layers over devices of their own memory, sizes known.

        Where shares are pinned, tensors sent to other devices or memory is shared there are fewer choices or other
        ones; ``packer`` packs those.
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

    def incumbent(
        self, request: PlanRequest, limit_s: float = inf, expected: Proposal | None = None
    ) -> Evaluation | None:
        """Return the best that fits with at most these seconds a token; None where nothing is confirmed.

        That is what solving finds, or what is better in a small problem. Solving begins with the ``expected`` proposal.
        """
        found = self._solved(request, limit_s, expected)
        if found is not None and found.candidate.unknown:
            return None
        return improved(self if found is None else found.optimizer, request, limit_s, found)

    def _solved(self, request: PlanRequest, limit_s: float, expected: Proposal | None) -> Evaluation | None:
        """Solve, account and learn until the answer stands; one whose figures are unknown is returned as it is."""
        now, best = self, None
        tried: set[tuple[str, ...]] = set()
        for _ in range(MAX_ROUNDS):
            proposal, expected = expected or now.proposal(request, limit_s), None
            if proposal is None:
                break
            segments = proposal.split.segments
            name = (proposal.mode.name, *(str((now.devices[each.bin].name, *each[1:])) for each in segments))
            stands = name in tried
            if not stands:
                tried.add(name)
                candidate, stands = now._accounted(request, proposal)
                if candidate.unknown:
                    return Evaluation(candidate, proposal, now)
                best = Evaluation(candidate, proposal, now) if candidate.fits else best
                stands = stands and candidate.fits
            if stands and best is None:
                break
            if stands:
                order = now.faster_order(request, proposal)
                now = now.reordered(order)
                if order is None:
                    break
        return best and best._replace(optimizer=now)

    # -----------------------------------------------------------------------------------------------------------------
    # One context: which split

    def question(self, request: PlanRequest, *, told: bool = True) -> Question:
        """Return the question, with what was learned of the devices, or with nothing told of them."""
        accountant = self.accountant
        params = context_params(accountant.model, request)
        learned = self.learned if told else Learned()
        return Question(accountant.model, params, accountant.machine, self.devices, accountant.limits, learned)

    def tiers(self, question: Question, request: PlanRequest) -> Iterator[tuple[Subproblem, ...]]:
        """Yield subproblems that compete, the better first: all on devices; then not pipelined; then some on the host.

        The next tier is of interest only where the one before has no answer: prompts are computed on devices, and the
        faster the more copies of its inputs a graph may have.
        """
        n_slots, pinned, params = question.n_slots, request.n_gpu_layers, question.params
        if isinstance(pinned, int) and 0 <= pinned < n_slots:
            yield (Subproblem(Mode.WITH_HOST, question.problem(Mode.WITH_HOST, on_host=n_slots - pinned)),)
            return
        if Mode.UNPIPELINED in self.modes:
            several = question.problem(Mode.UNPIPELINED)
            if params.kv_offload and not params.overrides:
                pipelined = question.problem(Mode.PIPELINED)
                yield (Subproblem(Mode.UNPIPELINED, several, most=1), Subproblem(Mode.PIPELINED, pipelined, least=2))
            yield (Subproblem(Mode.UNPIPELINED, several),)
        if Mode.WITH_HOST in self.modes and pinned in {None, "auto"}:
            with_host = question.problem(Mode.WITH_HOST, on_host=None, spills=bool(question.parts))
            yield (Subproblem(Mode.WITH_HOST, with_host),)

    def least_s(self, request: PlanRequest, limit_s: float) -> float:
        """Return the seconds of a split that is expected to fit and to be this fast, infinite where there is none."""
        tiers = self.tiers(self.question(request), request)
        return next((s for tier in tiers for each in tier if (s := each.least_s(limit_s)) < inf), inf)

    def proposal(self, request: PlanRequest, limit_s: float = inf) -> Proposal | None:
        """Return the split that the objective puts first, by what is expected of every device."""
        question, spread = self.question(request), self.accountant.spread
        for tier in self.tiers(question, request):
            chains = [(each, each.chained(inf) if spread else each.fastest(limit_s)) for each in tier]
            fastest_s = min((s for each, chain in chains for s in each.by_count(chain).values()), default=inf)
            if fastest_s < inf and fastest_s <= limit_s:
                return preferred(question, chains, fastest_s, limit_s, spread=spread)
        return None

    def faster_order(self, request: PlanRequest, proposal: Proposal) -> tuple[Device, ...] | None:
        """Return the devices in the order of a split that is faster by more than what is equal, where there is one.

        Every order is tried once, with what accounting has shown of the devices in their own order.
        """
        if self.order_is_pinned or self.orders_were_tried:
            return None
        question = self.question(request)
        limit_s = proposal.fastest_s / EQUAL_SPEED
        for subproblem in (each for tier in self.tiers(question, request) for each in tier):
            problem = replace(subproblem.problem, ordered=False, max_bins=subproblem.most, limit_s=limit_s)
            many = bool(problem.spill_slots) and len(problem.bins) > MAX_SPILL_ORDERS
            if subproblem.mode is not proposal.mode or many or bound_s(problem) >= limit_s:
                continue
            solver = Solver(problem)
            enough = [used for used in solver.seconds if used.bit_count() >= max(subproblem.least, 1)]
            used = min(enough, key=lambda each: solver.seconds[each], default=0)
            if used and solver.seconds[used] < limit_s:
                return self._beginning_with([self.devices[segment.bin] for segment in solver.split(used).segments])
        return None

    def reordered(self, order: tuple[Device, ...] | None) -> Optimizer:
        """Return the same with the devices in that order for good, in their own where none is faster."""
        return replace(self, devices=order or self.devices, orders_were_tried=True)

    def in_order_of(self, first: Sequence[Device]) -> Optimizer:
        """Return the same with these devices before the others."""
        return replace(self, devices=self._beginning_with(first))

    def _beginning_with(self, first: Sequence[Device]) -> tuple[Device, ...]:
        return (*first, *(device for device in self.devices if device not in first))

    # -----------------------------------------------------------------------------------------------------------------
    # What the proposal really takes

    def accounted(self, request: PlanRequest, mode: Mode, split: Split) -> Evaluation:
        """Return this split, accounted for."""
        proposal = Proposal(mode, split, split.seconds)
        return Evaluation(self._accounted(request, proposal)[0], proposal, self)

    def _accounted(self, request: PlanRequest, proposal: Proposal) -> tuple[Candidate, bool]:
        """Return the accounted placement of a proposal, having learned from it.

        Also say whether the proposal stands where it fits: no device takes less than was expected of it, so that none
        was left out that there is room for.
        """
        accountant, segments = self.accountant, proposal.split.segments
        question = self.question(request)
        group = [self.devices[segment.bin] for segment in segments]
        shares = [segment.end - segment.start for segment in segments]
        candidate = accountant.candidate(flagged(question, request, proposal), group, sum(shares), shares)
        taken = {row.name: row.claimed_bytes for row in candidate.usages}
        stands, n_ctx = True, question.params.n_ctx_seq
        for place, segment in enumerate(segments):
            device = self.devices[segment.bin]
            spilled = question.spill_sizes(device)[segment.spill_start : segment.spill_end]
            own = sum(question.sizes(device)[segment.start : segment.end]) - sum(spilled)
            part = question.part(proposal.mode, segment.bin, first=place == 0, output=segment.end == question.n_slots)
            beyond = taken[device.name] - own - budget.overhead_bytes(device)
            stands = stands and beyond >= question.expected(part)
            self.learned.learn(part, n_ctx, beyond)
        return candidate, stands

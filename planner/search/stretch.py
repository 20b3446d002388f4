"""The longest context that the solver's splits allow: foretold by what accounting has shown of a few, and confirmed."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

from planner.context import CONTEXT_ALIGNMENT
from planner.search import knobs
from planner.search.candidates import Candidate
from planner.search.learned import Mode
from planner.search.optimizer import MAX_ROUNDS, Evaluation, Optimizer
from planner.search.proposals import Proposal
from planner.speed import EQUAL_SPEED, pace
from planner.types.request import PlanRequest

MAX_CONTEXT_ROUNDS: Final = 8  # of bisecting; three are usual: what a device takes grows nearly in proportion
_MISSED: Final = 1.25  # a guess that was too far: a step adds more


@dataclass(frozen=True, slots=True)
class Stretch:
    """A request whose context is open, from the shortest that may be chosen to the trained length."""

    optimizer: Optimizer
    settled: PlanRequest
    floor: int
    trained: int

    def _with(self, n_ctx: int) -> PlanRequest:
        return knobs.with_context(self.settled, n_ctx)

    def longest(self) -> Candidate | None:
        """Return the best placement with the longest context; None where not even the floor fits.

        Where everything lies on devices at the floor, that is the longest with which it still does. Where not, it is
        the longest with which decoding is as fast: a longer one would push more to the host. The trained length is
        tried first. Below it, multiples of 256 are tried by what is expected to fit; what accounting then shows is
        learned, until no longer context is expected to fit.
        """
        optimizer, expected = self.optimizer, None
        if self.floor < self.trained and not optimizer.is_small:
            optimizer, expected = self._expected_at_floor()
            if expected is not None and expected.mode is Mode.WITH_HOST:
                optimizer, found = self._beside_host(optimizer, expected)
                if found is not None:
                    return found
                expected = None
        at_floor = optimizer.incumbent(self._with(self.floor), expected=expected)
        if at_floor is None or self.floor >= self.trained:
            return at_floor and at_floor.candidate
        return self._from_floor(at_floor)

    def _from_floor(self, at_floor: Evaluation) -> Candidate:
        """Return the placement with the longest context that begins with one that fits."""
        proposal = at_floor.proposal
        spills = proposal.mode is Mode.WITH_HOST
        modes = (Mode.WITH_HOST,) if spills else (Mode.PIPELINED, Mode.UNPIPELINED)
        optimizer = at_floor.optimizer.only(*modes)
        limit_s = proposal.fastest_s * EQUAL_SPEED if spills else inf
        whole = optimizer.incumbent(self._with(self.trained), limit_s)
        if whole is not None:
            return whole.candidate
        # What each device takes beyond its layers grows with the context in proportion: two lengths tell of others.
        optimizer.accounted(self._with(self.trained), proposal.mode, proposal.split)
        return (self._between(optimizer, self.trained, limit_s) or at_floor).candidate

    def _beside_host(self, optimizer: Optimizer, at_floor: Proposal) -> tuple[Optimizer, Candidate | None]:
        """Return the placement with the longest context where parts are left to the host, as far as can be foretold.

        What is expected ``at_floor`` is not confirmed there, only what is longer; it is expected anew by what that has
        shown. None where nothing longer is found, or where everything is expected to fit on devices. Also return the
        optimizer to go on with.
        """
        for _ in range(MAX_ROUNDS):
            if at_floor.mode is not Mode.WITH_HOST:
                break
            limit_s = at_floor.fastest_s * EQUAL_SPEED
            found = self._between(optimizer.only(Mode.WITH_HOST), self.trained + 1, limit_s)
            if found is None:
                break
            optimizer = found.optimizer.only(*optimizer.modes)
            again = optimizer.proposal(self._with(self.floor))
            if again is None:
                break
            # What is foretold counts as equal to what was foretold before, within what always does.
            if again.mode is Mode.WITH_HOST and found.proposal.split.seconds <= again.fastest_s * EQUAL_SPEED**2:
                return optimizer, found.candidate
            at_floor = again
        return optimizer, None

    def _expected_at_floor(self) -> tuple[Optimizer, Proposal | None]:
        """Return what accounting for another proposal lets expect, and the optimizer that proposes it."""
        optimizer, request = self.optimizer, self._with(self.floor)
        first = optimizer.proposal(request)
        if first is None or optimizer.accounted(request, first.mode, first.split).candidate.unknown:
            return optimizer, None
        proposal = optimizer.proposal(request)
        if proposal is None:
            return optimizer, None
        order = optimizer.faster_order(request, proposal)
        optimizer = optimizer.reordered(order)
        return optimizer, proposal if order is None else optimizer.proposal(request)

    def _between(self, optimizer: Optimizer, over: int, limit_s: float) -> Evaluation | None:
        """Return the placement with the longest context that fits: longer than the floor, shorter than ``over``."""
        incumbent: Evaluation | None = None
        low, high = self.floor // CONTEXT_ALIGNMENT, -(-over // CONTEXT_ALIGNMENT)
        for _ in range(MAX_CONTEXT_ROUNDS):
            guess = self._expected_steps(optimizer, low, high, limit_s)
            if guess == low and optimizer.is_small:
                guess = (low + high) // 2  # more may fit than is expected: there it is really looked for
            if guess == low:
                break
            found = optimizer.incumbent(self._with(guess * CONTEXT_ALIGNMENT), limit_s)
            if found is None:
                high = guess
            else:
                low, incumbent, optimizer = guess, found, found.optimizer
        return incumbent

    def _expected_steps(self, optimizer: Optimizer, low: int, high: int, limit_s: float) -> int:
        """Return the largest number of steps between these for which a split is expected to fit.

        The next step is tried first: it ends a search that is at its end. Then halves; where there is a limit, where
        the seconds would meet it that steps are to add, or twice as far as the last time.
        """
        ahead, step_s, seconds = 1, self._step_s(optimizer, low, high), inf
        while high - low > 1:
            steps = low + max(min(ahead, high - low - 1), 1)
            tried_s = optimizer.least_s(self._with(steps * CONTEXT_ALIGNMENT), limit_s)
            if tried_s < inf:
                low, seconds, ahead = steps, tried_s, 2 * ahead
            else:
                high, step_s, ahead = steps, step_s * _MISSED, 1
            if max(limit_s, seconds) < inf and step_s > 0:
                ahead = max(int((limit_s - seconds) / step_s), ahead)
            else:
                ahead = (high - low) // 2
        return low

    def _step_s(self, optimizer: Optimizer, low: int, high: int) -> float:
        """Return the seconds that a step is to add where it pushes as many bytes to the host."""
        few, many = (optimizer.question(self._with(steps * CONTEXT_ALIGNMENT)) for steps in (low, high))
        grown = [sum(each.sizes(optimizer.devices[0])) for each in (few, many)]
        share = sum(part.read for part in few.parts) / (sum(part.tensor.nbytes for part in few.parts) or inf) or 1.0
        return (grown[1] - grown[0]) / (high - low) * share / pace(optimizer.accountant.machine.host).bytes_per_s

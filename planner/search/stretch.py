"""The longest context that the solver's splits allow: foretold by what accounting has shown of a few, and confirmed."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

from planner.context import CONTEXT_ALIGNMENT
from planner.search import knobs
from planner.search.best import MAX_ROUNDS, Best, Choice, Found
from planner.search.candidates import Candidate
from planner.search.learned import Mode
from planner.speed import EQUAL_SPEED, pace
from planner.types.request import PlanRequest

MAX_CONTEXT_ROUNDS: Final = 8  # of bisecting; three are usual: what a device takes grows nearly in proportion
_MISSED: Final = 1.25  # a guess that was too far: a step adds more


@dataclass(frozen=True, slots=True)
class Stretch:
    """A request whose context is open, from the shortest that may be chosen to the trained length."""

    best: Best
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
        best, choice = self.best, None
        if self.floor < self.trained and not best.is_small:
            choice = self._expected_at_floor()
            if choice is not None and choice.mode is Mode.WITH_HOST:
                if found := self._beside_host(choice):
                    return found
                choice = None
        at_floor = best.found(self._with(self.floor), expected=choice)
        if at_floor is None or self.floor >= self.trained:
            return at_floor and at_floor.candidate
        return self._from_floor(at_floor)

    def _from_floor(self, at_floor: Found) -> Candidate:
        """Return the placement with the longest context that begins with one that fits."""
        best, choice = self.best, at_floor.choice
        spills = choice.mode is Mode.WITH_HOST
        best.modes = frozenset({Mode.WITH_HOST} if spills else {Mode.PIPELINED, Mode.UNPIPELINED})
        limit_s = choice.fastest_s * EQUAL_SPEED if spills else inf
        whole = best.at(self._with(self.trained), limit_s)
        if whole is not None:
            return whole
        # What each device takes beyond its layers grows with the context in proportion: two lengths tell of others.
        best.accounted(self._with(self.trained), choice.mode, choice.split)
        return (self._between(self.trained, limit_s) or at_floor).candidate

    def _beside_host(self, at_floor: Choice) -> Candidate | None:
        """Return the placement with the longest context where parts are left to the host, as far as can be foretold.

        What is expected ``at_floor`` is not confirmed there, only what is longer; it is expected anew by what that has
        shown. None where nothing longer is found, or where everything is expected to fit on devices.
        """
        everything = self.best.modes
        for _ in range(MAX_ROUNDS):
            if at_floor.mode is not Mode.WITH_HOST:
                break
            limit_s = at_floor.fastest_s * EQUAL_SPEED
            self.best.modes = frozenset({Mode.WITH_HOST})
            found = self._between(self.trained + 1, limit_s)
            self.best.modes = everything
            again = found and self.best.choice(self._with(self.floor))
            if found is None or again is None:
                break
            # What is foretold counts as equal to what was foretold before, within what always does.
            if again.mode is Mode.WITH_HOST and found.choice.split.seconds <= again.fastest_s * EQUAL_SPEED**2:
                return found.candidate
            at_floor = again
        return None

    def _expected_at_floor(self) -> Choice | None:
        """Return the choice that accounting for another one lets expect."""
        best, request = self.best, self._with(self.floor)
        first = best.choice(request)
        if first is None or best.accounted(request, first.mode, first.split).candidate.unknown:
            return None
        choice = best.choice(request)
        return best.choice(request) if choice is not None and best.reordered_for(request, choice) else choice

    def _between(self, over: int, limit_s: float) -> Found | None:
        """Return the placement with the longest context that fits: longer than the floor, shorter than ``over``."""
        best: Found | None = None
        low, high = self.floor // CONTEXT_ALIGNMENT, -(-over // CONTEXT_ALIGNMENT)
        for _ in range(MAX_CONTEXT_ROUNDS):
            guess = self._expected_steps(low, high, limit_s)
            if guess == low and self.best.is_small:
                guess = (low + high) // 2  # more may fit than is expected: there it is really looked for
            if guess == low:
                break
            attempt = self.best.found(self._with(guess * CONTEXT_ALIGNMENT), limit_s)
            if attempt is None:
                high = guess
            else:
                low, best = guess, attempt
        return best

    def _expected_steps(self, low: int, high: int, limit_s: float) -> int:
        """Return the largest number of steps between these for which a split is expected to fit.

        The next step is tried first: it ends a search that is at its end. Then halves; where there is a limit, where
        the seconds would meet it that steps are to add, or twice as far as the last time.
        """
        ahead, step_s, seconds = 1, self._step_s(low, high), inf
        while high - low > 1:
            steps = low + max(min(ahead, high - low - 1), 1)
            tried_s = self.best.least_s(self._with(steps * CONTEXT_ALIGNMENT), limit_s)
            if tried_s < inf:
                low, seconds, ahead = steps, tried_s, 2 * ahead
            else:
                high, step_s, ahead = steps, step_s * _MISSED, 1
            if max(limit_s, seconds) < inf and step_s > 0:
                ahead = max(int((limit_s - seconds) / step_s), ahead)
            else:
                ahead = (high - low) // 2
        return low

    def _step_s(self, low: int, high: int) -> float:
        """Return the seconds that a step is to add where it pushes as many bytes to the host."""
        few, many = (self.best.question(self._with(steps * CONTEXT_ALIGNMENT)) for steps in (low, high))
        grown = [sum(each.sizes(self.best.devices[0])) for each in (few, many)]
        share = sum(part.read for part in few.parts) / (sum(part.tensor.nbytes for part in few.parts) or inf) or 1.0
        return (grown[1] - grown[0]) / (high - low) * share / pace(self.best.accountant.machine.host).bytes_per_s

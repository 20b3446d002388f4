"""Searches of the planner's, of which some need not be made again.

A search takes milliseconds for a small model, and a tenth of a second for one that is spread over devices. Most loads
are of a model that was loaded before, on a machine on which nothing but the host's free memory is another. What was
found then is taken again where that proves to be what would be found now (``planner.search.endless``), and only there:
the machine is looked at each time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from planner import oracle
from planner.model import ModelFacts
from planner.search import placement
from planner.search.candidates import Oracle
from planner.search.endless import held_against, with_endless_host
from planner.types import LlamaBuild, Machine, Plan, PlanOutcome, PlanRequest, Policy, Source

MAX_REMEMBERED: Final = 64  # some ten KiB each; a model is planned for in a handful of situations


@dataclass(frozen=True, slots=True)
class _Question:
    """What a search depends on; the machine's host has memory without end."""

    request: PlanRequest
    machine: Machine
    policy: Policy
    build: LlamaBuild


@dataclass(slots=True)
class _Asked:
    """A question about this model that was asked before, and the plan that answers it for a time to come, if any."""

    model: ModelFacts
    question: _Question
    was_tried: bool = False
    plan: Plan | None = None


class Searches:
    """Searches, and remembers."""

    def __init__(self) -> None:
        self._asked: deque[_Asked] = deque(maxlen=MAX_REMEMBERED)

    def search(
        self, model: ModelFacts, request: PlanRequest, machine: Machine, policy: Policy, build: LlamaBuild
    ) -> PlanOutcome:
        """Return what ``placement.search`` would. ``model`` is the same object as long as its files are the same.

        Raises InvalidRequest.
        """
        endless = with_endless_host(machine)
        if endless is not None:
            question = _Question(request, endless, policy, build)
            kept = self._kept(model, question)
            if kept is not None and (plan := held_against(kept, machine, policy)) is not None:
                return plan
        return placement.search(model, request, machine, policy, build, oracle.ask(build))

    def _kept(self, model: ModelFacts, question: _Question) -> Plan | None:
        """Return the plan that answers this question whenever the host has room; it is made when asked for again."""
        before = next((one for one in self._asked if one.model is model and one.question == question), None)
        if before is None:
            self._asked.append(_Asked(model, question))
            return None
        if not before.was_tried:
            before.was_tried = True
            asking = oracle.ask(question.build)
            outcome = placement.search(
                model, question.request, question.machine, question.policy, question.build, asking, advises=False
            )
            before.plan = outcome if isinstance(outcome, Plan) and _lasts(outcome, asking) else None
        return before.plan


def _lasts(plan: Plan, asking: Oracle | None) -> bool:
    """Say whether nobody is to be asked anew for its figures: of one that is estimated llama.cpp may say more now."""
    figures = (figure for usage in plan.usages for figure in (usage.model, usage.context, usage.compute))
    return asking is None or all(figure.source is not Source.ESTIMATED for figure in figures)

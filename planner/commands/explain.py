"""``planner explain``: what fits where, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from planner import companions, flags
from planner.commands import terminal
from planner.commands.surroundings import Surroundings, surroundings
from planner.errors import InvalidRequest
from planner.explain import to_json
from planner.explain_text import to_text
from planner.limits import one_more_gib
from planner.model import read_model
from planner.oracle import ask
from planner.requirement import all_on_devices
from planner.search import placement
from planner.search.candidates import Oracle
from planner.together import Wanted, together
from planner.together_text import together_to_json, together_to_text
from planner.types import Machine, Plan, PlanOutcome, PlanRequest, Policy

FITS: Final = 0
DOES_NOT_FIT: Final = 3


def main(name: str, words: Sequence[str]) -> int:
    """Print the plan for a model, or why there is none; for several, whether they fit together. Raises PlannerError."""
    del name
    if {"-h", "--help"} & set(words):
        from planner.usage import explain_usage

        terminal.write(explain_usage())
        return FITS
    line = flags.parse(words)
    if not line.options.models:
        raise InvalidRequest("which model? planner explain MODEL [flags]")
    where = surroundings(line)
    question = _Question(line, where, None if line.options.no_oracle else ask(where.build))
    if len(line.options.models) == 1:
        fits = _alone(question)
    elif line.options.versus is None:
        fits = _together(question)
    else:
        raise InvalidRequest("--versus compares the plans of one model, but there are several")
    return FITS if fits else DOES_NOT_FIT


@dataclass(frozen=True, slots=True)
class _Question:
    """A command line and where it plans: what is the same for each of its models."""

    line: flags.CommandLine
    where: Surroundings
    oracle: Oracle | None

    def wanted(self, path: str) -> Wanted:
        """Return what is asked of the model at this path. Raises ModelFileError."""
        model = read_model(path)
        request = self.line.request_of(model.role)
        return Wanted(companions.attach(model, request), request)

    def planned(self, wanted: Wanted, policy: Policy, machine: Machine | None = None) -> PlanOutcome:
        """Return the best placement under this policy that keeps to what is required. Raises InvalidRequest."""
        there = machine or self.where.machine

        def search(request: PlanRequest) -> PlanOutcome:
            return placement.search(wanted.model, request, there, policy, self.where.build, self.oracle)

        found = all_on_devices(wanted.request, search) if self.line.options.require else search(wanted.request)
        return replace(found, warnings=(*self.where.warnings, *self.line.notes, *found.warnings))


def _alone(question: _Question) -> bool:
    """Print the plan for one model, and say whether it fits."""
    where, wanted = question.where, question.wanted(question.line.options.models[0])

    def planned_on(machine: Machine) -> PlanOutcome:
        return question.planned(wanted, where.policy, machine)

    outcome = planned_on(where.machine)
    if question.line.options.versus is not None:
        return _beside(question, wanted, outcome, question.line.options.versus)
    if question.line.options.json:
        terminal.write_json(to_json(outcome))
    else:
        more = one_more_gib(outcome, where.machine, planned_on) if isinstance(outcome, Plan) else ()
        terminal.write(to_text(outcome, terminal.columns(), terminal.style(), tuple(more)))
    return isinstance(outcome, Plan)


def _together(question: _Question) -> bool:
    """Print how several models share the machine, and say whether they fit."""
    wanted = [question.wanted(path) for path in question.line.options.models]
    result = together(wanted, question.where.policy, question.planned)
    if question.line.options.json:
        terminal.write_json(together_to_json(result))
    else:
        terminal.write(together_to_text(result, terminal.columns(), terminal.style()))
    return result.fits


def _beside(question: _Question, wanted: Wanted, outcome: PlanOutcome, text: str) -> bool:
    """Print the plan beside what llama-server would do with other flags, and say whether ours fits."""
    from planner import versus, versus_text
    from planner.oracle_fit import fitted

    where, (model, asked) = question.where, wanted

    def search(request: PlanRequest, policy: Policy) -> PlanOutcome:
        attached = companions.attach(read_model(model.summary.path), request)
        return placement.search(attached, request, where.machine, policy, where.build, question.oracle)

    def fit(request: PlanRequest, names: Sequence[str], rooms: Sequence[int]) -> versus.Fitted | None:
        return fitted(where.build, model, request, names, rooms)

    if text == versus.FIT:
        other = versus.of_fit(asked, outcome, model, where.machine, where.policy, search, fit)
    else:
        other = versus.of_flags(text, model, where.machine, where.policy, search, fit)
    if question.line.options.json:
        terminal.write_json(versus_text.versus_to_json(outcome, other))
    else:
        terminal.write(versus_text.versus_to_text(outcome, other, terminal.columns(), terminal.style()))
    return isinstance(outcome, Plan)

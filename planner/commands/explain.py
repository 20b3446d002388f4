"""``planner explain``: what fits where, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from planner import companions, flags
from planner.commands import terminal
from planner.commands.named import Models
from planner.commands.surroundings import Surroundings, surroundings
from planner.errors import InvalidRequest
from planner.explain import to_json
from planner.model import ModelFacts, read_model
from planner.oracle import ask
from planner.search import placement
from planner.types.machine import Machine
from planner.types.plan import Plan, PlanOutcome
from planner.types.request import PlanRequest, Policy

if TYPE_CHECKING:
    from planner.search.candidates import Oracle

FITS: Final = 0
DOES_NOT_FIT: Final = 3

Asked = tuple[ModelFacts, PlanRequest]


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
    question = _Question(line, where, None if line.options.no_oracle else ask(where.build), Models(line))
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
    models: Models

    def asked(self, word: str) -> Asked:
        """Return a model, its companions attached, and what is asked of it. Raises PlannerError."""
        model, request = self.models.asked(word)
        return companions.attach(model, request), request

    def planned(
        self, asked: Asked, policy: Policy, machine: Machine | None = None, *, advises: bool = True
    ) -> PlanOutcome:
        """Return the best placement under this policy that keeps to what is required. Raises InvalidRequest."""
        model, there, build = asked[0], machine or self.where.machine, self.where.build

        def search(request: PlanRequest) -> PlanOutcome:
            return placement.search(model, request, there, policy, build, self.oracle, advises=advises)

        found = search(asked[1]) if self.line.options.require is None else _on_devices(asked[1], search)
        return replace(found, warnings=(*self.where.warnings, *self.line.notes, *found.warnings))


def _on_devices(request: PlanRequest, search: Callable[[PlanRequest], PlanOutcome]) -> PlanOutcome:
    from planner.requirement import all_on_devices

    return all_on_devices(request, search)


def _alone(question: _Question) -> bool:
    """Print the plan for one model, and say whether it fits."""
    asked = question.asked(question.line.options.models[0])
    outcome = question.planned(asked, question.where.policy)
    if question.line.options.versus is not None:
        _show_beside(question, asked, outcome, question.line.options.versus)
    elif question.line.options.json:
        terminal.write_json(to_json(outcome))
    else:
        _show(question, asked, outcome)
    return isinstance(outcome, Plan)


def _show(question: _Question, asked: Asked, outcome: PlanOutcome) -> None:
    """Print an outcome for a reader, and what more memory would buy."""
    from planner.explain_text import to_text
    from planner.limits import one_more_gib

    def planned_on(machine: Machine) -> PlanOutcome:
        return question.planned(asked, question.where.policy, machine, advises=False)

    more = one_more_gib(outcome, question.where.machine, planned_on) if isinstance(outcome, Plan) else ()
    terminal.write(to_text(outcome, terminal.columns(), terminal.style(), tuple(more)))


def _together(question: _Question) -> bool:
    """Print how several models share the machine, and say whether they fit."""
    from planner.together import Wanted, together
    from planner.together_text import together_to_json, together_to_text

    wanted = [Wanted(*question.asked(word)) for word in question.line.options.models]
    result = together(wanted, question.where.policy, partial(question.planned, advises=False), question.planned)
    if question.line.options.json:
        terminal.write_json(together_to_json(result))
    else:
        terminal.write(together_to_text(result, terminal.columns(), terminal.style(), question.line.options.models))
    return result.fits


def _show_beside(question: _Question, wanted: Asked, outcome: PlanOutcome, text: str) -> None:
    """Print the plan beside what llama-server would do with other flags."""
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

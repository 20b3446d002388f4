"""``planner explain``: what fits where, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from planner import companions, flags
from planner.commands import terminal
from planner.commands.surroundings import surroundings
from planner.errors import InvalidRequest
from planner.explain import to_json
from planner.explain_text import to_text
from planner.model import read_model
from planner.oracle import ask
from planner.search import placement
from planner.types import Plan, PlanOutcome

FITS: Final = 0
DOES_NOT_FIT: Final = 3


def main(name: str, words: Sequence[str]) -> int:
    """Print the plan for a model, or why there is none. Raises PlannerError."""
    del name
    if {"-h", "--help"} & set(words):
        from planner.usage import explain_usage

        terminal.write(explain_usage())
        return FITS
    line = flags.parse(words)
    outcome = _planned(line)
    if line.options.json:
        terminal.write_json(to_json(outcome))
    else:
        terminal.write(to_text(outcome, terminal.columns(), terminal.style()))
    return FITS if isinstance(outcome, Plan) else DOES_NOT_FIT


def _planned(line: flags.CommandLine) -> PlanOutcome:
    if line.options.model is None:
        raise InvalidRequest("which model? planner explain MODEL [flags]")
    where = surroundings(line)
    model = read_model(line.options.model)
    request = line.request_of(model.role)
    oracle = None if line.options.no_oracle else ask(where.build)
    model = companions.attach(model, request)
    outcome = placement.search(model, request, where.machine, where.policy, where.build, oracle)
    return replace(outcome, warnings=(*where.warnings, *line.notes, *outcome.warnings))

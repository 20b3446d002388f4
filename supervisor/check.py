"""``planner check``: proves a configuration without starting anything.

Every setting, the models file, the keys file and the certificate are read as the service would read them; every model
that the models file names is planned with what it says, and those that are pinned or preloaded are planned together.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from config import models_file
from config.model_settings import ExternalRunner
from config.resolve import ConfigError
from config.settings import load
from planner import companions, flags
from planner.commands import terminal
from planner.commands.surroundings import Surroundings, surroundings
from planner.errors import InvalidRequest, PlannerError
from planner.explain import headline
from planner.model import ModelFacts, read_model
from planner.oracle import ask
from planner.search import placement
from planner.together import Search, Wanted, together
from planner.types import Plan, PlanOutcome, Policy
from supervisor.core.types import DoesNotFit, LoadPlan, PlanProblem
from supervisor.daemon import operator_files
from supervisor.daemon.operator_files import OperatorFiles
from supervisor.models import configured
from supervisor.models.catalogue import Catalogue, ModelEntry
from supervisor.models.served import served
from supervisor.planning.model_request import request_of
from supervisor.planning.placing import as_told

USAGE: Final = """\
planner check [--machine FILE | --gpu NAME[:N] ... | --device NAME=SIZE ... | --no-gpu] [--host-memory SIZE] [--json]
planner check --schema

Reads every setting and file as the service would, and plans each model that the models file names: on this machine, on
another (a file of `planner devices --json`), or on one that is imagined, as `planner explain` does. Nothing is started.
--schema prints the models file's JSON schema.
Exit status: 0 all of it can be served, 1 something cannot be served as it is set, 2 a setting or a file is wrong.
"""
OK: Final = 0
SOMETHING_DOES_NOT_FIT: Final = 1
_FLAGS: Final = frozenset({"--json", "--machine", "--gpu", "--device", "--no-gpu", "--host-memory"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one model: one line, whether it can be served, and what its planner warns of."""

    model: str
    fits: bool
    story: str
    warnings: tuple[str, ...] = ()


def main(name: str, words: Sequence[str]) -> int:
    """Check, print the verdicts and return the exit status. Raises PlannerError."""
    if {"-h", "--help"} & set(words):
        sys.stdout.write(USAGE)
        return OK
    if list(words) == ["--schema"]:
        terminal.write_json(models_file.json_schema())
        return OK
    line = _line(name, words)
    try:
        loaded = load(os.environ)
        settings, files = loaded.settings, operator_files.read(loaded.settings)
    except ConfigError as error:
        raise InvalidRequest(str(error)) from None
    for warning in loaded.warnings:
        sys.stderr.write(f"planner: warning: {warning}\n")
    where = surroundings(line)
    verdicts, warnings = _verdicts(files, served(loaded, files.models), where), where.machine.warnings
    if line.options.json:
        told = {"fits": _all_fit(verdicts), "verdicts": [_json(one) for one in verdicts], "warnings": list(warnings)}
        terminal.write_json({"schema": 1, **told})
    else:
        notes = "".join(f"note   {warning}\n" for warning in warnings)
        terminal.write("".join(map(_told, verdicts)) + notes + _summary(settings.models_file, files, verdicts))
    return OK if _all_fit(verdicts) else SOMETHING_DOES_NOT_FIT


def _line(name: str, words: Sequence[str]) -> flags.CommandLine:
    """Return the machine that is to be checked for. Raises InvalidRequest for any other wish."""
    if wrong := [word for word in words if word.startswith("-") and word not in _FLAGS]:
        raise InvalidRequest(f"{wrong[0]}: no such flag: {USAGE.splitlines()[0]}")
    line = flags.parse(words)
    if line.options.models:
        raise InvalidRequest(f"planner {name} takes no model: it checks those that the models file names")
    if line.request.devices is not None:
        raise InvalidRequest("--device without a size chooses devices, as the models file does: write NAME=SIZE")
    return line


def _all_fit(verdicts: Iterable[Verdict]) -> bool:
    return all(one.fits for one in verdicts)


def _json(verdict: Verdict) -> dict[str, Any]:
    return {
        "model": verdict.model,
        "fits": verdict.fits,
        "story": verdict.story,
        "warnings": list(verdict.warnings),
    }


def _told(verdict: Verdict) -> str:
    warnings = "".join(f"       warning: {warning}\n" for warning in verdict.warnings)
    return f"{'ok   ' if verdict.fits else 'WRONG'}  {verdict.model}: {verdict.story}\n{warnings}"


def _summary(models: Path, files: OperatorFiles, verdicts: Sequence[Verdict]) -> str:
    """Return the last lines: how many models can be served, or why none was looked at, and who has a key."""
    named = files.models.models.keys() | files.models.external.keys()
    wrong = named & {one.model for one in verdicts if not one.fits}
    if not named:
        lines = [f"{models} names no models." if models.exists() else f"There is no models file at {models}."]
    elif wrong:
        lines = ["", f"{len(wrong)} of {len(named)} models cannot be served as they are set."]
    else:
        together = "Each model can be served, but not all at a time that are to stay loaded."
        lines = ["", "All is well." if _all_fit(verdicts) else together]
    if files.clients:
        lines.append(f"{len(files.clients)} client{'s have keys' if len(files.clients) > 1 else ' has a key'}.")
    return "".join(f"{line}\n" for line in lines)


def _verdicts(files: OperatorFiles, entries: Catalogue, where: Surroundings) -> list[Verdict]:
    oracle = ask(where.build)

    def search(wanted: Wanted, policy: Policy) -> PlanOutcome:
        return placement.search(wanted.model, wanted.request, where.machine, policy, where.build, oracle)

    missing = configured.missing(files.models, entries.entries)
    verdicts = [Verdict(name, fits=False, story="there is no model of this id") for name in missing]
    verdicts += [
        Verdict(entry.id, fits=False, story=configured.why_unheard(alias, other))
        for entry, alias, other in configured.unheard(entries)
    ]
    resident: list[tuple[ModelEntry, Wanted]] = []
    for entry in entries.entries:
        if entry.external is not None:
            verdicts.append(_program(entry.id, entry.external, where))
            continue
        if entry.id not in files.models.models:
            continue
        try:
            wanted = _wanted(entry, entries)
            outcome = search(wanted, where.policy)
        except PlannerError as error:
            verdicts.append(Verdict(entry.id, fits=False, story=str(error)))
            continue
        own = tuple(warning for warning in outcome.warnings if warning not in where.machine.warnings)
        verdicts.append(Verdict(entry.id, isinstance(outcome, Plan), headline(outcome), own))
        if entry.settings.pin or entry.settings.preload:
            resident.append((entry, wanted))
    if len(resident) > 1:
        verdicts.append(_together(resident, where.policy, search))
    return verdicts


def _program(name: str, program: ExternalRunner, where: Surroundings) -> Verdict:
    if shutil.which(program.cmd[0]) is None:
        return Verdict(name, fits=False, story=f"{program.cmd[0]} is no program that can be started here")
    match as_told(program)(where.machine, where.policy):
        case LoadPlan():
            return Verdict(name, fits=True, story="there is room for it")
        case DoesNotFit(headline=story) | PlanProblem(reason=story):
            return Verdict(name, fits=False, story=story)


def _wanted(entry: ModelEntry, entries: Catalogue) -> Wanted:
    """Return what the service would ask the planner for. Raises PlannerError."""
    if entry.problem is not None:
        raise InvalidRequest(entry.problem)
    request = request_of(entry, entry.settings, draft=entries.draft_of(entry.settings))
    facts: ModelFacts = companions.attach(read_model(entry.path), request)
    return Wanted(facts, request)


def _together(resident: Sequence[tuple[ModelEntry, Wanted]], policy: Policy, search: Search) -> Verdict:
    """Return whether the models that are to stay loaded can be loaded at a time."""
    names = ", ".join(entry.id for entry, _ in resident)
    result = together([wanted for _, wanted in resident], policy, search)
    story = "fit together" if result.fits else "do not fit together, though they are pinned or to be preloaded"
    return Verdict(names, result.fits, story)

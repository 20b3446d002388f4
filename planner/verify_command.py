"""``planner verify``, from its words to what is printed; the machine and a folder's models are given to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from planner import flags, verify
from planner.errors import InvalidRequest, ModelFileError
from planner.model import ModelFacts, read_model
from planner.oracle import ask
from planner.types import LlamaBuild, Machine, Policy
from planner.verify import Verification

AGREES: Final = 0
DIFFERS: Final = 1
NOT_COMPARED: Final = 3  # the model does not fit or would be refused, as planner explain has it

_WHICH: Final = "which model? planner verify MODEL [flags], or planner verify --all FOLDER [flags]"


class Surroundings(NamedTuple):
    """Where a command line plans: the machine, the llama.cpp that would be launched, what the operator allows."""

    machine: Machine
    build: LlamaBuild
    policy: Policy


# The models below a folder: called with it and with what reads a header, yields entries with path and problem.
Scan = Callable[[Path, Callable[[str], ModelFacts]], Sequence[Any]]


def run(words: Sequence[str], surroundings: Callable[[flags.CommandLine], Surroundings], scan: Scan) -> tuple[str, int]:
    """Return the text to print and the exit status. Raises InvalidRequest, and ModelFileError for a single model."""
    folder, words = _without_folder(words)
    line = flags.parse(words)
    if (folder is None) == (line.options.model is None):
        raise InvalidRequest(_WHICH)
    if line.options.no_oracle:
        raise InvalidRequest("--no-oracle: verifying is asking llama.cpp")
    where = surroundings(line)
    if folder is None:
        results: tuple[Verification, ...] = (_verified(read_model(line.options.model or ""), line, where),)
    else:
        results = _folder(folder, line, where, scan)
    if line.options.json:
        text = json.dumps(verify.to_json(where.build, results), indent=2) + "\n"
    elif folder is None:
        text = verify.to_text(where.build, results[0])
    else:
        text = verify.to_lines(where.build, results)
    return text, _status(results, alone=folder is None)


def _status(results: Sequence[Verification], *, alone: bool) -> int:
    if not all(result.agrees for result in results):
        return DIFFERS
    return NOT_COMPARED if alone and results[0].problem is not None else AGREES


def _without_folder(words: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """Return the folder of ``--all``, if it is given, and the other words."""
    if "--all" not in words:
        return None, words
    at = list(words).index("--all")
    if at + 1 == len(words):
        raise InvalidRequest("--all needs a folder: --all FOLDER")
    return words[at + 1], [*words[:at], *words[at + 2 :]]


def _verified(model: ModelFacts, line: flags.CommandLine, where: Surroundings) -> Verification:
    oracle = ask(where.build, any_build=True)
    if oracle is None:
        found = where.build.path or "no llama-server was found, so there is nothing"
        raise InvalidRequest(f"{found}: no libraries beside it to ask; run `make llama`, or set PLANNER_LLAMA_SERVER")
    return verify.verify(model, line.request_of(model.role), where.machine, where.policy, where.build, oracle)


def _folder(folder: str, line: flags.CommandLine, where: Surroundings, scan: Scan) -> tuple[Verification, ...]:
    """Return a result for every model below the folder, those that cannot be read among them."""
    facts: dict[str, ModelFacts] = {}

    def read(path: str) -> ModelFacts:
        facts[path] = read_model(path)
        return facts[path]

    def result(path: str, problem: str | None) -> Verification:
        if problem is not None:
            return Verification(path, problem=problem.removeprefix(f"{path}: "))
        try:
            return _verified(facts[path], line, where)
        except ModelFileError as error:
            return Verification(path, problem=error.problem)

    try:
        entries = scan(Path(folder), read)
    except OSError as error:
        raise InvalidRequest(f"--all {folder}: {error.strerror}") from None
    if not entries:
        raise InvalidRequest(f"--all {folder}: no model below it")
    return tuple(result(entry.path, entry.problem) for entry in entries)

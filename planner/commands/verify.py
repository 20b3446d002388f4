"""``planner verify``: the formulas beside what the installed llama.cpp itself says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from planner import flags, verify
from planner.commands import terminal
from planner.commands.named import Models
from planner.commands.surroundings import Surroundings, surroundings
from planner.errors import InvalidRequest, ModelFileError
from planner.model import ModelFacts, read_model
from planner.oracle import ask
from planner.types.request import PlanRequest
from planner.verify import Verification

AGREES: Final = 0
DIFFERS: Final = 1
NOT_COMPARED: Final = 3  # the model does not fit or would be refused, as planner explain has it

_WHICH: Final = "which model? planner verify MODEL [flags], or planner verify --all FOLDER [flags]"


def main(name: str, words: Sequence[str]) -> int:
    """Print both sides, for a model or for a folder of them. Raises PlannerError."""
    del name
    if {"-h", "--help"} & set(words):
        from planner.usage import VERIFY_USAGE

        terminal.write(VERIFY_USAGE)
        return AGREES
    folder, words = _without_folder(words)
    line = flags.parse(words)
    models = line.options.models
    if len(models) != (1 if folder is None else 0):
        raise InvalidRequest(_WHICH)
    for flag, given in (("--versus", line.options.versus), ("--require", line.options.require)):
        if given is not None:
            raise InvalidRequest(f"{flag}: that is for planner explain")
    if line.options.no_oracle:
        raise InvalidRequest("--no-oracle: verifying is asking llama.cpp")
    where = surroundings(line)
    if folder is None:
        results: tuple[Verification, ...] = (_verified(*Models(line).asked(models[0]), where),)
    else:
        results = _folder(folder, line, where)
    if line.options.json:
        terminal.write_json(verify.to_json(where.build, results))
    elif folder is None:
        terminal.write(verify.to_text(where.build, results[0]))
    else:
        terminal.write(verify.to_lines(where.build, results))
    return _status(results, alone=folder is None)


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


def _verified(model: ModelFacts, request: PlanRequest, where: Surroundings) -> Verification:
    oracle = ask(where.build, any_build=True)
    if oracle is None:
        found = where.build.path or "no llama-server was found, so there is nothing"
        raise InvalidRequest(f"{found}: no libraries beside it to ask; run `make llama`, or set PLANNER_LLAMA_SERVER")
    return verify.verify(model, request, where.machine, where.policy, where.build, oracle)


def _folder(folder: str, line: flags.CommandLine, where: Surroundings) -> tuple[Verification, ...]:
    """Return a result for every model below the folder, those that cannot be read among them."""
    from supervisor.models.catalogue import scan

    facts: dict[str, ModelFacts] = {}

    def read(path: str) -> ModelFacts:
        facts[path] = read_model(path)
        return facts[path]

    def result(path: str, problem: str | None) -> Verification:
        if problem is not None:
            return Verification(path, problem=problem.removeprefix(f"{path}: "))
        try:
            return _verified(facts[path], line.request_of(facts[path].role), where)
        except ModelFileError as error:
            return Verification(path, problem=error.problem)

    try:
        entries = scan(Path(folder), read)
    except OSError as error:
        raise InvalidRequest(f"--all {folder}: {error.strerror}") from None
    if not entries:
        raise InvalidRequest(f"--all {folder}: no model below it")
    return tuple(result(entry.path, entry.problem) for entry in entries)

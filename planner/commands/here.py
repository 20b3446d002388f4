"""What is here: ``planner devices``, ``doctor``, ``config`` and ``--version``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from planner.commands import terminal
from planner.commands.surroundings import detected, settings
from planner.errors import InvalidRequest

FINE: Final = 0
SOMETHING_IS_WRONG: Final = 1


def main(name: str, words: Sequence[str]) -> int:
    """Run the command of this name. Raises PlannerError."""
    if words and words[0] in {"-h", "--help"}:
        terminal.write(f"planner {name} [--json]\n\n{ABOUT[name]}\n")
        return FINE
    if any(word != "--json" for word in words):
        raise InvalidRequest(f"planner {name} takes --json and nothing else")
    return COMMANDS[name](as_json=bool(words))


def _devices(*, as_json: bool) -> int:
    from gpu import show

    placing, odd = settings()
    found = detected(placing)
    machine = replace(found.machine, warnings=(*odd, *found.machine.warnings))
    if as_json:
        terminal.write_json(show.as_json(machine, found.cards))
    else:
        terminal.write(show.as_text(machine, found.cards, terminal.columns()) + "\n")
    return FINE


def _doctor(*, as_json: bool) -> int:
    from gpu import doctor, facts

    placing, _ = settings()
    findings = doctor.examine(facts.gather(detected(placing), os.environ))
    if as_json:
        terminal.write_json(doctor.as_json(findings))
    else:
        terminal.write(doctor.as_text(findings, terminal.columns()) + "\n")
    return FINE if doctor.is_healthy(findings) else SOMETHING_IS_WRONG


def _config(*, as_json: bool) -> int:
    from config import render
    from config.resolve import resolve

    resolved = resolve(os.environ)
    if as_json:
        terminal.write_json(render.as_json(resolved.values, resolved.warnings))
    else:
        terminal.write(render.text_table(resolved.values) + "\n")
        for warning in resolved.warnings:
            sys.stderr.write(f"planner: warning: {warning}\n")
    if resolved.problems:
        raise InvalidRequest("\n".join(str(problem) for problem in resolved.problems))
    return FINE


def _version(*, as_json: bool) -> int:
    del as_json
    from importlib.metadata import PackageNotFoundError, version

    from gpu import llama
    from planner.build import PINNED_COMMIT, PINNED_VERSION

    try:
        ours = version("loadmaster")
    except PackageNotFoundError:
        ours = "(not installed)"
    placing, _ = settings()
    search = llama.find(os.environ, configured=placing.llama_server, n_gpus=0)
    build = search.build
    theirs = search.not_found() or f"{build.version} (commit {build.commit}), {build.path}"
    terminal.write(f"planner {ours}, exact for llama.cpp {PINNED_VERSION} (commit {PINNED_COMMIT})\n")
    terminal.write(f"llama.cpp {theirs}\n")
    return FINE


ABOUT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "devices": "Shows what llama-server can use here by its names, what is free there, what is left out and why.",
        "doctor": "Says what is wrong with this machine and what mends it. Exit status 0: nothing is, 1: something is.",
        "config": "Shows every setting in force and where it comes from.",
        "--version": "Shows our version and that of the llama-server that is launched.",
    }
)
COMMANDS: Final[Mapping[str, Callable[..., int]]] = MappingProxyType(
    {"devices": _devices, "doctor": _doctor, "config": _config, "--version": _version}
)

"""The command. The only module of this package that reads the environment, prints, and knows the other packages.

Imports stand inside functions: ``explain`` must not pay for what ``serve`` needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from planner.errors import InvalidRequest, PlannerError

if TYPE_CHECKING:
    from config.light import PlacementSettings
    from planner.flags import CommandLine
    from planner.types import LlamaBuild, Machine, PlanOutcome

FITS: Final = 0
SOMETHING_IS_WRONG: Final = 1
DOES_NOT_FIT: Final = 3
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130  # 128 + SIGINT
BROKEN_PIPE: Final = 141  # 128 + SIGPIPE
DEFAULT_COLUMNS: Final = 80


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status. Whatever is wrong is one line on stderr, never a traceback."""
    try:
        status = _dispatch(sys.argv[1:] if words is None else words)
        sys.stdout.flush()
    except PlannerError as error:
        return _complain(str(error), error.exit_status)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


def _dispatch(words: Sequence[str]) -> int:
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "explain": _explain,
        "verify": _verify,
        "devices": _devices,
        "doctor": _doctor,
        "serve": _serve,
        "config": _config,
        "--version": _version,
    }
    if not words or words[0] in {"-h", "--help", "help"}:
        from planner.usage import USAGE

        _print(USAGE)
        return FITS if words else WRONG_USAGE
    command = commands.get(words[0])
    if command is None:
        raise InvalidRequest(f"{words[0]}: no such command; there are {', '.join(commands)}")
    return command(words[1:])


# ---------------------------------------------------------------------------------------------------------------------
# explain


def _explain(words: Sequence[str]) -> int:
    from planner import budget, companions, flags
    from planner.model import read_model
    from planner.oracle import ask
    from planner.policy import from_settings
    from planner.search import placement

    if any(word in {"-h", "--help"} for word in words):
        from planner.usage import explain_usage

        _print(explain_usage())
        return FITS
    line = flags.parse(words)
    if line.options.model is None:
        raise InvalidRequest("which model? planner explain MODEL [flags]")
    settings, odd = _settings()
    model = read_model(line.options.model)
    machine, build = _machine(line, settings)
    request = line.request_of(model.role)
    oracle = None if line.options.no_oracle else ask(build)
    model = companions.attach(model, request)
    policy = from_settings(settings)
    outcome = placement.search(model, request, budget.with_overheads(machine, policy), policy, build, oracle)
    outcome = replace(outcome, warnings=(*odd, *line.notes, *outcome.warnings))
    _show(outcome, as_json=line.options.json)
    from planner.types import Plan

    return FITS if isinstance(outcome, Plan) else DOES_NOT_FIT


def _machine(line: CommandLine, settings: PlacementSettings) -> tuple[Machine, LlamaBuild]:
    """Return the machine to plan for, real or imagined, and the llama-server that it is planned for."""
    options, request = line.options, line.request
    host_bytes = _host_memory(options.host_memory)
    if options.machine or options.what_if or options.cards or options.no_gpu:
        machine, build = _imagined(line, settings, host_bytes)
    else:
        detected = _detect(settings, request.rpc or (), named=request.devices or ())
        machine, build = detected.machine, detected.llama.build
    if host_bytes is not None:
        from gpu.whatif import with_host_memory

        machine = with_host_memory(machine, host_bytes)
    return machine, build


def _imagined(line: CommandLine, settings: PlacementSettings, host_bytes: int | None) -> tuple[Machine, LlamaBuild]:
    """Return the machine that the flags describe, and the llama-server that was found here."""
    from gpu import llama, machine_file, whatif

    options = line.options
    if line.request.rpc:
        raise InvalidRequest("--rpc with an imagined machine: write the address as --device RPC0@HOST:PORT=SIZE")
    try:
        if options.machine:
            machine = machine_file.read(options.machine)
        else:
            machine = whatif.machine(
                options.what_if, options.cards, host_memory_bytes=host_bytes, more_cards=settings.cards
            )
    except whatif.WhatIfError as error:
        raise InvalidRequest(str(error)) from None
    return machine, llama.find(os.environ, configured=settings.llama_server, n_gpus=0).build


def _detect(settings: PlacementSettings, endpoints: Sequence[str] = (), *, named: Sequence[str] = ()) -> Any:
    from config.values import RpcServer
    from gpu.detect import detect

    pinned = []
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise InvalidRequest(f"--rpc {endpoint}: expected HOST:PORT")
        pinned.append(RpcServer(host, int(port)))
    servers = (*settings.rpc_servers, *pinned)
    return detect(os.environ, llama_server=settings.llama_server, rpc_servers=servers, named=named)


def _host_memory(text: str | None) -> int | None:
    from planner.units import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise InvalidRequest(f"--host-memory: {error}") from None


def _show(outcome: PlanOutcome, *, as_json: bool) -> None:
    if as_json:
        import json

        from planner.explain import to_json

        _print(json.dumps(to_json(outcome), indent=2) + "\n")
        return
    from planner.explain_text import Style, to_text

    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    _print(to_text(outcome, _columns(os.environ), Style(colour=colour, unicode=encoding.startswith("utf"))))


def _columns(environ: Mapping[str, str]) -> int:
    """Return the width of the terminal, where there is one (``shutil`` would take 10 ms to import)."""
    if environ.get("COLUMNS", "").isdigit():
        return int(environ["COLUMNS"])
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return DEFAULT_COLUMNS


# ---------------------------------------------------------------------------------------------------------------------
# verify


def _verify(words: Sequence[str]) -> int:
    from planner import verify_command
    from planner.policy import from_settings
    from supervisor.catalogue import scan

    if any(word in {"-h", "--help"} for word in words):
        from planner.usage import VERIFY_USAGE

        _print(VERIFY_USAGE)
        return FITS

    def surroundings(line: CommandLine) -> verify_command.Surroundings:
        settings, _ = _settings()
        return verify_command.Surroundings(*_machine(line, settings), from_settings(settings))

    text, status = verify_command.run(words, surroundings, scan)
    _print(text)
    return status


# ---------------------------------------------------------------------------------------------------------------------
# The other commands


def _devices(words: Sequence[str]) -> int:
    as_json = _only_json("devices", words)
    from gpu import show

    settings, odd = _settings()
    detected = _detect(settings)
    machine = replace(detected.machine, warnings=(*odd, *detected.machine.warnings))
    if as_json:
        import json

        _print(json.dumps(show.as_json(machine, detected.cards), indent=2) + "\n")
    else:
        _print(show.as_text(machine, detected.cards, _columns(os.environ)) + "\n")
    return FITS


def _doctor(words: Sequence[str]) -> int:
    as_json = _only_json("doctor", words)
    from gpu import doctor, facts

    settings, _ = _settings()
    findings = doctor.examine(facts.gather(_detect(settings), os.environ))
    if as_json:
        import json

        _print(json.dumps(doctor.as_json(findings), indent=2) + "\n")
    else:
        _print(doctor.as_text(findings) + "\n")
    return FITS if doctor.is_healthy(findings) else SOMETHING_IS_WRONG


def _config(words: Sequence[str]) -> int:
    as_json = _only_json("config", words)
    from config import render
    from config.resolve import resolve

    resolved = resolve(os.environ)
    if as_json:
        import json

        _print(json.dumps(render.as_json(resolved.values, resolved.warnings), indent=2) + "\n")
    else:
        _print(render.text_table(resolved.values) + "\n")
        for warning in resolved.warnings:
            _print_error(f"planner: warning: {warning}")
    for problem in resolved.problems:
        _complain(str(problem), WRONG_USAGE)
    return WRONG_USAGE if resolved.problems else FITS


def _serve(words: Sequence[str]) -> int:
    if words:
        raise InvalidRequest(
            f"serve takes no flags, but {words[0]} was given; settings are environment variables, see `planner config`"
        )
    from supervisor.app import serve

    return serve(os.environ)


def _version(words: Sequence[str]) -> int:
    del words
    from importlib.metadata import PackageNotFoundError, version

    from gpu import llama
    from planner.build import PINNED_COMMIT, PINNED_VERSION

    try:
        ours = version("loadmaster")
    except PackageNotFoundError:
        ours = "(not installed)"
    settings, _ = _settings()
    search = llama.find(os.environ, configured=settings.llama_server, n_gpus=0)
    build = search.build
    theirs = search.not_found() or f"{build.version} (commit {build.commit}), {build.path}"
    _print(f"planner {ours}, exact for llama.cpp {PINNED_VERSION} (commit {PINNED_COMMIT})\nllama.cpp {theirs}\n")
    return FITS


def _only_json(command: str, words: Sequence[str]) -> bool:
    if any(word != "--json" for word in words):
        raise InvalidRequest(f"planner {command} takes --json and nothing else")
    return bool(words)


def _settings() -> tuple[PlacementSettings, tuple[str, ...]]:
    """Return the settings that placement needs and a line for each odd one. Raises InvalidRequest with all bad ones."""
    from config.light import read
    from config.resolve import ConfigError

    try:
        loaded = read(os.environ)
    except ConfigError as error:
        raise InvalidRequest(str(error)) from None
    return loaded.settings, loaded.warnings


def _print(text: str) -> None:
    sys.stdout.write(text)


def _print_error(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _complain(text: str, status: int) -> int:
    for line in text.splitlines():
        _print_error(f"planner: error: {line}")
    return status

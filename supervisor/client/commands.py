"""The commands: words in, exit status out. Each asks the running service and prints what it says."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from config.parse import parse_duration, parse_size
from planner.errors import InvalidRequest
from supervisor.client import chat, making, tables
from supervisor.client.names import choose
from supervisor.client.service import Service, service
from supervisor.client.transfer import Transfer

OK: Final = 0
SHORT: Final = 3  # as `planner explain` ends where something does not fit


@dataclass(frozen=True, slots=True)
class Words:
    """A command's words, sorted: what was named, the flags that take a value, and those that take none."""

    names: tuple[str, ...]
    values: Mapping[str, str]
    switches: frozenset[str]


@dataclass(frozen=True, slots=True)
class Command:
    """One command. ``usage`` begins with its line; ``names`` is how few and how many words it takes beside flags."""

    run: Callable[[Service, Words], int]
    usage: str
    names: tuple[int, int | None]
    value_flags: frozenset[str] = frozenset()
    switches: frozenset[str] = frozenset()


def main(name: str, words: Sequence[str]) -> int:
    """Run the command of this name and return its exit status. Raises PlannerError."""
    command = COMMANDS[name]
    if {"-h", "--help"} & set(words):
        sys.stdout.write(command.usage)
        return OK
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal or a pipe cannot say is no reason to fail
            stream.reconfigure(errors="replace")
    return command.run(service(os.environ), _sorted(command, words))


def _sorted(command: Command, words: Sequence[str]) -> Words:
    """Return the words by what they are. Raises InvalidRequest with the command's usage."""
    usage = command.usage.splitlines()[0]
    names: list[str] = []
    values: dict[str, str] = {}
    switches: set[str] = set()
    rest = iter(words)
    for word in rest:
        flag, given, value = word.partition("=")
        if word == "--":
            names += rest
        elif flag in command.value_flags:
            values[flag] = value if given else next(rest, "")
            if not values[flag]:
                raise InvalidRequest(f"{flag} needs a value: {usage}")
        elif word in command.switches:
            switches.add(word)
        elif word.startswith("-") and len(word) > 1:
            raise InvalidRequest(f"{word}: no such flag: {usage}")
        else:
            names.append(word)
    fewest, most = command.names
    if len(names) < fewest:
        missing = usage.split()[2 + len(names)].lower().replace("_", " ")
        raise InvalidRequest(f"which {missing}? {usage}")
    if most is not None and len(names) > most:
        raise InvalidRequest(f"{names[most]}: one word too many: {usage}")
    return Words(tuple(names), values, frozenset(switches))


# ---------------------------------------------------------------------------------------------------------------------
# What there is


def _ps(at: Service, words: Words) -> int:
    status = at.get("/status")
    return _print_json(status["runners"]) if "--json" in words.switches else _print(tables.running(status))


def _list(at: Service, words: Words) -> int:
    status = at.get("/status")
    return _print_json(status["models"]) if "--json" in words.switches else _print(tables.models(status))


def _show(at: Service, words: Words) -> int:
    model = _model(at, words.names[0])
    told = at.post("/api/show", {"model": model})
    return _print_json(told) if "--json" in words.switches else _print(tables.described(model, told))


def _logs(at: Service, words: Words) -> int:
    follow = bool({"-f", "--follow"} & words.switches)
    path = f"/manage/logs?model={quote(_model(at, words.names[0]))}&follow={int(follow)}"
    with at.lines("GET", path) as lines:
        for line in lines:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    return OK


# ---------------------------------------------------------------------------------------------------------------------
# What runs


def _run(at: Service, words: Words) -> int:
    asked = " ".join(words.names[1:])
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    question = "\n\n".join(part for part in (asked, piped.strip()) if part).encode(errors="replace").decode()
    is_terminal = sys.stdout.isatty()
    conversation = chat.Conversation(
        at,
        _model(at, words.names[0]),
        sys.stdout,
        system=words.values.get("--system"),
        keep_alive=words.values.get("--keep-alive"),
        is_terminal=is_terminal,
    )
    if question:
        conversation.ask(question)
        return OK
    if not sys.stdin.isatty():
        raise InvalidRequest("nothing to ask: the input is empty; write the question after the model's name")
    return chat.converse(conversation)


def _load(at: Service, words: Words) -> int:
    body = {"model": _model(at, words.names[0])}
    if "--keep-alive" in words.values:
        body["keep_alive"] = words.values["--keep-alive"]
    try:
        at.post("/manage/load", body)
    except KeyboardInterrupt:
        sys.stderr.write(f"{body['model']} goes on loading; `planner unload {body['model']}` stops that\n")
        raise
    return _print(f"{body['model']} is loaded\n")


def _unload(at: Service, words: Words) -> int:
    for name in words.names:
        model = _model(at, name)
        was_loaded = at.post("/manage/unload", {"model": model})["unloaded"]
        _print(f"{model} is unloaded\n" if was_loaded else f"{model} was not loaded\n")
    return OK


def _reset(at: Service, words: Words) -> int:
    model = _model(at, words.names[0])
    was_failed = at.post("/manage/reset", {"model": model})["reset"]
    return _print(f"{model} may be tried again\n" if was_failed else f"{model} has not failed\n")


def _yield(at: Service, words: Words) -> int:
    device, *sizes = words.names
    if "--end" in words.switches:
        if sizes or words.values:
            raise InvalidRequest("--end takes the device alone: planner yield DEVICE --end")
        ended = at.post("/manage/yield/end", {"device": device})["ended"]
        return _print(
            f"{device}: models are placed there again\n" if ended else f"{device}: nothing was asked for there\n"
        )
    if not sizes:
        raise InvalidRequest(f"how much? planner yield {device} SIZE, such as 8GiB, or planner yield {device} --end")
    (size,) = sizes
    try:
        wanted_bytes, for_s = parse_size(size), parse_duration(words.values.get("--for", "30m"))
    except ValueError as error:
        raise InvalidRequest(f"{error}: write a size such as 8GiB, and a duration such as 30m") from None
    told = at.post("/manage/yield", {"device": device, "bytes": wanted_bytes, "for_seconds": for_s})
    _print(tables.yielded(told, wanted_bytes))
    return SHORT if told["short_bytes"] else OK


# ---------------------------------------------------------------------------------------------------------------------
# The store


def _pull(at: Service, words: Words) -> int:
    body = {"model": words.names[0], "insecure": "--insecure" in words.switches}
    with at.lines("POST", "/api/pull", body) as lines:
        Transfer(sys.stdout, sys.stdout.isatty()).follow(lines)
    return OK


def _create(at: Service, words: Words) -> int:
    file = Path(words.values.get("-f") or words.values.get("--file", "Modelfile"))
    making.create(at, words.names[0], file, Transfer(sys.stdout, sys.stdout.isatty()))
    return OK


def _rm(at: Service, words: Words) -> int:
    for name in words.names:
        with at.lines("DELETE", "/api/delete", {"model": name}):
            _print(f"{name} is deleted\n")
    return OK


def _cp(at: Service, words: Words) -> int:
    source, destination = words.names
    with at.lines("POST", "/api/copy", {"source": source, "destination": destination}):
        return _print(f"{destination} is a copy of {source}\n")


# ---------------------------------------------------------------------------------------------------------------------


def _model(at: Service, name: str) -> str:
    """Return the model's id that this part of a name stands for. Raises InvalidRequest, ServiceError."""
    return choose(name, [model["id"] for model in at.get("/v1/models")["data"]])


def _print(text: str) -> int:
    sys.stdout.write(text)
    return OK


def _print_json(value: Any) -> int:
    return _print(json.dumps(value, indent=2) + "\n")


_JSON: Final = frozenset({"--json"})
_KEEP_ALIVE: Final = frozenset({"--keep-alive"})
_UNLOAD_USAGE: Final = """\
MODEL ...

Lets the model's runner finish what it serves, and stops it. The next request loads the model again.
"""

COMMANDS: Final[Mapping[str, Command]] = {
    "run": Command(
        _run,
        """\
planner run MODEL [QUESTION] [--system TEXT] [--keep-alive DURATION]

Talks with a model, which part of a name is enough for. With a question, or with text from a pipe (which follows the
question), it prints the one answer and ends.
""",
        (1, None),
        _KEEP_ALIVE | {"--system"},
    ),
    "ps": Command(
        _ps, "planner ps [--json]\n\nLists the runners: state, requests, memory, until when.\n", (0, 0), switches=_JSON
    ),
    "list": Command(
        _list, "planner list [--json]\n\nLists the models that can be asked for.\n", (0, 0), switches=_JSON
    ),
    "show": Command(
        _show, "planner show MODEL [--json]\n\nTells what a model is and how it is spoken to.\n", (1, 1), switches=_JSON
    ),
    "load": Command(
        _load,
        "planner load MODEL [--keep-alive DURATION]\n\nLoads a model before anybody asks it.\n",
        (1, 1),
        _KEEP_ALIVE,
    ),
    "unload": Command(_unload, f"planner unload {_UNLOAD_USAGE}", (1, None)),
    "stop": Command(_unload, f"planner stop {_UNLOAD_USAGE}", (1, None)),
    "reset": Command(_reset, "planner reset MODEL\n\nLets a model that failed be tried again at once.\n", (1, 1)),
    "logs": Command(
        _logs,
        "planner logs MODEL [-f]\n\nPrints the last lines of the model's runner; -f: and what follows.\n",
        (1, 1),
        switches=frozenset({"-f", "--follow"}),
    ),
    "yield": Command(
        _yield,
        """\
planner yield DEVICE SIZE [--for DURATION] | planner yield DEVICE --end

Frees memory for another program: stops idle runners until so much is free on the device, and places nothing there for
so long (30m where not given). Where that is not enough, runners in use take no new request and go when they have
finished; it says so, and ends with status 3 as long as less is free. --end: the other program is done before that time
is over, with the device and with all that share its memory.
""",
        (1, 2),
        frozenset({"--for"}),
        frozenset({"--end"}),
    ),
    "pull": Command(
        _pull,
        """\
planner pull NAME [--insecure]

Fetches a model from its registry into the store. A pull that was interrupted goes on where it stopped.
--insecure allows a registry that speaks plain HTTP.
""",
        (1, 1),
        switches=frozenset({"--insecure"}),
    ),
    "create": Command(
        _create,
        """\
planner create NAME [-f MODELFILE]

Makes a model as a Modelfile says (./Modelfile where not given). Files behind FROM and ADAPTER are looked for beside it
and sent to the service, unless it has them.
""",
        (1, 1),
        frozenset({"-f", "--file"}),
    ),
    "rm": Command(_rm, "planner rm NAME ...\n\nDeletes models from the store.\n", (1, None)),
    "cp": Command(_cp, "planner cp NAME NEW_NAME\n\nGives a model of the store a second name.\n", (2, 2)),
}

"""A Modelfile's text as values, by the rules of Ollama's own parser (parser/parser.go)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from supervisor.api.parameters import KINDS, Kind
from supervisor.api.store import FOR_OLLAMA, BadCreate

MAX_TEXT: Final = 4 << 20  # characters; a licence or a long conversation, not a model
_COMMANDS: Final = (
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "parameter",
    "message",
    *FOR_OLLAMA,
)
_ROLES: Final = ("system", "user", "assistant")
_LINES: Final = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_WORD: Final = re.compile(r"\s*(\S*)\s*(.*)", re.DOTALL)
_QUOTES: Final = ('"""', '"')

# What each kind is called in an error, looks like as text, and becomes.
_READ: Final[Mapping[Kind, tuple[str, re.Pattern[str], Callable[[str], Any]]]] = {
    Kind.WHOLE: ("int", re.compile(r"[+-]?\d{1,18}", re.ASCII), int),
    Kind.REAL: ("float", re.compile(r"[+-]?\d{1,18}(\.\d{0,18})?(e[+-]?\d{1,2})?", re.ASCII), float),
    Kind.FLAG: ("bool", re.compile("true|false|t|f|1|0"), lambda text: text in {"true", "t", "1"}),
}
# Ollama takes these still, and does nothing with them.
_FORGOTTEN: Final = frozenset(
    [
        "f16_kv",
        "logits_all",
        "low_vram",
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "numa",
        "penalize_newline",
        "tfs_z",
        "use_mlock",
        "vocab_only",
    ]
)


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What a Modelfile says. ``sources`` and ``adapters`` are what stands behind FROM and ADAPTER, in order.

    ``for_ollama`` is as in ``supervisor.api.models.Preset``.
    """

    sources: tuple[str, ...]
    adapters: tuple[str, ...]
    template: str | None
    system: str | None
    parameters: Mapping[str, Any]
    messages: tuple[Mapping[str, str], ...]
    licenses: tuple[str, ...]
    for_ollama: Mapping[str, str]


def parse(text: str) -> Modelfile:
    """Return what a Modelfile says. Raises BadCreate with the line's number."""
    if len(text) > MAX_TEXT:
        raise BadCreate(f"the Modelfile is longer than {MAX_TEXT:,} characters")
    found: dict[str, list[tuple[int, str]]] = {command: [] for command in _COMMANDS}
    for number, command, value in _commands(text.removeprefix("\ufeff")):
        found[command].append((number, value))
    if not found["from"]:
        raise BadCreate("no FROM line")

    def last(command: str) -> str | None:
        return found[command][-1][1] if found[command] else None

    return Modelfile(
        sources=tuple(value for _, value in found["from"]),
        adapters=tuple(value for _, value in found["adapter"]),
        template=last("template"),
        system=last("system"),
        parameters=_parameters(found["parameter"]),
        messages=tuple(_message(number, value) for number, value in found["message"]),
        licenses=tuple(value for _, value in found["license"]),
        for_ollama={name: found[name][-1][1] for name in FOR_OLLAMA if found[name]},
    )


def is_path(source: str) -> bool:
    """Say whether what stands behind FROM or ADAPTER is written as a file rather than as a model's name."""
    return source.startswith((".", "/", "~")) or source.lower().endswith((".gguf", ".safetensors", ".bin"))


def _commands(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, command in lower case, and value with its quotes taken off."""
    lines = _LINES.findall(text)
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at]
        at += 1
        word, value = _split(line)
        if not word or word.startswith("#"):
            continue
        command, head = word.lower(), ""
        if command not in _COMMANDS:
            raise _error(number, f"command must be one of {', '.join(map(_quoted, _COMMANDS))}")
        if command in {"parameter", "message"}:  # a name, then what may be quoted
            head, value = _split(value)
            head += " "
        quote = next((one for one in _QUOTES if value.startswith(one)), "")
        if quote:
            value = value.removeprefix(quote)
            while not value.rstrip().endswith(quote):  # only the end of a line ends it
                if at == len(lines):
                    raise _error(number, f"the quotes that begin here are never closed with {quote}")
                value += lines[at]
                at += 1
            value = value.rstrip().removesuffix(quote)
        elif not value.strip():
            raise _error(number, f"{word.upper()} says nothing")
        else:
            value = value.strip()
        yield number, command, head + value


def _split(line: str) -> tuple[str, str]:
    """Return the first word, and what follows the white space after it."""
    word, rest = _WORD.fullmatch(line).groups()  # type: ignore[union-attr]  # matches any text
    return word, rest


def _message(number: int, value: str) -> Mapping[str, str]:
    role, _, content = value.partition(" ")
    if role.lower() not in _ROLES:
        raise _error(number, 'message role must be one of "system", "user", or "assistant"')
    return {"role": role.lower(), "content": content}


def _parameters(found: list[tuple[int, str]]) -> Mapping[str, Any]:
    parameters: dict[str, Any] = {}
    for number, line in found:
        name, _, text = line.partition(" ")
        try:
            value = parameter(name.lower(), text)
        except BadCreate as error:
            raise _error(number, str(error)) from error
        if name.lower() == "stop":
            parameters["stop"] = [*parameters.get("stop", ()), *value]
        elif value is not None:
            parameters[name.lower()] = value
    return parameters


def parameter(name: str, value: Any) -> Any:
    """Return a parameter's value, as text or as JSON has it, in its own type; None for one that nobody heeds.

    Raises BadCreate for an unknown name or a value of another type.
    """
    if name in _FORGOTTEN:
        return None
    kind = KINDS.get(name)
    if kind is None:
        raise BadCreate(f"unknown parameter {_shown(name)}")
    if kind is Kind.TEXTS:
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list) and all(isinstance(one, str) for one in stops):
            return stops
        raise BadCreate(f"invalid string value for parameter {name}")
    word, pattern, made = _READ[kind]
    whole = isinstance(value, float) and value.is_integer() and kind is Kind.WHOLE
    text = str(int(value) if whole else value).lower()
    if not pattern.fullmatch(text) or (isinstance(value, bool) and kind is not Kind.FLAG):
        raise BadCreate(f"invalid {word} value {_shown(value)} for parameter {name}")
    return made(text)


def _shown(value: Any) -> str:
    return repr(str(value)[:80])


def _quoted(word: str) -> str:
    return f'"{word}"'


def _error(number: int, problem: str) -> BadCreate:
    return BadCreate(f"(line {number}): {problem}")

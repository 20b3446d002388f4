"""What values of a Go template count as and are written like, and its functions (text/template, funcs.go)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from supervisor.go_template.nodes import TemplateError

_VERB: Final = re.compile(r"%([svdq%])")


@dataclass(frozen=True, slots=True)
class Record:
    """A Go struct: ``fields`` as templates see them, ``document`` as JSON writes it."""

    fields: Mapping[str, Any]
    document: Any


def go_json(value: Any) -> str:
    """Return JSON as Go's encoder writes it: without space, keys of maps in order, <, > and & escaped."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def is_true(value: Any) -> bool:
    """Say what Go's templates take for true: a struct always, else what is not empty or zero."""
    return True if isinstance(value, Record) else bool(value)


def below(value: Any, name: str) -> Any:
    """Return a field of a value. Raises ``TemplateError``."""
    fields = value.fields if isinstance(value, Record) else value
    if not isinstance(fields, Mapping):
        raise TemplateError(f"there is no .{name} in {type(value).__name__}")
    if isinstance(value, Record) and name not in fields:
        raise TemplateError(f"there is no .{name}")
    return fields.get(name)


def pairs(value: Any) -> list[tuple[Any, Any]]:
    """Return what a range goes over, each with its key or index. Raises ``TemplateError``."""
    if isinstance(value, Mapping):
        return sorted(value.items())
    if value is None or (isinstance(value, Sequence) and not isinstance(value, str)):
        return list(enumerate(value or ()))
    raise TemplateError(f"range cannot go over {type(value).__name__}")


def written(value: Any) -> str:
    """Return a value as it stands in the text (fmt.Fprint)."""
    match value:
        case None:
            return "<no value>"
        case bool():
            return "true" if value else "false"
        case str():
            return value
        case int() | float():
            return f"{value:g}" if isinstance(value, float) else str(value)
    return go_json(value)


def _plain(value: Any) -> Any:
    match value:
        case Record():
            return value.document
        case Mapping():
            return {key: _plain(one) for key, one in sorted(value.items())}
        case list() | tuple():
            return [_plain(one) for one in value]
    return value


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(key, int) and 0 <= key < len(value):
            value = value[key]
        else:
            raise IndexError(f"{key} is out of range")
    return value


def _slice(value: Any, *bounds: int) -> Any:
    start, end = (*bounds, *(0, len(value))[len(bounds) :])[:2]
    if not 0 <= start <= end <= len(value):
        raise IndexError("out of range")
    return value[start:end]


def _printf(form: str, *values: Any) -> str:
    left = list(values)

    def one(verb: re.Match[str]) -> str:
        if verb[1] == "%":
            return "%"
        if not left:
            raise ValueError("too few values")
        value = left.pop(0)
        return json.dumps(value, ensure_ascii=False) if verb[1] == "q" else written(value)

    return _VERB.sub(one, form)


def _print(*values: Any) -> str:
    """Join values, with a space between two that are both no text (fmt.Sprint)."""
    out = ""
    for before, value in zip((None, *values), values, strict=False):
        space = bool(out) and not isinstance(before, str) and not isinstance(value, str)
        out += (" " if space else "") + written(value)
    return out


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "not": lambda value: not is_true(value),
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "lt": lambda first, second: first < second,
    "le": lambda first, second: first <= second,
    "gt": lambda first, second: first > second,
    "ge": lambda first, second: first >= second,
    "len": len,
    "index": _index,
    "slice": _slice,
    "json": go_json,
    "print": _print,
    "println": lambda *values: " ".join(map(written, values)) + "\n",
    "printf": _printf,
}

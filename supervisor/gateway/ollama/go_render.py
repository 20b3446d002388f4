"""Renders Go templates: what values come to, count as and are written like (text/template, exec.go and funcs.go)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Final

from supervisor.gateway.ollama.go_syntax import (
    DOT,
    Branch,
    Call,
    Jump,
    Literal,
    Lookup,
    Node,
    Operand,
    Pipeline,
    TemplateError,
    Text,
)

# A conversation of a million tokens is a few megabytes; a template that makes more of it goes round in circles.
MAX_OUTPUT_CHARS: Final = 64 << 20
# Some dozen for each message; half a second's work, in a thread.
MAX_STEPS: Final = 100_000
_VERB: Final = re.compile(r"%([svdq%])")


@dataclass(frozen=True, slots=True)
class Record:
    """A Go struct: ``fields`` as templates see them, ``document`` as JSON writes it."""

    fields: Mapping[str, Any]
    document: Any


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


@dataclass(slots=True)
class _Scope:
    """Variables, the innermost block last."""

    blocks: list[dict[str, Any]] = field(default_factory=list)

    def find(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] | None = next((block for block in reversed(self.blocks) if name in block), None)
        if found is None:
            raise TemplateError(f"{name} is not declared")
        return found


@dataclass(slots=True)
class Budget:
    """What one conversation may take, in however many parts it is rendered. Texts that are not written count too."""

    steps: int = MAX_STEPS
    chars: int = MAX_OUTPUT_CHARS

    def spend(self, *, steps: int = 0, chars: int = 0) -> None:
        """Take so much. Raises ``TemplateError`` where it is not there."""
        self.steps -= steps
        self.chars -= chars
        if self.steps < 0 or self.chars < 0:
            raise TemplateError("the template makes too long a text, or goes round too often")


def render(nodes: tuple[Node, ...], data: Mapping[str, Any], today: date, budget: Budget) -> str:
    """Return the text. Raises ``TemplateError``."""
    return _Rendering(today, budget).text(nodes, data)


def go_json(value: Any) -> str:
    """Return JSON as Go's encoder writes it: without space, keys of maps in order, <, > and & escaped."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


class _Rendering:
    def __init__(self, today: date, budget: Budget) -> None:
        self._today = today
        self._budget = budget
        self._out: list[str] = []
        self._scope = _Scope()

    def text(self, nodes: tuple[Node, ...], data: Mapping[str, Any]) -> str:
        self._scope.blocks.append({"$": data})
        self._walk(nodes, data)
        return "".join(self._out)

    def _walk(self, nodes: tuple[Node, ...], dot: Any) -> None:
        for node in nodes:
            self._budget.spend(steps=1)
            match node:
                case Text():
                    self._write(node.text)
                case Pipeline():
                    value = self._assigned(node, dot)
                    if not node.variables:
                        self._write(_written(value))
                case Jump():
                    raise _Break if node.kind == "break" else _Continue
                case Branch():
                    self._scope.blocks.append({})
                    try:
                        self._branch(node, dot)
                    finally:
                        self._scope.blocks.pop()

    def _branch(self, node: Branch, dot: Any) -> None:
        if node.kind == "range":
            self._range(node, dot)
            return
        value = self._assigned(node.pipeline, dot)
        inner = value if node.kind == "with" else dot
        if _true(value):
            self._walk(node.body, inner)
        else:
            self._walk(node.otherwise, dot)

    def _range(self, node: Branch, dot: Any) -> None:
        pairs = _pairs(self._value(node.pipeline, dot))
        if not pairs:
            self._walk(node.otherwise, dot)
            return
        for key, value in pairs:
            self._budget.spend(steps=1)
            names = node.pipeline.variables
            given = (key, value) if len(names) == 2 else (value,)  # noqa: PLR2004 - index and element
            self._scope.blocks.append(dict(zip(names, given, strict=False)))
            try:
                self._walk(node.body, value)
            except _Continue:
                continue
            except _Break:
                break
            finally:
                self._scope.blocks.pop()

    def _assigned(self, pipeline: Pipeline, dot: Any) -> Any:
        value = self._value(pipeline, dot)
        for name in pipeline.variables:
            block = self._scope.blocks[-1] if pipeline.declares else self._scope.find(name)
            block[name] = value
        return value

    def _value(self, pipeline: Pipeline, dot: Any) -> Any:
        first, *others = pipeline.commands
        self._budget.spend(steps=len(others))
        value = self._operand(first, dot)
        for command in others:
            if not isinstance(command, Call):
                raise TemplateError("only a function takes what is piped into it")
            value = self._call(command, dot, value)
        return value

    def _operand(self, one: Operand, dot: Any) -> Any:
        match one:
            case Literal():
                return one.value
            case Call():
                return self._call(one, dot)
            case Lookup():
                value = self._base(one.base, dot)
                for name in one.fields:
                    value = _below(value, name)
                return value

    def _base(self, base: str | Pipeline, dot: Any) -> Any:
        if isinstance(base, Pipeline):
            return self._value(base, dot)
        return dot if base == DOT else self._scope.find(base)[base]

    def _call(self, call: Call, dot: Any, *piped: Any) -> Any:
        if call.function in {"and", "or"}:  # no more arguments are looked at than decide
            value: Any = None
            for argument in call.arguments:
                value = self._operand(argument, dot)
                if _true(value) is (call.function == "or"):
                    return value
            return piped[0] if piped else value
        arguments = [*(self._operand(argument, dot) for argument in call.arguments), *piped]
        if call.function == "currentDate":
            return self._today.isoformat()
        if call.function == "yesterdayDate":
            return (self._today - timedelta(days=1)).isoformat()
        try:
            result = _FUNCTIONS[call.function](*arguments)
        except (TypeError, IndexError, KeyError, ValueError) as error:
            raise TemplateError(f"{call.function} cannot be computed: {error}") from error
        self._budget.spend(chars=len(result) if isinstance(result, str) else 0)
        return result

    def _write(self, text: str) -> None:
        self._budget.spend(chars=len(text))
        self._out.append(text)


def _true(value: Any) -> bool:
    """Say what Go's templates take for true: a struct always, else what is not empty or zero."""
    return True if isinstance(value, Record) else bool(value)


def _below(value: Any, name: str) -> Any:
    fields = value.fields if isinstance(value, Record) else value
    if not isinstance(fields, Mapping):
        raise TemplateError(f"there is no .{name} in {type(value).__name__}")
    if isinstance(value, Record) and name not in fields:
        raise TemplateError(f"there is no .{name}")
    return fields.get(name)


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return sorted(value.items())
    if value is None or (isinstance(value, Sequence) and not isinstance(value, str)):
        return list(enumerate(value or ()))
    raise TemplateError(f"range cannot go over {type(value).__name__}")


def _written(value: Any) -> str:
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
        return json.dumps(value, ensure_ascii=False) if verb[1] == "q" else _written(value)

    return _VERB.sub(one, form)


def _print(*values: Any) -> str:
    """Join values, with a space between two that are both no text (fmt.Sprint)."""
    out = ""
    for before, value in zip((None, *values), values, strict=False):
        space = bool(out) and not isinstance(before, str) and not isinstance(value, str)
        out += (" " if space else "") + _written(value)
    return out


_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "not": lambda value: not _true(value),
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
    "println": lambda *values: " ".join(map(_written, values)) + "\n",
    "printf": _printf,
}

"""Renders Go templates (text/template, exec.go)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Final

from supervisor.go_template.nodes import (
    DOT,
    Branch,
    Call,
    Invocation,
    Jump,
    Literal,
    Lookup,
    Node,
    Operand,
    Pipeline,
    TemplateError,
    Text,
    Tree,
)
from supervisor.go_template.values import FUNCTIONS, below, is_true, pairs, written

# A conversation of a million tokens is a few megabytes; a template that makes more of it goes round in circles.
MAX_OUTPUT_CHARS: Final = 64 << 20
# Some dozen for each message; half a second's work, in a thread.
MAX_STEPS: Final = 100_000
# Definitions within definitions, conditions in them, and so on; Python's stack holds some three times as much.
MAX_NESTED: Final = 128


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


def render(tree: Tree, data: Mapping[str, Any], today: date, budget: Budget) -> str:
    """Return the text. Raises ``TemplateError``."""
    return _Rendering(tree, today, budget).text(data)


class _Rendering:
    def __init__(self, tree: Tree, today: date, budget: Budget) -> None:
        self._tree = tree
        self._today = today
        self._budget = budget
        self._out: list[str] = []
        self._scope = _Scope()
        self._nested = 0

    def text(self, data: Mapping[str, Any]) -> str:
        self._scope.blocks.append({"$": data})
        self._walk(self._tree.nodes, data)
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
                        self._write(written(value))
                case Jump():
                    raise _Break if node.kind == "break" else _Continue
                case Branch():
                    with self._deeper(self._scope):
                        self._branch(node, dot)
                case Invocation():
                    self._invoke(node, dot)

    @contextmanager
    def _deeper(self, scope: _Scope, **declared: Any) -> Iterator[None]:
        """Go into a block of its own within this scope."""
        if self._nested >= MAX_NESTED:
            raise TemplateError("the template goes into itself too often")
        outer, self._scope = self._scope, scope
        scope.blocks.append(declared)
        self._nested += 1
        try:
            yield
        finally:
            self._nested -= 1
            scope.blocks.pop()
            self._scope = outer

    def _invoke(self, node: Invocation, dot: Any) -> None:
        """Write what is defined under a name; it sees nothing but the value that it is given."""
        nodes = self._tree.defined.get(node.name)
        if nodes is None:
            raise TemplateError(f'"{node.name}" is not defined')
        value = None if node.pipeline is None else self._assigned(node.pipeline, dot)
        with self._deeper(_Scope(), **{"$": value}):
            self._walk(nodes, value)

    def _branch(self, node: Branch, dot: Any) -> None:
        if node.kind == "range":
            self._range(node, dot)
            return
        value = self._assigned(node.pipeline, dot)
        inner = value if node.kind == "with" else dot
        if is_true(value):
            self._walk(node.body, inner)
        else:
            self._walk(node.otherwise, dot)

    def _range(self, node: Branch, dot: Any) -> None:
        found = pairs(self._value(node.pipeline, dot))
        if not found:
            self._walk(node.otherwise, dot)
            return
        for key, value in found:
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
                    value = below(value, name)
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
                if is_true(value) is (call.function == "or"):
                    return value
            return piped[0] if piped else value
        arguments = [*(self._operand(argument, dot) for argument in call.arguments), *piped]
        if call.function == "currentDate":
            return self._today.isoformat()
        if call.function == "yesterdayDate":
            return (self._today - timedelta(days=1)).isoformat()
        try:
            result = FUNCTIONS[call.function](*arguments)
        except (TypeError, IndexError, KeyError, ValueError) as error:
            raise TemplateError(f"{call.function} cannot be computed: {error}") from error
        self._budget.spend(chars=len(result) if isinstance(result, str) else 0)
        return result

    def _write(self, text: str) -> None:
        self._budget.spend(chars=len(text))
        self._out.append(text)

"""Reads what stands within one action of a Go template: pipelines of functions, variables, fields and constants."""

from __future__ import annotations

import json
import re
from typing import Final

from supervisor.go_template.nodes import DOT, Call, Literal, Lookup, Operand, Pipeline, TemplateError

MAX_DEPTH: Final = 64  # of parentheses; deeper than this is none that anybody wrote

FUNCTIONS: Final = frozenset(
    {
        *("and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge"),
        *("len", "index", "slice", "print", "printf", "println", "json"),
        *("currentDate", "yesterdayDate"),
    }
)
LITERALS: Final = {"true": True, "false": False, "nil": None}

_TOKEN: Final = re.compile(
    r"""(?P<space>\s+)|(?P<text>"(?:\\.|[^"\\\n])*"|`[^`]*`)|(?P<number>[+-]?\d+(?:\.\d+)?)|(?P<variable>\$\w*)"""
    r"""|(?P<field>\.[A-Za-z_]\w*)|(?P<word>[A-Za-z_]\w*)|(?P<mark>:=|[=,|().])""",
    re.VERBOSE,
)


class Expression:
    """Reads what stands within one action."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None:
                raise TemplateError(f"unexpected {text[at]!r} in {{{{ {text} }}}}")
            self._tokens.append((token.lastgroup or "", token[0]))
            at = token.end()
        self._tokens.append(("end", ""))
        self._at = 0
        self._depth = 0

    def whole(self) -> Pipeline:
        """Return the pipeline that the action is."""
        variables, declares = self._assignment()
        pipeline = self._pipeline()
        if self._peek()[0] != "end":
            raise self._unexpected()
        return Pipeline(pipeline.commands, variables, declares)

    def _assignment(self) -> tuple[tuple[str, ...], bool]:
        """Take ``$a :=``, ``$a, $b :=`` or ``$a =`` off the beginning, where it is there."""
        found = re.match(r"\s*(\$\w+)\s*(?:,\s*(\$\w+)\s*)?(:=|=)", self._text)
        if found is None:
            return (), False
        length = 0
        while length < found.end():
            length += len(self._tokens[self._at][1])
            self._at += 1
        return tuple(name for name in found.group(1, 2) if name), found[3] == ":="

    def _pipeline(self) -> Pipeline:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TemplateError("the template is nested too deep")
        commands = [self._command()]
        while self._skip_space() == ("mark", "|"):
            self._at += 1
            commands.append(self._command())
        self._depth -= 1
        return Pipeline(tuple(commands))

    def _command(self) -> Operand:
        kind, text = self._skip_space()
        if kind == "word" and text in FUNCTIONS:
            self._at += 1
            arguments = []
            while self._skip_space() not in {("end", ""), ("mark", "|"), ("mark", ")")}:
                arguments.append(self._operand())
            return Call(text, tuple(arguments))
        operand = self._operand()
        if self._skip_space() not in {("end", ""), ("mark", "|"), ("mark", ")")}:
            raise self._unexpected()
        return operand

    def _operand(self) -> Operand:
        kind, text = self._peek()
        if kind == "word" and text in FUNCTIONS:
            operand: Operand = Call(text, ())
        elif kind == "word" and text in LITERALS:
            operand = Literal(LITERALS[text])
        elif kind == "text":
            operand = Literal(unquoted(text))
        elif kind == "number":
            operand = Literal(float(text) if "." in text else int(text))
        elif kind in {"variable", "field"} or text in {".", "("}:
            return self._lookup()
        else:
            raise self._unexpected()
        self._at += 1
        return operand

    def _lookup(self) -> Lookup:
        kind, text = self._peek()
        self._at += 1
        if kind == "variable":
            return Lookup(text, self._below())
        if kind == "field":
            return Lookup(DOT, (text[1:], *self._below()))
        if text == ".":
            return Lookup(DOT)
        inner = self._pipeline()
        if self._skip_space() != ("mark", ")"):
            raise self._unexpected()
        self._at += 1
        return Lookup(inner, self._below())

    def _below(self) -> tuple[str, ...]:
        names = []
        while self._peek()[0] == "field":
            names.append(self._peek()[1][1:])
            self._at += 1
        return tuple(names)

    def _skip_space(self) -> tuple[str, str]:
        while self._peek()[0] == "space":
            self._at += 1
        return self._peek()

    def _peek(self) -> tuple[str, str]:
        return self._tokens[min(self._at, len(self._tokens) - 1)]

    def _unexpected(self) -> TemplateError:
        return TemplateError(f"{self._peek()[1] or 'the end'!r} is not known or not expected in {{{{ {self._text} }}}}")


def unquoted(text: str) -> str:
    """Return what a quoted string says; Go's escapes beyond JSON's are not known here. Raises ``TemplateError``."""
    if text[0] == "`":
        return text[1:-1]
    try:
        return str(json.loads(text))
    except ValueError as error:
        raise TemplateError(f"{text} is no string that is known here") from error

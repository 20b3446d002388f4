"""Reads Go templates as far as Modelfiles use them: actions, if, with, range, variables, pipelines, trimmed space.

The grammar is that of text/template/parse (lex.go, parse.go). What is beyond it here (define, template, block, methods)
raises ``TemplateError``, so that nobody renders half of a template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

# The longest known, with tools and their rules, has 15 KiB; nesting deeper than this is none that anybody wrote.
MAX_TEMPLATE_CHARS: Final = 64 << 10
MAX_DEPTH: Final = 64

FUNCTIONS: Final = frozenset(
    {
        *("and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge"),
        *("len", "index", "slice", "print", "printf", "println", "json"),
        *("currentDate", "yesterdayDate"),
    }
)
LITERALS: Final = {"true": True, "false": False, "nil": None}

OPEN: Final = "{{"
# Possessive throughout: what does not match is given up at once.
_ACTION: Final = re.compile(
    r"""\{\{(?P<left>-(?=\s))?(?P<body>\s*+/\*.*?\*/\s*+-?|(?:"(?:\\.|[^"\\\n])*+"|`[^`]*+`|[^"`}]|\}(?!\}))*+)\}\}""",
    re.DOTALL,
)
_TOKEN: Final = re.compile(
    r"""(?P<space>\s+)|(?P<text>"(?:\\.|[^"\\\n])*"|`[^`]*`)|(?P<number>[+-]?\d+(?:\.\d+)?)|(?P<variable>\$\w*)"""
    r"""|(?P<field>\.[A-Za-z_]\w*)|(?P<word>[A-Za-z_]\w*)|(?P<mark>:=|[=,|().])""",
    re.VERBOSE,
)


class TemplateError(Exception):
    """The template is wrong, or uses what is not known here. The text says what."""


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant."""

    value: Any


@dataclass(frozen=True, slots=True)
class Lookup:
    """A variable ($ is the data as a whole), the dot, or a parenthesized pipeline, and the fields below it."""

    base: str | Pipeline
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A function of these arguments."""

    function: str
    arguments: tuple[Operand, ...]


Operand = Literal | Lookup | Call


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Commands, each given what the one before came to; the result goes to ``variables`` where there are any."""

    commands: tuple[Operand, ...]
    variables: tuple[str, ...] = ()
    declares: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Text that stands for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Branch:
    """An if, a with or a range: ``kind`` says which."""

    kind: str
    pipeline: Pipeline
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Jump:
    """A break or a continue."""

    kind: str


Node = Text | Pipeline | Branch | Jump
DOT: Final = "."


def parse(text: str) -> tuple[Node, ...]:
    """Return the template's nodes. Raises ``TemplateError``."""
    if len(text) > MAX_TEMPLATE_CHARS:
        raise TemplateError(f"the template is longer than {MAX_TEMPLATE_CHARS} characters")
    reader = _Reader(list(_pieces(text)))
    nodes, end = reader.nodes(0)
    if end:
        raise TemplateError(f"unexpected {{{{ {end} }}}}")
    return nodes


def fields_of(nodes: tuple[Node, ...]) -> Iterator[str]:
    """Yield the name of every field that the template looks up, conditions included."""
    for node in nodes:
        if isinstance(node, Pipeline):
            yield from _fields(node)
        elif isinstance(node, Branch):
            yield from _fields(node.pipeline)
            yield from fields_of(node.body)
            yield from fields_of(node.otherwise)


def _fields(one: Operand | Pipeline) -> Iterator[str]:
    match one:
        case Pipeline():
            for command in one.commands:
                yield from _fields(command)
        case Call():
            for argument in one.arguments:
                yield from _fields(argument)
        case Lookup():
            yield from one.fields
            if isinstance(one.base, Pipeline):
                yield from _fields(one.base)


def _pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Yield texts and actions in turn (True: an action), the space that markers trim taken away."""
    at, trim = 0, False
    while (opened := text.find(OPEN, at)) >= 0:
        action = _ACTION.match(text, opened)
        if action is None:
            raise TemplateError("an action is not closed")
        before = text[at:opened].lstrip() if trim else text[at:opened]
        yield False, before.rstrip() if action["left"] else before
        body = action["body"]
        trim = body[-1:] == "-" and (body[-2:-1].isspace() or body.startswith("/*"))
        body = (body[:-1] if trim else body).strip()
        if not body.startswith("/*"):
            yield True, body
        at = action.end()
    yield False, text[at:].lstrip() if trim else text[at:]


class _Reader:
    """Builds the tree."""

    def __init__(self, pieces: list[tuple[bool, str]]) -> None:
        self._pieces = pieces
        self._at = 0

    def nodes(self, depth: int) -> tuple[tuple[Node, ...], str]:
        """Return the nodes up to an ``end`` or an ``else``, and that action; empty at the template's end."""
        if depth > MAX_DEPTH:
            raise TemplateError("the template is nested too deep")
        found: list[Node] = []
        while self._at < len(self._pieces):
            is_action, text = self._pieces[self._at]
            self._at += 1
            word, _, rest = text.partition(" ") if is_action else ("", "", "")
            if not is_action:
                found += [Text(text)] if text else []
            elif word in {"if", "with", "range"}:
                found.append(self._branch(word, rest, depth))
            elif word in {"break", "continue"}:
                found.append(Jump(word))
            elif word in {"end", "else"}:
                return tuple(found), text
            elif word in {"define", "template", "block"}:
                raise TemplateError(f"{{{{ {word} }}}} is not known here")
            else:
                found.append(_Expression(text).whole())
        return tuple(found), ""

    def _branch(self, kind: str, condition: str, depth: int) -> Branch:
        pipeline = _Expression(condition).whole()
        body, end = self.nodes(depth + 1)
        otherwise: tuple[Node, ...] = ()
        if end == "else":
            otherwise, end = self.nodes(depth + 1)
        elif end.startswith("else "):  # else if, else with: a branch of its own, which takes the end along
            word, _, rest = end.removeprefix("else ").strip().partition(" ")
            if word not in {"if", "with"}:
                raise TemplateError(f"unexpected {{{{ {end} }}}}")
            return Branch(kind, pipeline, body, (self._branch(word, rest, depth + 1),))
        if end != "end":
            raise TemplateError(f"{{{{ {kind} }}}} has no end")
        return Branch(kind, pipeline, body, otherwise)


class _Expression:
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
            operand = Literal(text[1:-1] if text[0] == "`" else _unquoted(text))
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


def _unquoted(text: str) -> str:
    """Return what a quoted string says; Go's escapes beyond JSON's are not known here."""
    try:
        return str(json.loads(text))
    except ValueError as error:
        raise TemplateError(f"{text} is no string that is known here") from error

"""Reads Go templates as Modelfiles use them: if, with, range, define, template, block, and pipelines between them.

The grammar is that of text/template/parse (lex.go, parse.go). What is beyond it here (methods, functions that nobody
gave) raises ``TemplateError``, so that nobody renders half of a template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from supervisor.go_template.expression import MAX_DEPTH, Expression, unquoted
from supervisor.go_template.nodes import (
    Branch,
    Invocation,
    Jump,
    Node,
    TemplateError,
    Text,
    Tree,
)

MAX_TEMPLATE_CHARS: Final = 64 << 10  # the longest known, with tools and their rules, has 15 KiB
OPEN: Final = "{{"
# Possessive throughout: what does not match is given up at once.
_ACTION: Final = re.compile(
    r"""\{\{(?P<left>-(?=\s))?(?P<body>\s*+/\*.*?\*/\s*+-?|(?:"(?:\\.|[^"\\\n])*+"|`[^`]*+`|[^"`}]|\}(?!\}))*+)\}\}""",
    re.DOTALL,
)
_WORD: Final = re.compile(r"(\w*)\s*(.*)", re.DOTALL)
_NAME: Final = re.compile(r"""(?P<name>"(?:\\.|[^"\\\n])*"|`[^`]*`)\s*(?P<rest>.*)""", re.DOTALL)


def parse(text: str) -> Tree:
    """Return the template. Raises ``TemplateError``."""
    if len(text) > MAX_TEMPLATE_CHARS:
        raise TemplateError(f"the template is longer than {MAX_TEMPLATE_CHARS} characters")
    reader = _Reader(list(_pieces(text)))
    nodes, end = reader.nodes(0)
    if end:
        raise _unexpected(end)
    return Tree(nodes, reader.defined)


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
        self._loops = 0  # ranges around what is being read
        self.defined: dict[str, tuple[Node, ...]] = {}

    def nodes(self, depth: int) -> tuple[tuple[Node, ...], str]:
        """Return the nodes up to an ``end`` or an ``else``, and that action; empty at the template's end."""
        if depth > MAX_DEPTH:
            raise TemplateError("the template is nested too deep")
        found: list[Node] = []
        while self._at < len(self._pieces):
            is_action, text = self._pieces[self._at]
            self._at += 1
            word, rest = _WORD.fullmatch(text).groups() if is_action else ("", "")  # type: ignore[union-attr]  # any text
            if not is_action:
                found += [Text(text)] if text else []
            elif word in {"if", "with", "range"}:
                found.append(self._branch(word, rest, depth))
            elif word in {"break", "continue"} and self._loops and not rest:
                found.append(Jump(word))
            elif word in {"end", "else"}:
                return tuple(found), text
            elif word == "define" and not depth:
                self._define(_invocation(rest, alone=True).name, depth)
            elif word in {"template", "block"}:
                invocation = _invocation(rest)
                found.append(invocation)
                if word == "block":
                    self._define(invocation.name, depth)
            else:
                found.append(Expression(text).whole())
        return tuple(found), ""

    def _define(self, name: str, depth: int) -> None:
        """Read a definition up to its end. One that says nothing stands back behind another one of its name."""
        loops, self._loops = self._loops, 0
        nodes, end = self.nodes(depth + 1)
        self._loops = loops
        if end != "end":
            raise _unexpected(end) if end else TemplateError(f'the definition of "{name}" has no end')
        if _says_something(self.defined.get(name, ())):
            if _says_something(nodes):
                raise TemplateError(f'"{name}" is defined twice')
            return
        self.defined[name] = nodes

    def _branch(self, kind: str, condition: str, depth: int) -> Branch:
        pipeline = Expression(condition).whole()
        self._loops += kind == "range"
        body, end = self.nodes(depth + 1)
        self._loops -= kind == "range"
        otherwise: tuple[Node, ...] = ()
        if end == "else":
            otherwise, end = self.nodes(depth + 1)
        elif end.startswith("else "):  # else if, else with: a branch of its own, which takes the end along
            word, _, rest = end.removeprefix("else ").strip().partition(" ")
            if word not in {"if", "with"}:
                raise _unexpected(end)
            return Branch(kind, pipeline, body, (self._branch(word, rest, depth + 1),))
        if end != "end":
            raise TemplateError(f"{{{{ {kind} }}}} has no end")
        return Branch(kind, pipeline, body, otherwise)


def _invocation(text: str, *, alone: bool = False) -> Invocation:
    """Return what follows ``define``, ``template`` or ``block``: a name, and a pipeline unless it stands ``alone``."""
    found = _NAME.fullmatch(text)
    if found is None or (alone and found["rest"]):
        raise TemplateError(f"a name in quotes is expected: {text!r}")
    return Invocation(unquoted(found["name"]), Expression(found["rest"]).whole() if found["rest"] else None)


def _says_something(nodes: tuple[Node, ...]) -> bool:
    return any(not isinstance(node, Text) or node.text.strip() for node in nodes)


def _unexpected(action: str) -> TemplateError:
    return TemplateError(f"unexpected {{{{ {action} }}}}")

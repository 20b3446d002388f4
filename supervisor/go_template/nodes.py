"""The parts of a Go template, as they are read and rendered (text/template/parse, node.go)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final


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


@dataclass(frozen=True, slots=True)
class Invocation:
    """A ``{{ template }}`` or a ``{{ block }}``: what was defined under this name, of the pipeline's value."""

    name: str
    pipeline: Pipeline | None


Node = Text | Pipeline | Branch | Jump | Invocation
DOT: Final = "."


@dataclass(frozen=True, slots=True)
class Tree:
    """A template as a whole, and what is defined in it, by name."""

    nodes: tuple[Node, ...]
    defined: Mapping[str, tuple[Node, ...]]

    def fields(self) -> Iterator[str]:
        """Yield the name of every field that is looked up, in definitions too."""
        for nodes in (self.nodes, *self.defined.values()):
            yield from fields_of(nodes)


def fields_of(nodes: tuple[Node, ...]) -> Iterator[str]:
    """Yield the name of every field that these nodes look up, conditions included."""
    for node in nodes:
        if isinstance(node, Pipeline):
            yield from _fields(node)
        elif isinstance(node, Branch):
            yield from _fields(node.pipeline)
            yield from fields_of(node.body)
            yield from fields_of(node.otherwise)
        elif isinstance(node, Invocation) and node.pipeline is not None:
            yield from _fields(node.pipeline)


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

"""A Modelfile's TEMPLATE: messages, or a prompt and what goes before and after it, as one text (template/template.go).

Templates of the newer kind go over ``.Messages`` themselves. The older ones know ``.System``, ``.Prompt`` and
``.Response`` and are rendered once for each turn; the last time they end where the response would stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, Final

from supervisor.gateway.ollama.messages import ASSISTANT, SYSTEM, TOOL, USER, Message
from supervisor.go_template.nodes import DOT, Branch, Lookup, Node, Pipeline, Tree, fields_of
from supervisor.go_template.rendering import Budget, render
from supervisor.go_template.syntax import parse
from supervisor.go_template.values import Record

RESPONSE: Final = "Response"
# Ollama's own for a model that has none: a prompt goes to it as it is, which is what models want that only go on.
PLAIN_TEMPLATE: Final = "{{ .Prompt }}"


@dataclass(frozen=True, slots=True)
class Template:
    """A template that was understood. ``names`` are the fields that it looks up, in lower case."""

    tree: Tree
    names: frozenset[str]

    @property
    def inserts(self) -> bool:
        """Say whether it has a place for what comes after."""
        return "suffix" in self.names

    def infill(self, prompt: str, suffix: str) -> str:
        """Return the text between a prompt and a suffix to be filled in. Raises ``TemplateError``."""
        return render(self.tree, _values(Prompt=prompt, Suffix=suffix, Response=""), _today(), Budget())

    def conversation(self, messages: Sequence[Message], *, think: bool | str | None) -> str:
        """Return the text that a model goes on from. Raises ``TemplateError``."""
        thinking = {
            "Think": bool(think),
            "ThinkLevel": think if isinstance(think, str) else "medium" if think else "",
            "IsThinkSet": think is not None,
        }
        today, budget = _today(), Budget()
        system, collated = _collated(messages)
        if "messages" in self.names:
            told = [_record(message) for message in collated]
            return render(self.tree, _values(System=system, Messages=told, Response="", **thinking), today, budget)
        *before, last = _turns(collated)
        texts = [render(self.tree, _values(**turn, **thinking), today, budget) for turn in before]
        open_end, _ = _up_to_response(self.tree.nodes)
        return "".join([*texts, render(replace(self.tree, nodes=open_end), _values(**last, **thinking), today, budget)])


def read_template(text: str) -> Template:
    """Return the template. Raises ``TemplateError``."""
    tree = parse(text)
    names = frozenset(name.lower() for name in tree.fields())
    if not {"messages", "response"} & names:
        tree = replace(tree, nodes=(*tree.nodes, Pipeline((Lookup(DOT, (RESPONSE,)),))))
    return Template(tree, names)


def _values(**given: Any) -> Mapping[str, Any]:
    return given


def _today() -> date:
    return datetime.now(UTC).astimezone().date()


def _collated(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """Return all system prompts as one, and the messages with neighbours of one role joined."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role != TOOL:
            joined[-1] = replace(joined[-1], content=f"{joined[-1].content}\n\n{message.content}")
        else:
            joined.append(message)
    return "\n\n".join(one.content for one in messages if one.role == SYSTEM), joined


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return what the older templates are rendered with, one turn after the other; the last one is open."""
    turns = [_turn()]
    for message in messages:
        turn = turns[-1]
        over = turn[RESPONSE] or (message.role == SYSTEM and turn["Prompt"])
        if message.role in {SYSTEM, USER} and over:
            turns.append(_turn())
        place = {SYSTEM: "System", USER: "Prompt", ASSISTANT: RESPONSE}.get(message.role)
        if place is not None:
            turns[-1][place] = message.content
    return turns


def _turn() -> dict[str, str]:
    return {"System": "", "Prompt": "", RESPONSE: ""}


def _up_to_response(nodes: tuple[Node, ...]) -> tuple[tuple[Node, ...], bool]:
    """Return the nodes before the response's place, and whether it was found."""
    kept: list[Node] = []
    for node in nodes:
        if isinstance(node, Pipeline) and RESPONSE in fields_of((node,)):
            return tuple(kept), True
        if isinstance(node, Branch):
            body, found = _up_to_response(node.body)
            otherwise, found = ((), True) if found else _up_to_response(node.otherwise)
            kept.append(replace(node, body=body, otherwise=otherwise))
            if found:
                return tuple(kept), True
        else:
            kept.append(node)
    return tuple(kept), False


def _record(message: Message) -> Record:
    calls = [
        Record(
            {
                "ID": call.id,
                "Function": Record(
                    {"Index": index, "Name": call.name, "Arguments": call.arguments},
                    {"Index": index, "Name": call.name, "Arguments": call.arguments},
                ),
            },
            {"ID": call.id, "Function": {"Index": index, "Name": call.name, "Arguments": call.arguments}},
        )
        for index, call in enumerate(message.tool_calls)
    ]
    fields = {
        "Role": message.role,
        "Content": message.content,
        "Thinking": message.thinking,
        "Images": list(message.images),
        "ToolCalls": calls,
        "ToolName": message.tool_name,
        "ToolCallID": message.tool_call_id,
    }
    return Record(fields, {**fields, "ToolCalls": [call.document for call in calls]})

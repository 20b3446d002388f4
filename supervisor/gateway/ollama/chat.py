"""``/api/chat``: what is asked, and the request to llama-server that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from supervisor.api.models import Preset
from supervisor.gateway.errors import BadRequest
from supervisor.gateway.ollama.answer import Piece, call_json
from supervisor.gateway.ollama.errors import TOP_LOGPROBS_RANGE, OllamaError
from supervisor.gateway.ollama.fields import Fields
from supervisor.gateway.ollama.keep_alive import parse_keep_alive
from supervisor.gateway.ollama.messages import (
    ASSISTANT,
    SYSTEM,
    Message,
    preset_messages,
    read_messages,
    read_tools,
    to_openai,
)
from supervisor.gateway.ollama.options import checked

MAX_TOP_LOGPROBS: Final = 20
THINK_LEVELS: Final = ("low", "medium", "high", "max")
ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Common:
    """What chat and generate share. ``schema`` is the JSON schema that the answer has to follow, None: none.

    ``think`` is None where the request leaves it to the model, else whether, or how much. ``keep_alive_s`` is None
    where the request says nothing of it.
    """

    model: str
    options: Mapping[str, Any]
    keep_alive_s: float | None
    stream: bool
    schema: Mapping[str, Any] | None
    think: bool | str | None
    truncate: bool
    logprobs: bool
    n_top: int


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request to ``/api/chat``. Without messages it only loads the model, or unloads it."""

    common: Common
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]


def read_common(fields: Fields) -> Common:
    """Return what chat and generate share. Raises ``BadRequest``, ``OllamaError``."""
    n_top = fields.whole("top_logprobs")
    if not 0 <= n_top <= MAX_TOP_LOGPROBS:
        raise OllamaError(400, TOP_LOGPROBS_RANGE)
    return Common(
        model=fields.text("model"),
        options=checked(fields.mapping("options")),
        keep_alive_s=parse_keep_alive(fields.any("keep_alive")),
        stream=fields.flag("stream") is not False,
        schema=_schema(fields.any("format")),
        think=_think(fields.any("think")),
        truncate=fields.flag("truncate") is not False,
        logprobs=bool(fields.flag("logprobs")),
        n_top=n_top,
    )


def read_chat(fields: Fields) -> ChatRequest:
    """Return what is asked. Raises ``BadRequest``, ``OllamaError``."""
    return ChatRequest(read_common(fields), read_messages(fields), read_tools(fields))


def conversation(asked: ChatRequest, preset: Preset) -> tuple[Message, ...]:
    """Return the messages with those that the model brings along, and its system prompt unless one was sent.

    What the model has said last, in however many messages, is one that it goes on with: llama-server knows no other.
    """
    messages = (*preset_messages(preset.messages), *asked.messages)
    while [_is_said(one) for one in messages[-2:]] == [True, True]:
        *before, first, second = messages
        messages = (*before, replace(first, content=f"{first.content}\n\n{second.content}"))
    if preset.system and asked.messages[0].role != SYSTEM:
        return (Message(SYSTEM, preset.system), *messages)
    return messages


def _is_said(message: Message) -> bool:
    return message.role == ASSISTANT and not message.tool_calls


def chat_body(
    messages: tuple[Message, ...], tools: tuple[Mapping[str, Any], ...], common: Common, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the body for llama-server's ``/v1/chat/completions``."""
    body = {
        **sampling,
        "messages": to_openai(messages),
        "stream_options": {"include_usage": True},
        **think_fields(common.think),
    }
    if tools:
        body |= {"tools": list(tools), "parallel_tool_calls": True}
    if common.schema is not None:
        body["json_schema"] = common.schema
    if common.logprobs:  # llama-server: the token itself is only told beside at least one alternative
        body |= {"logprobs": True, "top_logprobs": max(1, common.n_top)}
    return body


def think_fields(think: bool | str | None) -> dict[str, Any]:  # noqa: FBT001 - the request's own value
    """Return how llama-server is told to think or not (tools/server/server-common.cpp, ``enable_thinking``)."""
    if think is None:
        return {}
    fields: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": think is not False}}
    return fields | {"reasoning_effort": think} if isinstance(think, str) else fields


def without_oldest(messages: tuple[Message, ...], dropped: int) -> tuple[Message, ...]:
    """Return the messages without the oldest ``dropped``; system messages stay."""
    return tuple(one for one in messages[:dropped] if one.role == SYSTEM) + messages[dropped:]


def part(piece: Piece) -> dict[str, Any]:
    """Return a piece of the answer as a chat's ``message``."""
    message: dict[str, Any] = {"role": ASSISTANT, "content": piece.text}
    if piece.thinking:
        message["thinking"] = piece.thinking
    if piece.tool_calls:
        message["tool_calls"] = call_json(piece.tool_calls)
    return {"message": message}


def _schema(value: Any) -> Mapping[str, Any] | None:
    if value is None or value == "":
        return None
    if value == "json":
        return ANY_OBJECT
    if isinstance(value, dict):
        return value
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    raise BadRequest(f'invalid format: {shown[:200]}; expected "json" or a valid JSON Schema object', param="format")


def _think(value: Any) -> bool | str | None:
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value in THINK_LEVELS):
        return value
    words = ", ".join(f'"{level}"' for level in THINK_LEVELS)
    if isinstance(value, str):
        raise BadRequest(f'invalid think value: "{value[:200]}" (must be {words}, true, or false)', param="think")
    raise BadRequest(f"think must be a boolean or string ({words}, true, or false)", param="think")

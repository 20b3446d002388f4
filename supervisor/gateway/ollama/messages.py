"""Ollama's messages, images and tools as OpenAI's, which llama-server's chat endpoint reads."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from supervisor.gateway.errors import BadRequest
from supervisor.gateway.ollama.fields import Fields

SYSTEM: Final = "system"
USER: Final = "user"
ASSISTANT: Final = "assistant"
TOOL: Final = "tool"
# How much of an attachment's base64 text tells what it is: the first 12 bytes.
_MAGIC_CHARS: Final = 16
# What the bytes of each kind begin with, as llama-server sees it (tools/mtmd/mtmd-helper.cpp).
_SOUNDS: Final = {
    "wav": re.compile(rb"RIFF....WAVE", re.DOTALL),
    "mp3": re.compile(rb"ID3|\xff[\xe0-\xff]"),
}
_IMAGES: Final = {
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "bmp": re.compile(rb"BM"),
}
_NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a function: by the model in its answer, or in a conversation that is sent again."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. ``images`` are base64 texts, checked to be such."""

    role: str
    content: str = ""
    thinking: str = ""
    images: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""


def read_messages(fields: Fields) -> tuple[Message, ...]:
    """Return the conversation of a chat request. Raises ``BadRequest``."""
    return tuple(_message(one) for one in fields.objects("messages", "Message"))


def read_images(fields: Fields) -> tuple[str, ...]:
    """Return the images of a message or a request. Raises ``BadRequest`` for what is no base64."""
    images = fields.texts("images")
    for image in images:
        try:
            base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest("illegal base64 data in images", param="images") from error
    return images


def read_tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """Return the tools, each with the parameters that llama-server insists on."""
    return tuple(_tool(one) for one in fields.raw_objects("tools"))


def preset_messages(messages: Iterable[Mapping[str, str]]) -> tuple[Message, ...]:
    """Return the messages that a model brings along."""
    return tuple(Message(one.get("role", USER), one.get("content", "")) for one in messages)


def to_openai(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return the conversation as OpenAI writes it.

    Calls get the ids that OpenAI knows and older clients of Ollama do not send: a tool's answer belongs to the oldest
    call of its name that has none yet, else to the oldest one.
    """
    result: list[dict[str, Any]] = []
    open_calls: deque[tuple[str, str]] = deque()  # id and name
    numbered = 0
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": _content(message)}
        if message.thinking:
            entry["reasoning_content"] = message.thinking
        calls = []
        for call in message.tool_calls:
            call_id = call.id or f"call_{numbered}"
            numbered += 1
            open_calls.append((call_id, call.name))
            function = {"name": call.name, "arguments": json.dumps(call.arguments)}
            calls.append({"type": "function", "id": call_id, "function": function})
        if calls:
            entry["tool_calls"] = calls
        if message.role == TOOL:
            entry["tool_call_id"] = message.tool_call_id or _answered(message.tool_name, open_calls)
            entry |= {"name": message.tool_name} if message.tool_name else {}
        result.append(entry)
    return result


def _answered(name: str, open_calls: deque[tuple[str, str]]) -> str:
    """Take the call that a tool's answer belongs to off the open ones and return its id."""
    if not open_calls:
        return ""
    found = next((call for call in open_calls if call[1] == name), open_calls[0])
    open_calls.remove(found)
    return found[0]


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.content
    text = [{"type": "text", "text": message.content}] if message.content else []
    return [*(_attachment(image) for image in message.images), *text]


def _attachment(image: str) -> dict[str, Any]:
    """Return an image, or the sound that Ollama's clients send in the same place. It is data, never an address."""
    magic = base64.b64decode(image[:_MAGIC_CHARS])
    sound = next((kind for kind, pattern in _SOUNDS.items() if pattern.match(magic)), None)
    if sound is not None:
        return {"type": "input_audio", "input_audio": {"data": image, "format": sound}}
    kind = next((kind for kind, pattern in _IMAGES.items() if pattern.match(magic)), "png")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}}


def _message(fields: Fields) -> Message:
    return Message(
        role=fields.text("role"),
        content=fields.text("content"),
        thinking=fields.text("thinking"),
        images=read_images(fields),
        tool_calls=tuple(_call(one) for one in fields.objects("tool_calls", "ToolCall")),
        tool_name=fields.text("tool_name"),
        tool_call_id=fields.text("tool_call_id"),
    )


def _call(fields: Fields) -> ToolCall:
    function = Fields("ToolCallFunction", fields.mapping("function"))
    return ToolCall(function.text("name"), function.mapping("arguments"), fields.text("id"))


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest("a tool needs a function with a name", param="tools")
    return {"type": "function", "function": {"parameters": _NO_PARAMETERS, **function}}

"""A chat of OpenAI's API with a model whose Modelfile has a template, as with Ollama: rendered here.

llama-server applies the header's template to every chat. What is written in another one goes to it as the prompt of a
completion, and its answer is told as that of a chat (tools/server/server-task.cpp, ``to_json_oaicompat`` and
``to_json_oaicompat_chat``). Left to the header's template are chats with tools, thoughts or images, which only
llama-server takes apart, and those of Anthropic's API and of ``/v1/responses``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from supervisor.api.models import ModelView
from supervisor.gateway.events import EVENT_END, sse_event
from supervisor.gateway.ollama.chat import ANY_OBJECT
from supervisor.gateway.ollama.form import written_by_modelfile
from supervisor.gateway.ollama.messages import ASSISTANT, SYSTEM, USER, Message
from supervisor.gateway.proxy import Retelling

CHATS: Final = "/v1/chat/completions"
COUNTS: Final = "/v1/chat/completions/input_tokens"
TEMPLATES: Final = "/apply-template"
COMPLETIONS: Final = "/v1/completions"
TOKENS: Final = "/tokenize"
DATA: Final = b"data: "
TOP_LOGPROBS: Final = 20  # llama-server's own number where a chat asks for log probabilities and not for how many
_ROLES: Final[Mapping[str, str]] = {SYSTEM: SYSTEM, "developer": SYSTEM, USER: USER, ASSISTANT: ASSISTANT}
# What a chat says in words that a completion has not, or has for something else.
_OF_CHATS: Final = frozenset(
    {"messages", "tools", "tool_choice", "response_format", "logprobs", "top_logprobs", "stream_options"}
)


class StreamRetelling:
    """Tells the events of a completion as those of a chat; ``with_usage`` where they are to end with its counts."""

    def __init__(self, *, with_usage: bool) -> None:
        self._with_usage = with_usage
        self._begun: set[int] = set()

    def feed(self, piece: bytes) -> bytes:
        """Return what these events come to."""
        return b"".join(self._event(one) for one in piece.split(EVENT_END) if one)

    def rest(self) -> bytes:
        """Return nothing: every event was told when it came."""
        return b""

    def _event(self, event: bytes) -> bytes:
        """Return one event as those that a chat has for it; comments, errors and the end as they are."""
        told = json.loads(event[len(DATA) :]) if event.startswith(DATA + b"{") else {}
        if "choices" not in told:
            return event + EVENT_END
        return b"".join(sse_event(json.dumps(chunk).encode()) for chunk in self._chunks(told))

    def _chunks(self, told: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield what one event of a completion comes to."""
        told["object"] = "chat.completion.chunk"
        (choice,) = told.pop("choices")
        usage, index, text, reason = told.pop("usage", None), choice["index"], choice["text"], choice["finish_reason"]

        def chunk(delta: Mapping[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
            return {"choices": [{"finish_reason": reason, "index": index, "delta": delta, **more}], **told}

        if index not in self._begun:
            self._begun.add(index)
            yield chunk({"role": ASSISTANT, "content": None})
        if text:
            yield chunk({"content": text}, logprobs=choice["logprobs"])
        if reason is not None:
            yield chunk({}, reason)
            if self._with_usage:
                yield {"choices": [], **told, "usage": usage}


class WholeRetelling:
    """Tells an answer that comes whole, by this function."""

    def __init__(self, tell: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        self._tell = tell
        self._body = b""

    def feed(self, piece: bytes) -> bytes:
        """Keep what comes."""
        self._body += piece
        return b""

    def rest(self) -> bytes:
        """Return the answer."""
        return json.dumps(self._tell(json.loads(self._body))).encode()


@dataclass(frozen=True, slots=True)
class Written:
    """What is asked of llama-server in place of a chat, and what tells its answer as that of a chat."""

    path: str
    body: bytes
    retelling: Retelling


def may_be_written(path: str, model: ModelView) -> bool:
    """Say whether it has to be looked at who writes such a request for this model."""
    return path in {CHATS, COUNTS, TEMPLATES} and model.preset.spoken_template is not None


async def written(path: str, body: bytes, model: ModelView) -> Written | None:
    """Return what is asked in place of a chat; None where the request goes on as it is."""
    if not may_be_written(path, model):
        return None
    fields = json.loads(body)
    messages = _messages(fields.get("messages"))
    constraints = _constraints(fields)
    if not messages or constraints is None or fields.get("tools"):
        return None
    found = await written_by_modelfile(model, messages, think=None)
    if found is None:
        return None
    _, text = found
    if path != CHATS:
        return _only_written(path, text)
    kept = {name: value for name, value in fields.items() if name not in _OF_CHATS}
    asked = json.dumps({**kept, "prompt": text, **constraints}).encode()
    return Written(COMPLETIONS, asked, _retelling(fields))


def _only_written(path: str, text: str) -> Written:
    """Return what tells a chat's text, or how many tokens that is; both by the tokens that llama-server makes of it."""
    asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()

    def tell(answer: dict[str, Any]) -> Mapping[str, Any]:
        if path == TEMPLATES:
            return {"prompt": text}
        return {"input_tokens": len(answer["tokens"]), "object": "response.input_tokens"}

    return Written(TOKENS, asked, WholeRetelling(tell))


def _retelling(fields: Mapping[str, Any]) -> Retelling:
    if fields.get("stream") is not True:
        return WholeRetelling(_chat)
    options = fields.get("stream_options")
    return StreamRetelling(with_usage=isinstance(options, dict) and options.get("include_usage") is True)


def _messages(given: Any) -> tuple[Message, ...]:
    """Return the conversation; nothing where it is more than texts by turns, or none at all."""
    read = [_message(one) for one in given] if isinstance(given, list) else []
    return tuple(one for one in read if one is not None) if None not in read else ()


def _message(given: Any) -> Message | None:
    if not isinstance(given, dict) or given.get("tool_calls"):
        return None
    role, text = _ROLES.get(str(given.get("role"))), _text(given.get("content"))
    return None if role is None or text is None else Message(role, text)


def _text(content: Any) -> str | None:
    """Return the text that a message is of, None where it is not of text alone."""
    if isinstance(content, str):
        return content
    texts = [_text_part(part) for part in content] if isinstance(content, list) else [None]
    return "".join(text or "" for text in texts) if None not in texts else None


def _text_part(part: Any) -> str | None:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
    return None


def _constraints(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a completion's words for the form of a chat's answer; None where they are not understood."""
    told: dict[str, Any] = {}
    wanted = fields.get("response_format")
    match wanted:
        case None | {"type": "text"}:
            pass
        case {"type": "json_object"}:
            told["json_schema"] = wanted.get("schema") or ANY_OBJECT
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            told["json_schema"] = schema or ANY_OBJECT
        case _:
            return None
    if fields.get("logprobs"):
        told["n_probs"] = fields.get("top_logprobs", TOP_LOGPROBS)
    elif fields.get("top_logprobs") is not None:
        return None
    return told


def _chat(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "object": "chat.completion", "choices": [_whole(choice) for choice in answer["choices"]]}


def _whole(choice: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in choice.items() if name not in {"text", "logprobs"}}
    told["message"] = {"role": ASSISTANT, "content": choice["text"]}
    return told if choice.get("logprobs") is None else told | {"logprobs": choice["logprobs"]}

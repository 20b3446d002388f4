"""llama-server's events as pieces of an answer, and what Ollama tells at its end.

Chat events are those of OpenAI (tools/server/server-task.cpp, ``to_json_oaicompat_chat``), completion events are
llama-server's own (``to_json_non_oaicompat``); both end with ``timings``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from supervisor.gateway.ollama.messages import ToolCall

STOP: Final = "stop"
LENGTH: Final = "length"
NS_PER_MS: Final = 1_000_000
NS_PER_S: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, perhaps empty. ``logprobs`` are as Ollama writes them."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Mapping[str, Any], ...] = ()

    def __add__(self, other: Piece) -> Piece:
        """Return both, one after the other."""
        return Piece(
            self.text + other.text,
            self.thinking + other.thinking,
            self.tool_calls + other.tool_calls,
            self.logprobs + other.logprobs,
        )


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer ended, and the runner's own counts and times. ``context``: tokens to go on from, where asked."""

    reason: str
    prompt_tokens: int
    prompt_ms: float
    tokens: int
    tokens_ms: float
    context: tuple[int, ...] = ()

    def metrics(self, total_s: float, load_s: float) -> dict[str, int]:
        """Return Ollama's figures, durations in nanoseconds."""
        return {
            "total_duration": round(total_s * NS_PER_S),
            "load_duration": round(load_s * NS_PER_S),
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": round(self.prompt_ms * NS_PER_MS),
            "eval_count": self.tokens,
            "eval_duration": round(self.tokens_ms * NS_PER_MS),
        }


@dataclass(slots=True)
class _Call:
    """A tool call as it comes in: the name first, then the arguments as JSON text in pieces."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def whole(self) -> ToolCall | None:
        """Return the call, None where its arguments were cut off."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except ValueError:
            return None
        return ToolCall(self.name, arguments, self.id) if isinstance(arguments, dict) else None


@dataclass(slots=True)
class ChatReader:
    """Reads the answer of ``/v1/chat/completions``, in events or whole. ``ending`` is None until the last one came.

    Tool calls come whole, with the event that ends the answer: Ollama knows no part of one. ``continued`` is the text
    of an assistant's message that the model goes on from: llama-server says it again, Ollama does not.
    """

    n_top: int = 0
    continued: str = ""
    ending: Ending | None = None
    _repeated: str = ""
    _calls: dict[int, _Call] = field(default_factory=dict)
    _reason: str = STOP

    def feed(self, event: Mapping[str, Any]) -> Piece:
        """Return what this event adds to the answer."""
        piece = self._piece(event["choices"][0]) if event["choices"] else Piece()
        if "usage" in event:
            usage, timings = event["usage"], event.get("timings", {})
            self.ending = Ending(
                self._reason,
                usage["prompt_tokens"],
                timings.get("prompt_ms", 0.0),
                usage["completion_tokens"],
                timings.get("predicted_ms", 0.0),
            )
        return piece

    def _piece(self, choice: Mapping[str, Any]) -> Piece:
        delta = choice.get("delta") or choice.get("message") or {}
        for index, part in enumerate(delta.get("tool_calls") or ()):
            self._take(part.get("index", index), part)
        calls: tuple[ToolCall, ...] = ()
        if choice["finish_reason"] is not None:
            self._reason = LENGTH if choice["finish_reason"] == LENGTH else STOP
            calls = tuple(call for one in self._calls.values() if (call := one.whole()) is not None)
        return Piece(
            self._new(delta.get("content") or ""),
            delta.get("reasoning_content") or "",
            calls,
            logprobs((choice.get("logprobs") or {}).get("content") or (), self.n_top),
        )

    def _new(self, text: str) -> str:
        """Return the text without what was there before; nothing while it may still be that."""
        if not self.continued:
            return text
        self._repeated += text
        if self.continued.startswith(self._repeated) and self._repeated != self.continued:
            return ""
        new, self.continued = self._repeated.removeprefix(self.continued), ""
        return new

    def _take(self, index: int, part: Mapping[str, Any]) -> None:
        call = self._calls.setdefault(index, _Call())
        function = part.get("function", {})
        call.id += part.get("id") or ""
        call.name += function.get("name") or ""
        call.arguments += function.get("arguments") or ""


@dataclass(slots=True)
class CompletionReader:
    """Reads the events of ``/completion`` and ``/infill``."""

    n_top: int = 0
    ending: Ending | None = None

    def feed(self, event: Mapping[str, Any]) -> Piece:
        """Return what this event adds to the answer."""
        if event["stop"]:
            timings = event["timings"]
            self.ending = Ending(
                LENGTH if event["stop_type"] == "limit" else STOP,
                event["tokens_evaluated"],
                timings["prompt_ms"],
                event["tokens_predicted"],
                timings["predicted_ms"],
            )
        return Piece(event["content"], logprobs=logprobs(event.get("completion_probabilities") or (), self.n_top))


def logprobs(entries: Any, n_top: int) -> tuple[Mapping[str, Any], ...]:
    """Return llama-server's log probabilities as Ollama's, with ``n_top`` alternatives each (0: without)."""
    return tuple(
        _token(entry) | ({"top_logprobs": [_token(top) for top in entry["top_logprobs"][:n_top]]} if n_top else {})
        for entry in entries
    )


def _token(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "bytes": entry["bytes"], "logprob": entry["logprob"]}


def call_json(calls: tuple[ToolCall, ...]) -> list[dict[str, Any]]:
    """Return tool calls as Ollama writes them: the arguments an object, not a text."""
    return [
        {"id": call.id, "function": {"index": index, "name": call.name, "arguments": dict(call.arguments)}}
        for index, call in enumerate(calls)
    ]

"""Chats that are asked for as completions: which are, and how the answers are told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.types import Role
from supervisor.api.models import ModelView, Preset
from supervisor.gateway.templated import CHATS, StreamRetelling, written

MODEL = ModelView(
    "m", "/m.gguf", Role.CHAT, "llama", 1, 0.0, 4096, 4096, preset=Preset(template="{{ .Prompt }}{{ .Response }}")
)
HELLO = {"role": "user", "content": "hello"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


async def asked(path: str = CHATS, **fields: object) -> dict[str, Any] | None:
    found = await written(path, json.dumps({"model": "m", "messages": [HELLO], **fields}).encode(), MODEL)
    return None if found is None else dict(json.loads(found.body))


@pytest.mark.anyio
async def test_what_a_completion_has_no_words_for_is_told_in_its_own() -> None:
    told = await asked(response_format={"type": "json_object"}, logprobs=True, tools=[], stream_options={}, seed=3)
    assert told == {"model": "m", "prompt": "hello", "json_schema": {"type": "object"}, "n_probs": 20, "seed": 3}
    assert (await asked(logprobs=True, top_logprobs=2) or {})["n_probs"] == 2


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fields",
    [
        {"path": "/v1/messages"},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{**HELLO, "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        {"tools": [{"type": "function", "function": {"name": "x"}}]},
        {"response_format": {"type": "poem"}},
        {"top_logprobs": 2},
    ],
    ids=str,
)
async def test_what_only_llama_server_understands_goes_on_as_it_is(fields: dict[str, Any]) -> None:
    assert await asked(**fields) is None


@pytest.mark.anyio
@given(fields=st.dictionaries(st.sampled_from(["messages", "tools", "response_format", "logprobs", "stop"]), JSON))
async def test_no_body_is_anything_but_written_or_left(fields: dict[str, Any]) -> None:
    told = await asked(**fields)
    assert told is None or told["prompt"] is not None


def test_comments_errors_and_the_end_of_a_stream_go_through() -> None:
    retelling = StreamRetelling(with_usage=False)
    for event in (b": ping\n\n", b'data: {"error": {"message": "x"}}\n\n', b"data: [DONE]\n\n"):
        assert retelling.feed(event) == event
    assert retelling.rest() == b""


def test_every_choice_begins_with_its_role() -> None:
    def event(index: int, text: str, reason: str | None = None) -> bytes:
        choice = {"text": text, "index": index, "logprobs": None, "finish_reason": reason}
        return b"data: " + json.dumps({"choices": [choice], "object": "text_completion"}).encode() + b"\n\n"

    retelling = StreamRetelling(with_usage=False)
    told = retelling.feed(event(0, "a") + event(1, "b") + event(0, "c") + event(1, "", "stop"))
    choices = [json.loads(one[6:])["choices"][0] for one in told.split(b"\n\n") if one]
    assert [(one["index"], one["delta"].get("role"), one["delta"].get("content")) for one in choices] == [
        (0, "assistant", None),
        (0, None, "a"),
        (1, "assistant", None),
        (1, None, "b"),
        (0, None, "c"),
        (1, None, None),
    ]
    assert choices[-1]["finish_reason"] == "stop"

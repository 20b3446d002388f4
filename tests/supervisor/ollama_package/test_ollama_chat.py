"""The ``ollama`` package's chats: whole and in pieces, with tools, thoughts, images and a format."""

from __future__ import annotations

import json
from typing import Any

import ollama
import pytest
import tiny_models
from ollama_questions import HELLO, N_CTX, TOOL, picture
from running_service import Service

pytestmark = [pytest.mark.llama, pytest.mark.anyio]


def test_a_chat_is_answered_whole_with_the_runners_figures(client: ollama.Client) -> None:
    told = client.chat("chat", [HELLO])
    assert told.message.content == tiny_models.TEXT
    assert (told.model, told.done, told.done_reason, told.message.role) == ("chat", True, "stop", "assistant")
    assert told.eval_count == len(tiny_models.TEXT.split()) + 1
    assert told.prompt_eval_count
    assert told.total_duration
    assert told.eval_duration
    assert told.load_duration is not None
    assert told.total_duration >= told.load_duration + told.eval_duration


def test_a_streamed_chat_says_the_same_in_pieces_and_ends_with_the_figures(client: ollama.Client) -> None:
    *pieces, last = client.chat("chat:latest", [HELLO], stream=True)
    assert len(pieces) > 10
    assert "".join(piece.message.content or "" for piece in pieces) == tiny_models.TEXT
    assert not any(piece.done for piece in pieces)
    assert (last.done, last.done_reason, last.message.content) == (True, "stop", "")
    assert last.eval_count


async def test_the_asynchronous_client_gets_the_same(service: Service) -> None:
    async with ollama.AsyncClient(f"http://127.0.0.1:{service.port}") as client:
        whole = await client.chat("CHAT", [HELLO])
        pieces = [piece async for piece in await client.generate("chat", "hello", stream=True)]
        listed = await client.list()
        vectors = await client.embed("embed", "hello")
    assert whole.message.content == "".join(piece.response or "" for piece in pieces) == tiny_models.TEXT
    assert "chat:latest" in [model.model for model in listed.models]
    assert len(vectors.embeddings) == 1


def test_an_answer_stops_where_it_is_told_to(client: ollama.Client) -> None:
    short = client.chat("chat", [HELLO], options={"num_predict": 3})
    assert (short.message.content, short.done_reason, short.eval_count) == ("Hello! I am", "length", 3)
    stopped = client.chat("chat", [HELLO], options={"stop": ["tiny"]})
    assert (stopped.message.content, stopped.done_reason) == ("Hello! I am a ", "stop")


def test_a_format_is_obeyed_whatever_the_model_wants(client: ollama.Client) -> None:
    schema: Any = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}
    told = client.chat("chat", [HELLO], format=schema, options={"num_predict": 60})
    assert json.loads(told.message.content or "") == {"n": 7}
    said = client.generate("chat", "hello", format=schema, options={"num_predict": 60})
    assert json.loads(said.response or "") == {"n": 7}
    raw = client.generate("chat", "hello", raw=True, format="json", options={"num_predict": 60})
    assert (raw.response or "").startswith("{")


def test_a_tool_is_called_whole_and_streamed_and_its_answer_taken(client: ollama.Client) -> None:
    whole = client.chat("tools", [HELLO], tools=[TOOL])
    assert whole.message.tool_calls
    (call,) = whole.message.tool_calls
    assert (call.function.name, call.function.arguments) == (tiny_models.TOOL_NAME, {})
    pieces = list(client.chat("tools", [HELLO], tools=[TOOL], stream=True))
    assert [piece.message.tool_calls for piece in pieces if piece.message.tool_calls] == [[call]]
    messages = [HELLO, whole.message, {"role": "tool", "content": "a cat", "tool_name": call.function.name}]
    assert client.chat("tools", messages, tools=[TOOL]).done


def test_thoughts_are_told_apart_from_the_answer(client: ollama.Client) -> None:
    whole = client.chat("thinks", [HELLO], think=True)
    assert ((whole.message.thinking or "").strip(), (whole.message.content or "").strip()) == (
        "Let me see.",
        "All is well.",
    )
    pieces = list(client.generate("thinks", "hello", think="low", stream=True))
    assert "".join(piece.thinking or "" for piece in pieces).strip() == "Let me see."
    assert "".join(piece.response or "" for piece in pieces).strip() == "All is well."
    with_template_closed = client.chat("thinks", [HELLO], think=False)
    assert not with_template_closed.message.thinking


def test_images_are_seen_by_models_that_have_eyes(client: ollama.Client) -> None:
    seen = client.chat("see/eyes", [{**HELLO, "images": [picture()]}])
    blind = client.chat("see/eyes", [HELLO])
    assert (seen.prompt_eval_count or 0) > (blind.prompt_eval_count or 0) + 10
    assert client.generate("see/eyes", "hello", images=[picture()]).response == tiny_models.TEXT
    with pytest.raises(ollama.ResponseError, match="this model is missing data required for image input") as refused:
        client.chat("chat", [{**HELLO, "images": [picture()]}])
    assert refused.value.status_code == 400


def test_an_answer_that_was_begun_is_gone_on_with(client: ollama.Client) -> None:
    begun, rest = tiny_models.TEXT[:11], tiny_models.TEXT[11:]
    asked = [HELLO, {"role": "assistant", "content": begun}]
    assert client.chat("chat", asked).message.content == rest
    assert "".join(piece.message.content or "" for piece in client.chat("chat", asked, stream=True)) == rest


def test_log_probabilities_come_with_their_alternatives(client: ollama.Client) -> None:
    told = client.chat("chat", [HELLO], logprobs=True, top_logprobs=2, options={"num_predict": 2})
    assert told.logprobs
    assert [entry.token.strip() for entry in told.logprobs] == ["Hello!", "I"]
    assert [len(entry.top_logprobs or ()) for entry in told.logprobs] == [2, 2]
    called = client.chat("tools", [HELLO], tools=[TOOL], logprobs=True)
    assert called.logprobs
    assert called.message.tool_calls
    said = client.generate("chat", "hello", logprobs=True, options={"num_predict": 2})
    assert said.logprobs
    assert said.logprobs[0].top_logprobs is None


def test_a_conversation_that_is_too_long_loses_its_oldest_messages(service: Service, client: ollama.Client) -> None:
    long = {"role": "user", "content": "hi " * N_CTX}
    asked = [{"role": "system", "content": "be kind"}, long, {"role": "assistant", "content": "yes"}, HELLO]
    assert client.chat("chat", asked).message.content == tiny_models.TEXT
    with pytest.raises(ollama.ResponseError, match="the input length exceeds the context length"):
        client.chat("chat", [long])
    refused = service.request("POST", "/api/chat", {"model": "chat", "messages": asked, "truncate": False})
    assert (refused.status, json.loads(refused.read())) == (
        400,
        {"error": "the input length exceeds the context length"},
    )

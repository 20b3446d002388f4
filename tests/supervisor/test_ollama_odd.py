"""What clients of Ollama send that nobody thought of, against the whole service."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders
import tiny_models
from running_service import Service, environment, shared

pytestmark = pytest.mark.llama

WORDS = "one two three four five six seven"


@pytest.fixture(scope="module")
def service(llama_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return one service for all tests of this module."""
    folder = tmp_path_factory.mktemp("odd-models")
    tiny_models.write_chat_model(folder / "chat.gguf")
    tiny_models.write_chat_model(folder / "base.gguf", template="")
    tiny_models.write_chat_model(folder / "endless.gguf", endless=True)
    tiny_encoders.write_embedding_model(folder / "embed.gguf")
    with shared(environment(os.environ, folder, tmp_path_factory.mktemp("odd"))) as service:
        yield service


def answer(service: Service, path: str, **body: object) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(service.request("POST", path, {"stream": False, **body}).read())
    return told


def test_a_batch_of_one_kills_no_runner(service: Service) -> None:
    told = answer(service, "/api/generate", model="chat", prompt="hi", options={"num_batch": 1})
    assert told["response"] == tiny_models.TEXT


def test_a_small_batch_cuts_no_text_that_is_embedded(service: Service) -> None:
    counts = {
        answer(service, "/api/embed", model="embed", input=WORDS, options=options)["prompt_eval_count"]
        for options in ({}, {"num_batch": 2})
    }
    assert len(counts) == 1


def test_a_model_without_any_template_goes_on_from_the_prompt_as_it_is(service: Service) -> None:
    """As with Ollama, for models that were never taught to chat; under OpenAI's API llama-server writes ChatML."""
    raw = answer(service, "/api/generate", model="base", prompt="hello", raw=True)["prompt_eval_count"]
    assert answer(service, "/api/generate", model="base", prompt="hello")["prompt_eval_count"] == raw
    hello = [{"role": "user", "content": "hello"}]
    assert answer(service, "/api/chat", model="base", messages=hello)["prompt_eval_count"] == raw
    assert answer(service, "/v1/chat/completions", model="base", messages=hello)["usage"]["prompt_tokens"] > raw
    assert answer(service, "/api/show", model="base")["template"] == "{{ .Prompt }}"


def test_what_the_model_said_in_two_messages_is_gone_on_with_as_one(service: Service) -> None:
    """As with Ollama; llama-server takes no two of them at the end."""
    said = [{"role": "assistant", "content": "Hello!"}, {"role": "assistant", "content": "I am"}]
    messages = [{"role": "user", "content": "hello"}, *said]
    told = answer(service, "/api/chat", model="chat", messages=messages)
    assert told["message"]["content"] == tiny_models.TEXT.partition("I am")[2]


def test_a_model_that_is_deleted_while_it_answers_finishes_its_answer_and_is_gone(service: Service) -> None:
    assert answer(service, "/api/create", model="own", **{"from": "endless"}) == {"status": "success"}
    body = {"model": "own", "prompt": "hello", "options": {"num_predict": 400}}
    stream = service.request("POST", "/api/generate", body)
    first = json.loads(stream.readline())
    assert service.request("DELETE", "/api/delete", {"model": "own"}).status == 200
    lines = [first, *map(json.loads, stream.read().splitlines())]
    assert (lines[-1]["done_reason"], lines[-1]["eval_count"]) == ("length", 400)
    assert "own:latest" not in [one["name"] for one in service.get("/api/tags")["models"]]
    assert service.request("POST", "/api/show", {"model": "own"}).status == 404

"""The ``ollama`` package's prompts and embeddings: what becomes of a text that is no chat."""

from __future__ import annotations

import math

import ollama
import pytest
import tiny_models
from ollama_questions import N_CTX

pytestmark = [pytest.mark.llama, pytest.mark.anyio]


def test_a_prompt_is_answered_and_gone_on_from(client: ollama.Client) -> None:
    first = client.generate("chat", "hello", system="be kind")
    assert first.response == tiny_models.TEXT
    assert first.context
    second = client.generate("chat", "and now", context=first.context)
    assert second.response == tiny_models.TEXT
    assert (second.prompt_eval_count or 0) > len(first.context)
    assert second.context
    assert second.context[: len(first.context)] == first.context


def test_a_raw_prompt_is_taken_as_it_is(client: ollama.Client) -> None:
    raw = client.generate("chat", "hello", raw=True)
    templated = client.generate("chat", "hello")
    assert raw.response == tiny_models.TEXT
    assert raw.context is None
    assert (raw.prompt_eval_count or 0) < (templated.prompt_eval_count or 0)


def test_texts_become_vectors_of_length_one(client: ollama.Client) -> None:
    both = client.embed("embed", ["hello", "world"])
    assert [round(math.hypot(*vector), 5) for vector in both.embeddings] == [1.0, 1.0]
    assert both.prompt_eval_count
    short = client.embed("embed", "hello", dimensions=3).embeddings[0]
    assert (len(short), round(math.hypot(*short), 5)) == (3, 1.0)
    assert client.embed("embed", []).embeddings == []
    older = client.embeddings("embed", "hello").embedding
    assert list(older) == pytest.approx(both.embeddings[0])
    assert list(client.embeddings("embed").embedding) == []


def test_a_text_that_is_too_long_is_cut_or_refused(client: ollama.Client) -> None:
    long = "word " * 3000
    cut = client.embed("embed", [long, "hello"])
    assert len(cut.embeddings) == 2
    with pytest.raises(ollama.ResponseError, match="the input length exceeds the context length") as refused:
        client.embed("embed", long, truncate=False)
    assert refused.value.status_code == 400


def test_an_answer_ends_where_the_context_is_full(client: ollama.Client) -> None:
    """Whatever the client says of shifting: nothing of a conversation is forgotten while it is answered."""
    answer = client.generate("endless", "x " * (N_CTX // 2 - 50), raw=True)
    assert answer.done_reason == "length"
    assert (answer.prompt_eval_count or 0) + (answer.eval_count or 0) == N_CTX

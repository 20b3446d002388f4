"""A Modelfile's template under OpenAI's API: the ``openai`` package, unmodified, against the whole service."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny_models
from running_service import Service, environment, shared
from store_layout import HOST, put_model

pytestmark = pytest.mark.llama

HELLO: Any = {"role": "user", "content": "hello"}
# Each says more than the header's template does, so that a prompt's tokens tell which one was applied.
WIDE = "{{ range .Messages }}one two three four five six: {{ .Content }} {{ end }}"
TOOL: Any = {"type": "function", "function": {"name": tiny_models.TOOL_NAME, "description": "look around"}}


@pytest.fixture(scope="module")
def service(llama_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return a service over a store: one model, under names with a template of their own and without."""
    scratch = tmp_path_factory.mktemp("templates")
    (scratch / "models").mkdir()
    tiny_models.write_chat_model(scratch / "chat.gguf", n_ctx_train=256)
    tiny_models.write_chat_model(scratch / "tools.gguf", template=tiny_models.TOOL_TEMPLATE)
    for name, file, template in (("plain", "chat", None), ("wide", "chat", WIDE), ("tools", "tools", WIDE)):
        layers = [("model", scratch / f"{file}.gguf"), *([("template", template.encode())] if template else [])]
        put_model(scratch / "store", f"{HOST}/library/{name}/latest", layers)
    renderer = json.dumps({"renderer": "looks"}).encode()
    layers = [("model", scratch / "chat.gguf"), ("template", WIDE.encode())]
    put_model(scratch / "store", f"{HOST}/library/rendered/latest", layers, renderer)
    with shared({**environment(os.environ, scratch / "models", scratch), "PLANNER_CONTEXT_LENGTH": "256"}) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def shape(value: Any) -> Any:
    """Return what two answers of one kind have in common: fields and kinds of values, not the values."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items() if name not in {"logprobs", "timings"}}
    return [shape(one) for one in value] if isinstance(value, list) else type(value)


def test_a_chat_is_written_in_the_modelfiles_template_and_answered_as_any_other(client: openai.OpenAI) -> None:
    wide, plain = (client.chat.completions.create(model=name, messages=[HELLO]) for name in ("wide", "plain"))
    assert wide.choices[0].message.content == plain.choices[0].message.content == tiny_models.TEXT
    assert wide.choices[0].finish_reason == "stop"
    assert wide.usage is not None
    assert plain.usage is not None
    assert wide.usage.prompt_tokens > plain.usage.prompt_tokens
    assert shape(wide.model_dump(exclude_unset=True)) == shape(plain.model_dump(exclude_unset=True))


def test_the_same_prompt_goes_out_under_both_apis(service: Service, client: openai.OpenAI) -> None:
    told = client.chat.completions.create(model="wide", messages=[HELLO])
    body = {"model": "wide", "messages": [HELLO], "stream": False}
    assert told.usage is not None
    answer = json.loads(service.request("POST", "/api/chat", body).read())
    assert answer["prompt_eval_count"] == told.usage.prompt_tokens


def test_the_prompt_and_its_length_are_told_as_they_go_out(service: Service, client: openai.OpenAI) -> None:
    body = {"model": "wide", "messages": [HELLO]}
    told = json.loads(service.request("POST", "/apply-template", body).read())
    assert told == {"prompt": "one two three four five six: hello "}
    counted = json.loads(service.request("POST", "/v1/chat/completions/input_tokens", body).read())
    usage = client.chat.completions.create(model="wide", messages=[HELLO]).usage
    assert usage is not None
    assert counted["input_tokens"] == usage.prompt_tokens
    plain = json.loads(service.request("POST", "/v1/chat/completions/input_tokens", {**body, "model": "plain"}).read())
    assert plain.keys() == counted.keys()


def test_a_stream_has_the_events_of_any_other(client: openai.OpenAI) -> None:
    streams = {}
    for name in ("wide", "plain"):
        options: Any = {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}
        streams[name] = list(client.chat.completions.create(model=name, messages=[HELLO], stream=True, **options))
        assert "".join(one.choices[0].delta.content or "" for one in streams[name][:-1]) == tiny_models.TEXT
        assert streams[name][-1].usage is not None
    assert [shape(one.model_dump(exclude_unset=True)) for one in streams["wide"]] == [
        shape(one.model_dump(exclude_unset=True)) for one in streams["plain"]
    ]
    for pieces in zip(*streams.values(), strict=True):
        told = [one.choices[0].logprobs for one in pieces if one.choices and one.choices[0].logprobs]
        assert len({len(one.content[0].top_logprobs) for one in told if one.content}) <= 1
        assert len(told) in {0, 2}
    bare = list(client.chat.completions.create(model="wide", messages=[HELLO], stream=True, max_tokens=2))
    assert bare[-1].choices[0].finish_reason == "length"


def test_what_a_chat_asks_of_its_answers_form_holds(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    formats: Any = ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    for wanted in formats:
        told = client.chat.completions.create(
            model="wide", messages=[HELLO], response_format=wanted, max_completion_tokens=40
        )
        assert (told.choices[0].message.content or "").startswith("{")
    several = client.chat.completions.create(model="wide", messages=[HELLO], max_tokens=3, logprobs=True)
    assert several.choices[0].finish_reason == "length"
    assert several.choices[0].logprobs is not None
    assert len(several.choices[0].logprobs.content or ()) == 3


def test_a_template_of_the_requests_own_that_cannot_be_used_is_refused(service: Service) -> None:
    """Under Ollama's API, which alone takes one: nobody wants an answer to another prompt than asked for."""
    for asked in ({"prompt": "hello"}, {"prompt": "hello", "suffix": "x"}):
        body = {"model": "plain", "template": "{{ .Prompt", "stream": False, **asked}
        answer = service.request("POST", "/api/generate", body)
        assert answer.status == 500
        assert json.loads(answer.read()) == {"error": "template: an action is not closed"}


def test_texts_in_parts_and_developers_are_read(client: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    plain: Any = [{"role": "system", "content": "hello"}, HELLO]
    told = [client.chat.completions.create(model="wide", messages=messages).usage for messages in (parts, plain)]
    counts = [usage.prompt_tokens for usage in told if usage is not None]
    assert len(counts) == 2
    assert counts[0] == counts[1]


def test_a_refusal_is_the_runners_own(service: Service, client: openai.OpenAI) -> None:
    long: Any = {"role": "user", "content": "hello " * 400}
    told = []
    for name in ("wide", "plain"):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=name, messages=[long], stream=name == "wide")
        told.append(refused.value.body)
    assert shape(told[0]) == shape(told[1])
    answer = service.chat("wide", response_format={"type": "nonsense"})
    assert answer.status == 400
    assert "response_format" in json.loads(answer.read())["error"]["message"]


def test_where_only_the_header_can_the_header_does(service: Service) -> None:
    """Tools are llama-server's to take apart; and where a renderer is named, the template is nobody's."""

    def tokens(model: str, **more: object) -> int:
        return int(json.loads(service.chat(model, max_tokens=1, **more).read())["usage"]["prompt_tokens"])

    assert tokens("rendered") == tokens("plain") < tokens("wide")
    body = {"model": "tools", "messages": [HELLO], "tools": [TOOL]}
    by_header = json.loads(service.request("POST", "/apply-template", body).read())
    assert "one two three" not in by_header["prompt"]
    assert tokens("tools", tools=[TOOL], tool_choice="none") != tokens("tools")

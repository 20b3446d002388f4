"""What Ollama's clients ask, as values: each field read, each wrong one told in Ollama's words."""

from __future__ import annotations

import base64
import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.types import LoadOptions, Role
from supervisor.api.models import Preset
from supervisor.gateway.errors import RequestError
from supervisor.gateway.ollama import chat, generate
from supervisor.gateway.ollama.embed import cut, read_embed, truncated
from supervisor.gateway.ollama.fields import parse_fields
from supervisor.gateway.ollama.keep_alive import parse_keep_alive
from supervisor.gateway.ollama.library import read_create
from supervisor.gateway.ollama.messages import Message, ToolCall, to_openai
from supervisor.gateway.ollama.options import checked, load_options, of_preset, sampling

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()
WAV = base64.b64encode(b"RIFF" + bytes(4) + b"WAVE" + bytes(20)).decode()
USER = {"role": "user", "content": "hi"}


def read_chat(**fields: Any) -> chat.ChatRequest:
    return chat.read_chat(parse_fields(json.dumps({"model": "m", **fields}).encode(), "ChatRequest"))


def read_generate(**fields: Any) -> generate.GenerateRequest:
    return generate.read_generate(parse_fields(json.dumps({"model": "m", **fields}).encode(), "GenerateRequest"))


@pytest.mark.parametrize(
    "given_value,seconds",
    [
        (None, None),
        (1, 1.0),
        (42.5, 42.5),
        (0, 0.0),
        ("42m", 2520.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("100ms", 0.1),
        ("0", 0.0),
        (-1, math.inf),
        (-3.14, math.inf),
        ("-1m", math.inf),
    ],
)
def test_a_keep_alive_is_seconds_or_a_go_duration_and_below_zero_for_ever(given_value: Any, seconds: float) -> None:
    assert parse_keep_alive(given_value) == seconds


@pytest.mark.parametrize(
    "given_value,told",
    [
        ("42", 'time: missing unit in duration "42"'),
        ("5x", 'time: unknown unit "x" in duration "5x"'),
        ("soon", 'time: invalid duration "soon"'),
        ("", 'time: invalid duration ""'),
        ("9999999999h", 'time: invalid duration "9999999999h"'),
        (math.nan, 'time: invalid duration "nan"'),
        (10**400, f'time: invalid duration "1{49 * "0"}"'),
        (True, "Unsupported type: 'bool'"),
        ([1], "Unsupported type: '[]interface {}'"),
    ],
)
def test_a_keep_alive_that_is_none_is_told_as_go_tells_it(given_value: Any, told: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_keep_alive(given_value)
    assert str(refused.value) == told


@pytest.mark.parametrize(
    "body,told",
    [
        (b"", "missing request body"),
        (b"  \n", "missing request body"),
        (b"{", "unexpected EOF"),
        (b"{x}", "invalid character 'x' looking for beginning of object key string"),
        (b"hello", "invalid character 'h' looking for beginning of value"),
        (b"[]", "json: cannot unmarshal array into Go value of type api.ChatRequest"),
        (b'{"model": 1}', "json: cannot unmarshal number into Go struct field ChatRequest.model of type string"),
        (b'{"stream": "x"}', "json: cannot unmarshal string into Go struct field ChatRequest.stream of type bool"),
        (b'{"options": []}', "json: cannot unmarshal array into Go struct field ChatRequest.options of type map["),
        (b'{"messages": [3]}', "json: cannot unmarshal number into Go struct field ChatRequest.messages of type api."),
        (b'{"messages": [{"content": 3}]}', "json: cannot unmarshal number into Go struct field Message.content of"),
        (b'{"top_logprobs": 21}', "top_logprobs must be between 0 and 20"),
        (b'{"think": "deeply"}', 'invalid think value: "deeply" (must be "low", "medium", "high", "max", true, or '),
        (b'{"think": 3}', 'think must be a boolean or string ("low", "medium", "high", "max", true, or false)'),
        (b'{"format": "xml"}', 'invalid format: "xml"; expected "json" or a valid JSON Schema object'),
        (b'{"tools": [{"type": "function"}]}', "a tool needs a function with a name"),
        (b'{"messages": [{"role": "user", "images": ["http://x/y.png"]}]}', "illegal base64 data in images"),
        (b'{"options": {"num_ctx": "many"}}', 'option "num_ctx" must be of type integer'),
        (b'{"options": {"top_p": true}}', 'option "top_p" must be of type float32'),
        (b'{"options": {"use_mmap": 1}}', 'option "use_mmap" must be of type boolean'),
        (b'{"options": {"stop": "x"}}', 'option "stop" must be of type array'),
        (b'{"options": {"stop": [1]}}', 'option "stop" must be of an array of strings'),
        (b'{"options": {"seed": 1e999}}', 'option "seed" must be of type integer'),
        (b'{"options": {"seed": NaN}}', "the body is not usable"),
        (b"[" * 100_000, "the body is not usable"),
        (b'{"model": "\xff"}', "the body is not UTF-8"),
    ],
)
def test_a_wrong_chat_request_is_told_in_ollamas_words(body: bytes, told: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat.read_chat(parse_fields(body, "ChatRequest"))
    assert str(refused.value).startswith(told)


@given(st.binary(max_size=60) | st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text()).map(repr))
def test_no_body_is_answered_with_anything_but_a_refusal_or_a_request(body: bytes | str) -> None:
    data = body.encode("utf-8", "replace") if isinstance(body, str) else body
    with suppress(RequestError):
        assert chat.read_chat(parse_fields(data, "ChatRequest"))


def test_load_options_go_to_the_planner_and_those_that_leave_it_the_choice_are_none() -> None:
    def load(**asked: object) -> LoadOptions:
        return load_options(checked(asked), Role.CHAT)

    assert load(num_ctx=8192.0, num_gpu=0, main_gpu=1, num_batch=256, use_mmap=False) == LoadOptions(
        8192, 0, 1, 256, use_mmap=False
    )
    assert load(num_gpu=999, main_gpu=0) == LoadOptions(n_gpu_layers=999, main_gpu=0)
    assert load(num_ctx=0, num_gpu=-1, main_gpu=-1, num_batch=None) == LoadOptions()


def test_a_batch_is_as_large_as_llama_server_needs_it_and_cuts_no_text_that_is_embedded() -> None:
    assert load_options({"num_batch": 1}, Role.CHAT).n_batch == 2
    assert load_options({"num_batch": 1}, Role.EMBEDDING).n_batch is None


def test_sampling_options_have_ollamas_defaults_and_llama_servers_names() -> None:
    asked = checked({"temperature": 0, "num_predict": 7, "stop": ["x", ""], "num_keep": 2})
    fields = sampling(asked, 2048)
    assert fields["temperature"] == 0.0
    assert (fields["n_predict"], fields["n_keep"], fields["stop"]) == (7, 2, ["x"])
    assert (fields["top_k"], fields["top_p"], fields["min_p"]) == (40, 0.9, 0.0)
    assert not {"num_predict", "num_keep", "num_ctx"} & fields.keys()


def test_no_limit_and_the_whole_context_are_said_as_llama_server_understands_them() -> None:
    fields = sampling(checked({"num_predict": -2, "repeat_last_n": -1}), 2048)
    assert (fields["n_predict"], fields["repeat_last_n"]) == (-1, 2048)
    assert sampling(checked({"num_predict": 0}), None)["n_predict"] == -1


def test_options_that_nobody_knows_and_wrong_ones_of_a_model_are_left_out() -> None:
    assert checked({"mirostat": 1, "numa": True, "seed": 3}) == {"seed": 3}
    assert of_preset({"seed": 3, "top_k": "many"}) == {"seed": 3}


def test_half_a_character_is_replaced_and_whole_ones_stay() -> None:
    """Clients that cut a text anywhere send such; llama-server's parser refuses the whole request for one."""
    body = rb'{"prompt": "a\ud83d b\ud83d\ude00 \\ud83d"}'
    assert parse_fields(body, "GenerateRequest").text("prompt") == "a\ufffd b\U0001f600 \\ud83d"


@pytest.mark.parametrize(
    "data,told",
    [
        (b"\x89PNG\r\n\x1a\n", "data:image/png;base64,"),
        (b"\xff\xd8\xff\xe0....JFIF", "data:image/jpeg;base64,"),
        (b"GIF89a", "data:image/gif;base64,"),
        (b"RIFF\n\x01\x02\x03WEBPVP8 ", "data:image/webp;base64,"),
        (b"RIFF\n\x01\x02\x03WAVEfmt ", "wav"),
        (b"ID3\x04\x00", "mp3"),
        (b"\xff\xfb\x90\x00", "mp3"),
        (b"", "data:image/png;base64,"),
    ],
)
def test_an_attachment_is_called_what_its_bytes_say(data: bytes, told: str) -> None:
    text = base64.b64encode(data).decode()
    (part,) = to_openai([Message("user", images=(text,))])[0]["content"]
    if part["type"] == "image_url":
        assert part["image_url"]["url"] == told + text
    else:
        assert part["input_audio"] == {"data": text, "format": told}


def test_a_conversation_is_written_as_openai_does() -> None:
    look = ToolCall("look", {"at": 1})
    told = to_openai(
        [
            Message("system", "be short"),
            Message("user", "what is this?", images=(PNG, WAV)),
            Message("assistant", thinking="hm", tool_calls=(look, ToolCall("hear", {}))),
            Message("tool", "nothing", tool_name="hear"),
            Message("tool", "a cat", tool_name="look"),
        ]
    )
    assert told[0] == {"role": "system", "content": "be short"}
    assert [part["type"] for part in told[1]["content"]] == ["image_url", "input_audio", "text"]
    assert told[1]["content"][0]["image_url"]["url"] == f"data:image/png;base64,{PNG}"
    assert told[2]["reasoning_content"] == "hm"
    assert told[2]["tool_calls"][0] == {
        "type": "function",
        "id": "call_0",
        "function": {"name": "look", "arguments": '{"at": 1}'},
    }
    assert [(one["tool_call_id"], one["content"]) for one in told[3:]] == [("call_1", "nothing"), ("call_0", "a cat")]


def test_ids_of_calls_that_a_client_sends_are_kept() -> None:
    asked = read_chat(
        messages=[
            {"role": "assistant", "tool_calls": [{"id": "abc", "function": {"name": "f", "arguments": {"x": [1]}}}]},
            {"role": "tool", "content": "done", "tool_call_id": "abc"},
        ]
    )
    called, answered = to_openai(asked.messages)
    assert called["tool_calls"][0]["id"] == answered["tool_call_id"] == "abc"
    assert called["tool_calls"][0]["function"]["arguments"] == '{"x": [1]}'


def test_a_tool_without_parameters_gets_empty_ones() -> None:
    (tool,) = read_chat(tools=[{"type": "function", "function": {"name": "f", "description": "d"}}]).tools
    assert tool["function"] == {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


def test_a_chat_becomes_llama_servers_body() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = read_chat(messages=[USER], format=schema, think="high", logprobs=True)
    body = chat.chat_body(asked.messages, (), asked.common, {"seed": 1})
    assert body["messages"] == [USER]
    assert body["json_schema"] == schema
    assert (body["reasoning_effort"], body["chat_template_kwargs"]) == ("high", {"enable_thinking": True})
    assert (body["logprobs"], body["top_logprobs"], body["seed"]) == (True, 1, 1)
    assert "tools" not in body


@pytest.mark.parametrize(
    "think,fields",
    [
        (None, {}),
        (True, {"chat_template_kwargs": {"enable_thinking": True}}),
        (False, {"chat_template_kwargs": {"enable_thinking": False}}),
        ("low", {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "low"}),
    ],
)
def test_thinking_is_asked_for_in_llama_servers_words(think: Any, fields: dict[str, Any]) -> None:
    assert chat.think_fields(think) == fields


@pytest.mark.parametrize("value,schema", [("json", {"type": "object"}), ("", None), (None, None)])
def test_a_format_is_a_schema_or_none(value: Any, schema: Any) -> None:
    assert read_chat(format=value).common.schema == schema


def test_a_models_own_system_prompt_and_messages_come_first_unless_the_request_has_a_system_prompt() -> None:
    preset = Preset(system="you are a cat", messages=({"role": "user", "content": "a"},))
    with_own = chat.conversation(read_chat(messages=[USER]), preset)
    assert [(one.role, one.content) for one in with_own] == [
        ("system", "you are a cat"),
        ("user", "a"),
        ("user", "hi"),
    ]
    replaced = chat.conversation(read_chat(messages=[{"role": "system", "content": "you are a dog"}, USER]), preset)
    assert [one.content for one in replaced] == ["a", "you are a dog", "hi"]


def test_dropping_the_oldest_messages_keeps_the_system_prompts() -> None:
    messages = (Message("system", "s"), Message("user", "1"), Message("assistant", "2"), Message("user", "3"))
    assert [one.content for one in chat.without_oldest(messages, 3)] == ["s", "3"]


def test_a_prompt_is_the_users_turn_of_a_conversation() -> None:
    preset = Preset(system="be kind", messages=({"role": "user", "content": "a"},))
    told = generate.as_conversation(read_generate(prompt="hi", images=[PNG]), preset)
    assert [(one.role, one.content) for one in told] == [("system", "be kind"), ("user", "a"), ("user", "hi")]
    assert told[-1].images == (PNG,)
    going_on = generate.as_conversation(read_generate(prompt="hi", system="be rude", context=[1]), preset)
    assert [one.content for one in going_on] == ["be rude", "hi"]


@pytest.mark.parametrize("beside", [{"template": "x"}, {"system": "x"}, {"context": [1]}])
def test_a_raw_prompt_allows_nothing_around_it(beside: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="raw mode does not support template, system, or context"):
        read_generate(prompt="hi", raw=True, **beside)


def test_a_raw_prompt_has_no_place_for_images() -> None:
    with pytest.raises(RequestError, match="raw mode does not support images"):
        read_generate(prompt="hi", raw=True, images=[PNG])


def test_a_completion_and_an_infill_carry_what_constrains_them() -> None:
    asked = read_generate(prompt="a", suffix="b", format="json", logprobs=True, top_logprobs=3)
    constrained = {"json_schema": {"type": "object"}, "n_probs": 3}
    completion = generate.completion_body("a", asked.common, {"seed": 1})
    assert completion == {"seed": 1, "prompt": "a"} | constrained
    assert generate.infill_body(asked, {}) == {"input_prefix": "a", "input_suffix": "b"} | constrained


def read_texts(value: Any) -> tuple[str, ...]:
    return read_embed(parse_fields(json.dumps({"model": "m", "input": value}).encode(), "EmbedRequest")).texts


def test_texts_to_embed_are_one_or_many() -> None:
    assert [read_texts(value) for value in ("a", ["a", "b"], "", None, [])] == [("a",), ("a", "b"), (), (), ()]
    for wrong in (3, {"a": 1}, ["a", 3]):
        with pytest.raises(RequestError, match="invalid input type"):
            read_texts(wrong)


@given(st.lists(st.integers(10, 99), min_size=1, max_size=30), st.integers(0, 2), st.integers(0, 2), st.integers(4, 40))
def test_a_text_is_cut_at_its_end_and_keeps_what_the_model_puts_around_it(
    plain: list[int], before: int, after: int, limit: int
) -> None:
    whole = [1] * before + plain + [2] * after
    kept = truncated(whole, plain, limit)
    assert len(kept) == min(limit, len(whole))
    assert kept[:before] == [1] * before
    assert kept[len(kept) - after :] == [2] * after
    assert kept[before : len(kept) - after] == plain[: len(kept) - before - after]


def test_a_shortened_vector_has_length_one_again() -> None:
    assert cut([0.6, 0.0, 0.8], 2) == [1.0, 0.0]
    assert cut([0.6, 0.8], 0) == cut([0.6, 0.8], 5) == [0.6, 0.8]


def test_a_create_request_is_read_whole() -> None:
    body = {
        "name": "new",
        "from": "old",
        "files": {"a.gguf": "sha256:1"},
        "system": "s",
        "license": "MIT",
        "parameters": {"stop": ["x"]},
        "messages": [{"role": "user", "content": "hi"}],
    }
    spec = read_create(parse_fields(json.dumps(body).encode(), "CreateRequest"))
    assert (spec.model, spec.parent, spec.files, spec.licenses) == ("new", "old", {"a.gguf": "sha256:1"}, ("MIT",))
    assert (spec.system, spec.template, spec.parameters) == ("s", None, {"stop": ["x"]})
    assert spec.messages == ({"role": "user", "content": "hi"},)
    many = read_create(parse_fields(b'{"model": "m", "license": ["a", "b"]}', "CreateRequest"))
    assert many.licenses == ("a", "b")

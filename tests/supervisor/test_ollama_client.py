"""The ``ollama`` package, unmodified, against the whole service with real runners."""

from __future__ import annotations

import base64
import json
import math
import os
import signal
import struct
import zlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import companion_models
import ollama
import pytest
import tiny_encoders
import tiny_models
from running_service import Service, environment, shared

pytestmark = [pytest.mark.llama, pytest.mark.anyio]

HELLO = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": tiny_models.TOOL_NAME, "description": "look around"}}
THINKING_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['reasoning_content'] %}{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
N_CTX = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of each ability."""
    folder = tmp_path_factory.mktemp("ollama-models")
    (folder / "see").mkdir()
    tiny_models.write_chat_model(folder / "chat.gguf")
    tiny_models.write_chat_model(folder / "tools.gguf", text=tiny_models.TOOL_TEXT, template=tiny_models.TOOL_TEMPLATE)
    tiny_models.write_chat_model(
        folder / "thinks.gguf", text="<think> Let me see. </think> All is well.", template=THINKING_TEMPLATE
    )
    tiny_models.write_chat_model(folder / "endless.gguf", n_ctx_train=32_768, endless=True)
    tiny_models.write_chat_model(folder / "see" / "eyes.gguf")
    companion_models.write_projector(folder / "see" / "mmproj-eyes.gguf", n_embd_text=64)
    tiny_encoders.write_embedding_model(folder / "embed.gguf")
    return folder


@pytest.fixture(scope="module")
def service(folder: Path, llama_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return one service for all tests of this module."""
    environ = environment(os.environ, folder, tmp_path_factory.mktemp("ollama"))
    with shared({**environ, "PLANNER_CONTEXT_LENGTH": str(N_CTX)}) as service:
        yield service


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def client(service: Service) -> Iterator[ollama.Client]:
    with ollama.Client(f"http://127.0.0.1:{service.port}") as client:
        yield client


def picture() -> bytes:
    """Return a red square as PNG."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff\0\0" * 32) * 32
    head = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


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


def test_models_are_listed_and_shown(client: ollama.Client, folder: Path) -> None:
    listed = {model.model: model for model in client.list().models}
    assert {"chat:latest", "see/eyes:latest", "embed:latest"} <= listed.keys()
    details = listed["chat:latest"].details
    assert details is not None
    assert (details.format, details.family, details.quantization_level) == ("gguf", "llama", "F16")
    told = client.show("Chat:latest")
    assert told.capabilities == ["completion"]
    assert told.modelinfo
    assert told.modelinfo["llama.context_length"] == 4096
    assert told.template == tiny_models.CHAT_TEMPLATE
    assert f"FROM {folder / 'chat.gguf'}" in (told.modelfile or "").splitlines()
    assert client.show("tools").capabilities == ["completion", "tools"]
    assert client.show("embed").capabilities == ["embedding"]


def test_a_model_is_loaded_told_of_and_unloaded(client: ollama.Client) -> None:
    told = client.chat("chat", [], keep_alive="10m")
    assert told.done_reason == "load"
    assert client.generate("chat").done_reason == "load"
    loaded = {model.model: model for model in client.ps().models}
    entry = loaded["chat:latest"]
    assert (entry.name, entry.context_length) == ("chat:latest", N_CTX)
    assert entry.size
    assert entry.expires_at
    kept_s = (entry.expires_at - datetime.fromisoformat(told.created_at or "")).total_seconds()
    assert kept_s == pytest.approx(600, abs=60)
    client.chat("chat", [HELLO], keep_alive=-1, options={"num_predict": 1})
    (entry,) = (model for model in client.ps().models if model.model == "chat:latest")
    assert entry.expires_at
    assert entry.expires_at.year == 2318
    assert client.generate("chat", keep_alive=0).done_reason == "unload"
    assert "chat:latest" not in {model.model for model in client.ps().models}
    assert client.chat("chat", [], keep_alive=0).done_reason == "unload"


def test_an_answer_ends_where_the_context_is_full(client: ollama.Client) -> None:
    """Whatever the client says of shifting: nothing of a conversation is forgotten while it is answered."""
    answer = client.generate("endless", "x " * (N_CTX // 2 - 50), raw=True)
    assert answer.done_reason == "length"
    assert (answer.prompt_eval_count or 0) + (answer.eval_count or 0) == N_CTX


def test_a_larger_context_is_loaded_where_one_is_asked_for_and_serves_smaller_ones(client: ollama.Client) -> None:
    client.chat("endless", [], options={"num_ctx": 4096})
    (entry,) = (model for model in client.ps().models if model.model == "endless:latest")
    assert entry.context_length == 4096
    served = client.chat("endless", [HELLO], options={"num_ctx": 1024, "num_predict": 1})
    assert (served.load_duration or 0) < (served.total_duration or 0)
    (entry,) = (model for model in client.ps().models if model.model == "endless:latest")
    assert entry.context_length == 4096


def test_a_model_is_made_of_a_blob_copied_used_and_removed(client: ollama.Client, folder: Path) -> None:
    digest = client.create_blob(folder / "chat.gguf")
    assert client.create_blob(folder / "chat.gguf") == digest
    parameters = {"num_predict": 2, "stop": ["x"]}
    made = client.create("mine", files={"chat.gguf": digest}, system="be kind", parameters=parameters, license="MIT")
    assert made.status == "success"
    steps = client.create("mine:second", from_="mine", parameters={"num_predict": 3}, stream=True)
    assert [step.status for step in steps][-1] == "success"
    assert client.copy("mine:second", "other").status == "success"
    assert {"mine:latest", "mine:second", "other:latest"} <= {model.model for model in client.list().models}
    shown = client.show("other")
    assert (shown.license, sorted((shown.parameters or "").split())) == ("MIT", ['"x"', "3", "num_predict", "stop"])
    assert "SYSTEM be kind" in (shown.modelfile or "").splitlines()
    assert client.chat("mine", [HELLO]).message.content == "Hello! I"
    assert client.generate("other", "hello").response == "Hello! I am"
    assert client.generate("other", "hello", options={"num_predict": 1}).response == "Hello!"
    for name in ("mine", "mine:second", "other"):
        assert client.delete(name).status == "success"
    assert not {"mine:latest", "mine:second", "other:latest"} & {model.model for model in client.list().models}


def test_a_modelfiles_template_is_what_the_model_is_spoken_to_in(client: ollama.Client, folder: Path) -> None:
    """Told apart by the tokens that the prompt takes; one that nobody understands gives way to the header's."""
    digest = client.create_blob(folder / "chat.gguf")
    short, wide = "{{ .Prompt }}", "{{ range .Messages }}one two three four: {{ .Content }} {{ end }}"
    for name, template in (("short", short), ("wide", wide), ("odd", '{{ template "other" }}')):
        client.create(name, files={"chat.gguf": digest}, template=template)
        assert client.show(name).template == template
    raw = client.generate("chat", "hello", raw=True)
    by_header = client.chat("chat", [HELLO])
    counts = {name: client.chat(name, [HELLO]).prompt_eval_count or 0 for name in ("short", "wide", "odd")}
    assert counts["short"] == raw.prompt_eval_count
    assert counts["wide"] > counts["odd"]
    assert counts["odd"] == by_header.prompt_eval_count
    assert client.chat("wide", [HELLO]).message.content == tiny_models.TEXT
    asked = client.generate("chat", "hello", template=short)
    assert (asked.response, asked.prompt_eval_count) == (tiny_models.TEXT, raw.prompt_eval_count)
    filled = client.generate("chat", "a", suffix="b", template="{{ .Prompt }} {{ .Suffix }}")
    assert filled.response == tiny_models.TEXT
    for name in counts:
        client.delete(name)


def test_a_modelfile_holds_in_openais_api_and_anthropics_too(
    service: Service, client: ollama.Client, folder: Path
) -> None:
    """Where a request says nothing of its own; a Modelfile's context is loaded as well."""
    digest = client.create_blob(folder / "chat.gguf")
    parameters = {"num_predict": 2, "num_ctx": 2 * N_CTX}
    messages = [ollama.Message(role="user", content="one"), ollama.Message(role="assistant", content="two")]
    client.create("kind", files={"chat.gguf": digest}, system="be kind", messages=messages, parameters=parameters)
    asked = {"model": "kind", "messages": [HELLO]}

    def answer(path: str, **more: object) -> Any:
        return json.loads(service.request("POST", path, {**asked, **more}).read())

    assert answer("/apply-template")["prompt"].split("</s>")[:3] == [
        "<|system|>be kind",
        "<|user|>one",
        "<|assistant|>two",
    ]
    own = [{"role": "system", "content": "be brief"}, HELLO]
    assert "be kind" not in answer("/apply-template", messages=own)["prompt"]
    assert answer("/v1/chat/completions")["choices"][0]["message"]["content"] == "Hello! I"
    assert answer("/v1/chat/completions", max_tokens=3)["usage"]["completion_tokens"] == 3
    assert answer("/v1/completions", prompt="hello")["usage"]["completion_tokens"] == 2
    counts = [answer("/v1/messages/count_tokens", model=model)["input_tokens"] for model in ("kind", "chat")]
    assert counts[0] > counts[1]
    assert {entry.model: entry.context_length for entry in client.ps().models}["kind:latest"] == 2 * N_CTX
    client.delete("kind")


def test_what_the_store_refuses_is_told_with_a_status_or_at_the_end_of_the_stream(
    service: Service, client: ollama.Client
) -> None:
    with pytest.raises(ollama.ResponseError, match='model "nobody" not found') as refused:
        client.copy("nobody", "somebody")
    assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as unreachable:
        client.pull("127.0.0.1:1/library/nothing", insecure=True)
    assert unreachable.value.status_code == 500
    with pytest.raises(ollama.ResponseError):
        list(client.pull("127.0.0.1:1/library/nothing", insecure=True, stream=True))
    wrong = service.request("POST", f"/api/blobs/sha256:{'0' * 64}", "other bytes")
    assert wrong.status == 400
    assert "digest" in json.loads(wrong.read())["error"]
    assert service.request("HEAD", f"/api/blobs/sha256:{'0' * 64}").status == 404
    assert service.request("POST", "/api/create", {"model": "../up", "from": "chat"}).status == 400


@pytest.mark.parametrize(
    "ask,status,told",
    [
        (lambda client: client.chat("nobody", [HELLO]), 404, "model 'nobody' not found"),
        (lambda client: client.generate("nobody", "hi"), 404, "model 'nobody' not found"),
        (lambda client: client.show("nobody"), 404, "model 'nobody' not found"),
        (lambda client: client.embed("nobody", "hi"), 404, 'model "nobody" not found, try pulling it first'),
        (lambda client: client.delete("nobody"), 404, "model 'nobody' not found"),
        (lambda client: client.chat("embed", [HELLO]), 400, '"embed" does not support chat'),
        (lambda client: client.generate("embed", "hi"), 400, '"embed" does not support generate'),
        (lambda client: client.chat("chat", [HELLO], tools=[TOOL]), 400, "chat does not support tools"),
        (lambda client: client.chat("chat", [HELLO], think=True), 400, '"chat" does not support thinking'),
        (lambda client: client.generate("chat", "a", suffix="b"), 400, "chat does not support insert"),
        (lambda client: client.embed("chat", "hi"), 501, "this model does not support embeddings"),
        (lambda client: client.chat("chat", [HELLO], keep_alive="5"), 400, 'time: missing unit in duration "5"'),
        (lambda client: client.chat("chat", [HELLO], options={"seed": "x"}), 400, 'option "seed" must be of type i'),
        (lambda client: client.push("chat"), 501, "push is not supported"),
    ],
)
def test_what_cannot_be_done_is_told_as_ollama_tells_it(
    client: ollama.Client, ask: Any, status: int, told: str
) -> None:
    with pytest.raises(ollama.ResponseError) as refused:
        ask(client)
    assert refused.value.status_code == status
    assert refused.value.error.startswith(told)


def test_a_runner_that_dies_ends_the_stream_with_a_line_that_says_so(service: Service, client: ollama.Client) -> None:
    lines = client.chat("endless", [HELLO], stream=True)
    assert next(lines).message.content
    (pid,) = (one["pid"] for one in service.get("/status")["runners"] if one["model"] == "endless")
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ollama.ResponseError, match=r"model runner has unexpectedly stopped.*SIGKILL"):
        list(lines)


def test_a_client_that_leaves_ends_its_generation(service: Service, client: ollama.Client) -> None:
    lines = client.generate("endless", "hello", stream=True)
    assert next(lines).response
    lines.close()  # type: ignore[attr-defined]  # it is a generator
    client.generate("endless", "hello", options={"num_predict": 1})  # the only slot is free again


def test_the_doors_that_programs_knock_at_answer(service: Service) -> None:
    version = service.get("/api/version")["version"]
    assert all(part.isdigit() for part in version.split("."))
    assert service.request("GET", "/").read() == b"Ollama is running"
    for path in ("/", "/api/version", "/api/tags"):
        answer = service.request("HEAD", path)
        assert (answer.status, answer.read()) == (200, b"")
    wrong = service.request("GET", "/api/chat")
    assert (wrong.status, json.loads(wrong.read())["error"]) == (405, "GET is not allowed here; allowed: POST")


def test_lines_are_json_objects_of_their_type(service: Service) -> None:
    streamed = service.request("POST", "/api/generate", {"model": "chat", "prompt": "hi"})
    assert streamed.headers["Content-Type"] == "application/x-ndjson"
    assert streamed.headers["X-Loadmaster-Model"] == "chat"
    lines = [json.loads(line) for line in streamed.read().splitlines()]
    assert all(line["created_at"].endswith("Z") for line in lines)
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    image = base64.b64encode(picture()).decode()
    whole = service.request("POST", "/api/generate", {"model": "chat", "prompt": "hi", "stream": False})
    assert whole.headers["Content-Type"] == "application/json; charset=utf-8"
    refused = service.request("POST", "/api/generate", {"model": "chat", "prompt": "hi", "images": [image + "!"]})
    assert (refused.status, json.loads(refused.read())["error"]) == (400, "illegal base64 data in images")

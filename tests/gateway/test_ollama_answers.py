"""What Ollama's clients are told, as values: answers in pieces, models listed and described."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from planner.types import Role
from supervisor.api.errors import (
    BadModel,
    CannotFit,
    ClientLimit,
    LoadFailed,
    LoadTimeout,
    PlannerFailed,
    QueueFull,
    QueueTimeout,
)
from supervisor.api.models import ModelView, Preset
from supervisor.api.snapshot import DeviceUse, RunnerView, Snapshot
from supervisor.api.store import BadCreate, NotInStore, RegistryFailed, StoreFull
from supervisor.gateway.errors import RunnerLost, Unauthorized
from supervisor.gateway.ollama import models
from supervisor.gateway.ollama.answer import ChatReader, CompletionReader, Piece, call_json
from supervisor.gateway.ollama.errors import ContextExceeded, RunnerRefused, ollama_answer_to
from supervisor.gateway.ollama.names import human_number, shown
from supervisor.go_template.nodes import TemplateError

MODEL = ModelView(
    id="llama3.2",
    path="/models/llama3.2.gguf",
    role=Role.CHAT,
    architecture="llama",
    file_bytes=1000,
    modified_at=1_700_000_000.5,
    n_ctx_train=4096,
    n_ctx_per_slot=2048,
    digest="sha256:abc",
    quantization="Q4_K_M",
    n_params=8_030_261_248,
    n_embd=64,
    capabilities=("completion", "vision"),
)


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]}


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 5, "completion_tokens": 3},
    "timings": {"prompt_ms": 1.5, "predicted_ms": 2.5},
}


def test_text_and_thoughts_come_piece_by_piece_and_the_figures_are_the_runners() -> None:
    reader = ChatReader()
    events = [
        chunk({"role": "assistant", "content": None}),
        chunk({"reasoning_content": "hm"}),
        chunk({"content": "Hi"}),
        chunk({}, "stop"),
        USAGE,
    ]
    assert [reader.feed(event) for event in events] == [Piece(), Piece(thinking="hm"), Piece("Hi"), Piece(), Piece()]
    assert reader.ending is not None
    assert reader.ending.reason == "stop"
    assert reader.ending.metrics(total_s=2.0, load_s=0.5) == {
        "total_duration": 2_000_000_000,
        "load_duration": 500_000_000,
        "prompt_eval_count": 5,
        "prompt_eval_duration": 1_500_000,
        "eval_count": 3,
        "eval_duration": 2_500_000,
    }


def test_tool_calls_come_whole_with_arguments_as_objects() -> None:
    reader = ChatReader()
    parts = [
        {"index": 0, "id": "c1", "function": {"name": "add", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a": '}},
        {"index": 0, "function": {"arguments": "1}"}},
        {"index": 1, "id": "c2", "function": {"name": "stop", "arguments": "{}"}},
    ]
    assert all(reader.feed(chunk({"tool_calls": [part]})) == Piece() for part in parts)
    last = reader.feed(chunk({}, "tool_calls"))
    reader.feed(USAGE)
    assert call_json(last.tool_calls) == [
        {"id": "c1", "function": {"index": 0, "name": "add", "arguments": {"a": 1}}},
        {"id": "c2", "function": {"index": 1, "name": "stop", "arguments": {}}},
    ]
    assert reader.ending is not None
    assert reader.ending.reason == "stop"


def test_a_whole_answer_is_read_like_its_pieces() -> None:
    reader = ChatReader()
    calls = [{"id": "c1", "function": {"name": "add", "arguments": "{}"}}]
    message = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": calls}
    piece = reader.feed({**USAGE, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})
    assert (piece.thinking, [call.name for call in piece.tool_calls]) == ("hm", ["add"])
    assert reader.ending is not None
    assert (reader.ending.reason, reader.ending.tokens) == ("stop", 3)


@pytest.mark.parametrize(
    "pieces,told",
    [
        (["Hello, I am"], " I am"),
        (["Hel", "lo,", " I am"], " I am"),
        (["Hello,"], ""),
        ([" I am"], " I am"),
        (["He is"], "He is"),
        (["He", " is"], "He is"),
    ],
)
def test_what_the_model_goes_on_from_is_not_said_again(pieces: list[str], told: str) -> None:
    reader = ChatReader(continued="Hello,")
    assert "".join(reader.feed(chunk({"content": piece})).text for piece in pieces) == told


def test_a_tool_call_that_was_cut_off_is_none() -> None:
    reader = ChatReader()
    reader.feed(chunk({"tool_calls": [{"index": 0, "function": {"name": "add", "arguments": '{"a": '}}]}))
    assert reader.feed(chunk({}, "length")).tool_calls == ()


def test_log_probabilities_have_as_many_alternatives_as_were_asked_for() -> None:
    entry = {"id": 7, "token": "Hi", "bytes": [72, 105], "logprob": -0.1}
    logprobs = {"content": [{**entry, "top_logprobs": [entry, entry]}]}
    told = {"token": "Hi", "bytes": [72, 105], "logprob": -0.1}
    event = chunk({"content": "Hi"}, logprobs=logprobs)
    assert ChatReader(n_top=0).feed(event).logprobs == (told,)
    assert ChatReader(n_top=1).feed(event).logprobs == ({**told, "top_logprobs": [told]},)


def test_a_completion_ends_with_its_reason() -> None:
    reader = CompletionReader()
    assert reader.feed({"content": "Hi", "stop": False}) == Piece("Hi")
    timings = {"prompt_ms": 1.0, "predicted_ms": 1.0}
    last = {"content": "", "stop": True, "stop_type": "limit", "tokens_evaluated": 2, "tokens_predicted": 9}
    assert reader.feed({**last, "timings": timings}) == Piece()
    assert reader.ending is not None
    assert (reader.ending.reason, reader.ending.prompt_tokens, reader.ending.tokens) == ("length", 2, 9)


@pytest.mark.parametrize(
    "count,text",
    [
        (8_000_000_000, "8B"),
        (8_030_261_248, "8.0B"),
        (70_553_706_496, "70.6B"),
        (137_000_000, "137M"),
        (136_727_040, "136.73M"),
        (22_000, "22K"),
        (7, "7"),
    ],
)
def test_numbers_of_parameters_are_written_as_ollama_does(count: int, text: str) -> None:
    assert human_number(count) == text


def test_every_model_is_shown_with_a_tag() -> None:
    assert [shown(name) for name in ("a", "a:7b", "b/a", "localhost:5000/b/a")] == [
        "a:latest",
        "a:7b",
        "b/a:latest",
        "localhost:5000/b/a:latest",
    ]


def snapshot(*runners: RunnerView, listed: tuple[ModelView, ...] = (MODEL,)) -> Snapshot:
    return Snapshot(
        version="1",
        started_at=0.0,
        now=0.0,
        draining=False,
        not_ready=(),
        llama_server=None,
        llama_version=None,
        machine=None,
        runners=runners,
        models=listed,
        queue_length=0,
        queue_limit=1,
    )


RUNNER = RunnerView(
    id="r1",
    model=MODEL.id,
    role=Role.CHAT,
    state="ready",
    pid=1,
    url=None,
    since=0.0,
    in_flight=0,
    waiting=0,
    restarts=0,
    n_ctx_per_slot=2048,
    n_parallel=1,
    expires_at=1_700_000_300.0,
    keep_alive_s=300.0,
    retry_at=None,
    load_seconds=1.0,
    plan=None,
    uses=(DeviceUse("CUDA0", 700, 600), DeviceUse("CUDA1", 200, None), DeviceUse("Host", 100, 100)),
    last_failure=None,
)


def test_models_are_listed_the_latest_first_with_their_details() -> None:
    older = replace(MODEL, id="old:7b", modified_at=1.0, capabilities=(), quantization=None, n_params=None)
    first, second = models.tags(snapshot(listed=(older, MODEL)))["models"]
    assert (first["name"], first["model"], first["size"], first["digest"]) == ("llama3.2:latest",) * 2 + (1000, "abc")
    assert first["modified_at"] == "2023-11-14T22:13:20.500000Z"
    assert first["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama", "clip"],
        "parameter_size": "8.0B",
        "quantization_level": "Q4_K_M",
        "context_length": 4096,
        "embedding_length": 64,
    }
    assert second["name"] == "old:7b"
    assert second["capabilities"] == ["completion"]


def test_loaded_models_are_told_with_measured_bytes_and_their_end() -> None:
    (told,) = models.running(snapshot(RUNNER))["models"]
    assert (told["size"], told["size_vram"], told["context_length"]) == (900, 800, 2048)
    assert told["expires_at"] == "2023-11-14T22:18:20.000000Z"


def test_a_model_that_stays_for_ever_expires_in_centuries_and_comes_first() -> None:
    other = replace(RUNNER, id="r2", model="other", expires_at=None, keep_alive_s=math.inf)
    stopped = replace(RUNNER, id="r3", state="failed")
    listed = (MODEL, replace(MODEL, id="other"))
    first, second = models.running(snapshot(RUNNER, stopped, other, listed=listed))["models"]
    assert first["name"] == "other:latest"
    assert datetime.fromisoformat(first["expires_at"]).year == 2318
    assert second["name"] == "llama3.2:latest"


@pytest.mark.parametrize(
    "changes, ends",
    [
        ({"in_flight": 1}, "2023-11-14T22:18:20.000000Z"),
        ({"state": "loading"}, "2023-11-14T22:18:20.000000Z"),
        ({"in_flight": 1, "keep_alive_s": 0.0}, "2023-11-14T22:13:20.000000Z"),
        ({"in_flight": 1, "keep_alive_s": math.inf}, "2318-01-01T00:00:00.000000Z"),
        ({"state": "stopping", "since": 1_699_999_999.0}, "2023-11-14T22:13:19.000000Z"),
        ({"state": "draining", "in_flight": 1, "since": 1_699_999_999.0}, "2023-11-14T22:13:19.000000Z"),
    ],
)
def test_a_model_in_use_ends_as_if_it_fell_idle_now_and_one_that_goes_has_ended(
    changes: dict[str, Any], ends: str
) -> None:
    """Ollama's own command calls the latter "Stopping..."."""
    now = replace(snapshot(replace(RUNNER, expires_at=None, **changes)), now=1_700_000_000.0)
    (told,) = models.running(now)["models"]
    assert told["expires_at"] == ends


PRESET = Preset(
    template="{{ .Prompt }}\n",
    system='Say "hi".',
    parameters={"stop": ["<|a|>", "b c"], "num_ctx": 4096, "use_mmap": True},
    messages=({"role": "user", "content": "hello there"},),
    licenses=("MIT", "and\nmore"),
    parent="base",
)


def test_a_model_is_shown_with_its_modelfile_and_its_header() -> None:
    metadata = {
        "general.architecture": "llama",
        "general.name": "x",
        "tokenizer.chat_template": "jinja",
        "tokenizer.ggml.tokens": None,
        "a.short": [1, 2],
        "a.long": list(range(6)),
        "a.nan": float("nan"),
    }
    tensors = [{"name": "t", "type": "F16", "shape": [2, 3]}]
    details = {"metadata": metadata, "tensors": tensors, "projector": None}
    told = models.described(replace(MODEL, preset=PRESET), details, verbose=False)
    assert (told["template"], told["system"], told["license"]) == ("{{ .Prompt }}\n", 'Say "hi".', "MIT\nand\nmore")
    assert told["parameters"].splitlines() == [
        "num_ctx                        4096",
        'stop                           "<|a|>"',
        'stop                           "b c"',
        "use_mmap                       true",
    ]
    assert told["model_info"] == {
        "general.parameter_count": MODEL.n_params,
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": [],
        "a.short": [1, 2],
        "a.long": [],
        "a.nan": None,
    }
    assert told["tensors"] == tensors
    assert told["capabilities"] == ["completion", "vision"]
    assert models.described(MODEL, details, verbose=True)["model_info"]["a.long"] == [0, 1, 2, 3, 4, 5]
    assert models.described(MODEL, details, verbose=False)["template"] == "jinja"


def test_a_shown_modelfile_names_every_file_that_the_model_is_made_of() -> None:
    told = models.modelfile(replace(MODEL, mmproj="/m/eyes.gguf", adapters=("/m/one.gguf", "/m/two.gguf")))
    files = [line for line in told.splitlines() if line.startswith(("FROM", "ADAPTER"))]
    assert files == [f"FROM {MODEL.path}", "FROM /m/eyes.gguf", "ADAPTER /m/one.gguf", "ADAPTER /m/two.gguf"]


def test_a_shown_modelfile_says_all_that_the_model_is_made_of() -> None:
    assert models.modelfile(replace(MODEL, preset=PRESET)).splitlines()[3:] == [
        "",
        "FROM /models/llama3.2.gguf",
        'TEMPLATE "{{ .Prompt }}',
        '"',
        'SYSTEM Say "hi".',
        "PARAMETER num_ctx 4096",
        "PARAMETER stop <|a|>",
        "PARAMETER stop b c",
        "PARAMETER use_mmap true",
        "LICENSE MIT",
        'LICENSE "and',
        'more"',
        "MESSAGE user hello there",
    ]


BUSY = "server busy, please try again.  maximum pending requests exceeded"


@pytest.mark.parametrize(
    "error,status,told",
    [
        (QueueFull("512 wait"), 503, BUSY),
        (ClientLimit("you have 3"), 503, f"{BUSY} (you have 3)"),
        (CannotFit("too large", causes=(), never=True), 500, "too large"),
        (LoadFailed("it died: out of memory"), 500, "llama runner process has terminated: it died: out of memory"),
        (BadModel("its file is broken"), 500, "its file is broken"),
        (PlannerFailed("the planner died"), 500, "the planner died"),
        (QueueTimeout("600 s"), 503, f"{BUSY} (600 s)"),
        (LoadTimeout("300 s"), 500, "timed out waiting for llama runner to start: 300 s"),
        (RunnerLost("killed"), 500, "model runner has unexpectedly stopped: killed"),
        (Unauthorized("no key"), 401, "no key"),
        (ContextExceeded("too long", 512), 400, "too long"),
        (RunnerRefused(400, "bad grammar"), 400, "bad grammar"),
        (RunnerRefused(501, "not here"), 500, "not here"),
        (BadCreate("no such parameter"), 400, "no such parameter"),
        (NotInStore("gone"), 404, "gone"),
        (RegistryFailed("pull model manifest: file does not exist"), 500, "pull model manifest: file does not exist"),
        (TemplateError("$x is not declared"), 500, "template: $x is not declared"),
        (StoreFull("the disk is full"), 500, "the disk is full"),
        (ValueError("secret"), 500, "internal error; the service's log tells more under request id req_1"),
    ],
)
def test_every_error_has_ollamas_status_and_one_line(error: Exception, status: int, told: str) -> None:
    answer = ollama_answer_to(error, "req_1")
    assert (answer.status, answer.error) == (status, told)
    assert answer.expected is not isinstance(error, ValueError)

"""The ``ollama`` package's models: listed, shown, loaded, made, copied, removed; what a Modelfile adds."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import ollama
import pytest
import tiny_models
from ollama_questions import HELLO, N_CTX
from running_service import Service

pytestmark = [pytest.mark.llama, pytest.mark.anyio]


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

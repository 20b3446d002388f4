"""What a model says that is not heeded, to Ollama's own service alone mostly: kept, and told to who brings it in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from docker_registry import RegistryServer
from store_layout import HOST, digest_of, put_blob, put_model, said

from planner.model import read_model
from supervisor.api.models import Preset
from supervisor.api.store import CreateRequest
from supervisor.store.folder import StoreFolder
from supervisor.store.listing import scan
from supervisor.store.store import ModelStore

pytestmark = pytest.mark.anyio

CONFIG = json.dumps({"renderer": "looks", "parser": "reads", "requires": "0.30.0", "model_format": "gguf"}).encode()
BOTH = {"renderer": "looks", "parser": "reads"}


def preset(folder: StoreFolder, name: str) -> Preset:
    return next(entry.preset for entry in scan(folder, read_model) if entry.id == name)


def not_heeded(steps: list[str]) -> list[str]:
    return [step for step in steps if step.startswith("not heeded: ")]


async def test_it_is_kept_and_told_in_a_line_each_where_a_modelfile_or_a_request_says_it(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    digest = put_blob(folder.root, gguf)
    text = f"FROM {digest}\nRENDERER looks\nPARSER reads\nREQUIRES 0.30.0"
    forms, requires = not_heeded(await said(store.create(CreateRequest("own", modelfile=text))))
    assert "RENDERER looks and PARSER reads, which is code within Ollama" in forms
    assert "TEMPLATE beside it; the chat template in the model's header is applied instead" in forms
    assert "REQUIRES 0.30.0, which is a version of Ollama" in requires
    assert preset(folder, "own:latest").for_ollama == {**BOTH, "requires": "0.30.0"}
    (told,) = not_heeded(await said(store.create(CreateRequest("own", files={"x": digest}, for_ollama=BOTH))))
    assert "RENDERER looks" in told
    assert not_heeded(await said(store.create(CreateRequest("own", files={"x": digest})))) == []


async def test_a_model_without_a_chat_template_is_told_to_be_spoken_to_in_chatml(
    store: ModelStore, folder: StoreFolder, tmp_path: Path
) -> None:
    tiny_models.write_chat_model(tmp_path / "bare.gguf", template="")
    digest = put_blob(folder.root, (tmp_path / "bare.gguf").read_bytes())
    (told,) = not_heeded(await said(store.create(CreateRequest("own", files={"x": digest}, for_ollama=BOTH))))
    assert "llama-server speaks ChatML to it" in told


async def test_a_child_inherits_it_and_a_template_of_its_own_takes_the_place_of_renderer_and_parser(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    layers = [("model", gguf), ("template", b"{{ .Prompt }}")]
    put_model(folder.root, f"{HOST}/library/parent/1", layers, CONFIG)
    assert preset(folder, "parent:1").template == "{{ .Prompt }}"
    assert preset(folder, "parent:1").spoken_template is None
    await said(store.create(CreateRequest("child", parent="parent:1", system="Be kind.")))
    assert preset(folder, "child:latest").for_ollama == {**BOTH, "requires": "0.30.0"}
    await said(store.create(CreateRequest("child", parent="parent:1", template="<{{ .Prompt }}>")))
    assert preset(folder, "child:latest").for_ollama == {"requires": "0.30.0"}
    assert preset(folder, "child:latest").spoken_template == "<{{ .Prompt }}>"


async def test_a_template_that_cannot_be_used_is_told_with_the_reason(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    digest = put_blob(folder.root, gguf)
    spec = CreateRequest("own", files={"x": digest}, template="{{ toTypeScriptType .Prompt }}")
    (told,) = not_heeded(await said(store.create(spec)))
    assert "TEMPLATE, which cannot be used ('toTypeScriptType' is not known" in told
    assert "the model's header is applied instead" in told


async def test_it_is_told_of_a_model_that_is_pulled(
    registry: RegistryServer, gguf: bytes, tmp_path: Path, free_environment: dict[str, str]
) -> None:
    registry.push("library/code:1", {"model": gguf, "config": CONFIG})
    async with ModelStore(StoreFolder(tmp_path / "pulled", f"http://{registry.host}")) as store:
        steps = await said(store.pull("code:1", insecure=False))
    assert len(not_heeded(steps)) == 2
    assert steps[-1] == "success"
    assert digest_of(CONFIG)[7:19] in "".join(steps)

"""A service over a store as Ollama lays it out: its models are served where they lie, and new ones pulled into it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import companion_models
import pytest
import tiny_models
from docker_registry import BASIC, private_registry, registry_server
from running_service import Serve, Service
from store_layout import HOST, put_model, tree

from planner.model import read_model

pytestmark = pytest.mark.llama


def steps(service: Service, path: str, body: object) -> list[dict[str, Any]]:
    """Return what an endpoint tells line by line."""
    return [json.loads(line) for line in service.request("POST", path, body).read().splitlines()]


def tags(service: Service) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in service.get("/api/tags")["models"]}


def test_a_model_of_an_existing_store_answers_and_the_store_stays_as_it_was(
    serve: Serve, chat_model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    layers = [("model", chat_model.read_bytes()), ("params", b'{"num_predict": 3}'), ("license", b"MIT")]
    manifest = put_model(store, f"{HOST}/library/tiny/1b", layers)
    before = tree(store)
    service = serve()
    assert "tiny:1b" in {one["id"] for one in service.get("/v1/models")["data"]}
    listed = tags(service)["tiny:1b"]
    assert listed["digest"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    answer = json.loads(service.chat("TINY:1B").read())
    assert answer["choices"][0]["message"]["content"]
    assert service.runner()["model"] == "tiny:1b"
    assert tree(store) == before


def test_a_model_is_pulled_asked_copied_and_deleted_through_the_service(
    serve: Serve, chat_model: Path, tmp_path: Path
) -> None:
    if shutil.which("docker-registry") is None:
        pytest.skip("no docker-registry here: nothing is pulled (Debian: apt-get install docker-registry)")
    with registry_server(tmp_path / "registry") as registry:
        registry.push("library/tiny:1b", {"model": chat_model, "system": b"Be terse.", "config": b"{}"})
        service = serve(PLANNER_REGISTRY=f"http://{registry.host}")
        assert service.chat("tiny:1b").status == 404
        assert steps(service, "/api/pull", {"model": "tiny:1b"})[-1] == {"status": "success"}
    assert tags(service)["tiny:1b"]["details"]["family"] == "llama"
    assert service.chat("tiny:1b").status == 200
    made = steps(service, "/api/create", {"model": "own", "from": "tiny:1b", "system": "Be kind."})
    assert made[-1] == {"status": "success"}
    assert service.request("POST", "/api/copy", {"source": "own", "destination": "me/other:2"}).status == 200
    assert {"tiny:1b", "own:latest", "me/other:2"} <= set(tags(service))
    for name in ("tiny:1b", "own", "me/other:2"):
        assert service.request("DELETE", "/api/delete", {"model": name}).status == 200
    assert not {"tiny:1b", "own:latest", "me/other:2"} & set(tags(service))
    assert list((tmp_path / "store" / "blobs").iterdir()) == []


def test_names_of_one_model_share_its_runner(serve: Serve, chat_model: Path, tmp_path: Path) -> None:
    """A tag and a copy take no memory of their own, whatever each tells its model; other settings do."""
    store = tmp_path / "store"
    layers = [("model", chat_model.read_bytes())]
    for name, more in (("one", []), ("two", [("params", b'{"num_predict": 3}')]), ("three", [])):
        put_model(store, f"{HOST}/library/tiny/{name}", [*layers, *more])
    settings = tmp_path / "models.toml"
    settings.write_text('[models."tiny:three"]\nkeep_alive = "1h"\n')
    service = serve(PLANNER_MODELS_FILE=str(settings))
    lengths = {}
    for name in ("tiny:one", "tiny:two", "tiny:three"):
        answer = service.chat(name)
        assert answer.headers["X-Loadmaster-Model"] == name
        lengths[name] = json.loads(answer.read())["usage"]["completion_tokens"]
    assert lengths["tiny:two"] == 3 < lengths["tiny:one"]
    assert sorted(one["model"] for one in service.get("/status")["runners"]) == ["tiny:one", "tiny:three"]
    states = {one["id"]: one["state"] for one in service.get("/v1/models")["data"]}
    assert {states[f"tiny:{name}"] for name in ("one", "two", "three")} == {"ready"}
    assert service.request("DELETE", "/api/delete", {"model": "tiny:two"}).status == 200
    assert service.get("/v1/models/tiny:one")["state"] == "ready"
    assert service.request("POST", "/api/copy", {"source": "tiny:one", "destination": "tiny:four"}).status == 200
    assert service.chat("tiny:four").status == 200
    assert service.request("POST", "/manage/unload", {"model": "tiny:four"}).status == 200
    assert service.get("/v1/models/tiny:one")["state"] == "unloaded"


def test_a_model_is_made_of_one_of_the_folder_with_its_eyes(serve: Serve, chat_model: Path, tmp_path: Path) -> None:
    """The folder stays as it was, and the new model needs it no more."""
    folder = tmp_path / "models"
    (folder / "see").mkdir(parents=True)
    (folder / "see" / "eyes.gguf").write_bytes(chat_model.read_bytes())
    companion_models.write_projector(folder / "see" / "mmproj-eyes.gguf", n_embd_text=64)
    before = tree(folder)
    service = serve(PLANNER_MODELS=str(folder))
    body = {"model": "own", "modelfile": "FROM see/eyes\nSYSTEM Be kind."}
    told = [step["status"] for step in steps(service, "/api/create", body)]
    assert (told[0], told[-1]) == ("copying see/eyes", "success")
    assert tree(folder) == before
    shutil.rmtree(folder / "see")
    assert "vision" in tags(service)["own:latest"]["capabilities"]
    assert service.chat("own", max_tokens=2).status == 200


def test_a_model_that_became_another_is_loaded_anew_and_one_of_other_words_is_not(
    serve: Serve, chat_model: Path, endless_model: Path, tmp_path: Path
) -> None:
    """Under its name; a file of the folder as well as a model of the store."""
    file = tmp_path / "models" / "tiny.gguf"
    file.parent.mkdir()
    file.write_bytes(chat_model.read_bytes())
    service = serve(PLANNER_MODELS=str(file.parent))

    def sent(path: Path) -> dict[str, str]:
        data = path.read_bytes()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        service.request("POST", f"/api/blobs/{digest}", data)
        return {path.name: digest}

    def pid(model: str) -> int:
        assert service.chat(model, max_tokens=2).status == 200
        (runner,) = (one for one in service.get("/status")["runners"] if one["model"] == model)
        return int(runner["pid"])

    def make(path: Path, **more: str) -> None:
        body = {"model": "own", "files": sent(path), **more}
        assert steps(service, "/api/create", body)[-1] == {"status": "success"}

    make(chat_model)
    first = pid("own:latest")
    make(chat_model, system="Be kind.")
    assert pid("own:latest") == first
    make(endless_model)
    service.read_log("model.changed")
    assert pid("own:latest") != first
    before = pid(file.stem)
    new = file.with_suffix(".part")
    new.write_bytes(endless_model.read_bytes())
    new.replace(file)
    service.request("POST", "/manage/rescan", {})
    service.read_log("model.changed")
    assert pid(file.stem) != before


@pytest.mark.parametrize("variable,path", [("DOCKER_CONFIG", ""), ("PLANNER_REGISTRY_LOGINS", "config.json")])
def test_a_private_registrys_model_is_pulled_with_the_login_that_docker_keeps(
    variable: str, path: str, serve: Serve, chat_model: Path, tmp_path: Path
) -> None:
    if shutil.which("docker-registry") is None:
        pytest.skip("no docker-registry here: nothing is pulled (Debian: apt-get install docker-registry)")
    with private_registry(tmp_path / "registry") as registry:
        registry.push("library/own:1", {"model": chat_model, "config": b"{}"}, authorization=f"Basic {BASIC}")
        (tmp_path / "docker").mkdir()
        (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": BASIC}}}))
        service = serve(PLANNER_REGISTRY=f"http://{registry.host}", **{variable: str(tmp_path / "docker" / path)})
        assert steps(service, "/api/pull", {"model": "own:1"})[-1] == {"status": "success"}


def test_a_split_model_is_made_from_its_first_part_asked_shown_and_deleted(
    serve: Serve, chat_model: Path, llama_tools: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "parts").mkdir()
    parts = tiny_models.split(chat_model, tmp_path / "parts", llama_tools / "llama-gguf-split", 3)
    (tmp_path / "Modelfile").write_text(f"FROM ./parts/{parts[0].name}\nSYSTEM Be kind.\n")
    service = serve()

    def create() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "planner", "create", "big", "-f", str(tmp_path / "Modelfile")]
        at = {**environ, "PLANNER_HOST": f"127.0.0.1:{service.port}"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=at)

    made = create()
    assert (made.returncode, made.stderr) == (0, "")
    assert json.loads(service.chat("big").read())["choices"][0]["message"]["content"] == tiny_models.TEXT
    shown = json.loads(service.request("POST", "/api/show", {"model": "big"}).read())
    assert len(shown["tensors"]) == len(read_model(str(chat_model)).tensors)
    assert service.request("DELETE", "/api/delete", {"model": "big"}).status == 200
    assert [path for name in ("split", "blobs") for path in (tmp_path / "store" / name).iterdir()] == []
    parts[1].unlink()
    assert parts[1].name in create().stderr


def test_a_user_who_has_only_a_store_needs_no_folder_of_files(serve: Serve, chat_model: Path, tmp_path: Path) -> None:
    put_model(tmp_path / ".ollama/models", f"{HOST}/library/tiny/1b", [("model", chat_model)])
    service = serve(PLANNER_MODELS="", PLANNER_STORE="", HOME=str(tmp_path), XDG_DATA_HOME=str(tmp_path / "data"))
    assert service.get("/readyz")["ready"]
    assert list(tags(service)) == ["tiny:1b"]

"""A store that Ollama has filled, read in place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import companion_models
from store_layout import HOST, digest_of, put_blob, put_model, tree

from planner.model import read_model
from planner.types import Role
from supervisor.models.catalogue import Catalogue, ModelEntry
from supervisor.store.folder import StoreFolder
from supervisor.store.listing import scan


def by_id(root: Path, registry: str | None = None) -> dict[str, ModelEntry]:
    return {str(entry.id): entry for entry in scan(StoreFolder(root, registry), read_model)}


def test_a_model_is_its_blob_with_all_that_its_modelfile_said(tmp_path: Path, gguf: bytes) -> None:
    layers = [
        ("model", gguf),
        ("template", b"{{ .Prompt }}"),
        ("system", b"You are terse."),
        ("params", json.dumps({"num_ctx": 512, "stop": ["</s>"]}).encode()),
        ("messages", json.dumps([{"role": "user", "content": "hi"}]).encode()),
        ("license", b"MIT"),
        ("license", b"and another"),
    ]
    manifest = put_model(tmp_path, f"{HOST}/library/tiny/1b", layers)
    before = tree(tmp_path)
    entry = by_id(tmp_path)["tiny:1b"]
    assert tree(tmp_path) == before, "nothing is written"
    assert entry.problem is None
    assert entry.path == str(tmp_path / "blobs" / digest_of(gguf).replace(":", "-"))
    assert entry.digest == digest_of(manifest.read_bytes()).removeprefix("sha256:")
    assert entry.file_bytes == sum(len(data) for _, data in layers) + len(b'{"model_format": "gguf"}')
    assert entry.modified_at == manifest.stat().st_mtime
    assert (entry.role, entry.architecture, entry.n_embd) == (Role.CHAT, "llama", 64)
    assert entry.quantization is not None
    assert entry.n_params is not None
    assert "completion" in entry.capabilities
    preset = entry.preset
    assert (preset.template, preset.system) == ("{{ .Prompt }}", "You are terse.")
    assert preset.parameters == {"num_ctx": 512, "stop": ["</s>"]}
    assert preset.messages == ({"role": "user", "content": "hi"},)
    assert preset.licenses == ("MIT", "and another")


def test_the_host_that_the_store_was_filled_from_is_left_out_of_the_names(tmp_path: Path, gguf: bytes) -> None:
    for name in ("library/a/latest", "me/b/x"):
        put_model(tmp_path, f"{HOST}/{name}", [("model", gguf)])
    put_model(tmp_path, "hub.example.org/user/repo/Q4_K_M", [("model", gguf)])
    put_model(tmp_path, "local/library/own/latest", [("model", gguf)])
    assert list(by_id(tmp_path)) == ["a:latest", "hub.example.org/user/repo:Q4_K_M", "me/b:x", "own:latest"]
    set_by_hand = list(by_id(tmp_path, "https://hub.example.org"))
    assert set_by_hand == ["own:latest", f"{HOST}/library/a:latest", f"{HOST}/me/b:x", "user/repo:Q4_K_M"]


def test_two_models_of_one_short_name_are_both_there(tmp_path: Path, gguf: bytes) -> None:
    put_model(tmp_path, f"{HOST}/library/a/latest", [("model", gguf)])
    put_model(tmp_path, "local/library/a/latest", [("model", gguf)])
    assert len(by_id(tmp_path)) == 2


def test_what_is_broken_is_listed_with_its_reason_and_hides_nothing(tmp_path: Path, gguf: bytes) -> None:
    names = ("good", "cut", "torn", "lost", "short", "parts", "text", "empty", "deep")
    paths = {name: put_model(tmp_path, f"{HOST}/library/{name}/1", [("model", gguf + name.encode())]) for name in names}
    paths["cut"].write_text(paths["cut"].read_text()[:50])
    paths["torn"].write_text(json.dumps({"layers": [{"digest": "sha256:../../../etc/passwd", "size": 1}]}))
    (tmp_path / "blobs" / digest_of(gguf + b"lost").replace(":", "-")).unlink()
    (tmp_path / "blobs" / digest_of(gguf + b"short").replace(":", "-")).write_bytes(gguf)
    put_model(tmp_path, f"{HOST}/library/parts/1", [("model", gguf), ("model", gguf + b"2")])
    put_model(tmp_path, f"{HOST}/library/text/1", [("model", b"no GGUF")])
    put_model(tmp_path, f"{HOST}/library/empty/1", [("template", b"x")])
    paths["deep"].write_text("[" * 100_000)
    (tmp_path / "manifests" / HOST / "library" / "good" / ".DS_Store").write_text("x")
    (tmp_path / "manifests" / HOST / "library" / "stray").write_text("x")
    found = {model_id.partition(":")[0]: entry.problem for model_id, entry in by_id(tmp_path).items()}
    assert found.pop("good") is None
    said = {
        "cut": "is damaged (it is no JSON)",
        "torn": "has no sha256 digest",
        "lost": "No such file",
        "short": "are due: pull or create short:1 again",
        "parts": "its 2 parts have no names by which they are found",
        "text": "not a GGUF file",
        "empty": "names 0 GGUF models",
        "deep": "it is no JSON",
    }
    assert found.keys() == said.keys()
    for name, words in said.items():
        assert words.lower() in (found[name] or "").lower(), name


def test_a_projector_and_an_adapter_come_along(tmp_path: Path, gguf: bytes, chat_model: Path) -> None:
    companion_models.write_projector(tmp_path / "mmproj.gguf")
    companion_models.write_lora(tmp_path / "adapter.gguf", chat_model)
    projector, adapter = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("mmproj", "adapter"))
    put_model(tmp_path / "s", f"{HOST}/library/a/1", [("model", gguf), ("projector", projector), ("adapter", adapter)])
    entry = by_id(tmp_path / "s")["a:1"]
    blobs = tmp_path / "s" / "blobs"
    assert entry.mmproj == str(blobs / digest_of(projector).replace(":", "-"))
    assert entry.adapters == (str(blobs / digest_of(adapter).replace(":", "-")),)
    assert "vision" in entry.capabilities


def test_texts_that_make_no_sense_count_as_not_there(tmp_path: Path, gguf: bytes) -> None:
    layers = [("model", gguf), ("params", b"[1]"), ("messages", b"{"), ("system", b"\xff\xfe")]
    put_model(tmp_path, f"{HOST}/library/a/1", layers)
    entry = by_id(tmp_path)["a:1"]
    assert entry.problem is None
    assert (entry.preset.parameters, entry.preset.messages) == ({}, ())


def test_a_store_that_is_not_there_is_empty_and_not_made(tmp_path: Path) -> None:
    assert by_id(tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


def test_models_are_found_by_any_spelling_of_their_names(tmp_path: Path, gguf: bytes) -> None:
    put_model(tmp_path, f"{HOST}/library/Mixed/latest", [("model", gguf)])
    catalogue = Catalogue()
    catalogue.replace(scan(StoreFolder(tmp_path), read_model))
    for name in ("Mixed", "mixed", "MIXED:latest", "Mixed:LATEST", f"{HOST}/library/mixed"):
        found = catalogue.find(name)
        assert found is not None
        assert found.id == "Mixed:latest"
    assert catalogue.find("mixed:1b") is None
    assert catalogue.find("../Mixed") is None


def test_the_stamp_changes_with_every_change_and_only_then(tmp_path: Path, gguf: bytes) -> None:
    folder = StoreFolder(tmp_path)
    empty = folder.stamp()
    path = put_model(tmp_path, f"{HOST}/library/a/1", [("model", gguf)])
    one = folder.stamp()
    assert folder.stamp() == one != empty
    put_blob(tmp_path, b"not of any model yet")
    assert folder.stamp() == one
    shutil.copy(path, path.with_name("2"))
    two = folder.stamp()
    assert two != one
    path.unlink()
    assert folder.stamp() not in {empty, one, two}


def test_a_template_with_a_place_for_what_comes_after_makes_a_model_that_inserts(tmp_path: Path, gguf: bytes) -> None:
    config = json.dumps({"renderer": "looks"}).encode()
    for name, template, description in (
        ("a", b"{{ .Suffix }}", b"{}"),
        ("b", b"x", b"{}"),
        ("c", b"{{ .Suffix }}", config),
    ):
        layers = [("model", gguf), ("template", template)]
        put_model(tmp_path, f"{HOST}/library/{name}/1", layers, description)
    assert {name for name, entry in by_id(tmp_path).items() if "insert" in entry.capabilities} == {"a:1"}

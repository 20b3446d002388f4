"""Which files of a folder are models, and how they are called."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from planner.model import read_model
from planner.types import Role
from supervisor.core.types import ModelId
from supervisor.models.catalogue import Catalogue, ModelEntry, scan


def ids(entries: tuple[ModelEntry, ...]) -> list[str]:
    return [entry.id for entry in entries]


def test_a_model_is_called_by_its_path_below_the_folder(
    tmp_path: Path, chat_model: Path, embedding_model: Path
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.copy(chat_model, tmp_path / "deep" / "er" / "Chat.Q4_K.gguf")
    shutil.copy(embedding_model, tmp_path / "embed.gguf")
    (tmp_path / "notes.txt").write_text("no model")
    chat, embed = scan(tmp_path, read_model)
    assert (chat.id, chat.role, chat.architecture) == ("deep/er/Chat.Q4_K", Role.CHAT, "llama")
    assert chat.file_bytes == chat_model.stat().st_size
    assert (embed.id, embed.role) == ("embed", Role.EMBEDDING)


def test_a_split_model_is_one_model_and_a_missing_part_is_said(tmp_path: Path, chat_model: Path) -> None:
    shutil.copy(chat_model, tmp_path / "whole-00001-of-00002.gguf")
    shutil.copy(chat_model, tmp_path / "whole-00002-of-00002.gguf")
    shutil.copy(chat_model, tmp_path / "headless-00002-of-00002.gguf")
    assert ids(scan(tmp_path, read_model)) == ["headless", "whole"]


def test_a_projector_belongs_to_the_model_beside_it(tmp_path: Path, chat_model: Path) -> None:
    for name in ("one/model.gguf", "one/mmproj-F16.gguf", "two/a.gguf", "two/b.gguf", "two/mmproj-b.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(chat_model, tmp_path / name)
    found = {str(entry.id): entry.mmproj for entry in scan(tmp_path, read_model)}
    assert found == {
        "one/model": str(tmp_path / "one/mmproj-F16.gguf"),
        "two/a": None,
        "two/b": str(tmp_path / "two/mmproj-b.gguf"),
    }


def test_what_cannot_be_served_is_listed_with_the_reason(tmp_path: Path, chat_model: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    (root / "noise.gguf").write_bytes(b"noise")
    (root / "lost.gguf").symlink_to(root / "nowhere.gguf")
    (root / "round.gguf").symlink_to(root / "round.gguf")
    shutil.copy(chat_model, root / "real.gguf")
    problems = {str(entry.id): entry.problem for entry in scan(root, read_model)}
    assert problems.pop("real") is None
    said = {"noise": "noise.gguf", "lost": "lost.gguf is a link that leads to", "round": "round.gguf .* in a circle"}
    assert problems.keys() == said.keys()
    for name, pattern in said.items():
        assert re.search(pattern, problems[name] or "")


def test_links_to_files_and_folders_elsewhere_are_served_under_their_own_names(
    tmp_path: Path, chat_model: Path
) -> None:
    """As operators keep them: a store on another disk, linked piece by piece into the models folder."""
    root, store = tmp_path / "models", tmp_path / "store"
    (store / "deep").mkdir(parents=True)
    (root / "own").mkdir(parents=True)
    for path in (store / "deep/a.gguf", store / "blob-of-b", root / "own/c.gguf"):
        shutil.copy(chat_model, path)
    (root / "b.gguf").symlink_to(store / "blob-of-b")
    (root / "linked").symlink_to(store)
    (root / "also-own").symlink_to(root / "own")
    (store / "back").symlink_to(root)
    (store / "itself").symlink_to(store / "itself")
    assert ids(scan(root, read_model)) == ["b", "linked/deep/a", "own/c"]
    assert all(entry.problem is None for entry in scan(root, read_model))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "own/../c", "./c", "c.gguf", "c\0", "", "."])
def test_no_name_that_a_client_sends_is_taken_for_a_path(tmp_path: Path, chat_model: Path, name: str) -> None:
    root = tmp_path / "models"
    root.mkdir()
    shutil.copy(chat_model, root / "c.gguf")
    shutil.copy(chat_model, tmp_path / "secret.gguf")
    catalogue = Catalogue()
    catalogue.replace(scan(root, read_model))
    assert catalogue.find("c") is not None
    assert catalogue.find(name) is None


def test_latest_is_taken_off_only_where_no_model_is_called_so() -> None:
    entries = {name: ModelEntry(ModelId(name), f"/m/{name}.gguf", 1, 0.0) for name in ("a", "b", "b:latest")}
    catalogue = Catalogue()
    catalogue.replace(tuple(entries.values()))
    found = [catalogue.find(name) for name in ("a", "a:latest", "b:latest", "c:latest")]
    assert found == [entries["a"], entries["a"], entries["b:latest"], None]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "nowhere", read_model)
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(OSError, match="symbolic links"):
        scan(tmp_path / "round", read_model)


def test_closest_names_ignore_case_and_leave_out_what_is_unlike() -> None:
    catalogue = Catalogue()
    names = ("Llama-3.1-8B", "Llama-3.2-1B", "qwen3")
    catalogue.replace(tuple(ModelEntry(name, "/m", 1, 0.0) for name in names))  # type: ignore[arg-type]
    assert catalogue.closest("llama-3.1-8b") == ("Llama-3.1-8B", "Llama-3.2-1B")
    assert catalogue.closest("zzz") == ()

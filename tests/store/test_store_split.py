"""Split models in a store: each part a blob, all of them found by llama.cpp, and nothing left of them in the end."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_models
from aiohttp import web
from docker_registry import RegistryServer
from store_layout import HOST, digest_of, put_blob, put_model, said
from web_server import ranged, web_server

from planner.model import read_model
from supervisor.api.store import BadCreate, CreateRequest, RegistryFailed
from supervisor.models.catalogue import ModelEntry
from supervisor.store import parts
from supervisor.store.folder import StoreFolder
from supervisor.store.listing import scan
from supervisor.store.store import ModelStore

pytestmark = [pytest.mark.anyio, pytest.mark.llama]

N_PARTS = 3


@pytest.fixture(scope="session")
def shards(chat_model: Path, llama_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Return a model's files as llama.cpp splits it."""
    files = tiny_models.split(chat_model, tmp_path_factory.mktemp("shards"), llama_tools / "llama-gguf-split", N_PARTS)
    assert len(files) == N_PARTS
    return files


def sent(folder: StoreFolder, shards: Sequence[Path]) -> dict[str, str]:
    return {shard.name: put_blob(folder.root, shard.read_bytes()) for shard in shards}


def only_model(folder: StoreFolder) -> ModelEntry:
    (entry,) = scan(folder, read_model)
    return entry


def leads_to(entry: ModelEntry) -> Path:
    return Path(entry.path).resolve()


def links(folder: StoreFolder) -> list[Path]:
    return sorted((folder.root / parts.LINKS).glob("*"))


async def test_parts_that_were_sent_in_any_order_become_a_model_that_is_found_by_its_parts_names(
    shards: tuple[Path, ...], chat_model: Path, store: ModelStore, folder: StoreFolder
) -> None:
    assert (await said(store.create(CreateRequest("big", files=sent(folder, shards[::-1])))))[-1] == "success"
    entry, whole = only_model(folder), read_model(str(chat_model)).summary
    assert entry.problem is None
    assert entry.n_params == whole.n_params
    assert Path(entry.path).name == "model-00001-of-00003.gguf"
    assert leads_to(entry) == folder.blob(digest_of(shards[0].read_bytes()))
    assert entry.file_bytes > sum(shard.stat().st_size for shard in shards)
    moved = StoreFolder(folder.root.rename(folder.root.with_name("moved")))
    assert only_model(moved).problem is None


async def test_a_copy_needs_the_same_links_and_the_last_delete_takes_them(
    shards: tuple[Path, ...], store: ModelStore, folder: StoreFolder
) -> None:
    await said(store.create(CreateRequest("big", files=sent(folder, shards))))
    await said(store.create(CreateRequest("child", parent="big", system="Be kind.")))
    assert len(links(folder)) == 1
    await store.delete("big")
    assert only_model(folder).problem is None
    (folder.root / parts.LINKS / "somebody-elses").write_text("x")
    await store.delete("child")
    (folder.root / parts.LINKS / "somebody-elses").unlink()
    assert links(folder) == list(folder.blobs.iterdir()) == []


@pytest.mark.parametrize(
    "kept,problem",
    [
        ((0, 2), "all its 3 parts, and part 2 is missing"),
        ((1,), "all its 3 parts, and part 1, 3 is missing"),
        ((0, 1, 2, "whole"), "made of one GGUF model, or of the parts of one, not of 4"),
        (("whole", "other"), "made of one GGUF model, or of the parts of one, not of 2"),
    ],
)
async def test_what_is_not_all_the_parts_of_one_model_is_refused(
    kept: tuple[int | str, ...],
    problem: str,
    shards: tuple[Path, ...],
    gguf: bytes,
    store: ModelStore,
    folder: StoreFolder,
) -> None:
    files = {"whole": put_blob(folder.root, gguf), "other": put_blob(folder.root, gguf + b"2")}
    files |= dict(enumerate(sent(folder, shards).values()))  # type: ignore[arg-type]
    with pytest.raises(BadCreate, match=problem):
        await said(store.create(CreateRequest("big", files={str(one): files[one] for one in kept})))  # type: ignore[index]
    assert scan(folder, read_model) == ()


async def test_the_address_of_any_part_fetches_them_all(
    shards: tuple[Path, ...], store: ModelStore, folder: StoreFolder
) -> None:
    beside = {f"/u/r/resolve/main/{shard.name}": shard.read_bytes() for shard in shards}

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.query_string == "key=1"
        data = beside.get(request.path)
        return web.Response(status=404) if data is None else ranged(data, request)

    async with web_server(answer) as server:
        address = f"{server.url}/u/r/resolve/main/{shards[1].name}?key=1"
        assert (await said(store.pull(address, insecure=True)))[-1] == "success"
        assert only_model(folder).problem is None
        assert only_model(folder).id == f"{server.host}/u/r:big"
        beside.popitem()
        with pytest.raises(RegistryFailed, match="is not on"):
            await said(store.pull(address.replace("/r/", "/s/"), insecure=True))


async def test_a_registrys_manifest_of_parts_is_a_model(
    shards: tuple[Path, ...], registry: RegistryServer, tmp_path: Path, free_environment: dict[str, str]
) -> None:
    folder = StoreFolder(tmp_path / "pulled", f"http://{registry.host}")
    registry.push("library/split:1", [("model", shard) for shard in shards] + [("config", b"{}")])
    async with ModelStore(folder) as store:
        assert (await said(store.pull("split:1", insecure=False)))[-1] == "success"
    assert only_model(folder).problem is None


async def test_a_manifest_of_two_models_is_told_from_one_of_parts(gguf: bytes, folder: StoreFolder) -> None:
    put_model(folder.root, f"{HOST}/library/two/1", [("model", gguf), ("model", gguf + b"2")])
    (name,) = folder.names()
    parts.link(folder, folder.read(name).of_kind("model"))
    assert "names 2 GGUF models, and the first is a model of 1" in (only_model(folder).problem or "")


async def test_a_split_file_of_the_folder_comes_with_its_parts(
    shards: tuple[Path, ...], folder: StoreFolder, tmp_path: Path, free_environment: dict[str, str]
) -> None:
    (tmp_path / "models").mkdir()
    first = Path(shutil.copy(shards[0], tmp_path / "models"))
    for shard in shards[1:]:
        shutil.copy(shard, first.parent)
    async with ModelStore(folder, files_of=lambda name: (str(first),) if name == "big" else ()) as store:
        await said(store.create(CreateRequest("own", parent="big", system="Be kind.")))
    assert only_model(folder).problem is None


def test_a_name_that_claims_absurdly_many_parts_is_refused() -> None:
    with pytest.raises(BadCreate, match="of which there may be 1000"):
        parts.names_of("big-00001-of-99999")
    assert parts.names_of("big-1-of-2") == ("big-1-of-2", ("big-1-of-2",))

"""GGUF files of a model hub, fetched by their address in ranges and kept as models."""

from __future__ import annotations

import pytest
from aiohttp import web
from store_layout import digest_of, said
from web_server import WebServer, ranged, web_server
from yarl import URL

from planner.model import read_model
from supervisor.api.store import BadCreate, BadModelName, RegistryFailed
from supervisor.store import hub
from supervisor.store.folder import StoreFolder
from supervisor.store.listing import scan
from supervisor.store.store import ModelStore

pytestmark = pytest.mark.anyio
FILE = "/user/Repo.GGUF/resolve/main/tiny-Q4_K_M.gguf"


async def fetched(store: ModelStore, server: WebServer, path: str = FILE) -> list[str]:
    return await said(store.pull(server.url + path, insecure=True))


async def test_a_file_of_a_hub_becomes_a_model_that_is_verified_by_the_tag_of_its_redirect(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == FILE:
            tag = {"X-Linked-Etag": f'"{digest_of(gguf)[7:]}"', "Location": "/cdn/1"}
            return web.Response(status=302, headers=tag)
        return ranged(gguf, request)

    async with web_server(answer) as server:
        steps = await fetched(store, server)
    assert steps[-1] == "success"
    (entry,) = scan(folder, read_model)
    assert entry.id == f"{server.host}/user/Repo.GGUF:tiny-Q4_K_M"
    assert entry.problem is None
    assert entry.path == str(folder.blob(digest_of(gguf)))
    assert folder.blob(digest_of(gguf)).read_bytes() == gguf


async def test_a_file_with_another_digest_than_its_hub_says_is_refused(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return ranged(gguf, request, ETag=f'"{digest_of(b"another")[7:]}"')

    async with web_server(answer) as server:
        with pytest.raises(RegistryFailed, match="digest mismatch"):
            await fetched(store, server)
    assert scan(folder, read_model) == ()
    assert list(folder.blobs.iterdir()) == []


async def test_a_file_of_any_server_is_fetched_with_ranges_or_without(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    async def with_ranges(request: web.Request) -> web.StreamResponse:
        return ranged(gguf, request, ETag='"v1"')

    async def without(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=gguf)

    for answer in (with_ranges, without):
        async with web_server(answer) as server:
            assert (await fetched(store, server, "/tiny.gguf"))[-1] == "success"
            assert (await said(store.pull(f"{server.url}/tiny.gguf", insecure=True)))[-1] == "success"
            await store.delete(f"{server.host}/library/tiny")
    assert scan(folder, read_model) == ()
    assert list(folder.blobs.iterdir()) == []


async def test_what_is_no_model_is_refused_once_it_is_there_and_not_kept(
    store: ModelStore, folder: StoreFolder
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return ranged(b"<html>sign in first</html>", request)

    async with web_server(answer) as server:
        with pytest.raises(BadCreate, match="no GGUF file"):
            await fetched(store, server)
    assert list(folder.blobs.iterdir()) == []


async def test_plain_http_is_refused_unless_it_is_allowed(store: ModelStore) -> None:
    with pytest.raises(BadModelName, match="insecure protocol http"):
        await said(store.pull("http://127.0.0.1:1/a.gguf", insecure=False))


@pytest.mark.parametrize("text", ["https:///a.gguf", "https://[/a.gguf", "https://h:99999/a.gguf"])
async def test_what_is_no_address_is_refused(text: str, store: ModelStore, folder: StoreFolder) -> None:
    with pytest.raises(BadModelName, match="invalid model name"):
        await said(store.pull(text, insecure=False))
    assert not folder.root.exists()


@pytest.mark.parametrize(
    "address,name",
    [
        ("https://h.org/user/repo/resolve/main/q/file.Q8_0.gguf", "h.org/user/repo:file.Q8_0"),
        ("https://h.org:8443/file.gguf?download=true", "h.org:8443/library/file:latest"),
        ("https://h.org/a%2F..%2F..%2Fetc/b/c.gguf", "h.org/a/_:c"),
        ("https://h.org/user/repo/resolve/main/q/big-00002-of-00003.gguf", "h.org/user/repo:big"),
        ("https://h.org/../../etc/.hidden/x/..gguf", "h.org/etc/hidden:_"),
    ],
)
def test_the_name_of_a_file_comes_from_its_address_and_is_always_one(address: str, name: str) -> None:
    assert str(hub.name_of(URL(address))) == name


async def test_what_may_be_secret_in_an_address_is_not_told(store: ModelStore) -> None:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=404)

    async with web_server(answer) as server:
        address = f"http://me:hidden@{server.host}/a.gguf?token=hidden"
        with pytest.raises(RegistryFailed, match="file does not exist") as caught:
            await said(store.pull(address, insecure=True))
    assert "hidden" not in str(caught.value)

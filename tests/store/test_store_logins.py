"""Private registries and hubs: a login is shown to whom it is for, and to nobody else."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from docker_registry import BASIC, PASSWORD, USER, RegistryServer, private_registry
from store_layout import said
from web_server import ranged, web_server

from supervisor.api.store import RegistryFailed
from supervisor.store.folder import StoreFolder
from supervisor.store.logins import Logins
from supervisor.store.store import ModelStore

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("free_environment")]


def basic(password: str) -> str:
    return base64.b64encode(f"{USER}:{password}".encode()).decode()


@pytest.fixture
def logins(tmp_path: Path) -> Logins:
    """Return a file of logins that is not there yet."""
    return Logins(tmp_path / "config.json")


def keep(logins: Logins, host: str, **entry: Any) -> None:
    logins.file.write_text(json.dumps({"auths": {"elsewhere.example": {"auth": "eDp5"}, host: entry}}))


async def pulled(name: str, root: Path, logins: Logins, registry: str | None = None, *, insecure: bool = False) -> str:
    async with ModelStore(StoreFolder(root, registry), logins=logins) as store:
        return (await said(store.pull(name, insecure=insecure)))[-1]


@pytest.fixture
def private(registry: RegistryServer, gguf: bytes, tmp_path: Path) -> Iterator[RegistryServer]:
    """Return a registry that lets nobody in without a password, and holds a model."""
    with private_registry(tmp_path / "private") as server:
        server.push("library/own:1", {"model": gguf, "config": b"{}"}, authorization=f"Basic {BASIC}")
        yield server


@pytest.mark.parametrize(
    "entry", [{"auth": BASIC}, {"username": USER, "password": PASSWORD}], ids=["as docker writes it", "in the open"]
)
async def test_a_private_registry_lets_us_in_with_the_login_of_the_file(
    entry: dict[str, str], private: RegistryServer, logins: Logins, tmp_path: Path
) -> None:
    """A login counts from the moment that it was made."""
    registry = f"http://{private.host}"
    with pytest.raises(RegistryFailed, match=r"asks for a login \(Basic\): docker login HOST") as refused:
        await pulled("own:1", tmp_path / "store", logins, registry)
    assert "\n" not in str(refused.value)
    keep(logins, f"https://{private.host.upper()}/v1/", **entry)
    assert await pulled("own:1", tmp_path / "store", logins, registry) == "success"


async def test_a_login_that_is_refused_is_said_to_have_been_shown(
    private: RegistryServer, logins: Logins, tmp_path: Path
) -> None:
    keep(logins, private.host, auth=basic("wrong"))
    with pytest.raises(RegistryFailed, match=r"answers 401 .*the login was shown") as refused:
        await pulled("own:1", tmp_path / "store", logins, f"http://{private.host}")
    assert "wrong" not in str(refused.value)


async def test_no_login_goes_over_plain_http_because_a_client_wishes_so(
    private: RegistryServer, logins: Logins, tmp_path: Path
) -> None:
    keep(logins, private.host, auth=BASIC)
    with pytest.raises(RegistryFailed, match="asks for a login"):
        await pulled(f"{private.host}/library/own:1", tmp_path / "store", logins, insecure=True)


async def test_a_token_service_is_shown_the_login_and_the_registry_the_token(
    logins: Logins, gguf: bytes, tmp_path: Path
) -> None:
    """As hosted registries have it; and whoever keeps a registry's token shows that."""
    seen: list[tuple[str, str]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        shown = request.headers.get("Authorization", "")
        seen.append((request.path.rpartition("/")[2], shown))
        if request.path == "/token":
            return web.json_response({"token": "given"} if shown == f"Basic {BASIC}" else {}, status=200)
        challenge = f'Bearer realm="{server.url}/token",service="s",scope="repository:library/m:pull"'
        return web.Response(status=401 if shown != "Bearer given" else 404, headers={"WWW-Authenticate": challenge})

    async with web_server(answer) as server:
        for entry in ({"auth": BASIC}, {"registrytoken": "given"}):
            keep(logins, server.host, **entry)
            with pytest.raises(RegistryFailed, match="is not on"):
                await pulled("m:1", tmp_path / "store", logins, server.url)
    assert seen == [
        ("1", ""),
        ("token", f"Basic {BASIC}"),
        ("1", "Bearer given"),
        ("1", ""),
        ("1", "Bearer given"),
    ]


@pytest.mark.parametrize(
    "entry,shown", [({"registrytoken": "t0ken"}, "Bearer t0ken"), ({"auth": BASIC}, f"Basic {BASIC}")]
)
async def test_a_hub_is_shown_a_login_and_where_it_leads_nothing_is(
    entry: dict[str, str], shown: str, logins: Logins, gguf: bytes, tmp_path: Path
) -> None:
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        assert "Authorization" not in request.headers
        return ranged(gguf, request)

    async with web_server(elsewhere) as cdn:

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Authorization") != shown:
                return web.Response(status=401)
            raise web.HTTPFound(f"{cdn.url}/file")

        async with web_server(answer) as hub:
            name = f"{hub.url}/user/repo/resolve/main/own.gguf"
            with pytest.raises(RegistryFailed, match=r"answers 401 .*if it wants a login"):
                await pulled(name, tmp_path / "store", logins, hub.url, insecure=True)
            keep(logins, hub.host, **entry)
            assert await pulled(name, tmp_path / "store", logins, hub.url, insecure=True) == "success"


@pytest.mark.parametrize(
    "text,problem", [("{", "is no JSON"), ('{"auths": {"h": {"auth": "not base64!"}}}', "is no base64"), ("[]", None)]
)
def test_a_file_that_makes_no_sense_is_said_without_its_secrets(text: str, problem: str | None, logins: Logins) -> None:
    logins.file.write_text(text)
    if problem is None:
        assert logins.of("h") is None
        return
    with pytest.raises(RegistryFailed, match=problem) as refused:
        logins.of("h")
    assert "not base64!" not in str(refused.value)


def test_a_login_is_never_written_out(logins: Logins) -> None:
    keep(logins, "h", auth=BASIC)
    assert BASIC not in repr(logins.of("h"))
    assert Logins(logins.file.with_name("none")).of("h") is None
    keep(logins, "h")
    assert logins.of("h") is None


async def test_what_a_users_netrc_says_goes_to_nobody(
    logins: Logins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    async def answer(request: web.Request) -> web.StreamResponse:
        assert "Authorization" not in request.headers
        return web.Response(status=404)

    async with web_server(answer) as server:
        with pytest.raises(RegistryFailed, match="is not on"):
            await pulled("m:1", tmp_path / "store", logins, server.url)


async def test_a_proxy_of_the_environment_is_asked_in_a_servers_place(
    logins: Logins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=404)

    async with web_server(answer) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        for bypassed, problem in (("", "is not on"), ("127.0.0.1", "Cannot connect")):
            monkeypatch.setenv("no_proxy", bypassed)
            with pytest.raises(RegistryFailed, match=problem):
                await pulled("m:1", tmp_path / "store", logins, "http://127.0.0.1:1")
            assert len(proxy.requests) == 1

"""How a pull gets on with servers: tokens, redirects, no ranges, breaks, and servers that mean it ill."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from docker_registry import registry_server
from store_layout import CONFIG, LAYER, MANIFEST, digest_of, said
from web_server import WebServer, ranged, web_server
from yarl import URL

from supervisor.api.store import RegistryFailed, StoreFull
from supervisor.store.fetching import Fetcher, open_session
from supervisor.store.folder import StoreFolder
from supervisor.store.store import ModelStore

MODEL = bytes(range(256)) * 8192  # 2 MiB
CONFIG_BLOB = b"{}"
BLOBS = {digest_of(MODEL): MODEL, digest_of(CONFIG_BLOB): CONFIG_BLOB}

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("free_environment")]

Answers = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


def manifest(*, size_bytes: int = len(MODEL), digest: str = digest_of(MODEL)) -> bytes:
    layer = {"mediaType": f"{LAYER}model", "digest": digest, "size": size_bytes}
    config = {"mediaType": CONFIG, "digest": digest_of(CONFIG_BLOB), "size": len(CONFIG_BLOB)}
    return json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}).encode()


def registry_that(
    answers: Answers, document: bytes | None = None
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a registry that answers as this function says, and where it says nothing as one should."""

    async def answer(request: web.Request) -> web.StreamResponse:
        said_so = await answers(request)
        if said_so is not None:
            return said_so
        if "/manifests/" in request.path:
            return web.Response(body=document or manifest(), content_type=MANIFEST)
        return ranged(BLOBS[request.path.rpartition("/")[2]], request)

    return answer


async def nothing(_request: web.Request) -> None:
    return None


async def pulled(server: WebServer, root: Path) -> list[str]:
    async with ModelStore(StoreFolder(root, server.url)) as store:
        return await said(store.pull("m:1", insecure=False))


async def assert_refused(server: WebServer, root: Path, pattern: str, error: type[Exception] = RegistryFailed) -> None:
    """Hold that the pull fails with this line, and that the model is not there."""
    with pytest.raises(error, match=pattern) as caught:
        await pulled(server, root)
    assert "\n" not in str(caught.value)
    assert list(StoreFolder(root).names()) == []
    assert not StoreFolder(root).blob(digest_of(MODEL)).exists()


async def test_a_redirect_is_followed_and_takes_no_token_along(tmp_path: Path) -> None:
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        return ranged(MODEL, request)

    async with web_server(elsewhere) as storage:

        async def answers(request: web.Request) -> web.StreamResponse | None:
            if request.path == "/token":
                return web.json_response({"token": "secret"})
            if request.headers.get("Authorization") != "Bearer secret":
                realm = f'Bearer realm="{server.url}/token",service="s",scope="repository:library/m:pull"'
                return web.Response(status=401, headers={"WWW-Authenticate": realm})
            if request.path.endswith(digest_of(MODEL)):
                return web.Response(status=307, headers={"Location": f"{storage.url}/signed?by=us"})
            return None

        async with web_server(registry_that(answers)) as server:
            assert (await pulled(server, tmp_path))[-1] == "success"
        (token,) = [one for one in server.requests if one.path == "/token"]
        assert dict(token.query) == {"service": "s", "scope": "repository:library/m:pull"}
    assert storage.requests
    assert all("Authorization" not in one.headers for one in storage.requests)
    assert StoreFolder(tmp_path).blob(digest_of(MODEL)).read_bytes() == MODEL


@pytest.mark.parametrize("model", [MODEL, MODEL * 33], ids=["one part", "parts at once"])
async def test_a_server_that_knows_no_ranges_is_read_from_the_start(model: bytes, tmp_path: Path) -> None:
    digest = digest_of(model)

    async def answers(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=model) if request.path.endswith(digest) else None

    document = manifest(size_bytes=len(model), digest=digest)
    async with web_server(registry_that(answers, document)) as server:
        assert (await pulled(server, tmp_path))[-1] == "success"
    assert StoreFolder(tmp_path).blob(digest).read_bytes() == model


async def test_counts_without_their_bytes_are_not_believed(tmp_path: Path) -> None:
    """As a power cut, or a kill between two renames, may leave them."""
    folder = StoreFolder(tmp_path)
    folder.blobs.mkdir()
    counts = {"total": len(MODEL), "part": len(MODEL), "done": [len(MODEL)]}
    partial = folder.blobs / f"partial-{digest_of(MODEL).replace(':', '-')}"
    for text in (json.dumps(counts), "{", "[]", '{"total": 1, "part": 0, "done": ["x"]}'):
        partial.with_name(f"{partial.name}.parts").write_text(text)
        async with web_server(registry_that(nothing)) as server:
            assert (await pulled(server, tmp_path))[-1] == "success"
        folder.blob(digest_of(MODEL)).unlink()


async def test_an_answer_that_breaks_off_is_taken_up_where_it_ended(tmp_path: Path) -> None:
    async def answers(request: web.Request) -> web.StreamResponse | None:
        if not request.path.endswith(digest_of(MODEL)):
            return None
        start = request.http_range.start or 0
        if start:
            return None
        response = web.StreamResponse(status=206, headers={"Content-Range": f"bytes 0-{len(MODEL) - 1}/{len(MODEL)}"})
        response.content_length = len(MODEL)
        await response.prepare(request)
        await response.write(MODEL[: len(MODEL) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    async with web_server(registry_that(answers)) as server:
        assert (await pulled(server, tmp_path))[-1] == "success"
    asked = [one.http_range.start for one in server.requests if one.path.endswith(digest_of(MODEL))]
    assert asked[0] == 0
    assert len(asked) == 2
    assert 0 < asked[1] <= len(MODEL) // 2


async def test_a_server_that_falls_silent_is_asked_anew_for_the_rest(tmp_path: Path) -> None:
    silent = asyncio.Event()

    async def answers(request: web.Request) -> web.StreamResponse | None:
        if not request.path.endswith(digest_of(MODEL)) or request.http_range.start:
            return None
        response = web.StreamResponse(status=206, headers={"Content-Range": f"bytes 0-{len(MODEL) - 1}/{len(MODEL)}"})
        await response.prepare(request)
        await response.write(MODEL[: len(MODEL) // 2])
        await silent.wait()
        return response

    async with web_server(registry_that(answers)) as server:
        async with ModelStore(StoreFolder(tmp_path, server.url), stall_s=0.2) as store:
            assert (await said(store.pull("m:1", insecure=False)))[-1] == "success"
        silent.set()
    assert StoreFolder(tmp_path).blob(digest_of(MODEL)).read_bytes() == MODEL


async def test_plain_http_is_not_followed_to_from_where_tls_was_asked_for(tmp_path: Path) -> None:
    """The registry's own address is plain HTTP by its setting; a name of another host is not."""
    async with web_server(registry_that(nothing)) as server, ModelStore(StoreFolder(tmp_path)) as store:
        with pytest.raises(RegistryFailed, match="if it speaks plain HTTP, pull with insecure"):
            await said(store.pull(f"{server.host}/library/m:1", insecure=False))
        async with open_session() as session:
            with pytest.raises(RegistryFailed, match="is plain HTTP, which was not allowed"):
                await Fetcher(session, insecure=False).get(URL(server.url), {}).__aenter__()
    assert server.requests == []


@pytest.mark.parametrize(
    "location,pattern",
    [
        ("file:///etc/passwd", "no address of a web server"),
        ("/again", "redirects more than 5 times"),
        ("http://[", "no address"),
    ],
)
async def test_redirects_that_lead_nowhere_are_refused(location: str, pattern: str, tmp_path: Path) -> None:
    async def answers(_request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=302, headers={"Location": location})

    async with web_server(registry_that(answers)) as server:
        await assert_refused(server, tmp_path, pattern)


async def test_a_link_local_address_is_asked_by_nobody(tmp_path: Path) -> None:
    async with ModelStore(StoreFolder(tmp_path)) as store:
        with pytest.raises(RegistryFailed, match=r"169\.254\.169\.254 is of a private network"):
            await said(store.pull("http://169.254.169.254/library/m:1", insecure=True))


@pytest.mark.parametrize(
    "headers,body",
    [
        ({"Content-Range": f"bytes 5-{len(MODEL) - 1}/{len(MODEL)}"}, MODEL),
        ({"Content-Range": f"bytes 0-{len(MODEL) - 1}/1"}, MODEL),
        ({}, MODEL),
        ({"Content-Range": f"bytes 0-{len(MODEL) - 1}/{len(MODEL)}"}, MODEL + b"more"),
        ({"Content-Range": f"bytes 0-{len(MODEL) - 1}/{len(MODEL)}"}, b"x" + MODEL[1:]),
    ],
    ids=["another start", "another length", "no range", "more bytes", "other bytes"],
)
async def test_a_server_that_sends_what_was_not_asked_for_is_refused(
    headers: dict[str, str], body: bytes, tmp_path: Path
) -> None:
    async def answers(request: web.Request) -> web.StreamResponse | None:
        if request.path.endswith(digest_of(MODEL)):
            return web.Response(status=206, headers=headers, body=body)
        return None

    async with web_server(registry_that(answers)) as server:
        await assert_refused(server, tmp_path, "answers with|sends more bytes|digest mismatch")


@pytest.mark.parametrize(
    "document,pattern",
    [
        (b"no json", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"layers": []}', "is damaged"),
        (manifest(digest="sha256:../../../../../tmp/x"), "no sha256 digest"),
        (manifest(size_bytes=-1), "has no size"),
        (b" " * (5 << 20), "more than 4 MiB"),
    ],
)
async def test_a_manifest_that_is_none_is_refused(document: bytes, pattern: str, tmp_path: Path) -> None:
    async with web_server(registry_that(nothing, document)) as server:
        await assert_refused(server, tmp_path, pattern)


async def test_a_blob_of_an_absurd_size_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async with web_server(registry_that(nothing, manifest(size_bytes=1 << 62))) as server:
        await assert_refused(server, tmp_path, "disk", StoreFull)
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == []


@pytest.mark.parametrize("status", [400, 403, 410])
async def test_a_refusal_is_told_in_the_registrys_words(status: int, tmp_path: Path) -> None:
    async def answers(_request: web.Request) -> web.StreamResponse | None:
        return web.json_response({"errors": [{"code": "DENIED", "message": "not for you"}]}, status=status)

    async with web_server(registry_that(answers)) as server:
        await assert_refused(server, tmp_path, f"answers {status} for .*: not for you")


async def test_a_login_that_we_do_not_have_is_said(tmp_path: Path) -> None:
    async def answers(_request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})

    async with web_server(registry_that(answers)) as server:
        await assert_refused(server, tmp_path, r"asks for a login \(Basic\)")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens, with the real registry


def _run(*command: str, data: bytes = b"") -> bytes:
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Signer:
    """Signs tokens that a registry takes which trusts its certificate."""

    def __init__(self, folder: Path) -> None:
        self._key, self.certificate = folder / "key.pem", folder / "certificate.pem"
        files = ("-keyout", str(self._key), "-out", str(self.certificate))
        _run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "2", *files)

    def token(self, *actions: str) -> str:
        der = _run("openssl", "x509", "-in", str(self.certificate), "-outform", "DER")
        now = int(time.time())
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        claims = {
            "iss": "test",
            "sub": "",
            "aud": "registry",
            "exp": now + 300,
            "nbf": now - 60,
            "iat": now,
            "jti": "1",
        }
        access = [{"type": "repository", "name": "library/guarded", "actions": actions}]
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in (head, {**claims, "access": access}))
        return f"{signed}.{_encoded(_run('openssl', 'dgst', '-sha256', '-sign', str(self._key), data=signed.encode()))}"


async def test_a_registry_that_wants_a_token_is_given_the_one_that_its_service_hands_out(tmp_path: Path) -> None:
    if shutil.which("docker-registry") is None or shutil.which("openssl") is None:
        pytest.skip(
            "no docker-registry or openssl here: no token is asked for (Debian: apt-get install docker-registry)"
        )
    signer = Signer(tmp_path)

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.query["scope"] == "repository:library/guarded:pull"
        return web.json_response({"token": signer.token("pull")})

    async with web_server(answer) as service:
        auth = (
            f"auth: {{token: {{realm: '{service.url}/token', service: registry, issuer: test, "
            f"rootcertbundle: '{signer.certificate}'}}}}\n"
        )
        with registry_server(tmp_path / "registry", auth) as registry:
            blobs: dict[str, bytes | Path] = {"model": MODEL, "config": CONFIG_BLOB}
            registry.push("library/guarded:1", blobs, authorization=f"Bearer {signer.token('pull', 'push')}")
            async with ModelStore(StoreFolder(tmp_path / "store", f"http://{registry.host}")) as store:
                assert (await said(store.pull("guarded:1", insecure=False)))[-1] == "success"
        assert len(service.requests) == 1, "one token serves for all of a pull"

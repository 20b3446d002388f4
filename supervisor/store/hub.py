"""A GGUF file of a model hub, or of any web server, by its address: fetched in ranges, kept as a model.

The address of one part of a split model stands for all of them, which lie beside it under their names.

A server tells the file's length, and mostly what tells its versions apart (``ETag``). Of a hub whose entity tag is the
file's sha256 the file is verified by it; elsewhere TLS and the length are all that vouch for it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import aiohttp
from anyio import to_thread
from yarl import URL

from supervisor.api.store import Progress, RegistryFailed
from supervisor.store import building, manifests, names, parts, writing
from supervisor.store.blobs import Fetch, Tell, Wanted
from supervisor.store.fetching import Fetcher, Transient
from supervisor.store.folder import StoreFolder
from supervisor.store.logins import Login
from supervisor.store.names import ModelName
from supervisor.store.registry import check

SUFFIX: Final = ".gguf"
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LENGTH: Final = re.compile(r"bytes 0-0/(\d{1,19})", re.ASCII)
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_.-]+", re.ASCII)
_LONGEST_PART: Final = 80
_HTTPS_PORT: Final = 443  # a name without a port means it


def is_address(text: str) -> bool:
    """Say whether a client's text is the address of a GGUF file rather than a name."""
    return text.lower().startswith(("http://", "https://")) and text.lower().split("?")[0].endswith(SUFFIX)


def address(text: str) -> URL:
    """Return a client's text as an address. Raises BadModelName."""
    try:
        url = URL(text)
    except ValueError as error:
        raise names.bad_name(text) from error
    if not url.host:
        raise names.bad_name(text)
    return url


def name_of(url: URL) -> ModelName:
    """Return the name that the file at an address gets: of a hub ``host/user/repository:file``. Raises BadModelName."""
    path = [part for part in url.path.split("/") if part]
    stem, _ = parts.names_of(path[-1][: -len(SUFFIX)] if path else "")
    hub = len(path) > 2  # noqa: PLR2004 - user, repository, and what is in it
    namespace, model, tag = (path[0], path[1], stem) if hub else (names.DEFAULT_NAMESPACE, stem, names.DEFAULT_TAG)
    host = f"{url.host}:{url.port}" if url.port not in {None, _HTTPS_PORT} else str(url.host)
    return ModelName(host, _part(namespace).replace(".", "-"), _part(model), _part(tag))


def files_of(url: URL) -> tuple[URL, ...]:
    """Return the addresses of all files of the model that this is a file of. Raises BadCreate."""
    _, stems = parts.names_of(url.name[: -len(SUFFIX)])
    return tuple(url.with_name(stem + SUFFIX).with_query(url.query) for stem in stems) if len(stems) > 1 else (url,)


def _part(text: str) -> str:
    """Return a text as a part of a name: what names may not have becomes a dash."""
    return _NOT_IN_NAMES.sub("-", text).lstrip(".-")[:_LONGEST_PART] or "_"


@dataclass(frozen=True, slots=True)
class _File:
    """What the server says of the file. ``sha256`` is None where it does not say."""

    size_bytes: int
    etag: str
    sha256: str | None


async def pull_file(folder: StoreFolder, fetcher: Fetcher, url: URL, login: Login | None, tell: Tell) -> None:
    """Return once the file is in the store as a model, whole, with its other parts. Raises StoreError, OSError.

    ``login`` is shown at once: a hub that wants one does not say so in a way that all of them share.
    """
    shown = {} if login is None else {"Authorization": login.value}
    name = name_of(url)
    tell(Progress("pulling manifest"))
    try:
        wanted = [await _wanted(fetcher, file, shown) for file in files_of(url)]
    except Transient as error:
        raise RegistryFailed(str(error)) from error
    async with Fetch(folder, tell) as fetch:
        fetched = await fetch.blobs(wanted)
        tell(Progress(f"writing manifest of {name.short(folder.default_host)}"))
        replaced = await to_thread.run_sync(_keep, folder, name, fetched)
    await to_thread.run_sync(writing.collect, folder, replaced)
    tell(Progress("success"))


async def _wanted(fetcher: Fetcher, url: URL, shown: Mapping[str, str]) -> Wanted:
    """Return what there is to get at an address. Raises Transient, RegistryFailed."""
    file = await _ask(fetcher, url, shown)

    @asynccontextmanager
    async def source(span: str) -> AsyncIterator[aiohttp.ClientResponse]:
        same = {} if not file.etag or file.etag.startswith("W/") else {"If-Range": file.etag}
        async with fetcher.get(url, {"Range": span, **same, **shown}) as answer:
            await check(answer.response, _shown(url), logged_in=bool(shown))
            yield answer.response

    digest = None if file.sha256 is None else f"sha256:{file.sha256}"
    return Wanted(file.size_bytes, source, digest, f"{url}?{file.etag}?{file.size_bytes}")


async def _ask(fetcher: Fetcher, url: URL, shown: Mapping[str, str]) -> _File:
    """Ask for the first byte, which tells how many there are. Raises Transient, RegistryFailed."""
    async with fetcher.get(url, {"Range": "bytes=0-0", **shown}) as answer:
        response = answer.response
        await check(response, _shown(url), logged_in=bool(shown))
        ranged = _LENGTH.fullmatch(response.headers.get("Content-Range", ""))
        size_bytes = int(ranged[1]) if ranged is not None else response.content_length
        etag = response.headers.get("ETag", "")
        tags = (answer.linked.get("X-Linked-Etag", ""), etag)
    if size_bytes is None:
        raise RegistryFailed(f"{url.host} does not say how long {url.name} is")
    sha256 = next((tag.strip('"') for tag in tags if _SHA256.fullmatch(tag.strip('"'))), None)
    return _File(size_bytes, etag, sha256)


def _shown(url: URL) -> str:
    """Return an address for an error line: without the secrets that user and query may be."""
    return str(url.with_user(None).with_query(None))


def _keep(folder: StoreFolder, name: ModelName, digests: tuple[str, ...]) -> set[str]:
    """Make a model of the blobs. Raises BadCreate where they are none, OSError."""
    layers = parts.in_order(folder, tuple(building.gguf_layer(folder, digest) for digest in digests))
    config = building.config_layer(folder, building.facts_of(folder, layers), layers)
    return writing.write_manifest(folder, name, manifests.build(layers, config))

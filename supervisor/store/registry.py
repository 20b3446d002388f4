"""A registry as Docker's protocol speaks it (version 2): manifests and blobs by name, behind tokens or a login."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from yarl import URL

from supervisor.api.store import BadModelName, RegistryFailed
from supervisor.store import names
from supervisor.store.fetching import Answer, Fetcher, Transient, read_answer
from supervisor.store.folder import StoreFolder
from supervisor.store.logins import Login
from supervisor.store.manifests import MANIFEST_TYPE
from supervisor.store.names import ModelName

HOW_TO_LOG_IN: Final = "docker login HOST writes one into the file of PLANNER_REGISTRY_LOGINS, which is shown over TLS"
SHOWN_ERROR: Final = 200  # characters of what a registry says of its failure
OK: Final = frozenset({200, 206})
_NOT_FOUND: Final = 404
_UNAUTHORIZED: Final = 401
_FORBIDDEN: Final = frozenset({401, 403})
_TRY_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')


def is_plain(text: str, *, insecure: bool) -> bool:
    """Say whether a client's text asks for plain HTTP. Raises BadModelName where that was not allowed."""
    plain = text.lower().startswith("http://")
    if plain and not insecure:
        raise BadModelName("insecure protocol http: pull with insecure to allow it")
    return plain


def base_url(folder: StoreFolder, text: str, name: ModelName, *, insecure: bool) -> URL:
    """Return the address of the registry that a name is of. Raises BadModelName where that is none, or forbidden."""
    if name.host == names.LOCAL_HOST:
        raise BadModelName(
            f"model '{name.short(names.LOCAL_HOST)}' is of no registry: put the registry's host before the name, or "
            "set PLANNER_REGISTRY"
        )
    plain = is_plain(text, insecure=insecure)
    configured = folder.registry is not None and folder.registry.startswith("http://")
    plain = plain or insecure or (configured and name.host == folder.default_host)
    try:
        return URL(f"{'http' if plain else 'https'}://{name.host}")
    except ValueError as error:
        raise names.bad_name(text) from error


class Registry:
    """One registry, asked for one model. ``login`` is shown where it asks for one."""

    def __init__(self, fetcher: Fetcher, base: URL, name: ModelName, login: Login | None = None) -> None:
        self._fetcher = fetcher
        self._of_model = base / "v2" / name.namespace / name.model
        self._name = name
        self._login = login
        self._shown: Mapping[str, str] = {}  # the headers that it last wanted to see

    async def manifest(self) -> bytes:
        """Return the model's manifest as the registry has it. Raises RegistryFailed, Transient."""
        url = self._of_model / "manifests" / self._name.tag
        async with self._get(url, {"Accept": MANIFEST_TYPE}) as answer:
            return await read_answer(answer.response)

    @asynccontextmanager
    async def blob(self, digest: str, span: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for the bytes of a blob, by a value of the Range header. Raises RegistryFailed, Transient."""
        async with self._get(self._of_model / "blobs" / digest, {"Range": span}) as answer:
            yield answer.response

    @asynccontextmanager
    async def _get(self, url: URL, headers: Mapping[str, str]) -> AsyncIterator[Answer]:
        """Ask, with a login or a token where one is wanted: a new one where the last has run out."""
        for attempt in range(2):
            async with self._fetcher.get(url, {**headers, **self._shown}) as answer:
                if answer.response.status != _UNAUTHORIZED or attempt:
                    await check(answer.response, str(self._name), logged_in=self._login is not None)
                    yield answer
                    return
                challenge = answer.response.headers.get("WWW-Authenticate", "")
            self._shown = {"Authorization": await self._wanted(challenge)}

    async def _wanted(self, challenge: str) -> str:
        """Return what the registry asks to be shown. Raises RegistryFailed, Transient."""
        scheme, _, rest = challenge.partition(" ")
        asked = dict(_CHALLENGE.findall(rest))
        if self._login is not None and (self._login.is_token or scheme.lower() == "basic"):
            return self._login.value
        if scheme.lower() != "bearer" or "realm" not in asked:
            raise RegistryFailed(f"{self._name.host} asks for a login ({scheme or 'of no kind'}): {HOW_TO_LOG_IN}")
        return f"Bearer {await self._new_token(asked)}"

    async def _new_token(self, asked: dict[str, str]) -> str:
        """Return the token that the registry's own service hands out for this model, to us where we have a login."""
        try:
            url = URL(asked.pop("realm")).update_query(
                {key: asked[key] for key in ("service", "scope") if key in asked}
            )
        except ValueError as error:
            raise RegistryFailed(f"{self._name.host} names a token service that is no address") from error
        shown = {} if self._login is None else {"Authorization": self._login.value}
        async with self._fetcher.get(url, shown) as answer:
            await check(answer.response, str(self._name), logged_in=self._login is not None)
            document = _document(await read_answer(answer.response))
        token = document.get("token") or document.get("access_token")
        if not isinstance(token, str):
            raise RegistryFailed(f"{url.host} gave no token for {self._name}")
        return token


async def check(response: aiohttp.ClientResponse, what: str, *, logged_in: bool) -> None:
    """Return where the answer is what was asked for. Raises Transient where that may change, else RegistryFailed."""
    if response.status in OK:
        return
    if response.status == _NOT_FOUND:
        raise RegistryFailed(f"pull model manifest: file does not exist: {what} is not on {response.url.host}")
    said = _said(await read_answer(response))
    reason = f"{response.url.host} answers {response.status} for {what}{said}"
    if response.status in _TRY_AGAIN:
        raise Transient(reason)
    if response.status in _FORBIDDEN:
        reason += "; the login was shown" if logged_in else f"; if it wants a login: {HOW_TO_LOG_IN}"
    raise RegistryFailed(reason)


def _said(data: bytes) -> str:
    """Return what an error of the protocol says, nothing of any other text."""
    errors = _document(data).get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    message = first.get("message")
    return f": {message[:SHOWN_ERROR]}" if isinstance(message, str) and message.isprintable() else ""


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}

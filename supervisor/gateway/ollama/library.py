"""The handlers of everything that is about models rather than with them: listed, shown, fetched, made, removed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from http import HTTPStatus
from typing import Any, Final

from aiohttp import hdrs, web

from supervisor.api.errors import UnknownModel
from supervisor.api.runtime import Runtime
from supervisor.api.store import FOR_OLLAMA, CreateRequest, NotInStore, Progress, Store
from supervisor.gateway.errors import BadRequest
from supervisor.gateway.ollama import models
from supervisor.gateway.ollama.errors import MODEL_REQUIRED, OllamaError, model_not_found
from supervisor.gateway.ollama.fields import Fields, read_fields
from supervisor.gateway.ollama.granting import Granting
from supervisor.gateway.ollama.ndjson import Json, send_lines, send_whole

# Clients compare it with the version in which Ollama got what they need: it is that of the API that is spoken here.
API_VERSION: Final = "0.17.4"
# It calls a model what its header does, which nobody knows it by: so Ollama tells it the name that it asked for.
COPILOT: Final = "GitHubCopilotChat/"
SUCCESS: Final = "success"
NO_PUSH: Final = "push is not supported: this service fetches models and serves them, it does not publish any"
NOT_STORED: Final = " in the store: it is a file of the models folder, which is changed there"
NO_STORE: Final = "this service keeps no store: put GGUF files into its models folder instead"


class Library:
    """Answers about models."""

    def __init__(self, granting: Granting, store: Store | None, version: str) -> None:
        self._granting = granting
        self._runtime: Runtime = granting.runtime
        self._store = store
        self._version = version

    async def version(self, _request: web.Request) -> web.Response:
        """Answer ``GET /api/version``, with our own version beside that of the API."""
        return web.json_response({"version": API_VERSION, "loadmaster": self._version})

    async def status(self, _request: web.Request) -> web.Response:
        """Answer ``GET /api/status``: whether models of Ollama's cloud are to be had."""
        return web.json_response({"cloud": {"disabled": True, "source": "config"}})

    async def tags(self, _request: web.Request) -> web.Response:
        """Answer ``GET /api/tags``."""
        return web.json_response(models.tags(self._runtime.snapshot()))

    async def running(self, _request: web.Request) -> web.Response:
        """Answer ``GET /api/ps``."""
        return web.json_response(models.running(self._runtime.snapshot()))

    async def show(self, request: web.Request) -> web.Response:
        """Answer ``POST /api/show``."""
        fields = await read_fields(request, "ShowRequest")
        name, verbose = _name(fields), bool(fields.flag("verbose"))
        model = await self._granting.model(request, name)
        told = models.described(model, await self._runtime.details(model.id, whole=verbose), verbose=verbose)
        if system := fields.text("system"):
            told["system"] = system
        if request.headers.get(hdrs.USER_AGENT, "").startswith(COPILOT):
            told["model_info"]["general.basename"] = name
        return send_whole(request, told)

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """Answer ``POST /api/pull``."""
        fields = await read_fields(request, "PullRequest")
        steps = self._kept().pull(_name(fields), insecure=bool(fields.flag("insecure")))
        return await self._told(request, fields, steps)

    async def create(self, request: web.Request) -> web.StreamResponse:
        """Answer ``POST /api/create``."""
        fields = await read_fields(request, "CreateRequest")
        return await self._told(request, fields, self._kept().create(read_create(fields)))

    async def copy(self, request: web.Request) -> web.Response:
        """Answer ``POST /api/copy``."""
        fields = await read_fields(request, "CopyRequest")
        source = fields.text("source")
        try:
            await self._kept().copy(source, fields.text("destination"))
        except NotInStore as error:
            raise OllamaError(HTTPStatus.NOT_FOUND, f'model "{source}" not found{await self._why(source)}') from error
        await self._runtime.rescan()
        return web.Response()

    async def delete(self, request: web.Request) -> web.Response:
        """Answer ``DELETE /api/delete``."""
        fields = await read_fields(request, "DeleteRequest")
        name = _name(fields)
        try:
            model = await self._runtime.resolve(name)
        except UnknownModel as error:
            raise model_not_found(name) from error
        try:
            await self._kept().delete(name)
        except NotInStore as error:
            raise OllamaError(HTTPStatus.NOT_FOUND, f"model '{name}' not found{await self._why(name)}") from error
        await self._runtime.forget(model)
        return web.Response()

    async def has_blob(self, request: web.Request) -> web.Response:
        """Answer ``HEAD /api/blobs/DIGEST``."""
        digest = request.match_info["digest"]
        if not await self._kept().has_blob(digest):
            raise OllamaError(HTTPStatus.NOT_FOUND, f'blob "{digest}" not found')
        return web.Response()

    async def put_blob(self, request: web.Request) -> web.Response:
        """Answer ``POST /api/blobs/DIGEST``. The body goes to the disk as it comes, however large."""
        store, digest = self._kept(), request.match_info["digest"]
        if await store.has_blob(digest):
            return web.Response()
        await store.put_blob(digest, request.content.iter_any())
        return web.Response(status=HTTPStatus.CREATED)

    async def push(self, _request: web.Request) -> web.Response:
        """Answer ``POST /api/push``."""
        raise OllamaError(HTTPStatus.NOT_IMPLEMENTED, NO_PUSH)

    async def _why(self, name: str) -> str:
        """Return why a name is not in the store although it is served; nothing where it is not served either."""
        with suppress(UnknownModel):
            await self._runtime.resolve(name)
            return NOT_STORED
        return ""

    def _kept(self) -> Store:
        if self._store is None:
            raise OllamaError(HTTPStatus.NOT_IMPLEMENTED, NO_STORE)
        return self._store

    async def _told(self, request: web.Request, fields: Fields, steps: AsyncIterator[Progress]) -> web.StreamResponse:
        """Tell each step as it is taken, or only the last. Whoever reads of success finds the model."""

        async def lines() -> AsyncIterator[Json]:
            async with aclosing(steps):  # type: ignore[type-var]  # an async generator
                async for step in steps:
                    if step.status == SUCCESS:
                        await self._runtime.rescan()
                    yield _step(step)

        if fields.flag("stream") is not False:
            return await send_lines(request, lines())
        last: Json = {}
        async for line in lines():
            last = line
        return send_whole(request, last)


def read_create(fields: Fields) -> CreateRequest:
    """Return what a new model is to be made of. Raises ``BadRequest``."""
    licenses = fields.any("license")
    return CreateRequest(
        model=_name(fields),
        parent=fields.text("from") or None,
        files=_texts(fields, "files"),
        adapters=_texts(fields, "adapters"),
        modelfile=fields.text("modelfile") or None,
        template=fields.text("template") or None,
        system=fields.text("system") or None,
        parameters=fields.mapping("parameters"),
        licenses=fields.texts("license")
        if isinstance(licenses, list)
        else tuple(filter(None, [fields.text("license")])),
        messages=tuple(
            {"role": one.text("role"), "content": one.text("content")} for one in fields.objects("messages", "Message")
        ),
        for_ollama={name: value for name in FOR_OLLAMA if (value := fields.text(name))},
        quantize=fields.text("quantize") or None,
    )


def _name(fields: Fields) -> str:
    name = fields.text("model") or fields.text("name")
    if not name:
        raise OllamaError(HTTPStatus.BAD_REQUEST, MODEL_REQUIRED)
    return name


def _texts(fields: Fields, name: str) -> Mapping[str, str]:
    values: Mapping[str, Any] = fields.mapping(name)
    if not all(isinstance(value, str) for value in values.values()):
        raise BadRequest(f"{name} must map file names to digests", param=name)
    return values


def _step(step: Progress) -> Json:
    line: dict[str, Any] = {"status": step.status}
    line |= {"digest": step.digest} if step.digest is not None else {}
    line |= {"total": step.total} if step.total is not None else {}
    return line | ({"completed": step.completed} if step.completed is not None else {})

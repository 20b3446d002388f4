"""What llama-server itself serves, by ``model``: OpenAI's API, Anthropic's, and a few of its own; and the models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from aiohttp import hdrs, web

from planner.types import Role
from supervisor.api.lease import Amendments
from supervisor.api.models import ModelView, Preset
from supervisor.api.need import Need
from supervisor.api.runtime import Runtime
from supervisor.api.snapshot import Snapshot
from supervisor.gateway import templated
from supervisor.gateway.exchange import EXCHANGE
from supervisor.gateway.loading import progress_told, wants_progress
from supervisor.gateway.needs import need_of
from supervisor.gateway.peek import Peek, peek, peek_form, read_body
from supervisor.gateway.preset import is_spoken, loaded_by, with_preset
from supervisor.gateway.proxy import forward
from supervisor.status.view import model_state

# What a model must be served for to answer here; None: whatever it is served for. The paths are llama-server's own
# (tools/server/server.cpp). Not passed through is what belongs to one process rather than to a model: slots, props,
# adapters, the control of a stream by its id, streams that are taken up again.
PASSED_THROUGH: Final[Mapping[str, Role | None]] = {
    "/v1/chat/completions": Role.CHAT,
    "/v1/chat/completions/input_tokens": Role.CHAT,
    "/v1/completions": Role.CHAT,
    "/v1/responses": Role.CHAT,
    "/v1/responses/input_tokens": Role.CHAT,
    "/v1/messages": Role.CHAT,
    "/v1/messages/count_tokens": Role.CHAT,
    "/v1/audio/transcriptions": Role.CHAT,
    "/infill": Role.CHAT,
    "/apply-template": Role.CHAT,
    "/tokenize": None,
    "/detokenize": None,
    "/v1/embeddings": Role.EMBEDDING,
    "/v1/rerank": Role.RERANK,
    "/v1/reranking": Role.RERANK,
    "/rerank": Role.RERANK,
    "/reranking": Role.RERANK,
}
FORM: Final = "multipart/form-data"


class OpenAI:
    """The handlers of ``/v1``, and of what llama-server has beside it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def routes(self) -> list[web.AbstractRouteDef]:
        """Return what to add to the application's router."""
        return [
            *(web.post(path, self._pass_through) for path in PASSED_THROUGH),
            web.get("/v1/models", self._models),
            web.get("/v1/models/{id:.+}", self._model),
        ]

    async def _pass_through(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request)
        wanted = _peeked(request, body)
        exchange = request[EXCHANGE]
        exchange.stream = wanted.stream
        exchange.model = model = await self._runtime.resolve(wanted.model)
        view = self._runtime.model(model)
        role, need = asked_of(request.path, request.headers, wanted, view)
        acquiring = self._runtime.acquire(model, role, need)
        if wants_progress(request):
            acquiring = progress_told(request, self._runtime, model, acquiring)
        async with acquiring as lease:
            if wanted.is_form:
                return await forward(lease, request, request.path, body)
            body = amended(request.path, body, lease.amendments, view.preset)
            chat = await templated.written(request.path, body, view)
            if chat is not None:
                return await forward(lease, request, chat.path, chat.body, chat.retelling)
            return await forward(lease, request, request.path, body)

    async def _models(self, _request: web.Request) -> web.Response:
        snapshot = self._runtime.snapshot()
        return web.json_response({"object": "list", "data": [_entry(model, snapshot) for model in snapshot.models]})

    async def _model(self, request: web.Request) -> web.Response:
        name = await self._runtime.resolve(request.match_info["id"])
        snapshot = self._runtime.snapshot()
        return web.json_response(next(_entry(model, snapshot) for model in snapshot.models if model.id == name))


def _peeked(request: web.Request, body: bytes) -> Peek:
    content_type = request.headers.get(hdrs.CONTENT_TYPE, "")
    return peek_form(body, content_type) if content_type.lower().startswith(FORM) else peek(body)


def asked_of(path: str, headers: Mapping[str, str], wanted: Peek, model: ModelView) -> tuple[Role, Need]:
    """Return for what, and how, the model has to be loaded for this request. Raises ``BadRequest``."""
    role = PASSED_THROUGH[path] or model.role
    need = need_of(headers, wanted)
    load = loaded_by(model.preset, need.load, role)
    return role, need if load is need.load else replace(need, load=load)


def amended(path: str, body: bytes, amendments: Amendments | None, preset: Preset) -> bytes:
    """Return the body as the operator wants it to be, and where nothing is said of it, as the model's Modelfile."""
    if amendments is None and not is_spoken(preset):
        return body
    fields = json.loads(body)
    fields = fields if amendments is None else amendments.applied(fields)
    return json.dumps(with_preset(path, fields, preset)).encode()


def _entry(model: ModelView, snapshot: Snapshot) -> dict[str, Any]:
    """Return a model as OpenAI lists it, with what clients of local servers look for beside it.

    ``context_length`` is what one conversation gets, None until a plan has settled it; ``meta`` has
    llama-server's names.
    """
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.modified_at),
        "owned_by": "loadmaster",
        "role": str(model.role),
        "state": model_state(model, snapshot),
        "context_length": model.n_ctx_per_slot,
        "meta": {"n_ctx_train": model.n_ctx_train, "size": model.file_bytes, "architecture": model.architecture},
    }

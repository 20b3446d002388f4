"""What operators ask of runners without a request of their own: load, unload, try again, make room, tell the log."""

from __future__ import annotations

import math
from contextlib import aclosing
from typing import Any, Final

from aiohttp import hdrs, web

from planner.types import LoadOptions
from supervisor.api.need import Need
from supervisor.api.runtime import Runtime
from supervisor.gateway.errors import BadRequest
from supervisor.gateway.exchange import EXCHANGE
from supervisor.gateway.needs import KEEP_ALIVE, keep_alive_of
from supervisor.gateway.peek import object_of, read_body

# Longer than any other program's job; a slip of the keyboard must not take a device away for good.
MAX_YIELD_S: Final = 7 * 24 * 3600.0


class Manage:
    """The handlers of ``/manage``. Answers are JSON objects; errors are OpenAI's envelope."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def routes(self) -> list[web.AbstractRouteDef]:
        """Return what to add to the application's router."""
        return [
            web.post("/manage/load", self._load),
            web.post("/manage/unload", self._unload),
            web.post("/manage/reset", self._reset),
            web.post("/manage/rescan", self._rescan),
            web.post("/manage/yield", self._yield),
            web.post("/manage/yield/end", self._end_yield),
            web.get("/manage/logs", self._logs),
        ]

    async def _load(self, request: web.Request) -> web.Response:
        """Answer once the model is loaded; whoever leaves before that leaves the load to go on."""
        fields = object_of(await read_body(request))
        model = await self._model(request, fields)
        role = self._runtime.model(model).role
        need = Need(keep_alive_s=keep_alive_of(fields.get(KEEP_ALIVE)), load=LoadOptions(n_ctx=_n_ctx(fields)))
        async with self._runtime.acquire(model, role, need):
            return web.json_response({"model": model, "loaded": True})

    async def _unload(self, request: web.Request) -> web.Response:
        model = await self._model(request, object_of(await read_body(request)))
        return web.json_response({"model": model, "unloaded": await self._runtime.unload(model)})

    async def _reset(self, request: web.Request) -> web.Response:
        model = await self._model(request, object_of(await read_body(request)))
        return web.json_response({"model": model, "reset": self._runtime.reset(model)})

    async def _rescan(self, _request: web.Request) -> web.Response:
        await self._runtime.rescan()
        return web.json_response({"models": len(self._runtime.snapshot().models)})

    async def _yield(self, request: web.Request) -> web.Response:
        fields = object_of(await read_body(request))
        device, size, for_s = _device(fields), fields.get("bytes"), fields.get("for_seconds")
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise BadRequest('"bytes" must be a whole number above 0', param="bytes")
        if not isinstance(for_s, int | float) or isinstance(for_s, bool) or not 0 < for_s <= MAX_YIELD_S:
            raise BadRequest(f'"for_seconds" must be a number above 0, at most {MAX_YIELD_S:.0f}', param="for_seconds")
        given = await self._runtime.yield_memory(device, size, float(for_s))
        return web.json_response(
            {
                "device": given.device,
                "freed_bytes": given.freed_bytes,
                "free_bytes": given.free_bytes,
                "short_bytes": given.short_bytes,
                "awaited_bytes": dict(given.awaited_bytes),
                "until": given.until,
            }
        )

    async def _end_yield(self, request: web.Request) -> web.Response:
        device = _device(object_of(await read_body(request)))
        return web.json_response({"device": device, "ended": await self._runtime.end_yield(device)})

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        model = await self._model(request, request.query)
        follow = request.query.get("follow", "0") not in {"", "0"}
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "text/plain; charset=utf-8"})
        async with aclosing(self._runtime.log_lines(model, follow=follow)) as lines:
            first = await anext(lines, None)  # what has no log is an error, not an empty answer
            await response.prepare(request)
            if first is not None:
                await response.write(first.encode() + b"\n")
                async for line in lines:
                    await response.write(line.encode() + b"\n")
        await response.write_eof()
        return response

    async def _model(self, request: web.Request, fields: Any) -> str:
        name = fields.get("model")
        if not isinstance(name, str) or not name:
            raise BadRequest('"model" must be a name; GET /v1/models lists them', param="model")
        request[EXCHANGE].model = model = await self._runtime.resolve(name)
        return model


def _device(fields: dict[str, Any]) -> str:
    device = fields.get("device")
    if not isinstance(device, str):
        raise BadRequest('"device" must be a name such as CUDA0; GET /status lists them', param="device")
    return device


def _n_ctx(fields: dict[str, Any]) -> int | None:
    n_ctx = fields.get("num_ctx")
    if n_ctx is None:
        return None
    if not isinstance(n_ctx, int) or isinstance(n_ctx, bool) or not 0 < n_ctx < math.inf:
        raise BadRequest('"num_ctx" must be a whole number of tokens', param="num_ctx")
    return n_ctx

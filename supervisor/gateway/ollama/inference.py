"""The handlers of ``/api/chat`` and ``/api/generate``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from planner.types import Role
from supervisor.api.models import ModelView
from supervisor.gateway.exchange import EXCHANGE
from supervisor.gateway.ollama import chat, generate
from supervisor.gateway.ollama.answer import Ending, Piece
from supervisor.gateway.ollama.answering import Answer, chat_answer, generate_answer
from supervisor.gateway.ollama.chat import Common
from supervisor.gateway.ollama.errors import (
    NO_IMAGE_INPUT,
    OllamaError,
    lacks,
    lacks_capability,
)
from supervisor.gateway.ollama.fields import read_fields
from supervisor.gateway.ollama.granting import Granting, has, options_of, sampling_of
from supervisor.gateway.ollama.ndjson import Json, send_lines, send_whole, timestamp

Shape = Callable[[Piece], Mapping[str, Any]]


class Inference:
    """Answers chats and prompts."""

    def __init__(self, granting: Granting) -> None:
        self._granting = granting

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer ``POST /api/chat``."""
        asked = chat.read_chat(await read_fields(request, "ChatRequest"))
        common = asked.common
        model = await self._granting.model(request, common.model)
        if not asked.messages and common.keep_alive_s == 0:
            return await self._unload(request, model, common, chat.part)
        _require(model, common, "chat", images=any(one.images for one in asked.messages))
        if asked.tools and not has(model, "tools"):
            raise lacks_capability(common.model, "tools")
        options = options_of(model, common.options)
        async with self._granting.granted(request, model, Role.CHAT, options, common.keep_alive_s) as granted:
            if not asked.messages:
                return send_whole(request, _only("load", common, chat.part))
            answer = chat_answer(granted.runner, asked, model, sampling_of(options, granted))
            return await _respond(request, common, granted.load_s, answer, chat.part)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Answer ``POST /api/generate``."""
        asked = generate.read_generate(await read_fields(request, "GenerateRequest"))
        common = asked.common
        model = await self._granting.model(request, common.model)
        if not asked.prompt and common.keep_alive_s == 0:
            return await self._unload(request, model, common, generate.part)
        _require(model, common, "generate", images=bool(asked.images))
        options = options_of(model, common.options)
        async with self._granting.granted(request, model, Role.CHAT, options, common.keep_alive_s) as granted:
            if not asked.prompt and not asked.suffix:
                return send_whole(request, _only("load", common, generate.part))
            answer = generate_answer(granted.runner, asked, model, sampling_of(options, granted))
            return await _respond(request, common, granted.load_s, answer, generate.part)

    async def _unload(self, request: web.Request, model: ModelView, common: Common, shape: Shape) -> web.StreamResponse:
        await self._granting.runtime.unload(model.id)
        return send_whole(request, _only("unload", common, shape))


def _require(model: ModelView, common: Common, ability: str, *, images: bool) -> None:
    """Raise ``OllamaError`` where the model is not made for what is asked."""
    if model.role is not Role.CHAT:
        raise lacks(common.model, ability)
    if common.think and not has(model, "thinking"):
        raise lacks(common.model, "thinking")
    if images and not (has(model, "vision") or has(model, "audio")):
        raise OllamaError(400, NO_IMAGE_INPUT)


def _only(reason: str, common: Common, shape: Shape) -> Json:
    """Return the whole answer to a request that asks for no text."""
    return {
        "model": common.model,
        "created_at": timestamp(),
        **shape(Piece()),
        "done": True,
        "done_reason": reason,
    }


async def _respond(
    request: web.Request, common: Common, load_s: float, answer: Answer, shape: Shape
) -> web.StreamResponse:
    """Send the answer as it comes, or whole."""
    exchange = request[EXCHANGE]
    exchange.stream = common.stream

    def line(piece: Piece, ending: Ending | None = None) -> Json:
        head = {"model": common.model, "created_at": timestamp(), **shape(piece)}
        head |= {"logprobs": piece.logprobs} if piece.logprobs else {}
        if ending is None:
            return {**head, "done": False}
        context = {"context": ending.context} if ending.context else {}
        metrics = ending.metrics(exchange.elapsed_s(), load_s)
        return {**head, "done": True, "done_reason": ending.reason, **context, **metrics}

    async def lines() -> AsyncIterator[Json]:
        async with aclosing(answer):
            async for one in answer:
                if isinstance(one, Ending):
                    yield line(Piece(), one)
                elif one != Piece():
                    yield line(one)

    async def whole() -> Json:
        gathered = Piece()
        async with aclosing(answer):
            async for one in answer:
                if isinstance(one, Ending):
                    return line(gathered, one)
                gathered += one
        raise AssertionError("every answer has an ending")

    return await send_lines(request, lines()) if common.stream else send_whole(request, await whole())

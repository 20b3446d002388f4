"""The handlers of ``/api/chat`` and ``/api/generate``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import structlog
from aiohttp import web

from planner.types import Role
from supervisor.api import ModelView
from supervisor.gateway.exchange import EXCHANGE
from supervisor.gateway.ollama import chat, generate
from supervisor.gateway.ollama.answer import CompletionReader, Ending, Piece, call_json
from supervisor.gateway.ollama.chat import ChatRequest, Common
from supervisor.gateway.ollama.errors import (
    INPUT_TOO_LONG,
    NO_IMAGE_INPUT,
    ContextExceeded,
    OllamaError,
    RunnerRefused,
    lacks,
    lacks_capability,
)
from supervisor.gateway.ollama.fields import read_fields
from supervisor.gateway.ollama.fitting import shortened
from supervisor.gateway.ollama.form import COMPLETION_PATH, Reader, form_of, inserted_text, tokens_of
from supervisor.gateway.ollama.generate import GenerateRequest
from supervisor.gateway.ollama.granting import Granting, has, options_of, sampling_of
from supervisor.gateway.ollama.ndjson import Json, send_lines, send_whole, timestamp
from supervisor.gateway.ollama.runner import Runner

INFILL_PATH: Final = "/infill"

Answer = AsyncIterator[Piece | Ending]
Shape = Callable[[Piece], Mapping[str, Any]]

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("loadmaster.ollama")


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
            return await self._unload(request, model, common, _chat_shape)
        _require(model, common, "chat", images=any(one.images for one in asked.messages))
        if asked.tools and not has(model, "tools"):
            raise lacks_capability(common.model, "tools")
        options = options_of(model, common.options)
        async with self._granting.granted(request, model, Role.CHAT, options, common.keep_alive_s) as granted:
            if not asked.messages:
                return send_whole(request, _only("load", common, _chat_shape))
            answer = _chat_answer(granted.runner, asked, model, sampling_of(options, granted))
            return await _respond(request, common, granted.load_s, answer, _chat_shape)

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
            answer = _generate_answer(granted.runner, asked, model, sampling_of(options, granted))
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


def _chat_shape(piece: Piece) -> Mapping[str, Any]:
    return chat.part(piece, call_json(piece.tool_calls))


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
        async with aclosing(answer):  # type: ignore[type-var]  # an async generator
            async for one in answer:
                if isinstance(one, Ending):
                    yield line(Piece(), one)
                elif one != Piece():
                    yield line(one)

    async def whole() -> Json:
        gathered = Piece()
        async with aclosing(answer):  # type: ignore[type-var]  # an async generator
            async for one in answer:
                if isinstance(one, Ending):
                    return line(gathered, one)
                gathered += one
        raise AssertionError("every answer has an ending")

    return await send_lines(request, lines()) if common.stream else send_whole(request, await whole())


async def _chat_answer(runner: Runner, asked: ChatRequest, model: ModelView, sampling: Mapping[str, Any]) -> Answer:
    """Yield the answer to a conversation; one that is too long loses its oldest messages, as Ollama's does."""
    messages = chat.conversation(asked, model.preset)
    form = form_of(model, asked.common, messages, sampling, tools=asked.tools)
    try:
        async for one in _read(runner, form.path, form.body(messages), form.reader(messages)):
            yield one
    except ContextExceeded as error:
        if not asked.common.truncate:
            raise OllamaError(400, INPUT_TOO_LONG) from error
        shorter = await shortened(messages, partial(form.count, runner), error.n_ctx)
        _log.warning("chat.truncated", messages=len(messages), kept=len(shorter))
        async for one in _read(runner, form.path, form.body(shorter), form.reader(shorter)):
            yield one


async def _generate_answer(
    runner: Runner, asked: GenerateRequest, model: ModelView, sampling: Mapping[str, Any]
) -> Answer:
    """Yield the answer to a prompt: as it is, between two texts, or as the user's turn of a conversation."""
    common = asked.common
    if asked.raw:
        body = generate.completion_body(asked.prompt, common, sampling)
        answer = _read(runner, COMPLETION_PATH, body, CompletionReader(common.n_top))
    elif asked.suffix:
        answer = _inserted(runner, asked, model, sampling)
    else:
        answer = _prompted(runner, asked, model, sampling)
    try:
        async for one in answer:
            yield one
    except ContextExceeded as error:
        raise OllamaError(400, INPUT_TOO_LONG) from error


async def _inserted(runner: Runner, asked: GenerateRequest, model: ModelView, sampling: Mapping[str, Any]) -> Answer:
    """Yield what belongs between the prompt and the suffix, by the Modelfile's template or the model's own tokens."""
    common = asked.common
    rendered = inserted_text(model, asked)
    if rendered is None:
        path, body = INFILL_PATH, generate.infill_body(asked, sampling)
    else:
        path, body = COMPLETION_PATH, generate.completion_body(rendered, common, sampling)
    try:
        async for one in _read(runner, path, body, CompletionReader(common.n_top)):
            yield one
    except RunnerRefused as error:
        if error.status != HTTPStatus.NOT_IMPLEMENTED:
            raise
        # Only llama-server knows: it guesses the tokens for it by their texts (src/llama-vocab.cpp).
        raise lacks_capability(common.model, "insert") from error


async def _prompted(runner: Runner, asked: GenerateRequest, model: ModelView, sampling: Mapping[str, Any]) -> Answer:
    """Yield the answer to a prompt in its template, and at the end the tokens to go on from."""
    common, messages = asked.common, generate.as_conversation(asked, model.preset)
    form = form_of(model, common, messages, sampling, own=asked.template)
    if asked.images:  # they are no tokens that one could go on from
        if asked.context:
            _log.warning("context.ignored", model=model.id, problem="a prompt with images cannot go on from tokens")
        async for one in _read(runner, form.path, form.body(messages), form.reader(messages)):
            yield one
        return
    prompt = await form.text(runner, messages)
    path, body, reader = form.path, form.body(messages), form.reader(messages)
    if asked.context:
        path, reader = COMPLETION_PATH, CompletionReader(common.n_top)
        body = generate.completion_body([*asked.context, prompt], common, sampling)
    text = ""
    async for one in _read(runner, path, body, reader):
        if isinstance(one, Piece):
            text += one.text
            yield one
        else:
            tokens = await tokens_of(runner, prompt + text, begins=not asked.context)
            yield replace(one, context=(*asked.context, *tokens))


async def _read(runner: Runner, path: str, body: Mapping[str, Any], reader: Reader) -> Answer:
    if body.get("tools") and body.get("logprobs"):  # llama-server streams no answer with both
        yield reader.feed(await runner.ask(path, body))
    else:
        async with aclosing(runner.stream(path, body)) as events:  # type: ignore[type-var]  # an async generator
            async for event in events:
                yield reader.feed(event)
    if reader.ending is None:
        raise runner.lost("ended its answer too early")
    yield reader.ending

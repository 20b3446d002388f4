"""From a request to the pieces of its answer: which of llama-server's doors it goes to, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import structlog

from supervisor.api.models import ModelView
from supervisor.gateway.ollama import chat, generate
from supervisor.gateway.ollama.answer import CompletionReader, Ending, Piece
from supervisor.gateway.ollama.chat import ChatRequest
from supervisor.gateway.ollama.errors import (
    INPUT_TOO_LONG,
    ContextExceeded,
    OllamaError,
    RunnerRefused,
    lacks_capability,
)
from supervisor.gateway.ollama.fitting import shortened
from supervisor.gateway.ollama.form import COMPLETION_PATH, Reader, form_of, inserted_text, tokens_of
from supervisor.gateway.ollama.generate import GenerateRequest
from supervisor.gateway.ollama.runner import Runner

INFILL_PATH: Final = "/infill"

# Pieces, and one ending.
Answer = AsyncGenerator[Piece | Ending, None]

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("loadmaster.ollama")


async def chat_answer(runner: Runner, asked: ChatRequest, model: ModelView, sampling: Mapping[str, Any]) -> Answer:
    """Yield the answer to a conversation; one that is too long loses its oldest messages, as Ollama's does."""
    messages = chat.conversation(asked, model.preset)
    form = await form_of(model, asked.common, messages, sampling, tools=asked.tools)
    try:
        async for one in _read(runner, form.path, await form.body(messages), form.reader(messages)):
            yield one
    except ContextExceeded as error:
        if not asked.common.truncate:
            raise OllamaError(400, INPUT_TOO_LONG) from error
        shorter = await shortened(messages, partial(form.count, runner), error.n_ctx)
        _log.warning("chat.truncated", messages=len(messages), kept=len(shorter))
        async for one in _read(runner, form.path, await form.body(shorter), form.reader(shorter)):
            yield one


async def generate_answer(
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
    rendered = await inserted_text(model, asked)
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
    form = await form_of(model, common, messages, sampling, own=asked.template)
    if asked.images:  # they are no tokens that one could go on from
        if asked.context:
            _log.warning("context.ignored", model=model.id, problem="a prompt with images cannot go on from tokens")
        async for one in _read(runner, form.path, await form.body(messages), form.reader(messages)):
            yield one
        return
    prompt = await form.text(runner, messages)
    path, body, reader = form.path, await form.body(messages), form.reader(messages)
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
        async with aclosing(runner.stream(path, body)) as events:
            async for event in events:
                yield reader.feed(event)
    if reader.ending is None:
        raise runner.lost("ended its answer too early")
    yield reader.ending

"""The handlers of ``/api/embed`` and ``/api/embeddings``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from planner.types import Role
from supervisor.api.models import ModelView
from supervisor.gateway.errors import BadRequest
from supervisor.gateway.exchange import EXCHANGE
from supervisor.gateway.ollama.answer import NS_PER_S
from supervisor.gateway.ollama.errors import INPUT_TOO_LONG, ContextExceeded, OllamaError, model_not_pulled
from supervisor.gateway.ollama.fields import Fields, read_fields
from supervisor.gateway.ollama.granting import Granted, Granting, options_of
from supervisor.gateway.ollama.keep_alive import parse_keep_alive
from supervisor.gateway.ollama.ndjson import send_whole
from supervisor.gateway.ollama.options import checked
from supervisor.gateway.ollama.runner import Runner

EMBEDDINGS_PATH: Final = "/v1/embeddings"
NO_EMBEDDINGS: Final = "this model does not support embeddings"
# A token is at least one byte of the text; beginning, end and a leading space add a few that stand for none.
SPECIAL_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A request to ``/api/embed``. ``dimensions`` 0: all that the model has."""

    model: str
    texts: tuple[str, ...]
    truncate: bool
    dimensions: int
    options: dict[str, Any]
    keep_alive_s: float | None


class Embedding:
    """Answers with vectors."""

    def __init__(self, granting: Granting) -> None:
        self._granting = granting

    async def embed(self, request: web.Request) -> web.Response:
        """Answer ``POST /api/embed``."""
        asked = read_embed(await read_fields(request, "EmbedRequest"))
        model = await self._model(request, asked.model)
        options = options_of(model, asked.options)
        async with self._granting.granted(request, model, Role.EMBEDDING, options, asked.keep_alive_s) as granted:
            vectors, tokens = await _embedded(granted, asked.texts, truncate=asked.truncate)
            durations = {
                "total_duration": round(request[EXCHANGE].elapsed_s() * NS_PER_S),
                "load_duration": round(granted.load_s * NS_PER_S),
            }
        answer = {"model": asked.model, "embeddings": [cut(one, asked.dimensions) for one in vectors], **durations}
        return send_whole(request, answer | {"prompt_eval_count": tokens})

    async def embeddings(self, request: web.Request) -> web.Response:
        """Answer ``POST /api/embeddings``, the older form: one text, and the vector as the runner gives it."""
        fields = await read_fields(request, "EmbeddingRequest")
        text = fields.text("prompt")
        options, keep_alive_s = checked(fields.mapping("options")), parse_keep_alive(fields.any("keep_alive"))
        model = await self._model(request, fields.text("model"))
        options = options_of(model, options)
        async with self._granting.granted(request, model, Role.EMBEDDING, options, keep_alive_s) as granted:
            vectors, _ = await _embedded(granted, (text,) if text else (), truncate=True)
        return send_whole(request, {"embedding": vectors[0] if vectors else []})

    async def _model(self, request: web.Request, name: str) -> ModelView:
        model = await self._granting.model(request, name, model_not_pulled)
        if model.role is not Role.EMBEDDING:
            raise OllamaError(501, NO_EMBEDDINGS)
        return model


def read_embed(fields: Fields) -> EmbedRequest:
    """Return what is asked. Raises ``BadRequest``."""
    return EmbedRequest(
        model=fields.text("model"),
        texts=_texts(fields.any("input")),
        truncate=fields.flag("truncate") is not False,
        dimensions=fields.whole("dimensions"),
        options=checked(fields.mapping("options")),
        keep_alive_s=parse_keep_alive(fields.any("keep_alive")),
    )


def cut(vector: list[float], dimensions: int) -> list[float]:
    """Return the vector's first dimensions (0: all), of length 1 again."""
    if not 0 < dimensions < len(vector):
        return vector
    kept = vector[:dimensions]
    length = math.hypot(*kept)
    return [one / length for one in kept] if length else kept


def truncated(whole: list[int], plain: list[int], limit: int) -> list[int]:
    """Return at most ``limit`` tokens of a text: those that the model puts around it stay, the text's end goes.

    ``whole`` is the text with them, ``plain`` without.
    """
    added = len(whole) - len(plain)
    head = next((at for at in range(added + 1) if whole[at : at + len(plain)] == plain), 0)
    kept = max(0, limit - added)
    return [*whole[:head], *plain[:kept], *whole[head + len(plain) :]]


async def _embedded(granted: Granted, texts: tuple[str, ...], *, truncate: bool) -> tuple[list[list[float]], int]:
    """Return one vector for each text, of length 1, and the number of tokens that they took."""
    if not texts:
        return [], 0
    inputs = [await _fitting(granted.runner, text, granted.n_ctx, truncate=truncate) for text in texts]
    try:
        answer = await granted.runner.ask(EMBEDDINGS_PATH, {"input": inputs, "encoding_format": "float"})
    except ContextExceeded as error:
        raise OllamaError(400, INPUT_TOO_LONG) from error
    vectors = [one["embedding"] for one in sorted(answer["data"], key=lambda one: int(one["index"]))]
    return vectors, answer["usage"]["prompt_tokens"]


async def _fitting(runner: Runner, text: str, n_ctx: int | None, *, truncate: bool) -> str | list[int]:
    """Return the text, or as many of its tokens as fit. Raises ``OllamaError`` where it may not be cut."""
    if n_ctx is None or len(text.encode()) + SPECIAL_TOKENS <= n_ctx:
        return text
    whole = (await runner.ask("/tokenize", {"content": text, "add_special": True}))["tokens"]
    if len(whole) <= n_ctx:
        return text
    if not truncate:
        raise OllamaError(400, INPUT_TOO_LONG)
    plain = (await runner.ask("/tokenize", {"content": text}))["tokens"]
    return truncated(whole, plain, n_ctx)


def _texts(value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise BadRequest("invalid input type", param="input")

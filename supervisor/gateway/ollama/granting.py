"""From a name in a request to a runner that one may talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from planner.types import Role
from supervisor.api.errors import UnknownModel
from supervisor.api.models import ModelView
from supervisor.api.need import Need
from supervisor.api.runtime import Runtime
from supervisor.gateway.exchange import EXCHANGE
from supervisor.gateway.ollama.errors import MODEL_REQUIRED, OllamaError, model_not_found
from supervisor.gateway.ollama.options import load_options, of_preset, sampling
from supervisor.gateway.ollama.runner import Runner, talking

Missing = Callable[[str], OllamaError]


@dataclass(frozen=True, slots=True)
class Granted:
    """A runner to talk to, how long the request waited for it, and what one conversation of it holds."""

    runner: Runner
    load_s: float
    n_ctx: int | None


class Granting:
    """What every endpoint that uses a model does first."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    async def model(self, request: web.Request, name: str, missing: Missing = model_not_found) -> ModelView:
        """Return the model of this name. Raises ``OllamaError``: without a name, or as ``missing`` says."""
        if not name:
            raise OllamaError(400, MODEL_REQUIRED)
        try:
            found = await self.runtime.resolve(name)
            request[EXCHANGE].model = found
            return self.runtime.model(found)
        except UnknownModel as error:  # it may have gone since
            raise missing(name) from error

    @asynccontextmanager
    async def granted(
        self, request: web.Request, model: ModelView, role: Role, options: Mapping[str, Any], keep_alive_s: float | None
    ) -> AsyncIterator[Granted]:
        """Wait for a lease on a runner that loads as these options say. Raises an ``AcquireError``."""
        exchange = request[EXCHANGE]
        need = Need(keep_alive_s=keep_alive_s, load=load_options(options, role))
        before_s = exchange.elapsed_s()
        async with self.runtime.acquire(model.id, role, need) as lease:
            load_s = exchange.elapsed_s() - before_s
            with talking(lease) as runner:
                yield Granted(runner, load_s, self.runtime.model(model.id).n_ctx_per_slot)


def options_of(model: ModelView, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that hold: the request's over the model's own."""
    return of_preset(model.preset.parameters) | dict(asked)


def sampling_of(options: Mapping[str, Any], granted: Granted) -> dict[str, Any]:
    """Return what these options ask of llama-server."""
    return sampling(options, granted.n_ctx)


def has(model: ModelView, capability: str) -> bool:
    """Say whether a model has a capability; where nothing is known of it, it may."""
    return not model.capabilities or capability in model.capabilities

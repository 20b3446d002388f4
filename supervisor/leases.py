"""Who waits and who holds: tickets and leases, on the side of those who wait and hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from supervisor.api.lease import Amendments, Endpoint
from supervisor.core.types import ModelId, Refusal


class ChildLease:
    """A grant to send one request for ``model`` to one child of ``runner``; implements ``api.lease.Lease``."""

    def __init__(
        self,
        model: ModelId,
        runner: ModelId,
        generation: int,
        endpoint: Endpoint,
        amendments: Amendments | None = None,
    ) -> None:
        self._model = model
        self._endpoint = endpoint
        self._amendments = amendments
        self._story: str | None = None
        self._to_tell: list[Callable[[str], None]] = []
        self.runner = runner
        self.generation = generation

    @property
    def endpoint(self) -> Endpoint:
        """Where to send the request."""
        return self._endpoint

    @property
    def model(self) -> str:
        """Return the public id of the model that was asked for."""
        return self._model

    @property
    def amendments(self) -> Amendments | None:
        """What is to be changed in the request."""
        return self._amendments

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Have this told the story as soon as the child is gone, at once where it is."""
        if self._story is None:
            self._to_tell.append(tell)
        else:
            tell(self._story)

    def forget(self) -> None:
        """Tell nobody any more: it was given back, and whoever held it need not be held by it."""
        self._to_tell.clear()

    def lose(self, story: str) -> None:
        """Tell whoever wants to know that the child is gone."""
        self._story = story
        for tell in self._to_tell:
            tell(story)


class Waiter:
    """A ticket's owner, who asks for ``model``: settled by a lease or by a refusal, at once or later."""

    def __init__(self, model: ModelId) -> None:
        self.model = model
        self._waiting: asyncio.Future[None] | None = None
        self.lease: ChildLease | None = None
        self.refusal: Refusal | None = None

    async def wait_settled(self) -> None:
        """Return when there is an answer."""
        if self.lease is None and self.refusal is None:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting

    def settle(self, answer: ChildLease | Refusal) -> None:
        """Answer the ticket."""
        if isinstance(answer, Refusal):
            self.refusal = answer
        else:
            self.lease = answer
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

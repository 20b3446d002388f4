"""Who waits and who holds: tickets and leases, on the side of those who wait and hold."""

from __future__ import annotations

import anyio

from supervisor.api import Amendments, Endpoint
from supervisor.core.types import ModelId, Refusal


class ChildLease:
    """A grant to send one request to one child; implements ``supervisor.api.Lease``."""

    def __init__(
        self, model: ModelId, generation: int, endpoint: Endpoint, amendments: Amendments | None = None
    ) -> None:
        self._model = model
        self._endpoint = endpoint
        self._amendments = amendments
        self._lost = anyio.Event()
        self._story = ""
        self.generation = generation

    @property
    def endpoint(self) -> Endpoint:
        """Where to send the request."""
        return self._endpoint

    @property
    def model(self) -> str:
        """Return the public id of the model."""
        return self._model

    @property
    def amendments(self) -> Amendments | None:
        """What is to be changed in the request."""
        return self._amendments

    async def wait_lost(self) -> str:
        """Return the story as soon as the child is gone; else wait for ever."""
        await self._lost.wait()
        return self._story

    def lose(self, story: str) -> None:
        """Tell whoever waits that the child is gone."""
        self._story = story
        self._lost.set()


class Waiter:
    """A ticket's owner: settled by a lease or by a refusal."""

    def __init__(self) -> None:
        self._settled = anyio.Event()
        self.lease: ChildLease | None = None
        self.refusal: Refusal | None = None

    async def wait_settled(self) -> None:
        """Return when there is an answer."""
        await self._settled.wait()

    def settle(self, answer: ChildLease | Refusal) -> None:
        """Answer the ticket."""
        if isinstance(answer, Refusal):
            self.refusal = answer
        else:
            self.lease = answer
        self._settled.set()

"""The runtime's own interface: what the gateway, the status pages and the tests may ask of the supervisor."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from planner.types import Role
from supervisor.api.lease import Lease, Offer
from supervisor.api.models import ModelView
from supervisor.api.need import NO_NEED, Need
from supervisor.api.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Where a model's load stands. ``stage`` is a word for people; ``fraction`` of the weights read, where known."""

    stage: str
    fraction: float | None
    waited_s: float


@dataclass(frozen=True, slots=True)
class YieldResult:
    """What came of freeing memory for another program.

    ``device`` is what it is called by now: names are given anew when a worker or a card goes. ``freed_bytes`` is what
    our runners gave back for it, ``free_bytes`` what the driver calls free now and ``short_bytes`` how much less that
    is than was wanted (None: it does not say). ``awaited_bytes`` is what runners in use will give back, by model:
    they take up no new request, and go when they have finished. ``until`` is the moment, in seconds since the epoch,
    up to which nothing of ours is placed there.
    """

    device: str
    freed_bytes: int
    free_bytes: int | None
    short_bytes: int | None
    awaited_bytes: Mapping[str, int]
    until: float


class Runtime(Protocol):
    """What the gateway may ask of the supervisor."""

    def snapshot(self) -> Snapshot:
        """Return the state of everything, at once."""
        ...

    async def resolve(self, name: str) -> str:
        """Return the public id of the model that a client's name stands for, at no cost where it is known.

        Raises UnknownModel, with the closest ids, once the folder was read again and has none of that name.
        """
        ...

    def model(self, model: str) -> ModelView:
        """Return one model as a snapshot has it, at the cost of one. Raises UnknownModel where it has gone."""
        ...

    def acquire(self, model: str, role: Role, need: Need = NO_NEED) -> AbstractAsyncContextManager[Lease]:
        """Return a context manager that waits for a lease on a runner of this model, loading it where need be.

        Entering raises an ``AcquireError`` where none can be granted. Cancelling while it waits takes the request out
        of the queue; a load that it caused goes on.
        """
        ...

    def known(self, name: str) -> str | None:
        """Return the public id of the model that a client's name stands for; None where it has to be looked for."""
        ...

    def when_stopped(self, tell: Callable[[str], None]) -> None:
        """Have this told the base URL of each runner that is stopped, just before it is."""
        ...

    def offer(self, model: str, role: Role, need: Need = NO_NEED) -> Offer | None:
        """Return the lease that can be had without a wait; None where it has to be waited for, or there is none.

        Nothing has happened yet, and nothing may before it is taken: the offer is good for this moment. Where there is
        none since the model is not loaded, the machine is looked at already for the load that is likely to follow.
        """
        ...

    async def unload(self, model: str) -> bool:
        """Let the model's runner finish what it serves, stop it, and return once its child is gone.

        False where nothing was loaded. What waits for the model, or asks for it later, loads it again.
        """
        ...

    def reset(self, model: str) -> bool:
        """Let a runner that failed or backs off be tried again at once; False where there was nothing to forgive."""
        ...

    def progress(self, model: str) -> LoadProgress | None:
        """Return where the model's load stands, None where none is under way."""
        ...

    async def yield_memory(self, device: str, wanted_bytes: int, for_s: float) -> YieldResult:
        """Stop the cheapest runners until so much is free on a device, and place nothing there for so long.

        Returns once those that were idle are gone, and does not wait for those in use. Raises UnknownDevice.
        """
        ...

    async def end_yield(self, device: str) -> bool:
        """Let our runners have, before its time is over, what was given to other programs of a device's memory.

        That is all of the memory that the device shares with others. False where nothing was given. Runners that go for
        it already still go. Raises UnknownDevice.
        """
        ...

    async def forget(self, model: str) -> None:
        """Follow that a model was deleted: stop its runner, unless other names share it, and read the models again."""
        ...

    async def rescan(self) -> None:
        """Read the models again, now."""
        ...

    async def details(self, model: str, *, whole: bool = False) -> Mapping[str, Any]:
        """Return ``{"metadata": {...}, "tensors": [{"name", "type", "shape"}], "projector": metadata or None}``.

        So say the headers of the model and of its projector. Arrays too long to be kept (vocabularies) are None, or
        ``JsonText`` where the ``whole`` is wanted. Raises UnknownModel, BadModel, PlannerFailed.
        """
        ...

    def log_lines(self, model: str, *, follow: bool) -> AsyncGenerator[str, None]:
        """Yield the last lines that the model's runner logged; with ``follow`` what it says from then on, to its end.

        The last one's where none runs. Raises UnknownModel where none has run since the service started.
        """
        ...

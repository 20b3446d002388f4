"""Who asks, and what they may: clients by their keys, and a runtime that knows what the client at hand may use.

Handlers do not check anything: they ask a ``PermittedRuntime``, which shows a client its own models only, so that no
handler can forget to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
)
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Final

from config.keys_file import Client, hash_of
from planner.types import Role
from supervisor.api.errors import AcquireError, ClientLimit, UnknownModel
from supervisor.api.lease import Lease, Offer
from supervisor.api.models import ModelView
from supervisor.api.need import NO_NEED, Need
from supervisor.api.runtime import LoadProgress, Runtime, YieldResult
from supervisor.api.snapshot import Snapshot
from supervisor.gateway.discretion import Discretion
from supervisor.gateway.errors import NotPermitted, Unauthorized

SHARED: Final = "shared key"  # how the names begin of those who hold a key of API_KEYS, which have none


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a name for the log and the queue, and what they may."""

    name: str
    client: Client


# Where no keys are asked for, whoever reaches the service may do everything.
ANYBODY: Final = Client(hash="")
NOBODY_NAMED: Final = Caller("", ANYBODY)
_caller: ContextVar[Caller] = ContextVar("caller", default=NOBODY_NAMED)


@dataclass(slots=True)
class Clients:
    """Everybody who has a key, and how many requests each has in work. ``api_keys`` may do everything.

    Nobody is told apart, and nobody is kept out, where there are no keys at all, and never were: whoever takes the last
    one away wants nobody let in. ``needed``: a key is needed even so.
    """

    api_keys: tuple[str, ...] = ()
    named: Mapping[str, Client] = field(default_factory=dict)
    needed: bool = False
    _in_work: Counter[str] = field(default_factory=Counter)
    _by_hash: dict[str, Caller] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the keys by their hash: a look-up takes as long for any key, and tells nothing about them."""
        self.replace(self.named)

    def replace(self, named: Mapping[str, Client]) -> None:
        """Let these clients in, and no others but the holders of API_KEYS; requests in work go on."""
        self.named = named
        shared = enumerate(self.api_keys, start=1)
        self._by_hash = {hash_of(key): Caller(f"{SHARED} {number}", ANYBODY) for number, key in shared}
        self._by_hash |= {client.hash: Caller(name, client) for name, client in named.items()}
        self.needed |= bool(self._by_hash)

    def identify(self, headers: Mapping[str, str], remote: str | None) -> Caller:
        """Return who sent these headers from this address. Raises ``Unauthorized``.

        A key comes as a bearer token or in ``X-Api-Key``. Those who share a key of API_KEYS are told apart by address.
        """
        if not self.needed:
            return Caller(remote or "", ANYBODY)
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        sent = [token.strip()] if scheme.lower() == "bearer" else []
        if "X-Api-Key" in headers:
            sent.append(headers["X-Api-Key"])
        if not sent:
            raise Unauthorized("an API key is needed: send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'")
        for key in sent:
            if (caller := self._by_hash.get(hash_of(key))) is not None:
                is_shared = caller.client is ANYBODY
                return replace(caller, name=f"{caller.name} from {remote}") if is_shared and remote else caller
        raise Unauthorized("this API key is not one of this service's")

    def admitted(self, caller: Caller, *, counts: bool) -> AbstractContextManager[None]:
        """Make this client the one at hand; its request is one in work where it ``counts``. Raises ``ClientLimit``."""
        return _Admitted(caller, self._in_work if counts and caller.client.concurrency is not None else None)


class _Admitted(AbstractContextManager[None]):
    """Makes a client the one at hand, and counts its request ``in_work``; None: it has no limit.

    No generator: each request comes through here, most of them through nothing that costs more.
    """

    __slots__ = ("_caller", "_in_work", "_token")

    def __init__(self, caller: Caller, in_work: Counter[str] | None) -> None:
        self._caller = caller
        self._in_work = in_work

    def __enter__(self) -> None:
        name, limit = self._caller.name, self._caller.client.concurrency
        if self._in_work is not None:
            if limit is not None and self._in_work[name] >= limit:
                raise ClientLimit(f"{name} has {limit} requests in work already, as many as its key allows")
            self._in_work[name] += 1
        self._token = _caller.set(self._caller)

    def __exit__(self, *_raised: object) -> None:
        _caller.reset(self._token)
        if self._in_work is not None:
            self._in_work[self._caller.name] -= 1


def caller() -> Caller:
    """Return who sent the request at hand."""
    return _caller.get()


def check_may_manage() -> None:
    """Raise ``NotPermitted`` where the client at hand may not load, unload, pull, create or delete."""
    if not _caller.get().client.manage:
        raise NotPermitted(f"the key of {_caller.get().name} may use models, not manage them")


def check_may_use_all() -> None:
    """Raise ``NotPermitted`` where the client at hand may use some models only."""
    if _caller.get().client.models:
        raise NotPermitted(f"the key of {_caller.get().name} is for some models, and this concerns all of them")


class PermittedRuntime:
    """The runtime as the client at hand may see it: a model that it may not use is as unknown as one that is not."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def snapshot(self) -> Snapshot:
        """Return the state of everything, models and runners that the client may not use left out.

        So are the operator's paths for a client that may not use all.
        """
        snapshot = self._runtime.snapshot()
        client = _caller.get().client
        if not client.models:
            return snapshot
        visible = {one.id for one in snapshot.models if _may_use(client, one.id, one.aliases)}
        shown = replace(
            snapshot,
            models=tuple(one for one in snapshot.models if one.id in visible),
            runners=tuple(one for one in snapshot.runners if one.model in visible),
            counters={name: counters for name, counters in snapshot.counters.items() if name in visible},
        )
        return Discretion(snapshot.models).snapshot(shown)

    async def resolve(self, name: str) -> str:
        """Return the model's id. Raises UnknownModel."""
        try:
            model = await self._runtime.resolve(name)
            self._check(model)
        except UnknownModel:
            if not _caller.get().client.models:
                raise
            raise _unknown(name) from None  # neither the names that resemble it, nor whether it is another's alias
        return model

    def model(self, model: str) -> ModelView:
        """Return the model. Raises UnknownModel."""
        self._check(model)
        view = self._runtime.model(model)
        return Discretion([view]).model(view) if _caller.get().client.models else view

    def acquire(self, model: str, role: Role, need: Need = NO_NEED) -> AbstractAsyncContextManager[Lease]:
        """Wait for a lease, in the name of the client at hand. Raises UnknownModel."""
        self._check(model)
        need = need.of(_caller.get().name)
        if not _caller.get().client.models:
            return self._runtime.acquire(model, role, need)
        return self._acquire_discreetly(model, role, need)

    @asynccontextmanager
    async def _acquire_discreetly(self, model: str, role: Role, need: Need) -> AsyncIterator[Lease]:
        with self._discreetly(model):
            async with self._runtime.acquire(model, role, need) as lease:
                yield lease

    def known(self, name: str) -> str | None:
        """Return the model's id; None where it is not known, or not to the client at hand."""
        model = self._runtime.known(name)
        return model if model is not None and self._may_use(model) else None

    def when_stopped(self, tell: Callable[[str], None]) -> None:
        """Have this told of each runner that is stopped."""
        self._runtime.when_stopped(tell)

    def offer(self, model: str, role: Role, need: Need = NO_NEED) -> Offer | None:
        """Return the lease that the client at hand can have, None where it has to be waited for."""
        if not self._may_use(model):
            return None
        return self._runtime.offer(model, role, need.of(_caller.get().name))

    async def unload(self, model: str) -> bool:
        """Unload the model. Raises NotPermitted, UnknownModel."""
        check_may_manage()
        self._check(model)
        return await self._runtime.unload(model)

    def reset(self, model: str) -> bool:
        """Let the model be tried again. Raises NotPermitted, UnknownModel."""
        check_may_manage()
        self._check(model)
        return self._runtime.reset(model)

    def progress(self, model: str) -> LoadProgress | None:
        """Return where the model's load stands. Raises UnknownModel."""
        self._check(model)
        return self._runtime.progress(model)

    async def yield_memory(self, device: str, wanted_bytes: int, for_s: float) -> YieldResult:
        """Free memory. Raises NotPermitted."""
        check_may_manage()
        return await self._runtime.yield_memory(device, wanted_bytes, for_s)

    async def end_yield(self, device: str) -> bool:
        """Have memory back. Raises NotPermitted."""
        check_may_manage()
        return await self._runtime.end_yield(device)

    async def forget(self, model: str) -> None:
        """Follow that the model was deleted. Raises NotPermitted, UnknownModel."""
        check_may_manage()
        self._check(model)
        await self._runtime.forget(model)

    async def rescan(self) -> None:
        """Read the models again."""
        await self._runtime.rescan()

    async def details(self, model: str, *, whole: bool = False) -> Mapping[str, Any]:
        """Return what the model's header says. Raises UnknownModel."""
        self._check(model)
        with self._discreetly(model):
            return await self._runtime.details(model, whole=whole)

    def log_lines(self, model: str, *, follow: bool) -> AsyncGenerator[str, None]:
        """Yield the runner's log. Raises NotPermitted, UnknownModel."""
        check_may_manage()
        self._check(model)
        lines = self._runtime.log_lines(model, follow=follow)
        if not _caller.get().client.models:
            return lines
        return _discreet_lines(lines, Discretion([self._runtime.model(model)]))

    @contextmanager
    def _discreetly(self, model: str) -> Iterator[None]:
        """Let what went wrong with a model be told without paths, where the client at hand may use some models only."""
        try:
            yield
        except AcquireError as error:
            if _caller.get().client.models:
                error.args = (Discretion([self._runtime.model(model)]).text(str(error)),)
            raise

    def _check(self, model: str) -> None:
        """Raise UnknownModel for a model that the client at hand may not use."""
        if not self._may_use(model):
            raise _unknown(model)

    def _may_use(self, model: str) -> bool:
        client = _caller.get().client
        return not client.models or _may_use(client, model, self._runtime.model(model).aliases)


async def _discreet_lines(lines: AsyncGenerator[str, None], discretion: Discretion) -> AsyncGenerator[str, None]:
    async with aclosing(lines):
        async for line in lines:
            yield discretion.text(line)


def _unknown(model: str) -> UnknownModel:
    return UnknownModel(
        f"there is no model {model!r} for the key of {_caller.get().name}; GET /v1/models lists those that it may use"
    )


def _may_use(client: Client, model: str, aliases: tuple[str, ...]) -> bool:
    return any(client.may_use(name) for name in (model, *aliases))

"""One piece of work, followed by any number of clients: started once, ended when nobody follows any more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import structlog

from supervisor.api.store import Progress, StoreError

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("supervisor.store")

Tell = Callable[[Progress], None]
Work = Callable[[Tell], Awaitable[None]]


class _Follower:
    """What one client has not been told yet: of each blob only the latest, so that a slow client holds nothing up."""

    def __init__(self, told: dict[str, Progress]) -> None:
        self.waiting = dict(told)
        self.news = anyio.Event()


class Shared:
    """Runs ``work`` once. ``ended`` is called once, when nobody can join in any more."""

    def __init__(self, work: Work, ended: Callable[[], object]) -> None:
        self._work = work
        self._ended = ended
        self._told: dict[str, Progress] = {}
        self._followers: set[_Follower] = set()
        self._scope = anyio.CancelScope()
        self._error: StoreError | None = None
        self._over = False
        self._known = True

    async def run(self) -> None:
        """Do the work, unless everybody has left; a StoreError goes to those who follow."""
        try:
            with self._scope:
                await self._work(self._tell)
        except StoreError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - a defect ends one piece of work, not the service; its story is told
            _log.exception("store.failed")
            self._error = StoreError(f"the store failed: {type(error).__name__}: {error}")
        finally:
            self._over = True
            self._forget()
            for follower in self._followers:
                follower.news.set()

    def _forget(self) -> None:
        """Say, once, that nobody can join in any more."""
        if self._known:
            self._known = False
            self._ended()

    def _tell(self, progress: Progress) -> None:
        key = progress.digest or progress.status
        self._told.pop(key, None)
        self._told[key] = progress
        for follower in self._followers:
            follower.waiting[key] = progress
            follower.news.set()

    async def follow(self) -> AsyncIterator[Progress]:
        """Yield what happens, what happened already first. Raises the work's StoreError."""
        follower = _Follower(self._told)
        self._followers.add(follower)
        try:
            while True:
                waiting, follower.waiting, follower.news = follower.waiting, {}, anyio.Event()
                for progress in waiting.values():
                    yield progress
                if follower.waiting:
                    continue
                if self._over:
                    break
                await follower.news.wait()
            if self._error is not None:
                raise self._error
        finally:
            self._followers.discard(follower)
            if not self._followers:
                self._scope.cancel()
                self._forget()

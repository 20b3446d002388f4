"""Get blobs into the store: each into a partial file, verified, and only then given its name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial as bind
from types import TracebackType
from typing import Final, Self

import anyio
from anyio import to_thread

from supervisor.api.store import BadCreate, Progress, RegistryFailed, StoreFull
from supervisor.store import download, writing
from supervisor.store.download import Source
from supervisor.store.folder import StoreFolder
from supervisor.store.partial import Busy, Partial

LOOK_AGAIN_S: Final = 0.5  # whether another process has finished a blob that we want too
TOLD_EVERY_S: Final = 0.1  # a client's bar moves smoothly
TOLD_EVERY_BYTES: Final = 16 << 20
_SHORT: Final = slice(len("sha256:"), len("sha256:") + 12)

Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A blob to get. Where its digest is not known beforehand, ``version`` tells its bytes from others."""

    size_bytes: int
    source: Source
    digest: str | None
    version: str = ""

    @property
    def key(self) -> str:
        """Return what its partial file is called by."""
        return (self.digest or f"url:{hashlib.sha256(self.version.encode()).hexdigest()}").replace(":", "-")


@dataclass(slots=True)
class _Told:
    """What a client was last told of a blob."""

    at: float = 0.0
    done_bytes: int = -TOLD_EVERY_BYTES


class Fetch:
    """Gets blobs. ``tell`` learns how far each is.

    Use within ``async with``: while it lasts nobody removes blobs, since nothing names these yet. Where the disk is
    full, or they are no model after all, it takes away again what it brought.
    """

    def __init__(self, folder: StoreFolder, tell: Tell) -> None:
        self._folder = folder
        self._tell = tell
        self._streams = anyio.CapacityLimiter(download.STREAMS)
        self._told: dict[str, _Told] = {}
        self._fetched: list[str] = []
        self._adding = writing.adding_meanwhile(folder)

    async def __aenter__(self) -> Self:
        """Raise OSError where the store cannot be written to."""
        await self._adding.__aenter__()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        await self._adding.__aexit__(None, None, None)
        if isinstance(error, StoreFull | BadCreate | OSError):
            await to_thread.run_sync(writing.collect, self._folder, self._fetched)

    async def blobs(self, wanted: Sequence[Wanted]) -> tuple[str, ...]:
        """Return the digests once all are there, whole. Raises StoreError."""
        partials: dict[str, Partial] = {}
        with ExitStack() as held:
            try:
                # In one order for everybody, so that no two wait for each other.
                for blob in sorted(wanted, key=lambda blob: blob.key):
                    await self._hold(blob, held, partials)
                needed = sum(partial.total_bytes - partial.done_bytes for partial in partials.values())
                writing.require_free(self._folder, needed)
                await download.together(
                    bind(self._fill, blob, partials[blob.key]) for blob in wanted if blob.key in partials
                )
                if partials:
                    self._tell(Progress("verifying sha256 digest"))
                return tuple([await self._verified(blob, partials.get(blob.key)) for blob in wanted])
            except (OSError, StoreFull) as error:
                for partial in partials.values():
                    partial.discard()
                raise error if isinstance(error, StoreFull) else writing.store_error(error, self._folder) from error

    def _is_whole(self, blob: Wanted) -> bool:
        return blob.digest is not None and writing.is_whole(self._folder, blob.digest, blob.size_bytes)

    async def _hold(self, blob: Wanted, held: ExitStack, partials: dict[str, Partial]) -> None:
        """Take a blob's partial file, or wait until whoever has it has made it whole."""
        while not self._is_whole(blob):
            partials[blob.key] = Partial(self._folder.blobs, blob.key, blob.size_bytes)
            try:
                held.enter_context(partials[blob.key])
            except Busy:
                del partials[blob.key]
                self._tell(Progress(f"waiting for another download of {_short(blob)}"))
                await anyio.sleep(LOOK_AGAIN_S)
            else:
                return
        self._tell_bytes(blob, blob.size_bytes)

    async def _fill(self, blob: Wanted, partial: Partial) -> None:
        self._tell_bytes(blob, partial.done_bytes)
        await download.fill(partial, blob.source, self._streams, lambda: self._tell_bytes(blob, partial.done_bytes))

    async def _verified(self, blob: Wanted, partial: Partial | None) -> str:
        """Return the digest of a blob that was there, or that is now: then it has its name."""
        if partial is None:
            return str(blob.digest)
        digest = await partial.sha256()
        if blob.digest not in {None, digest}:
            partial.discard()
            raise RegistryFailed(
                f"digest mismatch, file must be downloaded again: want {blob.digest}, got {digest}; it was removed"
            )
        await to_thread.run_sync(partial.finish, self._folder.blob(digest))
        self._fetched.append(digest)
        return digest

    def _tell_bytes(self, blob: Wanted, done_bytes: int) -> None:
        told, now = self._told.setdefault(blob.key, _Told()), anyio.current_time()
        whole = done_bytes == blob.size_bytes
        if whole or now >= told.at + TOLD_EVERY_S or done_bytes >= told.done_bytes + TOLD_EVERY_BYTES:
            told.at, told.done_bytes = now, done_bytes
            self._tell(Progress(f"pulling {_short(blob)}", blob.digest or blob.key, blob.size_bytes, done_bytes))


def _short(blob: Wanted) -> str:
    """Return what a client sees of a blob."""
    return blob.digest[_SHORT] if blob.digest else blob.version.partition("?")[0].rpartition("/")[2]

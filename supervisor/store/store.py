"""The store behind ``supervisor.api.store``: what clients may do to the models on disk."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial as bind
from pathlib import Path
from typing import Final, Self

import aiohttp
import anyio
from anyio import from_thread, to_thread
from anyio.abc import TaskGroup
from yarl import URL

from supervisor.api.store import CreateRequest, Progress, StoreError
from supervisor.store import create, hub, names, parts, writing
from supervisor.store.fetching import STALL_S, Fetcher, open_session
from supervisor.store.folder import StoreFolder
from supervisor.store.logins import Login, Logins
from supervisor.store.pull import pull
from supervisor.store.registry import Registry, base_url, is_plain
from supervisor.store.sharing import Shared, Tell, Work

COPIED_BYTES: Final = 4 << 20  # at a time
MAX_PULLS: Final = 16  # different models at once; more only slow each other down


class ModelStore:
    """Changes a store, as ``supervisor.api.store.Store`` says. Use within ``async with``, which ends what is under way.

    ``logins`` are for registries and hubs. ``stall_s`` is how long a server may be silent before it is asked anew.
    ``files_of`` returns the files of a model that is served from elsewhere, of which one can be made here too; nothing
    where there is none of that name.
    """

    def __init__(
        self,
        folder: StoreFolder,
        *,
        logins: Logins | None = None,
        stall_s: float = STALL_S,
        files_of: Callable[[str], tuple[str, ...]] = lambda _name: (),
    ) -> None:
        self._folder = folder
        self._logins = logins
        self._files_of = files_of
        self._stall_s = stall_s
        self._pulls: dict[tuple[str, bool], Shared] = {}
        self._session: aiohttp.ClientSession
        self._tasks: TaskGroup

    async def __aenter__(self) -> Self:
        """Open what pulls need; nothing is written yet."""
        self._session = open_session(self._stall_s)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            with anyio.CancelScope(shield=True):
                await self._session.close()

    async def pull(self, name: str, *, insecure: bool) -> AsyncIterator[Progress]:
        """Fetch a model from its registry, or a GGUF file by its address. Whoever asks meanwhile joins in."""
        work, key = self._pulling(name, insecure=insecure)
        shared = self._pulls.get(key)
        if shared is None:
            if len(self._pulls) >= MAX_PULLS:
                raise StoreError(f"{MAX_PULLS} models are being pulled already: try again when one is done")
            shared = self._pulls[key] = Shared(work, bind(self._pulls.pop, key, None))
            self._tasks.start_soon(shared.run)
        async for progress in shared.follow():
            yield progress

    def _pulling(self, name: str, *, insecure: bool) -> tuple[Work, tuple[str, bool]]:
        fetcher = Fetcher(self._session, insecure=insecure)
        if hub.is_address(name):
            is_plain(name, insecure=insecure)
            url = hub.address(name)
            login = self._login(url, url.host_port_subcomponent or "")
            return self._guarded(bind(hub.pull_file, self._folder, fetcher, url, login)), (str(url), insecure)
        full = self._folder.target(name)
        base = base_url(self._folder, name, full, insecure=insecure)
        login = self._login(base, full.host)
        registry = Registry(Fetcher(self._session, insecure=base.scheme == "http"), base, full, login)
        return self._guarded(bind(pull, self._folder, registry, full)), (str(full), insecure)

    def _login(self, url: URL, host: str) -> Login | None:
        """Return our login for this host; none where it would go through the network for everybody to read.

        Plain HTTP is what a client allows by asking for it, and that is not enough: the operator's setting has to.
        """
        by_setting = self._folder.registry == f"http://{host}"
        return self._logins.of(host) if self._logins is not None and (url.scheme == "https" or by_setting) else None

    def _guarded(self, work: Work) -> Work:
        async def run(tell: Tell) -> None:
            try:
                await work(tell)
            except OSError as error:
                raise writing.store_error(error, self._folder) from error

        return run

    async def create(self, spec: CreateRequest) -> AsyncIterator[Progress]:
        """Make a model from a parent, which is copied or pulled where it is not here, or from blobs."""
        name = self._folder.target(spec.model)
        made = create.recipe(spec)
        if made.parent is not None and (files := self._files_of(made.parent)):
            yield Progress(f"copying {made.parent}")
            whole = [part for file in files for part in parts.files_of(Path(file))]
            made = replace(made, parent=None, blobs=tuple([await self._taken_in(file) for file in whole]))
        elif made.parent is not None and self._folder.find(made.parent) is None:
            async for progress in self.pull(made.parent, insecure=False):
                if progress.status != "success":
                    yield progress

        async def work(tell: Tell) -> None:
            def build() -> None:
                with writing.adding(self._folder):
                    replaced = create.create(
                        self._folder, name, made, lambda progress: from_thread.run_sync(tell, progress)
                    )
                writing.collect(self._folder, replaced)

            await to_thread.run_sync(build)
            tell(Progress("success"))

        shared = Shared(self._guarded(work), lambda: None)
        self._tasks.start_soon(shared.run)
        async for progress in shared.follow():
            yield progress

    async def _taken_in(self, file: Path) -> str:
        """Return the digest of the blob that a file on this machine becomes. Raises StoreError."""
        try:
            digest = await to_thread.run_sync(_digest_of, file)
            if not await self.has_blob(digest):
                async with await anyio.open_file(file, "rb") as stream:
                    await self.put_blob(digest, _chunks(stream))
        except OSError as error:
            raise StoreError(f"{file} cannot be read ({error.strerror})") from error
        return digest

    async def copy(self, source: str, destination: str) -> None:
        """Give a model a second name. Raises BadModelName, NotInStore, StoreError."""
        name = self._folder.target(destination)
        await self._in_thread(self._copy, self._folder.existing(source), name)

    def _copy(self, source: names.ModelName, destination: names.ModelName) -> None:
        with writing.adding(self._folder):
            writing.write_manifest(self._folder, destination, self._folder.read(source))

    async def delete(self, name: str) -> None:
        """Remove a model, and the blobs that no other one uses. Raises BadModelName, NotInStore, StoreError."""
        await self._in_thread(self._delete, self._folder.existing(name))

    def _delete(self, name: names.ModelName) -> None:
        freed = writing.remove_manifest(self._folder, name)
        writing.collect(self._folder, freed)
        writing.collect(self._folder)

    async def has_blob(self, digest: str) -> bool:
        """Say whether a blob is there, whole. Raises BadCreate for what is no digest."""
        return self._folder.blob(digest).is_file()

    async def put_blob(self, digest: str, chunks: AsyncIterator[bytes]) -> None:
        """Take a blob in. Raises BadCreate where its bytes have another digest, StoreFull, StoreError."""
        self._folder.blob(digest)  # before anything is read
        try:
            async with writing.adding_meanwhile(self._folder):
                await writing.receive_blob(self._folder, digest, chunks)
        except OSError as error:
            raise writing.store_error(error, self._folder) from error

    async def _in_thread(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            await to_thread.run_sync(work, *arguments)
        except OSError as error:
            raise writing.store_error(error, self._folder) from error


def _digest_of(file: Path) -> str:
    with file.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


async def _chunks(stream: anyio.AsyncFile[bytes]) -> AsyncIterator[bytes]:
    while chunk := await stream.read(COPIED_BYTES):
        yield chunk

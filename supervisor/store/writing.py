"""Writing into a store so that nothing has its name before it is whole, and what failed leaves nothing behind.

Two processes may work on one store. Whoever adds to it holds its lock shared; whoever removes blobs needs it alone, and
leaves them for another time where it cannot have that: a blob that was verified and waits for its manifest stays.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

from anyio import to_thread

from supervisor.api.store import BadCreate, StoreError, StoreFull
from supervisor.store import parts
from supervisor.store.folder import BLOB_NAME, DEFAULT_HOST_FILE, StoreFolder
from supervisor.store.manifests import Layer, Manifest
from supervisor.store.names import LOCAL_HOST, ModelName

LOCK_FILE: Final = ".lock"
PARTIAL: Final = "partial-"  # what is not whole yet
TEMPORARY: Final = ".new-"  # what is about to be renamed; hidden, so that no reader takes it for a name
# A client uploads a blob and asks for the model that is made of it a moment later; Ollama's own service does not know
# of our lock, and gives what it finds here as long.
GRACE_S: Final = 3600.0
PARTIAL_KEPT_S: Final = 7 * 24 * 3600.0  # a pull that nobody took up again for a week
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def store_error(error: OSError, folder: StoreFolder) -> StoreError:
    """Return the error of the disk as a line for the client."""
    if error.errno in _FULL:
        return StoreFull(f"the disk of {folder.root} is full ({error.strerror}): free some space there, then try again")
    return StoreError(f"{error.filename or folder.root}: {error.strerror}; check PLANNER_STORE")


def require_free(folder: StoreFolder, needed_bytes: int) -> None:
    """Raise StoreFull where less is free than is needed."""
    folder.blobs.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(folder.blobs)
    free_bytes = status.f_bavail * status.f_frsize
    if needed_bytes > free_bytes:
        raise StoreFull(
            f"the disk of {folder.root} is too full: {needed_bytes:,} bytes are needed, {free_bytes:,} are free; "
            "free some space there, then try again"
        )


@contextmanager
def adding(folder: StoreFolder) -> Iterator[None]:
    """Keep everybody from removing blobs; waits while somebody does. Raises OSError where the store is not writable."""
    folder.blobs.mkdir(parents=True, exist_ok=True)
    with (folder.root / LOCK_FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # held alone only for the moment that a removal takes
        _keep_default_host(folder)
        yield


def _keep_default_host(folder: StoreFolder) -> None:
    """Write down which host short names belong to, before a model of another one comes."""
    file = folder.root / DEFAULT_HOST_FILE
    host = folder.default_host
    if folder.registry is None and host != LOCAL_HOST and not file.exists():
        write_whole(file, host.encode())


@asynccontextmanager
async def adding_meanwhile(folder: StoreFolder) -> AsyncIterator[None]:
    """Do as ``adding`` does, without holding the event loop up."""
    held = adding(folder)
    await to_thread.run_sync(held.__enter__)
    try:
        yield
    finally:
        held.__exit__(None, None, None)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there with all its bytes or not at all, whatever ends us. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_blob(folder: StoreFolder, kind: str, data: bytes) -> Layer:
    """Write a small blob, and return it as a layer of this kind. Raises OSError."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if not is_whole(folder, digest, len(data)):
        write_whole(folder.blob(digest), data)
    return Layer(kind, digest, len(data))


def is_whole(folder: StoreFolder, digest: str, size_bytes: int) -> bool:
    """Say whether the blob is there with all its bytes."""
    with suppress(OSError):
        return folder.blob(digest).stat().st_size == size_bytes
    return False


async def receive_blob(folder: StoreFolder, digest: str, chunks: AsyncIterator[bytes]) -> None:
    """Take a blob in. Raises BadCreate where its bytes have another digest, OSError; then nothing of it is left."""
    path = folder.blob(digest)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    hasher = hashlib.sha256()
    try:
        with temporary.open("xb") as file:

            def take(chunk: bytes) -> None:
                hasher.update(chunk)
                file.write(chunk)

            async for chunk in chunks:
                await to_thread.run_sync(take, chunk)
            file.flush()
            await to_thread.run_sync(os.fsync, file.fileno())
        if hasher.hexdigest() != digest.removeprefix("sha256:"):
            raise BadCreate(f"digest mismatch, expected {digest!r}, got 'sha256:{hasher.hexdigest()}': send it again")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_manifest(folder: StoreFolder, name: ModelName, manifest: Manifest) -> set[str]:
    """Make the model known: the last step, after all of its blobs. Raises OSError.

    Returns the digests of the version that it replaces, as far as they are no longer of this name.
    """
    replaced: set[str] = set()
    with suppress(StoreError):
        replaced = {blob.digest for blob in folder.read(name).blobs}
    write_whole(folder.manifest(name), manifest.data)
    return replaced - {blob.digest for blob in manifest.blobs}


def remove_manifest(folder: StoreFolder, name: ModelName) -> set[str]:
    """Remove the name, and return the digests that it had. Raises OSError.

    The folders of host and namespace stay: the store's default host is known by them.
    """
    path = folder.manifest(name)
    had: set[str] = set()
    with suppress(StoreError):
        had = {blob.digest for blob in folder.read(name).blobs}
    path.unlink()
    with suppress(OSError):
        path.parent.rmdir()
    return had


def collect(folder: StoreFolder, digests: Iterable[str] | None = None) -> None:
    """Remove blobs that no model uses: these, or all that have been there for ``GRACE_S`` and partials long given up.

    So go links to parts of models that are no more. Nothing is removed while somebody adds, or where a manifest cannot
    be read: then nobody knows what it uses. Raises OSError.
    """
    with (folder.root / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        try:
            kept = [folder.read(name) for name in folder.names()]
        except StoreError:
            return
        used = {blob.digest for manifest in kept for blob in manifest.blobs}
        for links in parts.unused(folder, kept):
            shutil.rmtree(links, ignore_errors=True)  # a link too many hurts nobody
        for path in _all(folder) if digests is None else map(folder.blob, digests):
            if path.name.replace("-", ":") not in used:
                path.unlink(missing_ok=True)


def _all(folder: StoreFolder) -> Iterator[Path]:
    """Yield what has been there long enough to be nobody's."""
    now = time.time()
    for path in folder.blobs.iterdir():
        kept_s = GRACE_S if BLOB_NAME.fullmatch(path.name) else PARTIAL_KEPT_S
        ours = BLOB_NAME.fullmatch(path.name) or path.name.startswith((PARTIAL, TEMPORARY))
        with suppress(OSError):
            if ours and path.stat().st_mtime < now - kept_s:
                yield path

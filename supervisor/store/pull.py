"""Fetch a model: its manifest, then its blobs, the manifest written last."""

from __future__ import annotations

from contextlib import suppress
from functools import partial as bind

from anyio import to_thread

from planner.errors import PlannerError
from planner.model import read_attachment
from supervisor.api.store import Progress, RegistryFailed
from supervisor.store import listing, manifests, parts, writing
from supervisor.store.blobs import Fetch, Tell, Wanted
from supervisor.store.fetching import Transient
from supervisor.store.folder import StoreFolder
from supervisor.store.heeding import not_heeded
from supervisor.store.manifests import BadManifest, Manifest
from supervisor.store.names import ModelName
from supervisor.store.registry import Registry


async def pull(folder: StoreFolder, registry: Registry, name: ModelName, tell: Tell) -> None:
    """Return once the model is in the store, whole. Raises StoreError, OSError.

    Whatever ends it before leaves partial blobs to be resumed; a wrong digest or a full disk leaves nothing.
    """
    tell(Progress("pulling manifest"))
    try:
        manifest = manifests.parse(await registry.manifest())
    except BadManifest as error:
        raise RegistryFailed(f"the manifest of {name} is damaged: {error}") from error
    except Transient as error:
        raise RegistryFailed(f"pull model manifest: {error}") from error
    if not manifest.of_kind(manifests.MODEL):
        raise RegistryFailed(f"{name} holds no GGUF model: llama-server could not serve it, and nothing was fetched")
    wanted = [Wanted(blob.size_bytes, bind(registry.blob, blob.digest), blob.digest) for blob in manifest.blobs]
    async with Fetch(folder, tell) as fetch:
        await fetch.blobs(wanted)
        tell(Progress("writing manifest"))
        replaced = await to_thread.run_sync(_keep, folder, name, manifest)
    for line in await to_thread.run_sync(_not_heeded, folder, manifest):
        tell(Progress(line))
    if replaced:
        tell(Progress("removing unused layers"))
        await to_thread.run_sync(writing.collect, folder, replaced)
    tell(Progress("success"))


def _keep(folder: StoreFolder, name: ModelName, manifest: Manifest) -> set[str]:
    parts.link(folder, manifest.of_kind(manifests.MODEL))
    return writing.write_manifest(folder, name, manifest)


def _not_heeded(folder: StoreFolder, manifest: Manifest) -> tuple[str, ...]:
    """Return a line for each thing that is not heeded; none of a model that cannot be read."""
    preset = listing.read_preset(folder, manifest.layers, manifest.config)
    with suppress(PlannerError):
        header = read_attachment(str(folder.blob(manifest.of_kind(manifests.MODEL)[0].digest)))
        return tuple(not_heeded(preset, header.metadata))
    return ()

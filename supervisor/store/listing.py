"""The models of a store, for the catalogue: each name's manifest read, its blobs looked for, its texts taken along.

Nothing is written. A model that cannot be served is listed with the reason; none hides another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from planner.errors import PlannerError
from planner.model import ModelFacts
from supervisor.api.models import Preset
from supervisor.api.store import FOR_OLLAMA, StoreError
from supervisor.core.types import ModelId
from supervisor.models.catalogue import ModelEntry, described
from supervisor.store import manifests, parts
from supervisor.store.folder import StoreFolder
from supervisor.store.manifests import Layer, Manifest
from supervisor.store.names import ModelName

MAX_TEXT_BYTES: Final = 1 << 20  # a template, a licence; the longest known are 100 KiB
PLACE_FOR_SUFFIX: Final = ".Suffix"  # in a template that says how text between two others is asked for

Read = Callable[[str], ModelFacts]


class _Unfit(Exception):
    """The model cannot be served; the text says why."""


def scan(folder: StoreFolder, read: Read) -> tuple[ModelEntry, ...]:
    """Return the models of the store, by id: the short name, or the full one where two have the same short one."""
    default_host = folder.default_host
    entries: dict[str, ModelEntry] = {}
    for name in folder.names():
        short = name.short(default_host)
        model_id = ModelId(short if short not in entries else str(name))
        entries[model_id] = _entry(folder, name, model_id, read)
    return tuple(sorted(entries.values(), key=lambda entry: entry.id))


def _entry(folder: StoreFolder, name: ModelName, model_id: ModelId, read: Read) -> ModelEntry:
    path = folder.manifest(name)
    modified_at = 0.0
    with suppress(OSError):
        modified_at = path.stat().st_mtime
    try:
        manifest = folder.read(name)
    except StoreError as error:
        return ModelEntry(model_id, str(path), 0, modified_at, problem=str(error))
    known: dict[str, Any] = {"modified_at": modified_at, "full_name": str(name), "digest": manifest.digest}
    size_bytes = manifest.size_bytes
    try:
        model, projector, adapters = _files(folder, manifest, model_id)
        facts = read(str(model))
        _check_parts(facts, manifest)
        projected = read(str(projector)) if projector is not None else None
        preset = read_preset(folder, manifest.layers, manifest.config)
    except (_Unfit, PlannerError) as error:
        return ModelEntry(model_id, str(path), size_bytes, problem=str(error), **known)
    entry = described(
        ModelEntry(model_id, str(model), size_bytes, adapters=tuple(map(str, adapters)), preset=preset, **known),
        facts,
        None if projected is None else (str(projector), projected),
    )
    inserts = PLACE_FOR_SUFFIX in (preset.spoken_template or "") and "insert" not in entry.capabilities
    return replace(entry, capabilities=(*entry.capabilities, "insert")) if inserts else entry


def _files(folder: StoreFolder, manifest: Manifest, model_id: str) -> tuple[Path, Path | None, tuple[Path, ...]]:
    """Return where the model, its projector and its adapters lie. Raises _Unfit."""
    models = manifest.of_kind(manifests.MODEL)
    projectors = manifest.of_kind(manifests.PROJECTOR)
    if not models or len(projectors) > 1:
        raise _Unfit(
            f"its manifest names {len(models)} GGUF models and {len(projectors)} projectors; "
            "llama-server serves one model with at most one projector"
        )
    for blob in manifest.blobs:
        problem = _missing(folder.blob(blob.digest), blob)
        if problem is not None:
            raise _Unfit(f"{problem}: pull or create {model_id} again")
    first = parts.first_file(folder, models)
    if not first.is_file():
        raise _Unfit(f"its {len(models)} parts have no names by which they are found: pull or create {model_id} again")
    projector = folder.blob(projectors[0].digest) if projectors else None
    return first, projector, tuple(folder.blob(layer.digest) for layer in manifest.of_kind(manifests.ADAPTER))


def _check_parts(facts: ModelFacts, manifest: Manifest) -> None:
    """Raise _Unfit where the manifest names more than one model, or not all of its parts."""
    models = manifest.of_kind(manifests.MODEL)
    if len(facts.paths) != len(models):
        raise _Unfit(f"its manifest names {len(models)} GGUF models, and the first is a model of {len(facts.paths)}")


def _missing(path: Path, blob: Layer) -> str | None:
    """Return the line that says what is wrong with a blob's file, or None."""
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        return f"its blob {path} cannot be read ({error.strerror})"
    if size_bytes != blob.size_bytes:
        return f"its blob {path} has {size_bytes:,} bytes, {blob.size_bytes:,} are due"
    return None


def read_preset(folder: StoreFolder, layers: tuple[Layer, ...], config: Layer | None = None) -> Preset:
    """Return what the small ones among these layers say; one that cannot be understood counts as not there.

    ``config`` is the model's description, which says what Ollama's own service alone heeds.
    """

    def texts(*kinds: str) -> list[str]:
        found = (_text(folder, layer) for layer in layers if layer.kind in kinds)
        return [text for text in found if text is not None]

    def last(*kinds: str) -> str | None:
        return next(reversed(texts(*kinds)), None)

    parameters = _json(last(manifests.PARAMS), dict)
    messages = _json(last(manifests.MESSAGES), list)
    description = _json(None if config is None else _text(folder, config), dict) or {}
    return Preset(
        template=last(manifests.TEMPLATE, manifests.PROMPT),
        system=last(manifests.SYSTEM),
        parameters=MappingProxyType(parameters or {}),
        messages=tuple(_message(one) for one in messages or () if isinstance(one, dict)),
        licenses=tuple(texts(manifests.LICENSE)),
        parent=next((layer.parent for layer in layers if layer.kind == manifests.MODEL), None),
        for_ollama=MappingProxyType(
            {name: value for name in FOR_OLLAMA if isinstance(value := description.get(name), str) and value}
        ),
    )


def _message(entry: Mapping[str, Any]) -> Mapping[str, str]:
    return MappingProxyType({key: value for key, value in entry.items() if isinstance(value, str)})


def _text(folder: StoreFolder, layer: Layer) -> str | None:
    with suppress(OSError), folder.blob(layer.digest).open("rb") as file:
        return file.read(MAX_TEXT_BYTES).decode(errors="replace")
    return None


def _json(text: str | None, kind: type) -> Any:
    """Return the document in this text where it is of this kind, else None."""
    with suppress(ValueError, RecursionError):
        document = json.loads(text or "")
        return document if isinstance(document, kind) else None
    return None

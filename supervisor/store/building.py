"""What a new model is made of: GGUF blobs told apart by their headers, and the small blob that describes the whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from planner.errors import PlannerError
from planner.model import ModelFacts, read_attachment, read_model
from supervisor.api.store import BadCreate
from supervisor.models.catalogue import PROJECTOR_ARCHITECTURE
from supervisor.store import manifests, parts, writing
from supervisor.store.folder import StoreFolder
from supervisor.store.manifests import Layer

BILLION: Final = 10**9
MILLION: Final = 10**6
CONFIG: Final = "config"  # a kind that no layer has
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


def gguf_layer(folder: StoreFolder, digest: str) -> Layer:
    """Return the blob as a layer of the kind that its header tells. Raises BadCreate where it is no GGUF file."""
    path = folder.blob(digest)
    try:
        metadata = read_attachment(str(path)).metadata
        size_bytes = path.stat().st_size
    except (PlannerError, OSError) as error:
        raise BadCreate(f"blob {digest} is no GGUF file: {error}") from error
    if metadata.get("general.type") == "adapter":
        return Layer(manifests.ADAPTER, digest, size_bytes)
    is_projector = metadata.get("general.architecture") == PROJECTOR_ARCHITECTURE
    return Layer(manifests.PROJECTOR if is_projector else manifests.MODEL, digest, size_bytes)


def facts_of(folder: StoreFolder, layers: tuple[Layer, ...]) -> ModelFacts:
    """Return the facts of the model among these layers, whose parts are given names. Raises BadCreate, OSError."""
    models = tuple(layer for layer in layers if layer.kind == manifests.MODEL)
    if not models:
        raise BadCreate("a model is made of a GGUF model, and there is none")
    parts.link(folder, models)
    try:
        return read_model(str(parts.first_file(folder, models)))
    except PlannerError as error:
        raise BadCreate(str(error)) from error


def config_layer(
    folder: StoreFolder, facts: ModelFacts, layers: tuple[Layer, ...], for_ollama: Mapping[str, str] = NOTHING
) -> Layer:
    """Write what Ollama keeps of a model beside its layers, and return it. Raises OSError."""
    summary = facts.summary
    document = {
        "model_format": "gguf",
        "model_family": summary.architecture,
        "model_families": [summary.architecture],
        "model_type": _human(summary.n_params),
        "file_type": summary.quantization or "unknown",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        **for_ollama,
    }
    return writing.write_blob(folder, CONFIG, json.dumps(document).encode())


def _human(n_params: int) -> str:
    """Return a number of parameters as Ollama writes it (format/format.go, ``HumanNumber``)."""
    return f"{n_params / BILLION:.1f}B" if n_params >= BILLION else f"{n_params / MILLION:.2f}M"

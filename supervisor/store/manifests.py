"""A model's manifest: which blobs it is made of, and what each is (Docker's image manifest, version 2, schema 2)."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Final

MAX_MANIFEST_BYTES: Final = 4 << 20  # what Docker's registry takes
MAX_LAYERS: Final = 1024
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)

MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE: Final = "application/vnd.docker.container.image.v1+json"
_LAYER_TYPE: Final = "application/vnd.ollama.image."
MODEL: Final = "model"
PROJECTOR: Final = "projector"
ADAPTER: Final = "adapter"
TEMPLATE: Final = "template"
SYSTEM: Final = "system"
PROMPT: Final = "prompt"  # what the system layer was called once
PARAMS: Final = "params"
MESSAGES: Final = "messages"
LICENSE: Final = "license"


class BadManifest(Exception):
    """This is no manifest; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One blob of a model. ``kind`` is the last word of its media type; ``parent`` the model that it was taken from."""

    kind: str
    digest: str
    size_bytes: int
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model's parts. ``config`` is None where there is none; ``data`` is the text that the digest is of."""

    layers: tuple[Layer, ...]
    config: Layer | None
    data: bytes

    @property
    def digest(self) -> str:
        """Return the sha256 of the manifest, in hexadecimal digits, as Ollama's API shows it."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blobs(self) -> tuple[Layer, ...]:
        """Return everything that has to be there for the model to be whole, each once."""
        found = {layer.digest: layer for layer in self.layers}
        if self.config is not None:
            found.setdefault(self.config.digest, self.config)
        return tuple(found.values())

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all blobs."""
        return sum(blob.size_bytes for blob in self.blobs)

    def of_kind(self, *kinds: str) -> tuple[Layer, ...]:
        """Return the layers of these kinds, in order."""
        return tuple(layer for layer in self.layers if layer.kind in kinds)


def parse(data: bytes) -> Manifest:
    """Return the manifest in this JSON text. Raises BadManifest."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise BadManifest(f"it is larger than {MAX_MANIFEST_BYTES >> 20} MiB")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadManifest("it is no JSON") from error
    if not isinstance(document, dict) or not isinstance(document.get("layers"), list):
        raise BadManifest("it has no layers")
    if not 0 < len(document["layers"]) <= MAX_LAYERS:
        raise BadManifest(f"it has {len(document['layers'])} layers")
    layers = tuple(_layer(entry) for entry in document["layers"])
    config = document.get("config")
    has_config = isinstance(config, dict) and config.get("digest")
    return Manifest(layers, _layer(config) if has_config else None, data)


def _layer(entry: Any) -> Layer:
    if not isinstance(entry, dict):
        raise BadManifest("a layer of it is no object")
    digest, size_bytes, parent = entry.get("digest"), entry.get("size"), entry.get("from")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise BadManifest("a layer of it has no sha256 digest")
    if not isinstance(size_bytes, int) or isinstance(size_bytes, bool) or size_bytes < 0:
        raise BadManifest(f"layer {digest[:19]} has no size")
    kind = str(entry.get("mediaType", "")).removeprefix(_LAYER_TYPE)
    return Layer(kind, digest, size_bytes, parent if isinstance(parent, str) else None)


def build(layers: tuple[Layer, ...], config: Layer) -> Manifest:
    """Return the manifest of these parts, as it is stored."""
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": config.digest, "size": config.size_bytes},
        "layers": [
            {
                "mediaType": _LAYER_TYPE + layer.kind,
                "digest": layer.digest,
                "size": layer.size_bytes,
                **({} if layer.parent is None else {"from": layer.parent}),
            }
            for layer in layers
        ],
    }
    return Manifest(layers, config, json.dumps(document, separators=(",", ":")).encode())

"""Write a store as Ollama lays it out, and look at one from outside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from supervisor.api import Progress

HOST = "registry.example.org"
LAYER = "application/vnd.ollama.image."
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"


def digest_of(data: bytes) -> str:
    """Return a digest as manifests write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def put_blob(root: Path, data: bytes) -> str:
    """Write a blob where Ollama does, and return its digest."""
    digest = digest_of(data)
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / digest.replace(":", "-")).write_bytes(data)
    return digest


def put_model(root: Path, name: str, layers: list[tuple[str, bytes]]) -> Path:
    """Write a model (``host/namespace/model/tag``) of these layers, and return its manifest."""
    config = b'{"model_format": "gguf"}'
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": put_blob(root, config), "size": len(config)},
        "layers": [
            {"mediaType": LAYER + kind, "digest": put_blob(root, data), "size": len(data)} for kind, data in layers
        ],
    }
    path = root / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def tree(root: Path) -> Mapping[str, int]:
    """Return every file below a folder, with the time of its last change."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


async def said(steps: AsyncIterator[Progress]) -> list[str]:
    """Return what happened to the end, each status once."""
    return list(dict.fromkeys([step.status async for step in steps]))

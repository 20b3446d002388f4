"""Which path is answered by what."""

from __future__ import annotations

from aiohttp import web

from supervisor.api.runtime import Runtime
from supervisor.api.store import Store
from supervisor.gateway.ollama.embed import Embedding
from supervisor.gateway.ollama.granting import Granting
from supervisor.gateway.ollama.inference import Inference
from supervisor.gateway.ollama.library import Library


def ollama_routes(runtime: Runtime, store: Store | None, version: str) -> list[web.AbstractRouteDef]:
    """Return Ollama's API over this runtime. Without a store there is nothing to pull into or to create."""
    granting = Granting(runtime)
    inference, embedding, library = Inference(granting), Embedding(granting), Library(granting, store, version)
    return [
        web.post("/api/chat", inference.chat),
        web.post("/api/generate", inference.generate),
        web.post("/api/embed", embedding.embed),
        web.post("/api/embeddings", embedding.embeddings),
        web.get("/api/version", library.version),
        web.get("/api/status", library.status),
        web.get("/api/tags", library.tags),
        web.get("/api/ps", library.running),
        web.post("/api/show", library.show),
        web.post("/api/pull", library.pull),
        web.post("/api/push", library.push),
        web.post("/api/create", library.create),
        web.post("/api/copy", library.copy),
        web.delete("/api/delete", library.delete),
        web.head("/api/blobs/{digest}", library.has_blob),
        web.post("/api/blobs/{digest}", library.put_blob),
    ]

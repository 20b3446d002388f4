"""Probes, status, metrics and the page. None of them wakes or loads a model."""

from __future__ import annotations

import base64
import hashlib
import re
from http import HTTPStatus
from importlib.resources import files
from typing import Final

from aiohttp import hdrs, web

from supervisor.api.runtime import Runtime
from supervisor.status.metrics import CONTENT_TYPE, Exposition
from supervisor.status.view import is_ready, status

# What Ollama answers here; clients look for it to find out whether something is there.
ALIVE: Final = "Ollama is running"


class Monitoring:
    """The handlers of everything that only tells."""

    def __init__(self, runtime: Runtime, exposition: Exposition) -> None:
        self._runtime = runtime
        self._exposition = exposition
        self._page = files("supervisor.status").joinpath("page.html").read_text(encoding="utf-8")
        self._policy = content_policy(self._page)

    def routes(self) -> list[web.AbstractRouteDef]:
        """Return what to add to the application's router."""
        return [
            web.get("/", self._root),
            web.get("/healthz", self._healthz),
            web.get("/readyz", self._readyz),
            web.get("/status", self._status),
            web.get("/metrics", self._metrics),
        ]

    async def _root(self, request: web.Request) -> web.Response:
        if "text/html" not in request.headers.get(hdrs.ACCEPT, ""):
            return web.Response(text=ALIVE, headers={hdrs.VARY: hdrs.ACCEPT})
        headers = {
            hdrs.VARY: hdrs.ACCEPT,
            hdrs.CACHE_CONTROL: "no-cache",
            "Content-Security-Policy": self._policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return web.Response(text=self._page, content_type="text/html", headers=headers)

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _readyz(self, _request: web.Request) -> web.Response:
        snapshot = self._runtime.snapshot()
        ready = is_ready(snapshot)
        answer = {"ready": ready, "reasons": list(snapshot.not_ready)}
        return web.json_response(answer, status=HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(status(self._runtime.snapshot()), headers={hdrs.CACHE_CONTROL: "no-store"})

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._exposition.text(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})


def content_policy(page: str) -> str:
    """Return the Content-Security-Policy under which this page, and nothing that was slipped into it, works."""
    hashes = {
        tag: " ".join(
            "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

"""A real registry server, Debian's docker-registry, on a port of loopback, filled by its own protocol."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

WITHIN_S = 30.0
LAYER = "application/vnd.ollama.image."
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LISTENING = re.compile(r"listening on ([^\s\"]+)")


@dataclass(frozen=True)
class RegistryServer:
    """A running registry. ``folder`` is where it keeps everything."""

    host: str
    folder: Path

    def push(self, name: str, layers: dict[str, bytes | Path], *, token: str | None = None) -> dict[str, str]:
        """Upload a model of these layers (kind -> bytes or file), and return their digests by kind."""
        repository, _, tag = name.partition(":")
        digests = {kind: self._blob(repository, content, token) for kind, content in layers.items()}
        sizes = {kind: _size(content) for kind, content in layers.items()}
        entries = [
            {"mediaType": LAYER + kind, "digest": digest, "size": sizes[kind]}
            for kind, digest in digests.items()
            if kind != "config"
        ]
        config = {"mediaType": CONFIG, "digest": digests["config"], "size": sizes["config"]}
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": entries}
        body = json.dumps(document).encode()
        self._ask("PUT", f"/v2/{repository}/manifests/{tag}", 201, body, MANIFEST, token)
        return digests

    def blob_file(self, digest: str) -> Path:
        """Return where the registry keeps a blob, for a test that damages it."""
        hex_ = digest.removeprefix("sha256:")
        return self.folder / "docker/registry/v2/blobs/sha256" / hex_[:2] / hex_ / "data"

    def _blob(self, repository: str, content: bytes | Path, token: str | None) -> str:
        data = content if isinstance(content, bytes) else content.read_bytes()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        target = self._ask("POST", f"/v2/{repository}/blobs/uploads/", 202, b"", token=token)
        parts = urlsplit(target)
        self._ask(
            "PUT", f"{parts.path}?{parts.query}&digest={digest}", 201, data, "application/octet-stream", token=token
        )
        return digest

    def _ask(self, method: str, path: str, status: int, body: bytes, kind: str = "", token: str | None = None) -> str:
        connection = HTTPConnection(self.host, timeout=WITHIN_S)
        headers = {"Content-Type": kind} if kind else {}
        connection.request(method, path, body, headers | ({"Authorization": f"Bearer {token}"} if token else {}))
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == status, (answer.status, text)
        connection.close()
        return answer.headers.get("Location", "")


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@contextmanager
def registry_server(folder: Path, auth: str = "") -> Iterator[RegistryServer]:
    """Run a registry that keeps its files in this folder; ``auth`` is that section of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "config.yml"
    configuration.write_text(
        f"version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}}}}}\n"
        f'http: {{addr: "127.0.0.1:0", secret: of-a-test}}\n{auth}'
    )
    command = ["docker-registry", "serve", str(configuration)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            host = next(found[1] for found in map(LISTENING.search, process.stderr) if found)
            Thread(target=process.stderr.read, daemon=True).start()  # keeps the pipe empty
            yield RegistryServer(host, folder)
        finally:
            process.kill()

"""The store's folder: where a manifest and a blob lie, which there are, and one name looked up without regard to case.

A manifest is ``manifests/<host>/<namespace>/<model>/<tag>``, a blob ``blobs/sha256-<64 hexadecimal digits>``; only
what is whole and was verified gets such a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.api.store import BadCreate, BadModelName, NotInStore, StoreError
from supervisor.folders import visible
from supervisor.store import manifests, names
from supervisor.store.manifests import BadManifest, Manifest
from supervisor.store.names import ModelName

MAX_MANIFESTS: Final = 10_000  # as many files as a folder of models may have
DEFAULT_HOST_FILE: Final = ".default-host"  # written by us; hidden, so that nobody takes it for a model
BLOB_NAME: Final = re.compile(r"sha256-([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A store at ``root``, which need not be there. ``registry`` is the host that short names belong to, if set."""

    root: Path
    registry: str | None = None

    @property
    def default_host(self) -> str:
        """Return the host that a name without one is of: the setting's, else the one that the store was filled from.

        That is the one with the namespace of models that are called by one word. Where there is none: ``LOCAL_HOST``.
        Once there is one it stays: a model of another host must not give all others another name.
        """
        if self.registry is not None:
            return self.registry.rpartition("://")[2]
        with suppress(OSError, UnicodeDecodeError):
            kept = (self.root / DEFAULT_HOST_FILE).read_text("utf-8").strip()
            if (self.root / "manifests" / kept / names.DEFAULT_NAMESPACE).is_dir() and names.is_host(kept):
                return kept
        hosts = (path.name for path in visible(self.root / "manifests"))
        filled = (host for host in hosts if (self.root / "manifests" / host / names.DEFAULT_NAMESPACE).is_dir())
        return next((host for host in filled if host != names.LOCAL_HOST), names.LOCAL_HOST)

    @property
    def blobs(self) -> Path:
        """Return the folder of the blobs."""
        return self.root / "blobs"

    def blob(self, digest: str) -> Path:
        """Return where the blob of this digest lies. Raises BadCreate where it is none."""
        if not manifests.DIGEST.fullmatch(digest):
            shown = digest[: names.SHOWN_NAME]
            raise BadCreate(f"invalid digest format {shown!r}: a digest is sha256: and 64 hexadecimal digits")
        return self.blobs / digest.replace(":", "-")

    def manifest(self, name: ModelName) -> Path:
        """Return where the manifest of this name lies."""
        return self.root / "manifests" / name.host / name.namespace / name.model / name.tag

    def names(self) -> Iterator[ModelName]:
        """Yield the names that have a manifest, in order; what lies there under another kind of name is no model."""
        found = 0
        level = [self.root / "manifests"]
        for _ in range(4):  # host, namespace, model, tag
            level = [path for folder in level for path in visible(folder)]
        for path in level:
            with suppress(BadModelName):
                yield ModelName(*path.parts[-4:])
                found += 1
            if found >= MAX_MANIFESTS:
                return

    def stamp(self) -> int:
        """Return a number that changes when a model comes, goes or becomes another."""
        seen = []
        for name in self.names():
            with suppress(OSError):
                seen.append((name, self.manifest(name).stat().st_mtime_ns))
        return hash(tuple(seen))

    def parse(self, text: str) -> ModelName:
        """Return the full name for a client's text. Raises BadModelName."""
        return names.parse(text, self.default_host)

    def target(self, text: str) -> ModelName:
        """Return the name to write for a client's text: the one that is there already where only its case differs.

        Raises BadModelName.
        """
        name = self.parse(text)
        return self.find(str(name)) or name

    def find(self, text: str) -> ModelName | None:
        """Return the name that is there for a client's text, whatever the case of its letters. Raises BadModelName."""
        wanted = [self.parse(text)]
        if not names.has_host(text):
            wanted.append(names.parse(text, names.LOCAL_HOST))
        for name in wanted:
            if self.manifest(name).is_file():
                return name
        by_folded = {name.folded: name for name in self.names()}
        return next((by_folded[name.folded] for name in wanted if name.folded in by_folded), None)

    def existing(self, text: str) -> ModelName:
        """Return the name that is there for a client's text. Raises BadModelName, NotInStore."""
        name = self.find(text)
        if name is None:
            raise NotInStore(f"model '{text[: names.SHOWN_NAME]}' not found")
        return name

    def read(self, name: ModelName) -> Manifest:
        """Return the manifest of this name. Raises StoreError."""
        path = self.manifest(name)
        try:
            with path.open("rb") as file:
                return manifests.parse(file.read(manifests.MAX_MANIFEST_BYTES + 1))
        except OSError as error:
            raise StoreError(f"the manifest {path} cannot be read ({error.strerror})") from error
        except BadManifest as error:
            raise StoreError(f"the manifest {path} is damaged ({error}): pull or create the model again") from error

"""``planner create``: a Modelfile, and the files that it names sent to the service as blobs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, Final

from planner.errors import InvalidRequest
from supervisor.api.store import BadCreate
from supervisor.client.service import Service, ServiceError
from supervisor.client.transfer import Transfer
from supervisor.store import modelfile, parts

CHUNK_BYTES: Final = 1 << 20


def create(at: Service, name: str, file: Path, shown: Transfer) -> None:
    """Make the model that this Modelfile describes. Raises InvalidRequest for what is wrong with it, ServiceError."""
    text = _text(file)
    try:
        read = modelfile.parse(text)
        body = {
            "model": name,
            "modelfile": text,
            "files": _sent(at, read.sources, file, shown),
            "adapters": _sent(at, read.adapters, file, shown),
        }
    except BadCreate as error:
        raise InvalidRequest(f"{file}: {error}") from None
    with at.lines("POST", "/api/create", body) as lines:
        shown.follow(lines)


def _text(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return stream.read(modelfile.MAX_TEXT + 1)  # one more than the parser takes
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}; -f names the Modelfile") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"{file} is no text in UTF-8: -f names the Modelfile, FROM in it the GGUF file") from None


def _sent(at: Service, sources: Iterable[str], file: Path, shown: Transfer) -> dict[str, str]:
    """Send what is a file here, and return each one's digest; the rest are names, which the service knows.

    A file that is one part of a split model stands for all of them.
    """
    sent = {}
    for source in sources:
        path = file.parent / Path(source).expanduser()
        if path.is_dir() and modelfile.is_path(source):
            raise InvalidRequest(f"{file}: {source} is a folder: name the GGUF file in it")
        if path.is_file():
            sent[source] = _send(at, path, shown)
            beside = [part for part in parts.files_of(path) if part.name != path.name]
            sent |= {part.name: _send(at, part, shown) for part in beside}
        elif modelfile.is_path(source):
            raise InvalidRequest(f"{file}: there is no file {path}")
    return sent


def _send(at: Service, path: Path, shown: Transfer) -> str:
    """Make the service have this file as a blob, and return its digest."""
    try:
        with path.open("rb") as file:
            shown.show(f"reading {path.name}")
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if not _is_there(at, digest):
                size_bytes = file.tell()
                file.seek(0)
                told = _telling(file, lambda done: shown.show(f"sending {path.name}", digest, done, size_bytes))
                at.send(f"/api/blobs/{digest}", told, size_bytes)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None
    return digest


def _is_there(at: Service, digest: str) -> bool:
    try:
        with at.lines("HEAD", f"/api/blobs/{digest}"):
            return True
    except ServiceError as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        return False


def _telling(file: BinaryIO, tell: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
        tell(file.tell())

"""Keeps what a llama-server answered, in the user's cache folder, one small file for each key.

A cache that cannot be read or written is no error: the binary is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

_SCHEMA: Final = "1"  # raised whenever what is kept changes
_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Answers:
    """What the binary printed for ``--version`` and ``--list-devices``, and the backends that lie in or beside it."""

    version: str
    list_devices: str
    backends: str


def load(environ: Mapping[str, str], key: Sequence[str]) -> Answers | None:
    """Return the answers kept under this key, or None."""
    file = _file(environ, key)
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file else {}
        return Answers(*(str(kept[name]) for name in ("version", "list_devices", "backends")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(environ: Mapping[str, str], key: Sequence[str], answers: Answers) -> None:
    """Keep the answers under this key, where there is a folder to keep them; nobody ever sees half a file."""
    file = _file(environ, key)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps(asdict(answers) | {"of": key[0]}), encoding="utf-8")
        own.replace(file)
    except OSError:
        return


def _file(environ: Mapping[str, str], key: Sequence[str]) -> Path | None:
    base = environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):
        base = f"{environ.get('HOME', '')}/.cache"
    if not base.startswith("/") or base == "/.cache":
        return None  # a service without a home
    digest = hashlib.blake2b("\0".join((_SCHEMA, *key)).encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return Path(base) / "loadmaster" / f"llama-server-{digest}.json"

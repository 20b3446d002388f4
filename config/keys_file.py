"""The keys file: who may use the service, each with a key of its own, of which only the hash is kept.

A key is random, 256 bits of it, so that one round of SHA-256 is enough: there is no shorter text to guess it from.
"""

from __future__ import annotations

import fnmatch
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Final

from config.parse import Kind, boolean, whole_number
from config.resolve import ConfigError, Problem
from config.sections import Key, document, read_text, scalar, tables, words

KEY_PREFIX: Final = "lm-"  # so that a leaked one is recognised by whoever scans for such
KEY_BYTES: Final = 32
MAX_CONCURRENCY: Final = 65536  # as many as may wait at all
_HASH: Final = re.compile(r"sha256:[0-9a-f]{64}")
_DEFAULT_TAG: Final = ":latest"  # the store's ids have it, people leave it out


@dataclass(frozen=True, slots=True)
class Client:
    """Who holds a key. ``hash`` is what ``hash_of`` returns for it.

    ``models`` are the ids and aliases that it may use, ``*`` in them standing for any text; empty: all. ``concurrency``
    is how many requests it may have in work at a time; None: as many as anybody. ``manage`` says whether it may load
    and unload, and, where it may use all models, pull, create and delete.
    """

    hash: str
    models: tuple[str, ...] = ()
    concurrency: int | None = None
    manage: bool = True

    def may_use(self, model: str) -> bool:
        """Say whether this model is on its list, where neither the case of letters nor ``:latest`` counts."""
        return not self.models or any(fnmatch.fnmatchcase(_plain(model), _plain(each)) for each in self.models)


@dataclass(frozen=True, slots=True)
class KeysFile:
    """The clients by name."""

    clients: Mapping[str, Client] = field(default_factory=lambda: MappingProxyType({}))


def hash_of(key: str) -> str:
    """Return what the file keeps of a key."""
    return "sha256:" + sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    """Return a key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def _plain(name: str) -> str:
    return name.lower().removesuffix(_DEFAULT_TAG)


def _hash(text: str) -> str:
    if not _HASH.fullmatch(text):
        raise ValueError(text)
    return text


CLIENT_KEYS: Final[tuple[Key, ...]] = (
    scalar(
        "hash",
        Kind("sha256: and 64 hexadecimal digits, as `planner key` prints them", _hash, str),
        "The hash of its key.",
        required=True,
    ),
    words("models", "The models that it may use, by id or alias; * stands for any text. Not given: all."),
    scalar("concurrency", whole_number(1, MAX_CONCURRENCY), "Requests that it may have in work at a time.", int),
    scalar(
        "manage",
        boolean(),
        "Whether it may load and unload models, and, of all, pull, create and delete; true if unset.",
        bool,
    ),
)


def read(file: Path) -> KeysFile:
    """Return what the file says; nobody where there is none. Raises ConfigError with everything that is wrong."""
    return parse(read_text(file), str(file))


def parse(text: str, name: str) -> KeysFile:
    """Return what this text of a keys file says; ``name`` is the file's in errors. Raises ConfigError."""
    problems: list[Problem] = []
    clients: dict[str, Client] = {}
    for section, content in document(text, name).items():
        where = f"{name}: [{section}"
        if section == "clients" and isinstance(content, dict):
            clients = tables(CLIENT_KEYS, Client, content, where, problems)
        else:
            problems.append(Problem(f"{where}]", "this name", "clients"))
    owners: dict[str, str] = {}
    for owner, client in clients.items():
        if owners.setdefault(client.hash, owner) != owner:
            problems.append(
                Problem(f"{name}: {owner}", "this hash", f"a hash of its own: {owners[client.hash]} has it")
            )
    if problems:
        raise ConfigError(tuple(problems))
    return KeysFile(MappingProxyType(clients))


def entry(name: str, key: str) -> str:
    """Return the lines that let this key's holder in, to be added to the file."""
    return f'[clients."{name}"]\nhash = "{hash_of(key)}"\n'

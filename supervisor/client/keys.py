"""``planner key``: makes a key for a client, prints it once, and keeps only its hash."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from config import keys_file
from config.resolve import ConfigError, resolve
from planner.errors import InvalidRequest

USAGE: Final = """\
planner key NAME

Makes a key for a client of this name, adds its hash to PLANNER_KEYS_FILE and prints the key, which is kept nowhere.
What the client may do is written into that file (models, concurrency, manage). A running service reads it on SIGHUP.
"""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")  # stands in log lines and as a key of a TOML file
PRIVATE: Final = 0o600  # a hash gives no key away, but says who there is


def main(name: str, words: Sequence[str]) -> int:
    """Make the key and return the exit status. Raises InvalidRequest."""
    del name
    if {"-h", "--help"} & set(words):
        sys.stdout.write(USAGE)
        return 0
    usage = USAGE.splitlines()[0]
    if not words:
        raise InvalidRequest(f"which name? {usage}")
    if len(words) > 1:
        raise InvalidRequest(f"{words[1]}: one word too many: {usage}")
    (client,) = words
    if not NAME.fullmatch(client):
        raise InvalidRequest(f"{client!r} is not a name of letters, digits and ._@- that begins with one of the first")
    file: Path = resolve(os.environ, fields={"keys_file"}).by_field()["keys_file"]
    try:
        if client in keys_file.read(file).clients:
            raise InvalidRequest(f"{client} has a key in {file}: take its section out first to give it a new one")
        key = keys_file.new_key()
        _append(file, keys_file.entry(client, key))
    except ConfigError as error:
        raise InvalidRequest(str(error)) from None
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}; set PLANNER_KEYS_FILE to where it can be written") from None
    sys.stdout.write(f"{key}\n")
    sys.stderr.write(f"added {client} to {file}; the key is shown only now\n")
    return 0


def _append(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, PRIVATE)
    with os.fdopen(descriptor, "a", encoding="utf-8") as stream:
        stream.write(f"\n{text}" if stream.tell() else text)

"""A split model in a store: its parts are blobs. llama.cpp finds parts by their names, so each gets a link with one.

The links of a model lie in a folder of their own, ``split/<a digest over those of its parts>``. They are relative, so
that a store may be moved.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from planner.errors import PlannerError
from planner.model import read_attachment
from supervisor.api.store import BadCreate
from supervisor.store import manifests
from supervisor.store.folder import StoreFolder
from supervisor.store.manifests import Layer, Manifest

LINKS: Final = "split"
MAX_PARTS: Final = 1000  # a model of 50 TB, at the size in which hubs split them
_SPLIT: Final = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.ASCII | re.DOTALL)


def names_of(stem: str) -> tuple[str, tuple[str, ...]]:
    """Return a file's name without what says which part it is, and the names of all parts in order; no suffix on any.

    Of a file that is no part it is the only one. Raises BadCreate where there are absurdly many.
    """
    split = _SPLIT.fullmatch(stem)
    if split is None:
        return stem, (stem,)
    count = int(split["count"])
    if not 0 < count <= MAX_PARTS:
        raise BadCreate(f"{stem} is one of {count} parts, of which there may be {MAX_PARTS}")
    return split["prefix"], tuple(_name(split["prefix"], number, count) for number in range(1, count + 1))


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files of the model that this is a file of. Raises BadCreate."""
    return tuple(path.with_name(name + path.suffix) for name in names_of(path.stem)[1])


def in_order(folder: StoreFolder, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return the layers, parts of a model in their order. Raises BadCreate where they are not all the parts of one."""
    models = [layer for layer in layers if layer.kind == manifests.MODEL]
    known = [_which(folder, layer) for layer in models]
    count = max((count for _, count in known), default=1)
    if {count for _, count in known} - {count} or (count == 1 and len(models) > 1):
        raise BadCreate(f"a model is made of one GGUF model, or of the parts of one, not of {len(models)}")
    numbers = sorted(number for number, _ in known)
    if count > 1 and numbers != list(range(count)):
        missing = [str(number + 1) for number in range(count) if number not in numbers]
        which = f"part {', '.join(missing)} is missing" if missing else "one is there twice"
        raise BadCreate(f"a split model is made of all its {count} parts, and {which}")
    ordered = iter(sorted(zip(known, models, strict=True), key=lambda one: one[0]))
    return tuple(next(ordered)[1] if layer.kind == manifests.MODEL else layer for layer in layers)


def first_file(folder: StoreFolder, models: tuple[Layer, ...]) -> Path:
    """Return the file that llama-server is given: the only blob, or the link to the first part."""
    return folder.blob(models[0].digest) if len(models) == 1 else _links(folder, models) / _link(1, len(models))


def link(folder: StoreFolder, models: tuple[Layer, ...]) -> None:
    """Make the links of a split model, all at once; of any other nothing. Raises OSError."""
    links = _links(folder, models)
    if len(models) < 2 or links.exists():  # noqa: PLR2004 - one blob is found by its own name
        return
    made = links.with_name(f".{secrets.token_hex(8)}")
    made.mkdir(parents=True)
    for number, layer in enumerate(models, 1):
        blob = folder.blob(layer.digest)
        (made / _link(number, len(models))).symlink_to(os.path.relpath(blob, made))
    try:
        made.replace(links)
    except OSError:
        shutil.rmtree(made)
        if not links.exists():  # else somebody else was quicker
            raise


def unused(folder: StoreFolder, kept: Iterable[Manifest]) -> Iterator[Path]:
    """Yield the folders of links that belong to none of these models."""
    used = {_links(folder, manifest.of_kind(manifests.MODEL)) for manifest in kept}
    with suppress(OSError):
        yield from set((folder.root / LINKS).iterdir()) - used


def _links(folder: StoreFolder, models: tuple[Layer, ...]) -> Path:
    digests = "\n".join(layer.digest for layer in models)
    return folder.root / LINKS / hashlib.sha256(digests.encode()).hexdigest()


def _link(number: int, count: int) -> str:
    return _name("model", number, count) + ".gguf"


def _name(prefix: str, number: int, count: int) -> str:
    """Return a part's name, as llama.cpp writes it (src/llama.cpp, ``llama_split_path``)."""
    return f"{prefix}-{number:05}-of-{count:05}"


def _which(folder: StoreFolder, layer: Layer) -> tuple[int, int]:
    """Return which part a blob is, from 0, and of how many; (0, 1): it is no part."""
    try:
        metadata = read_attachment(str(folder.blob(layer.digest))).metadata
    except PlannerError as error:
        raise BadCreate(f"blob {layer.digest} is no GGUF file: {error}") from error
    number, count = metadata.get("split.no", 0), metadata.get("split.count", 1)
    if isinstance(number, int) and isinstance(count, int) and count > 1:
        return number, count
    return 0, 1

"""The models of a folder: found by walking it, known by their headers, called by their path below it.

A model's id is its relative path without ``.gguf`` and without the suffix of a split file. Projectors are no models:
each belongs to the model beside it. A file that cannot be served is listed all the same, with the reason.

A name that a client sends is only ever looked up among these ids: no text of a request becomes a path.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from config.model_settings import ExternalRunner, ModelSettings
from planner.errors import InvalidRequest, PlannerError
from planner.model import ModelFacts
from planner.types import Role
from supervisor.api.models import CHAT_TEMPLATE, Preset
from supervisor.api.names import DEFAULT_TAG, folded
from supervisor.core.types import ModelId
from supervisor.folders import visible
from supervisor.models.capabilities import capabilities

MAX_FILES: Final = 10_000  # somebody's whole home directory is not a folder of models
PROJECTOR_ARCHITECTURE: Final = "clip"  # gguf-py/gguf/constants.py, MODEL_ARCH.MMPROJ
CLOSEST: Final = 3
CLOSEST_CUTOFF: Final = 0.4  # difflib's ratio; below it names have little in common

_SPLIT = re.compile(r"-(?P<number>\d{5})-of-\d{5}$")
_PROJECTOR = re.compile(r"(^|[-._])mmproj([-._]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model. ``problem`` is the line that says why it cannot be served; what could not be read is then None.

    ``path`` is the file that llama-server loads, ``file_bytes`` everything that belongs to the model. The other fields
    are as in ``supervisor.api.models.ModelView``; ``settings`` and ``aliases`` are the operator's. ``external`` is set
    where a program of the operator's stands in for llama-server, and there is no file; ``runs_as`` where another
    model loads the same files in the same way.
    """

    id: ModelId
    path: str
    file_bytes: int
    modified_at: float
    full_name: str = ""  # by which it is found too: an id is the shortest one
    digest: str = ""
    role: Role = Role.CHAT
    architecture: str | None = None
    n_ctx_train: int | None = None
    quantization: str | None = None
    n_params: int | None = None
    n_embd: int | None = None
    capabilities: tuple[str, ...] = ()
    mmproj: str | None = None
    adapters: tuple[str, ...] = ()
    preset: Preset = field(default_factory=Preset)
    has_chat_template: bool = True
    problem: str | None = None
    aliases: tuple[str, ...] = ()
    settings: ModelSettings = field(default_factory=ModelSettings)
    external: ExternalRunner | None = None
    runs_as: ModelId | None = None

    @property
    def runner(self) -> ModelId:
        """Return the model whose runner serves this one: itself, or another name for the same."""
        return self.id if self.runs_as is None else self.runs_as

    @property
    def loaded_files(self) -> tuple[object, ...]:
        """Return what is another one once a runner of it would load other bytes: in a store a blob's name is enough."""
        version = "" if self.full_name else self.digest
        return self.path, self.mmproj, self.adapters, version


def scan(folder: Path, read: Callable[[str], ModelFacts]) -> tuple[ModelEntry, ...]:
    """Return the models below the folder, by id. ``read`` gives a file's facts and raises PlannerError.

    Raises OSError where the folder itself cannot be read.
    """
    root = Path(os.path.realpath(folder, strict=True))
    next(root.iterdir(), None)  # the walk passes over a folder that may not be read
    found = {path: _read(path, read) for path in sorted(_files(root)) if _is_first(path)}
    projectors = {path: facts for path, facts in found.items() if _is_projector(path, facts)}
    models = {path: facts for path, facts in found.items() if path not in projectors}
    entries = []
    for path, facts in models.items():
        projector = _projector_of(path, list(projectors), list(models))
        with_facts = None if projector is None else (str(projector), projectors[projector])
        entries.append(_entry(path, _id(path, root), facts, with_facts))
    return tuple(sorted(entries, key=lambda entry: entry.id))


def stamp(folder: Path) -> int:
    """Return a number that changes when a model comes, goes, or is written to; what cannot be read counts as empty."""
    seen = []
    for path in _files(Path(os.path.realpath(folder))):
        with suppress(OSError):
            status = path.stat()
            seen.append((str(path), status.st_size, status.st_mtime_ns))
    return hash(tuple(seen))


class Catalogue:
    """What the last scan found."""

    def __init__(self) -> None:
        self._entries: Mapping[ModelId, ModelEntry] = {}
        self._folded: Mapping[str, ModelEntry] = {}

    def replace(self, entries: tuple[ModelEntry, ...]) -> None:
        """Take the result of a scan."""
        self._entries = {entry.id: entry for entry in entries}
        named = [(name, entry) for entry in entries for name in (entry.id, entry.full_name) if name]
        named += [(alias, entry) for entry in entries for alias in entry.aliases]
        self._folded = {folded(name): entry for name, entry in reversed(named)}

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Return every model, by id."""
        return tuple(self._entries.values())

    def find(self, name: str) -> ModelEntry | None:
        """Return the model of exactly this id; else of this name with or without Ollama's default tag, in any case."""
        exact = self._entries.get(ModelId(name)) or self._entries.get(ModelId(name.removesuffix(DEFAULT_TAG)))
        return exact or self._folded.get(folded(name))

    def draft_of(self, settings: ModelSettings) -> str | None:
        """Return the path of the draft model: a model by its name, else a file. Raises InvalidRequest."""
        if settings.draft is None:
            return None
        if (entry := self.find(settings.draft)) is not None and entry.external is None:
            return entry.path
        if settings.draft.startswith("/"):
            return settings.draft
        raise InvalidRequest(f"draft {settings.draft!r} is neither a model's id nor a path that begins with /")

    def closest(self, name: str) -> tuple[str, ...]:
        """Return the ids that resemble the name most, best first, whatever the case of their letters."""
        by_lower = {name.lower(): name for one in self._entries.values() for name in (str(one.id), *one.aliases)}
        found = difflib.get_close_matches(name.lower(), by_lower, n=CLOSEST, cutoff=CLOSEST_CUTOFF)
        return tuple(by_lower[one] for one in found)


def _files(root: Path) -> Iterator[Path]:
    """Yield GGUF files. Links are the operator's own doing: files and folders behind them are taken like others.

    No folder is entered twice, so that no loop is walked; one that is there by itself goes by its own name.
    """
    folders, linked, entered = [root], deque[Path](), set[str]()
    count = 0
    while folders or linked:
        folder = folders.pop() if folders else linked.popleft()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        for path in visible(folder):
            if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a link leads into what we may not enter
                (linked if path.is_symlink() else folders).append(path)
            elif path.suffix == ".gguf":
                count += 1
                if count > MAX_FILES:
                    return
                yield path


def _read(path: Path, read: Callable[[str], ModelFacts]) -> ModelFacts | str:
    """Return the file's facts, or the line that says why there are none."""
    try:
        path.stat()
    except OSError as error:
        if path.is_symlink():
            why = "leads in a circle" if error.errno == errno.ELOOP else f"leads to {path.readlink()}: {error.strerror}"
            return f"{path} is a link that {why}; link it to a file that is there, or remove it"
    try:
        return read(str(path))
    except PlannerError as error:
        return str(error)


def _is_projector(path: Path, facts: ModelFacts | str) -> bool:
    named_so = _PROJECTOR.search(path.stem) is not None
    return named_so or (not isinstance(facts, str) and facts.summary.architecture == PROJECTOR_ARCHITECTURE)


def _is_first(path: Path) -> bool:
    """Say whether the file stands for its model: unsplit, or the first part, or one whose first part is missing."""
    split = _SPLIT.search(path.stem)
    if split is None or int(split["number"]) == 1:
        return True
    first = path.with_name(path.name.replace(f"-{split['number']}-of-", "-00001-of-"))
    return not first.exists() and int(split["number"]) == 2  # noqa: PLR2004 - the next one tells of the missing first


def _id(path: Path, root: Path) -> ModelId:
    return ModelId(_SPLIT.sub("", path.relative_to(root).with_suffix("").as_posix()))


def _projector_of(path: Path, projectors: list[Path], models: list[Path]) -> Path | None:
    """Return the projector that belongs to this model: named after it, or alone with it in a folder."""
    beside = [one for one in projectors if one.parent == path.parent]
    stem = _SPLIT.sub("", path.stem).lower()
    named = [one for one in beside if (rest := _PROJECTOR.sub("", one.stem).strip("-._").lower()) and rest in stem]
    alone = len(beside) == 1 and sum(one.parent == path.parent for one in models) == 1
    return max(named, key=lambda one: len(one.stem), default=beside[0] if alone else None)


def _entry(
    path: Path, model_id: ModelId, facts: ModelFacts | str, projector: tuple[str, ModelFacts | str] | None
) -> ModelEntry:
    size_bytes, modified_at = 0, 0.0
    with suppress(OSError):  # then the facts say why
        status = path.stat()
        size_bytes, modified_at = status.st_size, status.st_mtime
    if not isinstance(facts, str):
        size_bytes = facts.summary.file_bytes
    version = f"{model_id}\0{size_bytes}\0{modified_at}".encode(errors="replace")
    entry = ModelEntry(model_id, str(path), size_bytes, modified_at, digest=hashlib.sha256(version).hexdigest())
    return replace(entry, problem=facts) if isinstance(facts, str) else described(entry, facts, projector)


def described(entry: ModelEntry, facts: ModelFacts, projector: tuple[str, ModelFacts | str] | None) -> ModelEntry:
    """Return the entry with what its header says. The projector is a path, and its facts or why there are none."""
    mmproj, seen = projector if projector is not None and facts.role is Role.CHAT else (None, None)
    return replace(
        entry,
        role=facts.role,
        architecture=facts.summary.architecture,
        n_ctx_train=facts.summary.n_ctx_train,
        quantization=facts.summary.quantization,
        n_params=facts.summary.n_params,
        n_embd=facts.hparams.n_embd,
        capabilities=capabilities(facts, None if isinstance(seen, str) else seen),
        mmproj=mmproj,
        has_chat_template=CHAT_TEMPLATE in facts.metadata,
        problem=None
        if facts.summary.n_layers
        else f"{entry.path} has no layers: a vocabulary or an adapter, not a model",
    )

"""What is particular to single models, and to programs that run beside them: the values of the models file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from config.sections import Table

NOTHING: Final[Table] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What is particular to one model; None (or empty) where nothing is.

    ``context`` is tokens for each conversation. ``draft`` is a model's id or a path; ``projector`` a path, or False for
    none. ``set`` are fields put into requests that lack them, ``force`` into all, ``strip`` are taken out.
    ``flags`` are llama-server's own, as words. Times are seconds (inf: for ever), ``cache_ram`` is MiB.
    """

    role: str | None = None
    context: int | None = None
    slots: int | Literal["auto"] | None = None
    kv_cache_type: str | None = None
    flash_attention: str | None = None
    cache_ram: int | None = None
    devices: tuple[str, ...] | None = None
    draft: str | None = None
    projector: str | bool | None = None
    mtp: bool | None = None
    flags: tuple[str, ...] = ()
    keep_alive: float | None = None
    pin: bool | None = None
    priority: int | None = None
    preload: bool | None = None
    aliases: tuple[str, ...] = ()
    set: Table = field(default_factory=lambda: NOTHING)
    force: Table = field(default_factory=lambda: NOTHING)
    strip: tuple[str, ...] = ()

    def over(self, defaults: ModelSettings) -> ModelSettings:
        """Return these settings with the defaults where they say nothing; tables are merged key by key."""
        merged: dict[str, Any] = {}
        for each in fields(self):
            own, other = getattr(self, each.name), getattr(defaults, each.name)
            if isinstance(own, Mapping):
                merged[each.name] = MappingProxyType({**other, **own})
            else:
                merged[each.name] = other if own is None or own == () else own
        return ModelSettings(**merged)


@dataclass(frozen=True, slots=True)
class ExternalRunner:
    """A program that is started and stopped like a runner and holds its place in the ledger.

    ``cmd`` is the program and its arguments; ``{port}`` in them, in ``health`` and in ``url`` is a free port.
    ``memory`` is the bytes that it takes on each device; it is believed.
    """

    cmd: tuple[str, ...]
    url: str
    health: str
    memory: Mapping[str, int]
    env: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    folder: Path | None = None
    slots: int = 1
    role: str = "chat"
    keep_alive: float | None = None
    pin: bool | None = None
    priority: int | None = None
    preload: bool | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelsFile:
    """What the file says."""

    defaults: ModelSettings = ModelSettings()
    models: Mapping[str, ModelSettings] = field(default_factory=lambda: NOTHING)
    external: Mapping[str, ExternalRunner] = field(default_factory=lambda: NOTHING)

    def of(self, model: str) -> ModelSettings:
        """Return what holds for the model of this id."""
        return self.models.get(model, ModelSettings()).over(self.defaults)

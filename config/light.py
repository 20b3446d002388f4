"""The cheap door: the settings that placement needs, for ``planner explain`` and ``planner devices``.

Standard library only; a few milliseconds. ``config.settings.Settings.placement`` gives the same values to the service.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from config.resolve import ConfigError, resolve
from config.table import Environ
from config.values import DeviceBytes, RpcServer


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """What the environment says about where models go. ``context_length`` None: the planner decides."""

    num_parallel: int | Literal["auto"]
    context_length: int | None
    kv_cache_type: str
    flash_attention: str
    cache_ram: int  # MiB
    gpu_overhead: DeviceBytes
    max_vram: DeviceBytes
    device_overhead: DeviceBytes
    sched_spread: bool
    rpc_servers: tuple[RpcServer, ...]
    llama_server: Path | None
    cards: Path

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> PlacementSettings:
        """Take this door's fields out of a mapping that has them."""
        return cls(**{name: fields[name] for name in cls.__slots__})


@dataclass(frozen=True, slots=True)
class LightLoaded:
    """The values and one line for each thing that was odd."""

    settings: PlacementSettings
    warnings: tuple[str, ...]


def read(environ: Environ | None = None) -> LightLoaded:
    """Return the placement settings of this environment (the process's own by default).

    Raises ConfigError with every bad ``PLANNER_`` value among them.
    """
    resolved = resolve(os.environ if environ is None else environ, light=True)
    if resolved.problems:
        raise ConfigError(resolved.problems)
    return LightLoaded(PlacementSettings.of(resolved.by_field()), resolved.warnings)

"""The operator's settings as a policy: the one conversion, for ``explain`` and for the service."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol, cast

from planner.types.request import FlashAttention, LearnedOverhead, PerDevice, Policy

_NONE: Mapping[str, int] = MappingProxyType({})
_NOTHING_LEARNED: Mapping[str, LearnedOverhead] = MappingProxyType({})


# ruff: noqa: D102 - the settings' meanings are in config.table


class _Bytes(Protocol):
    """A number of bytes for every device, with exceptions by name."""

    @property
    def default(self) -> int | None: ...
    @property
    def by_name(self) -> Mapping[str, int]: ...


class Settings(Protocol):
    """What the settings have to offer (``config.light.PlacementSettings`` does, and so does ``config.settings``)."""

    @property
    def num_parallel(self) -> int | Literal["auto"]: ...
    @property
    def context_length(self) -> int | None: ...
    @property
    def kv_cache_type(self) -> str: ...
    @property
    def flash_attention(self) -> str: ...
    @property
    def cache_ram(self) -> int: ...
    @property
    def gpu_overhead(self) -> _Bytes: ...
    @property
    def max_vram(self) -> _Bytes: ...
    @property
    def device_overhead(self) -> _Bytes: ...
    @property
    def sched_spread(self) -> bool: ...


def from_settings(
    settings: Settings,
    *,
    held: Mapping[str, int] = _NONE,
    promised: Mapping[str, int] = _NONE,
    learned: Mapping[str, LearnedOverhead] = _NOTHING_LEARNED,
) -> Policy:
    """Return the policy of these settings, with what runners hold, what was promised to loads, what was learned.

    All three are by device name.
    """
    return Policy(
        gpu_overhead=PerDevice(settings.gpu_overhead.default, settings.gpu_overhead.by_name),
        max_vram=PerDevice(settings.max_vram.default, settings.max_vram.by_name),
        device_overhead=PerDevice(settings.device_overhead.default, settings.device_overhead.by_name),
        learned_overhead=learned,
        spread=settings.sched_spread,
        n_parallel=settings.num_parallel,
        n_ctx_per_slot=settings.context_length,
        cache_type=settings.kv_cache_type,
        flash_attn=cast("FlashAttention", settings.flash_attention),
        cache_ram_mib=settings.cache_ram,
        held=held,
        promised=promised,
    )

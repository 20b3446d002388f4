"""The typed door: every setting as a field of one frozen pydantic model, for the service."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from config.light import PlacementSettings
from config.resolve import DEFAULT_ORIGIN, ConfigError, Value, resolve
from config.table import Environ
from config.values import Address, DeviceBytes, RpcServer


class Settings(BaseSettings):
    """Every setting's effective value. Times are seconds (inf: for ever); ``cache_ram`` is MiB, ``max_body`` bytes.

    The fields are the table's rows in lower case; pydantic checks each against its type, without conversion.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    models: Path
    models_file: Path
    store: Path
    registry: str | None
    registry_logins: Path
    host: Address
    api_keys: tuple[str, ...]
    keys_file: Path
    tls_cert: Path | None
    tls_key: Path | None
    allow_remote: bool
    origins: tuple[str, ...]
    num_parallel: int | Literal["auto"]
    context_length: int | None
    kv_cache_type: str
    flash_attention: Literal["auto", "on", "off"]
    cache_ram: int
    gpu_overhead: DeviceBytes
    max_vram: DeviceBytes
    device_overhead: DeviceBytes
    sched_spread: bool
    rpc_servers: tuple[RpcServer, ...]
    llama_server: Path | None
    cards: Path
    max_loaded_models: int
    max_queue: int
    client_queue: int | None
    queue_timeout: float
    keep_alive: float
    load_timeout: float
    drain_timeout: float
    stop_grace: float
    max_body: int
    state_dir: Path
    log_format: Literal["auto", "json", "text"]
    debug: int

    @property
    def placement(self) -> PlacementSettings:
        """Return what ``planner explain`` would read from the same environment."""
        return PlacementSettings.of(dict(self))

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Keep the keys out of every log line and traceback."""
        return [(name, "(not shown)" if name == "api_keys" else value) for name, value in self]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings' signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from ``config.resolve`` alone, as the light door does: the two cannot differ."""
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, where each came from (in the table's order), and one line for each thing that was odd."""

    settings: Settings
    values: tuple[Value, ...]
    warnings: tuple[str, ...]

    def is_default(self, field: str) -> bool:
        """Say whether nobody set this setting."""
        return any(value.origin == DEFAULT_ORIGIN for value in self.values if value.setting.field == field)


def load(environ: Environ | None = None) -> Loaded:
    """Return the settings of this environment (the process's own by default).

    Raises ConfigError with every bad ``PLANNER_`` value and every contradiction between settings.
    """
    resolved = resolve(os.environ if environ is None else environ)
    if resolved.problems:
        raise ConfigError(resolved.problems)
    return Loaded(Settings(**resolved.by_field()), resolved.values, resolved.warnings)

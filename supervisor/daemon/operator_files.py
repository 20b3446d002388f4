"""The files that the operator writes and a running service reads again on SIGHUP: models, clients, certificate."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from config import keys_file, models_file
from config.keys_file import Client
from config.model_settings import ModelsFile
from config.resolve import ConfigError, Problem
from config.settings import Settings
from planner.errors import InvalidRequest
from supervisor.planning.model_request import flags_of


@dataclass(frozen=True, slots=True)
class OperatorFiles:
    """What the files say. ``tls`` is None where the service speaks plain HTTP."""

    models: ModelsFile
    clients: Mapping[str, Client]
    tls: ssl.SSLContext | None


def read(settings: Settings) -> OperatorFiles:
    """Return what the files say now. Raises ConfigError with everything that is wrong in any of them."""
    problems: list[Problem] = []
    models, clients, tls = ModelsFile(), keys_file.KeysFile(), None
    try:
        models = models_file.read(settings.models_file)
        problems += _flags(models, settings.models_file)
    except ConfigError as error:
        problems += error.problems
    try:
        clients = keys_file.read(settings.keys_file)
    except ConfigError as error:
        problems += error.problems
    try:
        tls = _tls(settings)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(tuple(problems))
    return OperatorFiles(models, clients.clients, tls)


def _flags(models: ModelsFile, file: Path) -> Iterator[Problem]:
    """Yield a problem for each section with flags that no runner may be given: ``config`` knows of no flags."""
    sections = {"defaults": models.defaults, **{f'models."{name}"': one for name, one in models.models.items()}}
    for section, settings in sections.items():
        try:
            flags_of(settings)
        except InvalidRequest as error:
            given = " ".join(settings.flags)
            yield Problem(f"{file}: [{section}] flags", given, f"what a model may set: {error}")


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except OSError as error:  # ssl.SSLError among them
        files = f"{settings.tls_cert}" + ("" if settings.tls_key is None else f" with {settings.tls_key}")
        allowed = f"a certificate with its key in PEM: {error.strerror or error}"
        raise ConfigError((Problem("PLANNER_TLS_CERT", files, allowed),)) from None
    return context

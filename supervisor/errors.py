"""Refusals of the core as the errors that callers of ``acquire`` see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from supervisor.api.errors import (
    AcquireError,
    BadModel,
    CannotFit,
    ClientLimit,
    LoadFailed,
    LoadTimeout,
    PlannerFailed,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from supervisor.core.types import Refusal, RefusalKind

_PLAIN: Final[Mapping[RefusalKind, type[AcquireError]]] = {
    RefusalKind.BAD_MODEL: BadModel,
    RefusalKind.QUEUE_FULL: QueueFull,
    RefusalKind.CLIENT_LIMIT: ClientLimit,
    RefusalKind.QUEUE_TIMEOUT: QueueTimeout,
    RefusalKind.LOAD_TIMEOUT: LoadTimeout,
    RefusalKind.LOAD_FAILED: LoadFailed,
    RefusalKind.PLANNER_FAILED: PlannerFailed,
    RefusalKind.SHUTTING_DOWN: ShuttingDown,
}


def error_of(refusal: Refusal) -> AcquireError:
    """Return the error that tells this refusal."""
    message, retry_after_s = refusal.message, refusal.retry_after_s
    if refusal.kind is RefusalKind.CANNOT_FIT:
        return CannotFit(message, causes=refusal.causes, never=refusal.never, retry_after_s=retry_after_s)
    return _PLAIN[refusal.kind](message, retry_after_s=retry_after_s)

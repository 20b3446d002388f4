"""Why no lease was granted. A text is one line: what is wrong, where, what to do."""

from __future__ import annotations

from planner.types import Shortfall


class AcquireError(Exception):
    """No lease was granted. The text is one line that says what is wrong, where, and what to do.

    ``retry_after_s`` is None where trying again cannot help.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownModel(AcquireError):
    """The name is not in the folder; ``closest`` are names that are, best first."""

    def __init__(self, message: str, *, closest: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.closest = closest


class UnknownDevice(AcquireError):
    """This machine has no device of that name."""


class WrongRole(AcquireError):
    """The model is served for another role than the request needs."""


class BadModel(AcquireError):
    """The model file is in the folder but cannot be read or is refused by llama.cpp."""


class CannotFit(AcquireError):
    """The model does not fit. ``never`` says that it would not fit on an empty machine either."""

    def __init__(
        self, message: str, *, causes: tuple[Shortfall, ...], never: bool, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.causes = causes
        self.never = never


class QueueFull(AcquireError):
    """As many requests wait already as MAX_QUEUE allows."""


class ClientLimit(AcquireError):
    """This client has as many requests waiting as CLIENT_QUEUE allows; others are still welcome."""


class QueueTimeout(AcquireError):
    """No slot came free within QUEUE_TIMEOUT."""


class LoadTimeout(AcquireError):
    """The load showed no progress, or found no room, within LOAD_TIMEOUT."""


class LoadFailed(AcquireError):
    """The runner died while loading; the text ends with its last error line."""


class PlannerFailed(AcquireError):
    """The planner itself failed, which is a defect of ours; the text says how."""


class ShuttingDown(AcquireError):
    """The service is draining and takes no new work."""

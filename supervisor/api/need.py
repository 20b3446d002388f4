"""What a request asks of the runtime, beside the model and its role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from planner.types import LoadOptions


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks beside the model and its role.

    ``client`` is who asks (the name of its key, else its address): the queue is fair between clients.
    ``keep_alive_s`` is how long the runner stays once it is idle: ``math.inf`` for ever, None as it is set already.
    """

    client: str = ""
    keep_alive_s: float | None = None
    load: LoadOptions = field(default_factory=LoadOptions)

    def of(self, client: str) -> Need:
        """Return the same, asked by this client."""
        return Need(client, self.keep_alive_s, self.load)


NO_NEED: Final = Need()

"""What a request asks of the runtime, beside the model and its role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a request asks of the load itself; None: as the settings have it.

    ``n_ctx`` is tokens for one conversation; a runner that has as many serves it. The others are llama-server's own.
    """

    n_ctx: int | None = None
    n_gpu_layers: int | None = None
    main_gpu: int | None = None
    n_batch: int | None = None
    use_mmap: bool | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks beside the model and its role.

    ``client`` is who asks (the name of its key, else its address): the queue is fair between clients.
    ``keep_alive_s`` is how long the runner stays once it is idle: ``math.inf`` for ever, None as it is set already.
    """

    client: str = ""
    keep_alive_s: float | None = None
    load: LoadOptions = LoadOptions()


NO_NEED: Final = Need()

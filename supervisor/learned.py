"""What runners turned out to take beside llama.cpp's buffers, device by device; kept on disk beyond the service's life.

A device is remembered by what tells it from others, whatever its name is then.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Final

import structlog

from planner.types import HOST, LearnedOverhead, Machine
from supervisor.device_ids import device_ids, place_of

FILE_NAME: Final = "learned.json"
# A runner's own share is hundreds of MiB on every card measured; what lacks beyond this was somebody else's doing.
MOST_BYTES: Final = 2 << 30

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("supervisor.learned")


class Learned:
    """What was learned, in a file; one that cannot be read or written is said once and costs no request."""

    def __init__(self, folder: Path | None = None) -> None:
        self._path = None if folder is None else folder / FILE_NAME
        self._known: Mapping[str, LearnedOverhead] = MappingProxyType(self._read())

    def by_device(self, machine: Machine | None) -> Mapping[str, LearnedOverhead]:
        """Return what was learned of the devices of this machine, by their names on it."""
        told: dict[str, LearnedOverhead] = {}
        for name, device in {} if machine is None else device_ids(machine).items():
            known = self._known.get(device) or self._known.get(place_of(device))  # files once knew the places alone
            if known is not None:
                told[name] = known
        return told

    def learn(self, machine: Machine | None, device: str, size_bytes: int, model: str) -> None:
        """Remember that a runner takes so much on a device of this machine."""
        key = None if machine is None or device == HOST else device_ids(machine).get(device)
        if key is None:
            return
        today = dt.datetime.now(tz=dt.UTC).date().isoformat()
        overhead = LearnedOverhead(min(size_bytes, MOST_BYTES), model, today)
        self._known = MappingProxyType({**self._known, key: overhead})
        _log.warning("overhead.learned", device=device, size_bytes=overhead.size_bytes, model=model)
        self._write()

    def _read(self) -> dict[str, LearnedOverhead]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            return {key: LearnedOverhead(**each) for key, each in json.loads(self._path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning("learned.not_read", path=str(self._path), reason=str(error))
            return {}

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps({key: asdict(each) for key, each in self._known.items()}, indent=1))
            fresh.replace(self._path)
        except OSError as error:
            _log.warning("learned.not_written", path=str(self._path), reason=str(error))

"""What a client that may use some models is told of the operator's machine: what is wrong there, not where things lie.

Of a file its name is told, and not the folder. What is written for operators alone is left out: how a runner was
launched, the end of its log, warnings, which may name other models as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePath
from typing import Final

from planner.types import Device, Machine
from supervisor.api.models import ModelView
from supervisor.api.snapshot import RunnerView, Snapshot

# A file in a folder of which we know nothing but this text: it ends where a name seldom goes on. An endpoint of ours
# (GET /v1/models), or part of an address, is none.
_FILE: Final = re.compile(r"(?<![\w.:/-])(?<!GET )(?<!POST )/(?:[^\s/:;,'\"()]+/)+(?P<name>[^\s/:;,'\"()]+)")


class Discretion:
    """Leaves the folders out of which it knows, those of ``models``, and whatever else looks like one."""

    def __init__(self, models: Iterable[ModelView]) -> None:
        files = {file for one in models for file in (one.path, one.mmproj, *one.adapters) if file is not None}
        folders = {f"{PurePath(file).parent}/" for file in files if PurePath(file).is_absolute()}
        self._folders = sorted(folders, key=len, reverse=True)

    def text(self, text: str) -> str:
        """Return the text with the names of files in place of their paths."""
        for folder in self._folders:
            text = text.replace(folder, "")
        return _FILE.sub(r"\g<name>", text)

    def model(self, view: ModelView) -> ModelView:
        """Return the model without its files' folders."""
        return replace(
            view,
            path=PurePath(view.path).name,
            problem=None if view.problem is None else self.text(view.problem),
            mmproj=None if view.mmproj is None else PurePath(view.mmproj).name,
            adapters=tuple(PurePath(file).name for file in view.adapters),
        )

    def snapshot(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot without what its reader has no business with."""
        return replace(
            snapshot,
            not_ready=tuple(map(self.text, snapshot.not_ready)),
            llama_server=None,
            machine=None if snapshot.machine is None else self._machine(snapshot.machine),
            runners=tuple(map(self._runner, snapshot.runners)),
            models=tuple(map(self.model, snapshot.models)),
            warnings=(),
        )

    def _machine(self, machine: Machine) -> Machine:
        return replace(machine, devices=tuple(map(self._device, machine.devices)), warnings=(), looked_for=())

    def _device(self, device: Device) -> Device:
        return replace(device, why_not=None if device.why_not is None else self.text(device.why_not))

    def _runner(self, runner: RunnerView) -> RunnerView:
        failure = runner.last_failure
        if failure is not None:
            failure = replace(failure, reason=self.text(failure.reason), log_tail=())
        remedies = tuple(replace(one, because=self.text(one.because)) for one in runner.remedies)
        return replace(runner, plan=None, last_failure=failure, remedies=remedies)

"""Asks the installed llama.cpp itself what it would reserve, by a load that reads sizes only.

That takes 0.1 to 1 s and a process of its own: the library aborts on some errors and swaps a global logger. It is
asked only for what the formulas do not cover. Its compute buffers are made those of a real load
(``planner.oracle_reservation``), or are upper bounds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from planner import kv_overrides
from planner.accounting import DeviceBytes, MemoryLedger
from planner.build import is_pinned
from planner.context import ContextParams
from planner.model import ModelFacts
from planner.search.candidates import Oracle
from planner.types.machine import Device, DeviceKind, LlamaBuild, Machine
from planner.types.plan import Placement
from planner.types.usage import UNKNOWN_DETAIL, UNKNOWN_FIGURE, Figure, Source

if TYPE_CHECKING:
    import subprocess

TIMEOUT_S: Final = 30.0  # for one question; a 260k vocabulary takes 0.4 s, a cold GPU driver several seconds
MAX_QUESTIONS: Final = 16  # a search that needs more would take longer than anybody waits
LIBRARY: Final = "libllama-common.so.0"
WORKER: Final = "ggml-rpc-server"


def ask(build: LlamaBuild, *, any_build: bool = False) -> Oracle | None:
    """Return an oracle that asks this build, or None where that cannot be done.

    The structures that are handed over are those of the pinned commit: another build's answer is only good for being
    compared with ours (``any_build``). One whose structures differ is found out by its defaults, and does not answer.
    """
    if build.library_path is None or not (any_build or is_pinned(build)):
        return None
    folder = Path(build.library_path).parent
    if not (folder / LIBRARY).exists():
        return None
    worker = Path(build.path or "").parent / WORKER
    return _Asker(folder, worker if worker.exists() else None)


@dataclass(slots=True)
class _Asker:
    """The oracle of one build. The same question is asked once."""

    folder: Path
    worker: Path | None
    answers: dict[tuple[ModelFacts, ContextParams, Placement], MemoryLedger | None] = field(default_factory=dict)

    def __call__(
        self, model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine
    ) -> MemoryLedger | None:
        """Return what llama.cpp says to this placement, or None where it cannot be asked or does not answer."""
        key = (model, params, placement)
        if key not in self.answers:
            sliced = params.split_mode == "tensor"  # its figures are not told by device
            if len(self.answers) >= MAX_QUESTIONS or params.not_built or model.adapters or sliced:
                return None
            self.answers[key] = self._ask(model, params, placement, machine)
        return self.answers[key]

    def _ask(
        self, model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine
    ) -> MemoryLedger | None:
        devices = [machine.device(name) for name in placement.devices]
        stand_ins = [_needs_stand_in(device, machine) for device in devices]
        if any(stand_ins) and self.worker is None:
            return None
        question = {
            "folder": str(self.folder),
            "worker": str(self.worker) if any(stand_ins) else None,
            "model": str(Path(model.paths[0]).absolute()),  # the child works in another folder
            "devices": [
                None if stands_in else device.name for device, stands_in in zip(devices, stand_ins, strict=True)
            ],
            "names": placement.devices,
            "n_gpu_layers": placement.n_gpu_layers,
            "tensor_split": placement.tensor_split,
            "params": asdict(params),
            "kv_overrides": list(kv_overrides.parse(model.overrides).items()),
        }
        answer = run_child("planner.oracle_child", question, TIMEOUT_S)
        if answer is None or len(answer["rows"]) != len(devices) + 1:
            return None
        # A stand-in computes and aligns as a CPU does: for a worker that is as good as can be known, for a card near.
        near = any(
            stands_in and device.kind is not DeviceKind.RPC
            for device, stands_in in zip(devices, stand_ins, strict=True)
        )
        source = Source.ESTIMATED if near else Source.ORACLE
        rows = [_bytes(row, source, as_reserved=answer["as_reserved"]) for row in answer["rows"]]
        if params.overrides or -1 in placement.layer_devices:
            rows[-1] = replace(rows[-1], model=UNKNOWN_FIGURE)  # a size-only load leaves out what is mapped or repacked
        return MemoryLedger(tuple(rows[:-1]), rows[-1], UNKNOWN_DETAIL)


def _needs_stand_in(device: Device, machine: Machine) -> bool:
    """Say whether a throwaway worker takes this device's part: it is not here, or asking it could hang or kill it."""
    return machine.what_if or device.kind is DeviceKind.RPC


def _bytes(row: list[int], source: Source, *, as_reserved: bool) -> DeviceBytes:
    model, context, compute = row
    reserved = Figure(compute, source if as_reserved else Source.ESTIMATED)
    return DeviceBytes(Figure(model, source), Figure(context, source), reserved)


def run_child(module: str, question: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
    """Return what this module, run as a child, answers to the question: JSON on its stdin, JSON on its stdout.

    None where it failed or took too long. No process of it is left behind.
    """
    import json  # noqa: PLC0415 - most plans ask nothing, and are not to wait for these
    import subprocess  # noqa: PLC0415 - likewise

    child = subprocess.Popen(  # noqa: S603 - one of our own modules
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"},
        cwd=Path(__file__).parents[1],
    )
    try:
        output, _ = child.communicate(json.dumps(question).encode(), timeout_s)
        answer: dict[str, Any] | None = json.loads(output) if child.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        return None
    else:
        return answer
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and the worker that it may have started, which are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()

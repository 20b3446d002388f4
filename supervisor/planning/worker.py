"""The process that plans: reads headers, asks the machine, searches. A question in, an answer out, one at a time.

Planning is pure Python that may take 150 ms, and a driver that is asked may take seconds or hang; neither may hold up a
stream, so both happen here. What was read of a file is kept until the file changes. Started by ``planning.process``,
it ends with its standard input.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from config import light
from config.model_settings import ExternalRunner
from gpu.detect import Detected, detect
from gpu.llama import Search
from gpu.rpc import WorkerState
from planner import companions
from planner.errors import ModelFileError, PlannerError
from planner.model import ModelFacts, read_model
from planner.policy import from_settings
from planner.search import slots
from planner.types import DeviceKind, Machine, NoFit, Plan, Policy, Refused
from supervisor.core.settling import SETTLE_WITHIN_S, Reading, latest, unsettled
from supervisor.core.types import PlanOutcome, PlanProblem
from supervisor.models import places
from supervisor.planning import header_details
from supervisor.planning.messages import (
    Answer,
    Failed,
    LookAhead,
    LookAround,
    MakePlan,
    PlanAnswer,
    Question,
    ReadDetails,
    ScanModels,
    Situation,
    Surroundings,
    pack,
    read_message,
)
from supervisor.planning.placing import Placing, as_told, by_search
from supervisor.planning.searching import Searches

MAX_KEPT_HEADERS: Final = 256  # a header's facts are some hundred KiB
# From the first look at a request to the question for its plan: what was seen in between is as good as seen then.
LOOKED_AHEAD_S: Final = 0.05
SETTLE_POLL_S: Final = 0.05  # a driver's answer takes about a millisecond


class Worker:
    """Answers questions, with what it remembers of files and of the machine.

    What was seen ahead is good for ``ahead_for_s``.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        settle_within_s: float = SETTLE_WITHIN_S,
        ahead_for_s: float = LOOKED_AHEAD_S,
    ) -> None:
        self._environ = environ
        self._ahead_for_s = ahead_for_s
        self._settle_within_s = settle_within_s
        self._settings = light.read(environ).settings
        self._headers: dict[tuple[str, int, int], ModelFacts] = {}
        self._searches = Searches()
        self._detected: Detected | None = None
        self._stamp: tuple[int, int] | None = None  # of its llama-server
        self._reading: Reading | None = None  # of the last look
        self._ahead: tuple[Situation, Detected, float] | None = None  # seen for the next plan, and when

    def answer(self, question: Question) -> Answer:
        """Return the answer to this question."""
        match question:
            case LookAround(situation, lightly=True):
                return _surroundings(self._detect(situation, lightly=True))
            case LookAround(situation):
                return _surroundings(self._look(situation))
            case ScanModels():
                return self._scan(question)
            case ReadDetails():
                return self._details(question)
            case MakePlan():
                return self._plan(question)

    def look_ahead(self, situation: Situation) -> None:
        """Look at the machine for a plan that is asked for next. What goes wrong will go wrong again then."""
        self._ahead = None
        with suppress(Exception):
            self._ahead = situation, self._look(situation), time.monotonic()

    def _scan(self, asked: ScanModels) -> Answer:
        folder, store = asked.folder, asked.store
        optional = asked.folder_optional and store is not None and store.root.is_dir()
        try:
            return places.scan(folder, store, self._read, folder_optional=optional)
        except OSError as error:
            return Failed(f"the models folder {folder} cannot be read ({error.strerror}): check PLANNER_MODELS")

    def _read(self, path: str) -> ModelFacts:
        try:
            status = Path(path).stat()
        except OSError as error:
            raise ModelFileError(path, f"cannot be read ({error.strerror})", "scan the folder again") from error
        key = (path, status.st_mtime_ns, status.st_size)
        if key not in self._headers:
            facts = read_model(path)
            while len(self._headers) >= MAX_KEPT_HEADERS:
                self._headers.pop(next(iter(self._headers)))
            self._headers[key] = facts
        return self._headers[key]

    def _details(self, question: ReadDetails) -> Answer:
        paths: tuple[str, ...] = (question.path,)
        with suppress(PlannerError):  # what no plan can be made of has a header all the same
            paths = self._read(question.path).paths
        try:
            return header_details.read(paths, question.mmproj, whole=question.whole)
        except PlannerError as error:
            return Failed(str(error))
        except OSError as error:
            return Failed(f"{error.filename} cannot be read ({error.strerror}): scan the folder again")

    def _detect(self, situation: Situation, *, insist: frozenset[str] = frozenset(), lightly: bool = False) -> Detected:
        previous = self._detected
        if previous is not None and _stamp(previous.llama) != self._stamp:
            previous = replace(previous, llama=Search(None, ()))  # it was built anew, or removed: look for it again
        self._detected = detect(
            self._environ,
            llama_server=self._settings.llama_server,
            rpc_servers=self._settings.rpc_servers,
            leased=_endpoints(situation, situation.held),
            insist=insist,
            previous=previous,
            known=situation.known,
            owner=os.getppid(),
            lightly=lightly,
        )
        self._stamp = _stamp(self._detected.llama)
        return self._detected

    def _look(self, situation: Situation) -> Detected:
        """Return the machine once its drivers and workers show that the runners which have just gone are gone."""
        began_at = time.monotonic()
        give_up_at = began_at + self._settle_within_s
        awaited = frozenset[str]()
        while True:
            detected = self._detect(situation, insist=awaited)
            now = _reading(detected.machine, situation)
            awaited = _endpoints(situation, situation.gone) & _busy(detected, since_s=began_at)
            lagging = () if self._reading is None else unsettled(self._reading, now, situation.gone)
            if not (awaited or lagging) or time.monotonic() > give_up_at:
                self._reading = latest(self._reading, now)
                return detected
            time.sleep(SETTLE_POLL_S)

    def _plan(self, question: MakePlan) -> PlanAnswer:
        detected = self._seen(question.situation) or self._look(question.situation)
        return PlanAnswer(self._outcome(question, detected), _surroundings(detected))

    def _seen(self, situation: Situation) -> Detected | None:
        """Return the machine as it was seen ahead, if that was just now and our runners do to it what they did then."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != situation or time.monotonic() > ahead[2] + self._ahead_for_s:
            return None
        return ahead[1]

    def _outcome(self, question: MakePlan, detected: Detected) -> PlanOutcome:
        policy = from_settings(self._settings, learned=question.learned)
        asked = question.asked
        if isinstance(asked, ExternalRunner):
            return Placing(question, detected.machine, policy, as_told(asked)).outcome()
        if (not_found := detected.llama.not_found()) is not None:
            return PlanProblem(not_found, ours=True)
        try:
            facts = companions.attach(self._read(question.path), asked)
        except PlannerError as error:
            return PlanProblem(str(error))

        def search(machine: Machine, policy: Policy) -> Plan | NoFit | Refused:
            return self._searches.search(facts, asked, machine, policy, detected.llama.build)

        open_context = asked.n_ctx_per_slot is None and asked.n_ctx in {None, "auto"}
        place = by_search(search, open_context=open_context, open_slots=slots.are_open(asked, policy))
        return Placing(question, detected.machine, policy, place).outcome()


def _endpoints(situation: Situation, names: Iterable[str]) -> frozenset[str]:
    """Return the RPC workers to which the devices of these names belong, of those that are known."""
    devices = () if situation.known is None else situation.known.devices
    return frozenset(one.endpoint for one in devices if one.endpoint is not None and one.name in names)


def _busy(detected: Detected, *, since_s: float) -> frozenset[str]:
    """Return the workers that serve somebody, of those asked since then. One that is left alone is not waited for."""
    return frozenset(
        one.endpoint
        for one in detected.workers
        if one.state is WorkerState.BUSY and one.silent_at_s is not None and one.silent_at_s >= since_s
    )


def _reading(machine: Machine, situation: Situation) -> Reading:
    """Return what the drivers of this machine say now: those of remote devices and the host do not lag."""
    free_bytes = {
        str(device.name): device.free_bytes
        for device in machine.devices
        if device.free_bytes is not None and device.kind is not DeviceKind.RPC and device.pool != machine.host.pool
    }
    held = {name: held_bytes - situation.promised.get(name, 0) for name, held_bytes in situation.held.items()}
    return Reading(free_bytes, held, situation.promised)


def _surroundings(detected: Detected) -> Surroundings:
    return Surroundings(detected.machine, detected.llama.build, detected.llama.not_found())


def _stamp(search: Search) -> tuple[int, int] | None:
    """Return what changes when the llama-server that was found is replaced or removed."""
    with suppress(OSError):
        status = Path(search.build.path or "").stat()
        return status.st_mtime_ns, status.st_size
    return None


def main() -> None:
    """Answer what comes in on standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not end up among the answers
    worker = Worker(os.environ)
    while (message := read_message(sys.stdin.buffer)) is not None:
        question: Question | LookAhead = pickle.loads(message)  # noqa: S301 - from the process that started this one
        if isinstance(question, LookAhead):
            worker.look_ahead(question.situation)
            continue
        try:
            answer = worker.answer(question)
        except Exception as error:  # noqa: BLE001 - a defect ends one plan, not the service; its story is told
            answer = Failed(f"the planner failed on {question}: {type(error).__name__}: {error}")
        answers.write(pack(answer))
        answers.flush()


if __name__ == "__main__":
    main()

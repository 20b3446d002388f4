"""What there is to serve and to serve it with, as the planning process last told: models, machine, llama-server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import anyio
import structlog
from anyio import to_thread
from anyio.abc import TaskGroup

from config.model_settings import ExternalRunner, ModelSettings, ModelsFile
from planner.errors import InvalidRequest
from planner.types import LlamaBuild, Machine, PlanRequest, Role
from supervisor.api.errors import BadModel, PlannerFailed, UnknownModel, WrongRole
from supervisor.api.lease import Amendments
from supervisor.core.commands import PlanModel
from supervisor.core.events import Planned
from supervisor.core.types import ModelId, PlanProblem
from supervisor.device_ids import renamed
from supervisor.learned import Learned
from supervisor.models import catalogue, configured
from supervisor.models.catalogue import Catalogue, ModelEntry
from supervisor.planning.messages import (
    Details,
    Failed,
    LookAhead,
    LookAround,
    MakePlan,
    PlanAnswer,
    ReadDetails,
    ScanModels,
    Situation,
    Surroundings,
)
from supervisor.planning.model_request import request_of
from supervisor.planning.planned_machine import occupied
from supervisor.planning.process import PlanningFailed, PlanningProcess
from supervisor.store.folder import StoreFolder

# For what is missing, and for files that came, went or grew: a look at the names and times of a hundred costs 1 ms. It
# works on network file systems too, where no kernel tells of changes.
LOOK_AGAIN_S: Final = 2.0
# Somebody waits for a runner that has just become ready, and a look at the machine takes a core for two milliseconds.
REST_S: Final = 0.5
SHOWN_FOR_S: Final = 30.0  # a figure that is shown again and again, to Prometheus say, is not older than this by much
RESCAN_EVERY_S: Final = 30.0  # for what changed without a trace in those times, such as a blob that was removed
RESCAN_AFTER_S: Final = 1.0  # names that nobody knows, asked for in a loop, must not keep the disk busy
LLAMA_SERVER: Final = "llama-server"
MODELS: Final = "models"
SHOWN_NAME: Final = 200  # characters of a name that is not ours, in an error line
WHERE_NAMES_ARE: Final = "GET /v1/models lists the names"

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("supervisor.inventory")


class Runners(Protocol):
    """Those who run the models: what they hold of the machine, and who follows what is found."""

    def held_bytes(self) -> Mapping[str, int]:
        """Return what runners hold at present, by device, promises among it."""
        ...

    def promised_bytes(self) -> Mapping[str, int]:
        """Return the part of it that belongs to runners which have not finished loading."""
        ...

    def follow_models(self) -> None:
        """Follow the models, or what is said of them: they are others now."""
        ...

    def follow_devices(self, names: Mapping[str, str]) -> None:
        """Follow devices that are called otherwise from now on, by the names of before."""
        ...


class Inventory:
    """Asks the planning process and remembers its answers. ``not_ready`` are the reasons why nothing can be served.

    The models are those of the folder and of the store; the folder need not be there where it is optional.
    """

    def __init__(
        self,
        models: Path,
        planning: PlanningProcess,
        runners: Runners,
        *,
        store: StoreFolder | None = None,
        folder_optional: bool = False,
        learned: Learned | None = None,
        rescan_every_s: float = RESCAN_EVERY_S,
        shown_for_s: float = SHOWN_FOR_S,
    ) -> None:
        self._places = ScanModels(models, store, folder_optional)
        self._stamp = 0
        self._rescan_every_s = rescan_every_s
        self._shown_for_s = shown_for_s
        self._planning = planning
        self._runners = runners
        self._learned = learned or Learned()
        self._catalogue = Catalogue()
        self._found: tuple[ModelEntry, ...] = ()  # before the models file is applied
        self._file = ModelsFile()
        self._scanning = anyio.Lock()
        self._scanned_at = -math.inf
        self._looked_at = -math.inf
        self._problems = {LLAMA_SERVER: "llama-server has not been looked for yet", MODELS: "not scanned yet"}
        self._warned: frozenset[str] = frozenset()  # of the machine
        self._was_shown = False
        self.llama: LlamaBuild | None = None
        self.doubts: tuple[str, ...] = ()  # a line for each thing that the models file says in vain
        self._machine: Machine | None = None  # workers that a runner holds with their figures of before

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Return the models of the last scan."""
        return self._catalogue.entries

    @property
    def machine(self) -> Machine | None:
        """Return the machine as last read; what runners of ours hold of workers by now is taken off."""
        return None if self._machine is None else occupied(self._machine, self._runners.held_bytes())

    @property
    def not_ready(self) -> tuple[str, ...]:
        """Return one line for each thing that is missing."""
        return tuple(self._problems.values())

    def configure(self, file: ModelsFile) -> None:
        """Let this models file hold from now on."""
        self._file = file
        self._apply()
        self._look_for_doubts()

    def amendments(self, model: ModelId) -> Amendments | None:
        """Return what is to be changed in requests to a model; None: nothing."""
        entry = self._catalogue.find(model)
        return None if entry is None else configured.amendments(entry.settings)

    def _apply(self) -> None:
        self._catalogue.replace(configured.apply(self._file, self._found))
        self._runners.follow_models()

    async def look_around(self) -> None:
        """Find the machine, llama-server and the models; what is missing is remembered and logged, no more."""
        try:
            self._take(await self._look(gone={}))
        except PlanningFailed as error:
            self._note(LLAMA_SERVER, str(error))
        await self.scan()

    async def refresh(self, gone: Mapping[str, int]) -> None:
        """Read the machine again, now that runners of ours hold more of it, or that this is gone which they held."""
        try:
            self._take(await self._look(gone))
        except PlanningFailed as error:
            _log.warning("machine.not_read", reason=str(error))
        else:
            _log.debug("machine.read")

    async def refresh_at_rest(self, gone: Mapping[str, int]) -> None:
        """Read the machine again, a little later: not while those are served who waited for this."""
        await anyio.sleep(REST_S)
        await self.refresh(gone)

    def was_shown(self) -> None:
        """Note that somebody looks at the machine, for whom ``follow_what_is_shown`` may read it again."""
        self._was_shown = True

    async def follow_what_is_shown(self) -> None:
        """Read again what is free, where somebody looked since and the last reading is old: one that nobody sees rests.

        A driver that gives no answer is told of by the next plan.
        """
        if not self._was_shown or anyio.current_time() < self._looked_at + self._shown_for_s:
            return
        self._was_shown = False
        with suppress(PlanningFailed):
            self._take(await self._look({}, lightly=True))

    async def _look(self, gone: Mapping[str, int], *, lightly: bool = False) -> Surroundings:
        def question() -> LookAround:
            held, promised = self._runners.held_bytes(), self._runners.promised_bytes()
            return LookAround(Situation(self._machine, held, promised, gone), lightly)

        answer = await self._planning.ask(question)
        if isinstance(answer, Surroundings):
            return answer
        raise PlanningFailed(answer.reason if isinstance(answer, Failed) else f"it answered {type(answer).__name__}")

    def look_ahead(self, gone: Mapping[str, int], tasks: TaskGroup) -> None:
        """Have the machine looked at, as things stand now, for a plan that most likely is asked for in a moment."""
        held, promised = self._runners.held_bytes(), self._runners.promised_bytes()
        tasks.start_soon(self._planning.tell, LookAhead(Situation(self._machine, held, promised, gone)))

    async def keep_looking(self) -> None:
        """Look again for what is missing, and for models that come and go, for as long as the service runs."""
        while True:
            await anyio.sleep(LOOK_AGAIN_S)
            await self.follow_what_is_shown()
            if LLAMA_SERVER in self._problems:
                await self.look_around()
            elif (
                self._problems
                or anyio.current_time() > self._scanned_at + self._rescan_every_s
                or self._stamp != await to_thread.run_sync(self._look_at_files)
            ):
                await self.scan()

    def _look_at_files(self) -> int:
        folder, store = self._places.folder, self._places.store
        return hash((catalogue.stamp(folder), None if store is None else store.stamp()))

    @property
    def _where(self) -> str:
        """Return the places that are looked through, for the log."""
        folder, store = self._places.folder, self._places.store
        return str(folder) if store is None else f"{folder} and the store {store.root}"

    async def scan(self, *, forced: bool = False) -> None:
        """Read the models folder, unless that was done just now and it is not ``forced``."""
        async with self._scanning:
            if not forced and anyio.current_time() < self._scanned_at + RESCAN_AFTER_S:
                return
            try:
                self._stamp = await to_thread.run_sync(self._look_at_files)  # before: what comes later is seen later
                answer = await self._planning.ask(self._places)
            except PlanningFailed as error:
                answer = Failed(str(error))
            self._scanned_at = anyio.current_time()
            if isinstance(answer, Failed):
                self._note(MODELS, answer.reason)
            elif isinstance(answer, tuple):
                if answer != self._found or MODELS in self._problems:
                    broken = [entry.problem for entry in answer if entry.problem is not None]
                    about = {"models": len(answer), "broken": broken, "missing": configured.missing(self._file, answer)}
                    _log.info("models.scanned", folder=str(self._places.folder), **about)
                    self._found = answer
                    self._apply()
                self._note(MODELS, None)
                self._look_for_doubts()

    async def resolve(self, name: str) -> ModelEntry:
        """Return the model that this name stands for. Raises UnknownModel.

        The folder is read again before a name is called unknown: the file may have come since.
        """
        if self._catalogue.find(name) is None:
            await self.scan()
        entry = self._catalogue.find(name)
        if entry is None:
            closest = self._catalogue.closest(name)
            _log.info("model.unknown", asked=name[:SHOWN_NAME], looked_in=self._where)  # clients are told no paths
            hint = f"did you mean {', '.join(closest)}? " if closest else ""
            raise UnknownModel(f"there is no model {name[:SHOWN_NAME]!r}; {hint}{WHERE_NAMES_ARE}", closest=closest)
        return entry

    def files_of(self, name: str) -> tuple[str, ...]:
        """Return the files of a model that is served from the folder; of any other, or of none, nothing."""
        entry = self._catalogue.find(name)
        if entry is None or entry.full_name or entry.external is not None or entry.problem is not None:
            return ()
        return entry.path, *filter(None, [entry.mmproj])

    def known(self, model: str) -> ModelEntry:
        """Return the model of this id as it was last seen. Raises UnknownModel where it is not there any more."""
        entry = self._catalogue.find(model)
        if entry is None:
            raise UnknownModel(f"the model {model!r} is not there any more; {WHERE_NAMES_ARE}")
        return entry

    def known_as(self, name: str) -> ModelEntry | None:
        """Return the model that this name stands for, as it was last seen; None where it has to be looked for."""
        return self._catalogue.find(name)

    def runner_of(self, model: str) -> ModelId:
        """Return the model whose runner serves the one of this id, gone or not."""
        entry = self._catalogue.find(model)
        return ModelId(model) if entry is None else entry.runner

    async def find(self, name: str, role: Role) -> ModelEntry:
        """Return the model of this name for this role. Raises UnknownModel, BadModel, WrongRole.

        The folder is read again before a file is called bad: it may have been mended since.
        """
        entry = await self.resolve(name)
        if entry.problem is not None:
            await self.scan()
            entry = await self.resolve(name)
        if entry.problem is not None:
            raise BadModel(f"{entry.id} cannot be served: {entry.problem}")
        if entry.role is not role:
            raise WrongRole(f"{entry.id} is served for {entry.role} requests, not for {role}: ask another model")
        return entry

    async def details(self, name: str, *, whole: bool) -> Details:
        """Return what the model's header says. Raises UnknownModel, BadModel, PlannerFailed."""
        entry = await self.resolve(name)
        if entry.external is not None:
            raise BadModel(f"{entry.id} is a program and has no header")
        try:
            answer = await self._planning.ask(ReadDetails(entry.path, entry.mmproj, whole))
        except PlanningFailed as error:
            raise PlannerFailed(str(error)) from error
        if not isinstance(answer, Details):
            reason = answer.reason if isinstance(answer, Failed) else f"it answered {type(answer).__name__}"
            raise BadModel(f"{entry.id}: {reason}")
        return answer

    async def plan(self, command: PlanModel, *, meanwhile: Callable[[], object] = lambda: None) -> Planned:
        """Return the plan that was asked for, or why there is none; ``meanwhile`` is called while it is being made."""
        entry = self._catalogue.find(command.model)
        if entry is None:
            problem = PlanProblem("it is not there any more")
            return Planned(command.model, command.revision, problem)
        missing = self._problems.get(LLAMA_SERVER)
        if missing is not None and anyio.current_time() < self._looked_at + LOOK_AGAIN_S:
            return Planned(command.model, command.revision, PlanProblem(missing, ours=True))
        try:
            asked = self._asked(entry, command)
        except InvalidRequest as error:
            return Planned(command.model, command.revision, PlanProblem(str(error)))
        held, promised = command.held_bytes(), command.held_bytes(loading=True)
        question = MakePlan(
            model=command.model,
            path=entry.path,
            asked=asked,
            situation=Situation(self._machine, held, promised, command.gone),
            neighbours=command.neighbours,
            surplus=command.surplus,
            caps=command.caps,
            margins=command.margins,
            learned=self._learned.by_device(self._machine),
        )
        try:
            answer = await self._planning.ask(question, meanwhile=meanwhile)
        except PlanningFailed as error:
            answer = Failed(str(error))
        match answer:
            case PlanAnswer(outcome, surroundings):
                self._take(surroundings)
                return Planned(command.model, command.revision, outcome)
            case _:
                reason = answer.reason if isinstance(answer, Failed) else f"it answered {type(answer).__name__}"
                return Planned(command.model, command.revision, PlanProblem(reason, ours=True))

    def _asked(self, entry: ModelEntry, command: PlanModel) -> PlanRequest | ExternalRunner:
        """Return what is to be planned, by the settings that the core has seen. Raises InvalidRequest."""
        match command.launch:
            case ExternalRunner() as program:
                return program
            case ModelSettings() as settings:
                return request_of(entry, settings, command.options, draft=self._catalogue.draft_of(settings))
            case _:
                return request_of(entry, ModelSettings(), command.options)

    def learn(self, device: str, size_bytes: int, model: str) -> None:
        """Remember that a runner takes so much on a device beside llama.cpp's buffers."""
        self._learned.learn(self._machine, device, size_bytes, model)

    def _take(self, found: Surroundings) -> None:
        """Remember what was found, and log what is new about it."""
        self._looked_at = anyio.current_time()
        before = self._machine
        self._machine, self.llama = found.machine, found.llama if found.not_found is None else None
        self._note(LLAMA_SERVER, found.not_found)
        if before is not None and (names := renamed(before, found.machine)):
            _log.info("devices.renamed", names=names)
            self._runners.follow_devices(names)
        for warning in found.machine.warnings:
            if warning not in self._warned:
                _log.warning("machine.warning", warning=warning)
        self._warned = frozenset(found.machine.warnings)

    def _look_for_doubts(self) -> None:
        """Remember what the models file says in vain, and log what is new of it; before a scan nobody knows of any."""
        before = self.doubts
        self.doubts = () if MODELS in self._problems else configured.doubts(self._file, self._catalogue)
        for doubt in self.doubts:
            if doubt not in before:
                _log.warning("models_file.odd", warning=doubt)

    def _note(self, what: str, problem: str | None) -> None:
        """Remember a problem, or that there is none any more."""
        if problem is None:
            if self._problems.pop(what, None) is not None:
                _log.info("found", what=what)
        elif self._problems.get(what) != problem:
            self._problems[what] = problem
            _log.error("not_ready", what=what, reason=problem)

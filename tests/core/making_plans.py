"""Plans and a bench, for tests that need a plan but not what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from planner.types import LaunchSpec, LoadOptions
from supervisor.core import scheduler
from supervisor.core.commands import Command, Grant, PlanModel, Reject
from supervisor.core.events import (
    BecameReady,
    Event,
    Planned,
    ProcessExited,
    ProcessSpawned,
    RequestArrived,
    RequestFinished,
    TimePassed,
)
from supervisor.core.invariants import violations
from supervisor.core.loglines import Shortage
from supervisor.core.pool import LoadPhase, Pool
from supervisor.core.runner import RunnerState
from supervisor.core.types import (
    NO_OPTIONS,
    Limits,
    LoadPlan,
    ModelId,
    PlannedUse,
    PlanOutcome,
    RefusalKind,
    TicketId,
)

T = TypeVar("T")
CUDA0 = frozenset({"CUDA0"})
LIMITS = Limits(max_loaded_models=2, max_queue=4, keep_alive_s=60.0, load_timeout_s=30.0, drain_timeout_s=10.0)


def make_plan(
    *,
    on: Mapping[str, int] | None = None,
    host_bytes: int = 0,
    quality: int = 3,
    n_parallel: int = 1,
    serves: LoadOptions = NO_OPTIONS,
    is_known: bool = True,
) -> LoadPlan:
    """Return a plan that takes so much on each device, 10 bytes of CUDA0 where none is named, and on the host."""
    sizes = {"CUDA0": 10} if on is None else on
    return LoadPlan(
        LaunchSpec(("/llama-server",)),
        uses=tuple(PlannedUse(name, size, size) for name, size in {**sizes, "Host": host_bytes}.items()),
        n_parallel=n_parallel,
        serves=serves,
        quality=quality,
        is_best_possible=quality == 3 and is_known,
        is_known=is_known,
    )


class Bench:
    """A pool and the commands that its last event caused; invariants are checked after every step."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.pool = Pool(limits)
        self.now = 0.0
        self.commands: tuple[Command, ...] = ()
        self._ticket = 0

    def post(self, event: Event) -> tuple[Command, ...]:
        self.pool, self.commands = scheduler.step(self.pool, event, self.now)
        assert violations(self.pool) == []
        return self.commands

    def arrive(
        self, model: ModelId, client: str = "", options: LoadOptions = NO_OPTIONS, keep_alive_s: float | None = None
    ) -> TicketId:
        self._ticket += 1
        self.post(RequestArrived(TicketId(self._ticket), model, client, options, keep_alive_s))
        return TicketId(self._ticket)

    def answer(self, outcome: PlanOutcome) -> tuple[Command, ...]:
        """Answer the question to the planner that the last commands contain."""
        question = self.one(PlanModel)
        return self.post(Planned(question.model, question.revision, outcome))

    def answer_to(self, model: ModelId, outcome: PlanOutcome) -> tuple[Command, ...]:
        """Answer the question about this model that is being thought about."""
        assert self.pool.loads[model].phase is LoadPhase.PLANNING
        return self.post(Planned(model, self.pool.revision, outcome))

    def bring_up(self, model: ModelId, plan: LoadPlan | None = None, client: str = "") -> TicketId:
        """Load a model for one request and grant it."""
        ticket = self.arrive(model, client)
        self.answer(plan or make_plan())
        self.finish_load(model)
        return ticket

    def load_idle(self, model: ModelId, plan: LoadPlan | None = None) -> None:
        """Load a model that then serves nobody."""
        self.bring_up(model, plan)
        self.finish(model)

    def spawn(self, model: ModelId) -> tuple[Command, ...]:
        return self.post(ProcessSpawned(model, self.pool.runner(model).generation, 100))

    def finish_load(self, model: ModelId) -> tuple[Command, ...]:
        self.spawn(model)
        return self.post(BecameReady(model, self.pool.runner(model).generation, f"http://{model}"))

    def finish(self, model: ModelId, client: str = "") -> tuple[Command, ...]:
        return self.post(RequestFinished(model, self.pool.runner(model).generation, client))

    def exit(
        self,
        model: ModelId,
        last_error: str | None = None,
        shortage: Shortage | None = None,
        *,
        killed: bool = False,
    ) -> tuple[Command, ...]:
        generation = self.pool.runner(model).generation
        how = "killed by SIGKILL" if killed else "exit status 1"
        return self.post(ProcessExited(model, generation, how, last_error, shortage=shortage, killed=killed))

    def wait(self, seconds: float) -> tuple[Command, ...]:
        self.now += seconds
        return self.post(TimePassed())

    def one(self, kind: type[T]) -> T:
        """Return the only command of this kind among the last ones."""
        found = self.all(kind)
        assert len(found) == 1, self.commands
        return found[0]

    def all(self, kind: type[T]) -> list[T]:
        """Return every command of this kind among the last ones."""
        return [command for command in self.commands if isinstance(command, kind)]

    def state(self, model: ModelId) -> RunnerState:
        return self.pool.runner(model).state


def granted(commands: Iterable[Command]) -> list[int]:
    return [command.ticket for command in commands if isinstance(command, Grant)]


def refusals(commands: Iterable[Command]) -> list[tuple[int, RefusalKind]]:
    return [(command.ticket, command.refusal.kind) for command in commands if isinstance(command, Reject)]

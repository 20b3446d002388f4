"""Anything that may happen, in any order: the invariants hold, and every ticket is answered exactly once."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from making_plans import make_plan

from supervisor.core import scheduler
from supervisor.core.commands import Grant, LoseLeases, PlanModel, Reject, Spawn, StopProcess
from supervisor.core.events import (
    BecameReady,
    Event,
    LoadProgressed,
    Planned,
    ProcessExited,
    ProcessSpawned,
    RequestAbandoned,
    RequestArrived,
    RequestFinished,
    ShutdownRequested,
    SpawnFailed,
    TimePassed,
)
from supervisor.core.invariants import violations
from supervisor.core.pool import Pool
from supervisor.core.types import DoesNotFit, Limits, ModelId, PlanProblem, TicketId

MODELS = st.sampled_from([ModelId("a"), ModelId("b"), ModelId("c")])
OUTCOMES = st.sampled_from(
    [
        make_plan(),
        make_plan(n_parallel=3),
        make_plan(layers=1),
        make_plan(fit_by_llama=True),
        DoesNotFit("does not fit"),
        PlanProblem("no model"),
        PlanProblem("broken", ours=True),
    ]
)
Child = tuple[ModelId, int]


class PoolMachine(RuleBasedStateMachine):
    """A shell that does what the commands say, when hypothesis lets it."""

    @initialize(
        max_loaded=st.sampled_from([1, 2, None]),
        max_queue=st.integers(1, 3),
        keep_alive_s=st.sampled_from([0.0, 5.0, None]),
    )
    def choose_limits(self, max_loaded: int | None, max_queue: int, keep_alive_s: float | None) -> None:
        self.pool = Pool(Limits(max_loaded, max_queue, keep_alive_s, 30.0, 10.0, max_crashes=3, crash_window_s=50.0))

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(Limits(2, 3, 5.0, 30.0, 10.0, max_crashes=3, crash_window_s=50.0))
        self.now = 0.0
        self.next_ticket = 1
        self.questions: list[PlanModel] = []
        self.to_spawn: list[Spawn] = []
        self.alive: set[Child] = set()
        self.ready: set[Child] = set()
        self.open_tickets: set[int] = set()
        self.held: dict[int, Child] = {}
        self.stopping: set[Child] = set()
        self.lost: set[Child] = set()  # those whose leases were lost

    def post(self, event: Event) -> None:
        self.pool, commands = scheduler.step(self.pool, event, self.now)
        for command in commands:
            match command:
                case PlanModel():
                    self.questions.append(command)
                case Spawn(model=model):
                    assert all(child[0] != model for child in self.alive), "one child of a model at a time"
                    self.to_spawn.append(command)
                case StopProcess(model, generation):
                    assert (model, generation) in self.alive
                    self.stopping.add((model, generation))
                case Grant(ticket, model, generation):
                    self.open_tickets.remove(ticket)
                    assert (model, generation) in self.ready
                    self.held[ticket] = (model, generation)
                case Reject(ticket):
                    self.open_tickets.remove(ticket)
                case LoseLeases(model, generation):
                    child = (model, generation)
                    assert child not in self.alive or child in self.stopping
                    assert child in self.held.values()
                    assert child not in self.lost, "told once"
                    self.lost.add(child)
                case _:
                    pass

    @rule(model=MODELS)
    def arrive(self, model: ModelId) -> None:
        ticket = self.next_ticket
        self.next_ticket += 1
        self.open_tickets.add(ticket)
        self.post(RequestArrived(TicketId(ticket), model))

    @precondition(lambda self: self.open_tickets)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.open_tickets)))
        self.open_tickets.remove(ticket)
        self.post(RequestAbandoned(TicketId(ticket)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.held)))
        self.post(RequestFinished(*self.held.pop(ticket)))

    @precondition(lambda self: self.questions)
    @rule(outcome=OUTCOMES)
    def answer(self, outcome: object) -> None:
        question = self.questions.pop(0)
        self.post(Planned(question.model, question.revision, outcome))  # type: ignore[arg-type]

    @precondition(lambda self: self.to_spawn)
    @rule(works=st.booleans())
    def spawn(self, *, works: bool) -> None:
        command = self.to_spawn.pop(0)
        if works:
            self.alive.add((command.model, command.generation))
            self.post(ProcessSpawned(command.model, command.generation, 100))
        else:
            self.post(SpawnFailed(command.model, command.generation, "no such file"))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), what=st.sampled_from(["progress", "ready", "exit"]))
    def child_does(self, data: st.DataObject, what: str) -> None:
        child = data.draw(st.sampled_from(sorted(self.alive)))
        if what == "progress":
            self.post(LoadProgressed(*child))
        elif what == "exit":
            self.alive.discard(child)
            self.ready.discard(child)
            self.stopping.discard(child)
            self.post(ProcessExited(*child, "killed by SIGKILL", None))
        elif child not in self.ready:
            self.ready.add(child)
            self.post(BecameReady(*child, "http://127.0.0.1:1"))

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 11.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.post(TimePassed())

    @rule()
    def shut_down(self) -> None:
        if self.now > 50.0:  # rarely before the end
            self.post(ShutdownRequested())

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert violations(self.pool) == []

    @invariant()
    def the_pool_waits_for_the_open_tickets_only(self) -> None:
        assert {ticket.id for ticket in self.pool.waiting} == self.open_tickets

    @invariant()
    def whoever_holds_a_dead_child_s_lease_was_told(self) -> None:
        assert {child for child in self.held.values() if child not in self.alive} <= self.lost

    @invariant()
    def in_flight_is_what_is_held_on_live_children(self) -> None:
        held = [child for child in self.held.values() if child in self.alive]
        assert sum(one.in_flight for one in self.pool.runners.values()) == len(held)

    def teardown(self) -> None:
        """Let everything come to its end: nothing may be left waiting for what never comes."""
        self.settle(lambda: bool(self.questions or self.to_spawn or self.stopping))
        self.post(ShutdownRequested())
        self.post(ShutdownRequested())
        self.settle(lambda: bool(self.to_spawn or self.stopping))
        assert not self.open_tickets
        assert not self.pool.has_children
        assert not self.alive

    def settle(self, unfinished: Callable[[], bool]) -> None:
        for _ in range(100):
            if not unfinished():
                return
            if self.questions:
                self.answer(PlanProblem("the end"))
            elif self.to_spawn:
                self.spawn(works=False)
            else:
                child = min(self.stopping)
                for those in (self.alive, self.ready, self.stopping):
                    those.discard(child)
                self.post(ProcessExited(*child, "exit status 0", None))
            self.nothing_is_wrong()
        raise AssertionError("it never comes to rest")


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=50)

"""Anything that may happen, in any order: the invariants hold, and every ticket is answered exactly once."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_machine import BROKEN, CAPACITY, SIZES, answer

from planner.types import LoadOptions
from supervisor.core import ledger, scheduler
from supervisor.core.admission import free_runner
from supervisor.core.commands import Grant, LoseLeases, PlanModel, Reject, Spawn, StopProcess
from supervisor.core.events import (
    BecameReady,
    ChildHung,
    DevicesRenamed,
    Event,
    LoadProgressed,
    Planned,
    ProcessExited,
    ProcessSpawned,
    RequestAbandoned,
    RequestArrived,
    RequestFinished,
    ResetRequested,
    SettingsChanged,
    ShutdownRequested,
    SpawnFailed,
    StopRequested,
    TimePassed,
    WrongDevices,
    YieldEnded,
    YieldRequested,
)
from supervisor.core.invariants import violations
from supervisor.core.loading import FOR_ROOM
from supervisor.core.loglines import Shortage
from supervisor.core.pool import Pool
from supervisor.core.types import Limits, ModelId, ModelSettings, PlanProblem, TicketId
from supervisor.core.yielding import FOR_OTHERS

pytestmark = pytest.mark.timeout(600)  # half a minute alone, several on a machine that does much else

NAMES = [*map(ModelId, SIZES), BROKEN]
MODELS = st.sampled_from(NAMES)
CLIENTS = st.sampled_from(["x", "y"])
OPTIONS = st.sampled_from([LoadOptions(), LoadOptions(), LoadOptions(n_ctx=2048), LoadOptions(n_ctx=16384)])
KEEP_ALIVES = st.sampled_from([None, None, 0.0, 3.0, float("inf")])
SETTINGS = st.builds(
    ModelSettings,
    pinned=st.booleans(),
    priority=st.integers(-1, 1),
    preload=st.booleans(),
    launch=st.integers(0, 1),
)
FATES = st.sampled_from(["ready", "ready", "ready", "progress", "wrong", "hung", "exit", "short"])
PATIENCE = 400  # steps within which a shell that does what it is told brings everything to its end
# The build service has time for a hundred thousand steps, whoever waits at a terminal has not.
EXAMPLES, STEPS = (1000, 100) if os.environ.get("CI") else (60, 60)
Child = tuple[ModelId, int]


class PoolMachine(RuleBasedStateMachine):
    """A shell that does what the commands say, when hypothesis lets it."""

    @initialize(
        max_loaded=st.sampled_from([1, 2, None]),
        max_queue=st.integers(1, 6),
        client_queue=st.sampled_from([None, 2]),
        keep_alive_s=st.sampled_from([0.0, 5.0, float("inf")]),
        n_parallel=st.integers(1, 3),
    )
    def choose_limits(
        self, max_loaded: int | None, max_queue: int, client_queue: int | None, keep_alive_s: float, n_parallel: int
    ) -> None:
        limits = Limits(max_loaded, max_queue, keep_alive_s, 30.0, 10.0, client_queue, 60.0, max_crashes=3)
        self.pool, self.n_parallel = Pool(limits), n_parallel

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(Limits(2, 3, 5.0, 30.0, 10.0))
        self.n_parallel = 1
        self.now = 0.0
        self.next_ticket = 1
        self.questions: list[PlanModel] = []
        self.to_spawn: list[Spawn] = []
        self.alive: set[Child] = set()
        self.ready: set[Child] = set()
        self.open_tickets: set[int] = set()
        self.clients: dict[int, str] = {}
        self.held: dict[int, Child] = {}
        self.stopping: set[Child] = set()
        self.lost: set[Child] = set()  # those whose leases were lost

    def post(self, event: Event) -> None:
        before = self.pool
        self.pool, commands = scheduler.step(before, event, self.now)
        for command in commands:
            match command:
                case PlanModel():
                    self.questions.append(command)
                case Spawn(model=model):
                    assert all(child[0] != model for child in self.alive), "one child of a model at a time"
                    self.to_spawn.append(command)
                    self.nothing_is_promised_twice()
                case StopProcess(model, generation, reason):
                    assert (model, generation) in self.alive
                    self.stopping.add((model, generation))
                    if reason == FOR_ROOM:
                        self.it_may_go(before, model)
                    elif reason == FOR_OTHERS:
                        self.it_may_go(self.pool, model)
                case Grant(ticket, model, generation):
                    self.open_tickets.remove(ticket)
                    assert (model, generation) in self.ready - self.stopping, "a victim takes up no work"
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

    def nothing_is_promised_twice(self) -> None:
        held = ledger.held_bytes(self.pool)
        assert all(held.get(device, 0) <= size for device, size in CAPACITY.items()), held

    def it_may_go(self, decided_on: Pool, model: ModelId) -> None:
        assert not decided_on.settings_of(model).pinned
        assert not any(ticket.owed for ticket in self.pool.waiting_for(model)), "it has served whom it was loaded for"
        assert not self.pool.runner(model).serving

    @rule(model=MODELS, client=CLIENTS, options=OPTIONS, keep_alive_s=KEEP_ALIVES)
    def arrive(self, model: ModelId, client: str, options: LoadOptions, keep_alive_s: float | None) -> None:
        ticket = self.next_ticket
        self.next_ticket += 1
        self.open_tickets.add(ticket)
        self.clients[ticket] = client
        is_offered = free_runner(self.pool, model, options) is not None
        self.post(RequestArrived(TicketId(ticket), model, client, options, keep_alive_s))
        assert ticket in self.held or not is_offered

    @precondition(lambda self: self.open_tickets)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.open_tickets)))
        self.open_tickets.remove(ticket)
        self.post(RequestAbandoned(TicketId(ticket)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.give_back(data.draw(st.sampled_from(sorted(self.held))))

    def give_back(self, ticket: int) -> None:
        self.post(RequestFinished(*self.held.pop(ticket), self.clients[ticket]))

    @precondition(lambda self: self.questions)
    @rule(fails=st.sampled_from([False, False, False, True]))
    def answer(self, *, fails: bool) -> None:
        question = self.questions.pop(0)
        outcome = PlanProblem("the planner broke", ours=True) if fails else answer(question, self.n_parallel)
        self.post(Planned(question.model, question.revision, outcome))

    @precondition(lambda self: self.to_spawn)
    @rule(works=st.sampled_from([True, True, True, False]))
    def spawn(self, *, works: bool) -> None:
        command = self.to_spawn.pop(0)
        if works:
            self.alive.add((command.model, command.generation))
            self.post(ProcessSpawned(command.model, command.generation, 100))
        else:
            self.post(SpawnFailed(command.model, command.generation, "no such file"))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), fate=FATES)
    def child_does_something(self, data: st.DataObject, fate: str) -> None:
        self.child_does(data.draw(st.sampled_from(sorted(self.alive))), fate)

    def child_does(self, child: Child, fate: str) -> None:
        if fate == "progress":
            self.post(LoadProgressed(*child))
        elif fate in {"exit", "short"}:
            for those in (self.alive, self.ready, self.stopping):
                those.discard(child)
            shortage = Shortage("CUDA0") if fate == "short" else None
            self.post(ProcessExited(*child, "killed by SIGKILL", None, shortage=shortage, killed=True))
        elif child in self.ready:
            if fate == "hung":
                self.post(ChildHung(*child, "no answer"))
        elif fate == "wrong":
            self.post(WrongDevices(*child, "another card"))
        elif fate == "ready":
            self.ready.add(child)
            self.post(BecameReady(*child, "http://127.0.0.1:1"))

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 11.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.post(TimePassed())

    @rule(model=MODELS, at_once=st.booleans())
    def unload(self, model: ModelId, *, at_once: bool) -> None:
        generation = self.pool.runner(model).generation
        self.post(StopRequested(model, generation, None if at_once else self.now + 10.0))

    @rule(model=MODELS)
    def reset(self, model: ModelId) -> None:
        self.post(ResetRequested(model, self.pool.runner(model).generation))

    @rule(by_model=st.dictionaries(MODELS, SETTINGS, max_size=3))
    def change_settings(self, by_model: dict[ModelId, ModelSettings]) -> None:
        self.post(SettingsChanged(by_model))

    @rule(device=st.sampled_from(["CUDA0", "Host"]), wanted_bytes=st.integers(1, 30), is_known=st.booleans())
    def yield_memory(self, device: str, wanted_bytes: int, *, is_known: bool) -> None:
        free_bytes = CAPACITY[device] - ledger.held_bytes(self.pool).get(device, 0)
        told = free_bytes if is_known else None
        self.post(YieldRequested(frozenset({device}), wanted_bytes, told, self.now + 20.0))

    @rule(device=st.sampled_from(["CUDA0", "Host"]))
    def end_yield(self, device: str) -> None:
        self.post(YieldEnded(frozenset({device})))

    @rule()
    def number_the_cards_anew(self) -> None:
        self.post(DevicesRenamed({"CUDA0": "CUDA1", "CUDA1": "CUDA0"}))

    @rule()
    def shut_down(self) -> None:
        if self.now > 200.0:  # rarely before the end
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
    def what_is_served_is_what_is_held_on_live_children(self) -> None:
        served: Counter[str] = Counter()
        for one in self.pool.runners.values():
            served.update(one.serving)
        held = [ticket for ticket, child in self.held.items() if child in self.alive]
        assert served == Counter(self.clients[ticket] for ticket in held)

    def teardown(self) -> None:
        """With a shell that works, whoever waits is answered, whatever happened before; then nothing is left."""
        self.work_on(lambda: not self.open_tickets, "somebody waits for what never comes")
        self.post(ShutdownRequested())
        self.post(ShutdownRequested())
        self.work_on(lambda: not self.pool.has_children, "a child is left")
        assert not self.open_tickets
        assert not self.alive
        assert ledger.held_bytes(self.pool) == {}

    def work_on(self, done: object, otherwise: str) -> None:
        """Let everything succeed and end, one thing after another, time passing where nothing else happens."""
        assert callable(done)
        for _ in range(PATIENCE):
            self.nothing_is_wrong()
            if done():
                return
            loading = sorted(self.alive - self.ready - self.stopping)
            if self.questions:
                self.answer(fails=False)
            elif self.to_spawn:
                self.spawn(works=True)
            elif self.stopping:
                self.child_does(min(self.stopping), "exit")
            elif loading:
                self.child_does(loading[0], "ready")
            elif self.held:
                self.give_back(min(self.held))
            else:
                self.now = max(self.now, scheduler.next_deadline(self.pool) or self.now)
                self.post(TimePassed())
        states = {one.model: str(one.state) for one in self.pool.runners.values()}
        raise AssertionError(f"{otherwise}: {self.open_tickets}, {states}, {self.pool.loads}")


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS)

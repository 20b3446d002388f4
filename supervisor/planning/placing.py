"""One model, planned beside the runners that are there: which plan, or which of them have to go first.

The planner is asked for one state of the machine after another (``supervisor.core.eviction`` says which): as if some of
our runners were gone, with what the others hold and what was promised to those that still load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from config.model_settings import ExternalRunner
from planner import budget, explain, launch
from planner.errors import PlannerError
from planner.search.slots import enough_context
from planner.types import (
    HOST,
    DeviceKind,
    DeviceUsage,
    HostDetail,
    LaunchSpec,
    LoadOptions,
    Machine,
    NoFit,
    Plan,
    Policy,
    Refused,
    Role,
    Shortfall,
)
from planner.units import format_size
from supervisor.core import eviction
from supervisor.core.pinning import PinnedDevice
from supervisor.core.types import (
    Cap,
    DoesNotFit,
    LoadPlan,
    ModelId,
    Neighbour,
    PlannedUse,
    PlanOutcome,
    PlanProblem,
    Program,
)
from supervisor.planning.messages import MakePlan
from supervisor.planning.planned_machine import capped, emptied, occupied, with_margins, without

USE_MMAP: Final[Mapping[str | None, bool]] = MappingProxyType({"mmap": True, "none": False})

Answer = LoadPlan | DoesNotFit | PlanProblem
Place = Callable[[Machine, Policy], Answer]
Search = Callable[[Machine, Policy], Plan | NoFit | Refused]


def by_search(search: Search, *, open_context: bool = False, open_slots: bool = False) -> Place:
    """Return what places a model where the planner's search puts it, which chooses what is ``open`` too."""

    def place(machine: Machine, policy: Policy) -> Answer:
        try:
            outcome = search(budget.with_overheads(machine, policy), policy)
        except PlannerError as error:
            return PlanProblem(str(error))
        match outcome:
            case Plan():
                return load_plan(outcome, machine, open_context=open_context, open_slots=open_slots)
            case NoFit(causes=causes):
                return DoesNotFit(explain.headline(outcome), causes)
            case Refused():
                return PlanProblem(explain.headline(outcome))

    return place


def as_told(program: ExternalRunner) -> Place:
    """Return what places a program on the devices that the operator named, if there is so much to be had."""

    def place(machine: Machine, policy: Policy) -> Answer:
        there = {device.name for device in (*machine.devices, machine.host)}
        if unknown := sorted(program.memory.keys() - there):
            return PlanProblem(f"there is no {', '.join(unknown)} here; there are: {', '.join(sorted(there))}")
        if short := budget.short_of(machine, program.memory, budget.budgets(machine, policy)):
            return DoesNotFit(f"{program.cmd[0]} does not fit: {', '.join(map(_told, short))}", short)
        return LoadPlan(
            launch=LaunchSpec(program.cmd, program.env),
            uses=tuple(PlannedUse(name, size, size) for name, size in program.memory.items()),
            role=Role(program.role),
            n_parallel=program.slots,
            document={"program": list(program.cmd), "devices": dict(program.memory)},
            program=Program(program.url, program.health, None if program.folder is None else str(program.folder)),
        )

    return place


def _told(short: Shortfall) -> str:
    needed, available = format_size(short.needed_bytes), format_size(short.available_bytes)
    return f"{needed} are needed on {short.device} and {available} are to be had"


@dataclass(frozen=True, slots=True)
class Placing:
    """A question about one model on one machine. ``policy`` is the operator's alone; ``place`` knows nobody else."""

    question: MakePlan
    machine: Machine
    policy: Policy
    place: Place

    def outcome(self) -> PlanOutcome:
        """Return the plan to launch, who has to go first, or why neither will do."""
        found = self._chosen()
        if isinstance(found, DoesNotFit) and self.question.caps:
            uncapped = replace(self, question=replace(self.question, caps=()))
            if not isinstance(uncapped.outcome(), DoesNotFit):
                return replace(found, never=False, yielded=True)
        return found

    def _chosen(self) -> PlanOutcome:
        others = [self._with_all(one) for one in self.question.neighbours if one.model != self.question.model]
        machine, policy = self._beside(frozenset())
        available = budget.budgets(machine, policy).by_name
        return eviction.choose(self.plan_with, others, available, self.question.surplus)

    def plan_with(self, gone: frozenset[ModelId]) -> Answer:
        """Return the plan as if these were gone: on devices where nothing loads at present, if it can be as good."""
        machine, policy = self._beside(gone)
        busy = _names(one for one in self._staying(gone) if one.loading) - {HOST}
        if busy:
            idle = without(machine, lambda device: device.name in busy, "another model is being loaded there")
            plan = self.place(idle, policy)
            if isinstance(plan, LoadPlan) and plan.is_best_possible:
                return plan
        return self.place(machine, policy)

    def _staying(self, gone: frozenset[ModelId]) -> list[Neighbour]:
        """Return who is still there; the model's own runner, if it has one, is not."""
        return [one for one in self.question.neighbours if one.model not in {*gone, self.question.model}]

    def _beside(self, gone: frozenset[ModelId]) -> tuple[Machine, Policy]:
        """Return the machine and the policy with these gone and the others there."""
        staying = self._staying(gone)
        emptier = emptied(
            self.machine, _sum(_given_back(one) for one in self.question.neighbours if one not in staying)
        )
        taken = self._whole(staying)
        leased = without(
            occupied(emptier, _sum(one.held_bytes for one in staying if not one.loading)),  # else it is promised
            lambda device: device.name in taken,
            "it takes one process at a time, and another runner has it",
        )
        held, promised = _sum(one.held_bytes for one in staying), _sum(one.promised_bytes for one in staying)
        policy = replace(self.policy, held=held, promised=promised)
        caps = (*self.question.caps, *(Cap(frozenset({name}), held.get(name, 0)) for name in taken))
        below, policy = capped(leased, policy, caps)
        return below, with_margins(policy, below, self.question.margins)

    def _whole(self, staying: Sequence[Neighbour]) -> set[str]:
        """Return the devices that these have for themselves: all of a worker, since it serves one client at a time."""
        names = {name for one in staying for name in one.held_bytes}
        devices = self.machine.devices
        workers = {one.endpoint for one in devices if one.name in names and one.endpoint is not None}
        return {one.name for one in devices if one.endpoint in workers or (one.exclusive and one.name in names)}

    def _with_all(self, one: Neighbour) -> Neighbour:
        """Return the neighbour as one that holds all that is to be had of the devices which it has for itself."""
        whole = self._whole([one])
        if not whole:
            return one
        limits = budget.budgets(*self._beside(frozenset({one.model})))
        all_of = {name: limit for name in whole if (limit := limits.of(name)) is not None}
        return replace(one, held_bytes={**one.held_bytes, **all_of})


def load_plan(plan: Plan, machine: Machine, *, open_context: bool = False, open_slots: bool = False) -> LoadPlan:
    """Return what the supervisor needs to know of a plan for this machine."""
    names = launch.buffer_names(plan.placement.devices, machine)
    used = {*plan.placement.devices, HOST}
    placement = plan.placement
    where = [index >= 0 for index in (*placement.layer_devices, placement.output_device)]
    if plan.request.mmproj is not None:
        where.append(bool(placement.devices) and plan.request.mmproj_offload is not False)
    has_devices = any(usage.kind is not DeviceKind.HOST for usage in plan.usages)
    is_long = not open_context or _is_long_enough(plan)
    return LoadPlan(
        launch=plan.launch,
        uses=tuple(_use(usage, plan.host) for usage in plan.usages if usage.name in used),
        role=plan.request.role,
        n_parallel=plan.request.slots,
        serves=LoadOptions(
            n_ctx=plan.n_ctx_per_slot,
            n_gpu_layers=placement.n_gpu_layers,
            main_gpu=plan.request.main_gpu,
            n_batch=plan.request.n_batch,
            use_mmap=USE_MMAP.get(plan.request.load_mode),
        ),
        quality=sum(where),
        is_long_enough=is_long,
        is_best_possible=plan.is_known and is_long and (all(where) or not has_devices),
        is_known=plan.is_known,
        is_elastic=open_context or open_slots,
        document=explain.to_json(plan),
        buffer_devices=MappingProxyType({buffer: device for device, buffer in names.items()}),
        pinned=_pinned(plan, machine),
    )


def _is_long_enough(plan: Plan) -> bool:
    """Say whether a context that the planner chose is worth nobody's going."""
    return plan.n_ctx_per_slot is None or plan.n_ctx_per_slot >= enough_context(plan)


def _use(usage: DeviceUsage, host: HostDetail) -> PlannedUse:
    """Return what is taken on one device; of the host, mapped weights left out: they are page cache."""
    on_host = usage.kind is DeviceKind.HOST
    taken = budget.host_bytes(usage.context, usage.compute, host) if on_host else usage.claimed_bytes
    headroom = None if usage.budget_bytes is None else usage.budget_bytes - taken
    later = host.later_bytes if on_host else usage.image_reserve_bytes
    return PlannedUse(usage.name, usage.planned_bytes, taken, usage.overhead_bytes, headroom, later)


def _pinned(plan: Plan, machine: Machine) -> tuple[PinnedDevice, ...]:
    """Return the devices of the launch line, by the runner's names for them and by what tells them from others."""
    argv, request = plan.launch.argv, plan.request
    if "--device" not in argv or request.split_mode == "tensor":  # its one "meta" device stands for all
        return ()
    names = argv[argv.index("--device") + 1].split(",")
    pairs = list(zip(plan.placement.devices, names, strict=False))
    if request.split_mode == "none":
        pairs = pairs[request.main_gpu or 0 :][:1]
    devices = [(machine.device(name), child_name) for name, child_name in pairs]
    return tuple(PinnedDevice(device.name, name, device.pci_bus_id, device.endpoint) for device, name in devices)


def _given_back(one: Neighbour) -> Mapping[str, int]:
    """Return what its going adds to what is free: not what it would have taken in use only."""
    return {device: size - one.later_bytes.get(device, 0) for device, size in one.held_bytes.items()}


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _names(neighbours: Iterable[Neighbour]) -> set[str]:
    """Return the devices that these hold memory of."""
    return {device for one in neighbours for device, size in one.held_bytes.items() if size}

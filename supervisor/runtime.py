"""What ``api.runtime`` asks for, over the single writer: questions become events, its state becomes answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import structlog
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus

from config.model_settings import ModelsFile
from planner.types import Role
from supervisor import views
from supervisor.api.errors import UnknownDevice, UnknownModel
from supervisor.api.lease import Offer
from supervisor.api.models import ModelView
from supervisor.api.need import NO_NEED, Need
from supervisor.api.runtime import LoadProgress, YieldResult
from supervisor.api.snapshot import Snapshot
from supervisor.children.hanging import PATIENCE, Patience
from supervisor.core import ledger, yielding
from supervisor.core.events import (
    DevicesRenamed,
    ResetRequested,
    SettingsChanged,
    ShutdownRequested,
    StopRequested,
    YieldEnded,
    YieldRequested,
)
from supervisor.core.pool import Pool
from supervisor.core.runner import HAS_CHILD, Runner, RunnerState
from supervisor.core.types import Limits, ModelId
from supervisor.device_ids import DeviceId, device_ids, place_of
from supervisor.inventory import Inventory, Runners
from supervisor.leases import ChildLease
from supervisor.models import configured
from supervisor.models.catalogue import ModelEntry
from supervisor.planning.planned_machine import Share, shares
from supervisor.writer import Writer

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("supervisor.runtime")

STEADY_TRIES: Final = 3  # to find a device at rest: loads come seconds apart, and reading it takes milliseconds
LEAST_CTX: Final = 4  # as in Ollama; with a single token llama-server's own warm-up aborts


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """What the composition root tells the runtime.

    ``environ`` is what children inherit, after scrubbing. ``n_ctx_per_slot`` is what every conversation was promised,
    None where the planner decides by model. ``patience`` is how long a busy child may be silent.
    """

    version: str
    limits: Limits
    state_dir: Path
    stop_grace_s: float
    n_ctx_per_slot: int | None
    environ: Mapping[str, str]
    patience: Patience = PATIENCE
    warnings: tuple[str, ...] = ()


class Supervisor:
    """The runtime behind ``supervisor.api.runtime.Runtime``. ``run`` has to run for anything to happen.

    It and its ``inventory`` know each other, so it is given what makes one.
    """

    def __init__(self, options: RuntimeOptions, make_inventory: Callable[[Runners], Inventory]) -> None:
        self._options = options
        self._inventory = make_inventory(self)
        self._writer = Writer(
            options.limits,
            self._inventory,
            state_dir=options.state_dir,
            environ=options.environ,
            stop_grace_s=options.stop_grace_s,
            patience=options.patience,
        )
        self._started_at = time.time()
        self._clock = views.Clock()
        self._views = views.ModelViews(options.n_ctx_per_slot)
        self._loaded_files: dict[ModelId, tuple[object, ...]] = {}

    @property
    def inventory(self) -> Inventory:
        """Return what there is to serve, and to serve it with."""
        return self._inventory

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Serve until ``shut_down`` was called and every child is gone. Cancelled, it takes its children with it."""
        await self._writer.run(task_status=task_status)

    async def wait_stopped(self) -> None:
        """Return once ``shut_down`` was called and every child is gone."""
        await self._writer.stopped.wait()

    def configure(self, file: ModelsFile) -> None:
        """Let this models file hold from now on: runners whose settings it does not change keep serving."""
        self._inventory.configure(file)

    def shut_down(self) -> None:
        """Take no new work, let what runs finish in its time, stop every child. Called again: stop them now."""
        self._writer.post(ShutdownRequested())

    # -----------------------------------------------------------------------------------------------------------------
    # supervisor.inventory.Runners

    def held_bytes(self) -> Mapping[str, int]:
        """Return what our runners hold on each device, promises among it."""
        return ledger.held_bytes(self._writer.pool)

    def promised_bytes(self) -> Mapping[str, int]:
        """Return the part of it that belongs to runners which have not finished loading."""
        return ledger.promised_bytes(self._writer.pool)

    def follow_devices(self, names: Mapping[str, str]) -> None:
        """Go on remembering what is remembered of devices under the names that they have now."""
        self._writer.post(DevicesRenamed(names))

    def follow_models(self) -> None:
        """Take over what the settings say of the models now, and stop the runners of those whose files are others."""
        settings = configured.scheduling(self._inventory.entries)
        if settings != self._writer.pool.settings:
            self._writer.post(SettingsChanged(settings))
        files = {entry.id: entry.loaded_files for entry in self._inventory.entries}
        for runner in tuple(self._writer.pool.runners.values()):
            now = files.get(runner.model)
            if runner.state in HAS_CHILD and self._loaded_files.get(runner.model, now) != now:
                _log.info("model.gone" if now is None else "model.changed", model=runner.model)
                self._stop(runner)  # the next request loads what lies there now, if anything does
        self._loaded_files = files

    # -----------------------------------------------------------------------------------------------------------------
    # supervisor.api.runtime.Runtime

    def snapshot(self) -> Snapshot:
        """Return the state of everything, at once."""
        now, pool, inventory, clock = anyio.current_time(), self._writer.pool, self._inventory, self._clock
        clock.follow(now)
        inventory.was_shown()
        return Snapshot(
            version=self._options.version,
            started_at=self._started_at,
            now=clock.at(now),
            draining=pool.draining,
            not_ready=(*inventory.not_ready, *(("the service is shutting down",) if pool.draining else ())),
            llama_server=None if inventory.llama is None else inventory.llama.path,
            llama_version=None if inventory.llama is None else inventory.llama.version,
            machine=inventory.machine,
            ledger=views.ledger_views(pool, inventory.machine, now),
            runners=views.runner_views(pool, clock),
            models=tuple(self._views.of(one, pool) for one in inventory.entries),
            queue_length=len(pool.waiting),
            queue_limit=pool.limits.max_queue,
            counters=self._writer.counters,
            warnings=(*self._options.warnings, *inventory.doubts),
        )

    async def resolve(self, name: str) -> str:
        """Return the public id that this name stands for. Raises UnknownModel."""
        return (await self._inventory.resolve(name)).id

    def model(self, model: str) -> ModelView:
        """Return one model as a snapshot has it. Raises UnknownModel where it has gone."""
        return self._views.of(self._inventory.known(model), self._writer.pool)

    @asynccontextmanager
    async def acquire(self, model: str, role: Role, need: Need = NO_NEED) -> AsyncIterator[ChildLease]:
        """Wait for a lease, hold it, give it back exactly once. Entering raises an AcquireError."""
        entry = await self._inventory.find(model, role)
        with self._held(await self._writer.lease(entry, self._possible(need, entry)), need) as lease:
            yield lease

    def known(self, name: str) -> str | None:
        """Return the public id of the model that a client's name stands for; None where it has to be looked for."""
        entry = self._inventory.known_as(name)
        return None if entry is None else entry.id

    def when_stopped(self, tell: Callable[[str], None]) -> None:
        """Have this told the base URL of each runner that is stopped, just before it is."""
        self._writer.when_stopped(tell)

    def offer(self, model: str, role: Role, need: Need = NO_NEED) -> Offer | None:
        """Return the lease that can be had where nothing has to be waited for, else None."""
        entry = self._inventory.known_as(model)
        if entry is None or entry.problem is not None or entry.role is not role or entry.external is not None:
            return None
        need = self._possible(need, entry)
        endpoint = self._writer.endpoint_at_once(entry, need)
        if endpoint is None:
            self._writer.look_ahead(entry.runner)
            return None
        return Offer(endpoint, self._inventory.amendments(entry.id), partial(self._held_at_once, entry, need))

    def _possible(self, need: Need, entry: ModelEntry) -> Need:
        """Return the need with options that a runner can be loaded with, for this request and for those to come.

        No longer a context than the model was trained for, no shorter one than every conversation was promised.
        Ollama's clients write a negative number of layers for as many as fit.
        """
        n_ctx, n_gpu_layers = need.load.n_ctx, need.load.n_gpu_layers
        if n_ctx is None and n_gpu_layers is None:
            return need
        if n_ctx is not None:
            n_ctx = max(n_ctx, LEAST_CTX, entry.settings.context or self._options.n_ctx_per_slot or 0)
            n_ctx = n_ctx if entry.n_ctx_train is None else min(n_ctx, entry.n_ctx_train)
        n_gpu_layers = None if (n_gpu_layers or 0) < 0 else n_gpu_layers
        return replace(need, load=replace(need.load, n_ctx=n_ctx, n_gpu_layers=n_gpu_layers))

    def _held_at_once(self, entry: ModelEntry, need: Need) -> AbstractContextManager[ChildLease]:
        return self._held(self._writer.lease_at_once(entry, need), need)

    @contextmanager
    def _held(self, lease: ChildLease, need: Need) -> Iterator[ChildLease]:
        """Give the lease back exactly once."""
        try:
            yield lease
        finally:
            self._writer.give_back(lease, need.client)

    async def unload(self, model: str) -> bool:
        """Let the model's runner finish what it serves, stop it, and return once its child is gone."""
        return await self._unload((await self._inventory.resolve(model)).runner)

    async def _unload(self, model: ModelId) -> bool:
        runner = self._writer.pool.runner(model)
        if runner.state not in HAS_CHILD:
            return False
        self._stop(runner)
        await self._writer.until(lambda pool: _is_gone(pool.runner(runner.model), runner.generation))
        return True

    def _stop(self, runner: Runner) -> None:
        drain_until = anyio.current_time() + self._writer.pool.limits.drain_timeout_s
        self._writer.post(StopRequested(runner.model, runner.generation, drain_until))

    def reset(self, model: str) -> bool:
        """Let a runner that failed or backs off be tried again at once; False where there was nothing to forgive."""
        runner = self._writer.pool.runner(self._inventory.runner_of(model))
        self._writer.post(ResetRequested(runner.model, runner.generation))
        return self._writer.pool.runner(runner.model) != runner

    def progress(self, model: str) -> LoadProgress | None:
        """Return where the model's load stands, None where none is under way."""
        return views.progress(self._writer.pool, self._inventory.runner_of(model), anyio.current_time())

    async def yield_memory(self, device: str, wanted_bytes: int, for_s: float) -> YieldResult:
        """Stop the cheapest runners until so much is free on a device, and place nothing there for so long.

        Returns once those that were idle are gone, and does not wait for those in use. Raises UnknownDevice.
        """
        writer, which = self._writer, await self._identified(device)
        found = await self._steady_shares(which)
        before, now = ledger.held_on(writer.pool, found[0].devices), anyio.current_time()
        self._clock.follow(now)
        for share in found:
            writer.post(YieldRequested(share.devices, wanted_bytes, share.free_bytes, now + for_s))
        going = [one for one in writer.pool.leaving if _is_stopping_on(one, _all_of(found))]
        await writer.until(lambda pool: all(_is_gone(pool.runner(one.model), one.generation) for one in going))
        await self._read_machine()
        name, found = self._called_now(which), self._shares(which)
        mostly = found[0].devices
        free_bytes = min((one.free_bytes for one in found if one.free_bytes is not None), default=None)
        return YieldResult(
            device=name,
            freed_bytes=max(0, before - ledger.held_on(writer.pool, mostly)),
            free_bytes=free_bytes,
            short_bytes=None if free_bytes is None else max(0, wanted_bytes - free_bytes),
            awaited_bytes={
                str(model): size for model, size in yielding.awaited_bytes(writer.pool, mostly, now).items()
            },
            until=self._clock.at(now + for_s),
        )

    async def end_yield(self, device: str) -> bool:
        """Let our runners have what was given to other programs of a device's memory; False where nothing was."""
        which = await self._identified(device)
        devices, before = _all_of(self._shares(which)), self._writer.pool.yields
        self._writer.post(YieldEnded(devices))
        return self._writer.pool.yields != before

    async def _identified(self, device: str) -> DeviceId:
        """Return which device is called that at present. Raises UnknownDevice."""
        if self._inventory.machine is None:
            await self._read_machine()
        ids = self._ids()
        if device not in ids:
            raise UnknownDevice(f"there is no device {device!r} here; there are: {', '.join(ids) or 'none known yet'}")
        return ids[device]

    async def _steady_shares(self, which: DeviceId) -> tuple[Share, ...]:
        """Return what is free for a device, read while no load was under way there, began or ended.

        Where loads leave it no rest, what they took or gave back meanwhile counts as used. Raises UnknownDevice.
        """
        found, changed = self._shares(which), 0
        for _ in range(STEADY_TRIES):
            await self._writer.until(lambda pool: _is_at_rest(_all_of(self._shares(which)), pool))
            held = ledger.held_on(self._writer.pool, _all_of(self._shares(which)))
            await self._read_machine()
            found = self._shares(which)
            changed = abs(ledger.held_on(self._writer.pool, _all_of(found)) - held)
            if not changed:
                break
        return tuple(
            share if share.free_bytes is None else replace(share, free_bytes=share.free_bytes - changed)
            for share in found
        )

    async def _read_machine(self) -> None:
        """Read it once the drivers show what runners that have just gone gave back."""
        await self._inventory.refresh(ledger.gone_bytes(self._writer.pool, anyio.current_time()))

    def _ids(self) -> Mapping[str, DeviceId]:
        machine = self._inventory.machine
        return {} if machine is None else device_ids(machine)

    def _called_now(self, which: DeviceId) -> str:
        """Return the name of this device. Raises UnknownDevice where it has gone."""
        for name, device in self._ids().items():
            if device == which:
                return name
        raise UnknownDevice(f"the device at {place_of(which)} is not there any more")

    def _shares(self, which: DeviceId) -> tuple[Share, ...]:
        name, machine = self._called_now(which), self._inventory.machine
        return () if machine is None else shares(machine, name)

    async def forget(self, model: str) -> None:
        """Follow that a model was deleted: stop its runner, unless other names share it, and read the models again."""
        runner = self._inventory.runner_of(model)
        if not any(entry.runner == runner and entry.id != model for entry in self._inventory.entries):
            await self._unload(runner)
        await self.rescan()

    async def rescan(self) -> None:
        """Read the models again, now."""
        await self._inventory.scan(forced=True)

    async def details(self, model: str, *, whole: bool = False) -> Mapping[str, Any]:
        """Return what the model's header says. Raises UnknownModel, BadModel, PlannerFailed."""
        found = await self._inventory.details(model, whole=whole)
        tensors = [{"name": name, "type": type_, "shape": list(shape)} for name, type_, shape in found.tensors]
        return {"metadata": found.metadata, "tensors": tensors, "projector": found.projector}

    async def log_lines(self, model: str, *, follow: bool) -> AsyncGenerator[str, None]:
        """Yield the last lines that the model's runner logged; with ``follow`` what it says from then on, to its end.

        The last one's where none runs. Raises UnknownModel where none has run since the service started.
        """
        runner = self._writer.pool.runner((await self._inventory.resolve(model)).runner)
        log = self._writer.children.log(runner.model, runner.generation)
        if log is None:
            raise UnknownModel(f"{runner.model} is not loaded, and was not since the service started: it has no log")
        async for line in log.lines(follow=follow):
            yield line


def _all_of(found: Iterable[Share]) -> frozenset[str]:
    """Return the devices that share any of these."""
    return frozenset(name for share in found for name in share.devices)


def _is_at_rest(devices: frozenset[str], pool: Pool) -> bool:
    """Say whether nothing loads on these devices."""
    return not any(one.held_on(devices) for one in pool.loading)


def _is_stopping_on(runner: Runner, devices: frozenset[str]) -> bool:
    """Say whether the child stops, no more in use, and still holds memory there."""
    return runner.state is RunnerState.STOPPING and runner.held_on(devices) > 0


def _is_gone(runner: Runner, generation: int) -> bool:
    """Say whether the child of this generation is gone, whatever came after it."""
    return runner.generation != generation or runner.state not in HAS_CHILD

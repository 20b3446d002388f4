"""What is promised, held and given back on each device. Signed throughout: more may be promised than there is.

A byte is *held* from the moment its child is asked for until the child is reaped: by a runner that loads it is
*promised*, since no driver need show it yet. For a while after that it is *settling*: given back, but a driver may
still show it as used. *Yielded* memory is another program's until a moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from supervisor.core.pool import Pool
from supervisor.core.runner import IS_LEAVING, IS_LOADING, Runner, RunnerState
from supervisor.core.settling import SETTLE_WITHIN_S
from supervisor.core.types import Cap, Neighbour, Standing

# A runner that nobody used for so long is half as likely to be asked for soon; short beside KEEP_ALIVE's five minutes.
RECENT_S: Final = 60.0
READ_BYTES_PER_S: Final = 1e9  # of a file that is read from a usual disk, where no load was measured yet
LEAST_RELOAD_S: Final = 0.1  # a process, its device contexts, its warm-up


@dataclass(frozen=True, slots=True)
class Row:
    """One device's account. ``free_bytes`` is what its driver said last, None where it does not say.

    ``difference_bytes`` is what ready runners turned out to hold beyond their plans, None where one was not measured.
    ``cap_bytes`` is the most that our runners may hold at the moment, there or of the memory that it shares with other
    devices; None: no limit.
    """

    device: str
    free_bytes: int | None
    held_bytes: int
    promised_bytes: int
    settling_bytes: int
    cap_bytes: int | None
    difference_bytes: int | None


def rows(pool: Pool, free_bytes: Mapping[str, int | None], now: float) -> tuple[Row, ...]:
    """Return the account of every device of which a driver told, in that order."""
    held, promised, settling, capped = held_bytes(pool), promised_bytes(pool), gone_bytes(pool, now), caps(pool, now)
    return tuple(
        Row(
            device,
            free,
            held.get(device, 0),
            promised.get(device, 0),
            settling.get(device, 0),
            min((cap.most_bytes for cap in capped if device in cap.devices), default=None),
            _difference_bytes(pool, device),
        )
        for device, free in free_bytes.items()
    )


def held_bytes(pool: Pool) -> dict[str, int]:
    """Return what our runners hold on each device, promises among it."""
    return _sum_by_device(one.held_bytes() for one in pool.runners.values())


def promised_bytes(pool: Pool) -> dict[str, int]:
    """Return the part of it that belongs to runners which have not finished loading."""
    return _sum_by_device(one.held_bytes() for one in pool.loading)


def gone_bytes(pool: Pool, now: float) -> dict[str, int]:
    """Return what was held on each device by children that have just gone."""
    return _sum_by_device(one.held_bytes for one in pool.gone if one.at > now - SETTLE_WITHIN_S)


def caps(pool: Pool, now: float) -> tuple[Cap, ...]:
    """Return the most that our runners may hold on devices of which memory is another program's for now."""
    return tuple(one.cap for one in pool.yields if one.until > now)


def held_on(pool: Pool, devices: Iterable[str]) -> int:
    """Return what our runners hold on these devices together, promises among it."""
    held = held_bytes(pool)
    return sum(held.get(device, 0) for device in devices)


def later_on(pool: Pool, devices: Iterable[str]) -> int:
    """Return the part of it that drivers call free as long as our runners do not use it."""
    later = _sum_by_device(one.later_bytes() for one in pool.runners.values())
    return sum(later.get(device, 0) for device in devices)


def neighbour(pool: Pool, runner: Runner, now: float) -> Neighbour:
    """Return this runner as one beside which another model is to be planned."""
    settings = pool.settings_of(runner.model)
    if runner.state in IS_LEAVING:
        standing = Standing.LEAVING
    elif settings.pinned:
        standing = Standing.FIXED
    else:
        standing = Standing.IDLE if runner.idle else Standing.BUSY
    return Neighbour(
        runner.model,
        standing,
        runner.held_bytes(),
        _cost_s(runner, now),
        settings.priority,
        loading=runner.state in IS_LOADING,
        later_bytes=runner.later_bytes(),
    )


def _cost_s(runner: Runner, now: float) -> float:
    """Return the seconds that loading it again would take, times how likely it is to be asked for soon."""
    if runner.state in IS_LEAVING:
        return 0.0
    estimate_s = sum(runner.held_bytes().values()) / READ_BYTES_PER_S
    reload_s = max(LEAST_RELOAD_S, estimate_s if runner.reload_s is None else runner.reload_s)
    idle_s = now - runner.last_used if runner.idle else 0.0
    return reload_s / (1 + idle_s / RECENT_S)


def _difference_bytes(pool: Pool, device: str) -> int | None:
    total = 0
    for one in pool.runners.values():
        if one.state is not RunnerState.READY or one.child is None or one.plan is None:
            continue
        for use in one.plan.uses:
            if use.device == device:
                measured = one.child.measured_bytes.get(device)
                if measured is None or use.planned_bytes is None:
                    return None
                total += measured + use.overhead_bytes - use.planned_bytes
    return total


def _sum_by_device(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)

"""Where the host's memory is enough, how much of it is free decides nothing: a plan made without that bound holds on.

What is free on the host is another number at each look, and seldom one that matters. So a search may be made once, as
if the host's memory had no end, and its plan be taken each time the rest is as it was: with the figures of now in it,
it is to the byte what a search of now would find. That holds for a plan that lies on devices as a whole, or where there
are none: one that is divided was chosen by what each side has room for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from planner import budget
from planner.types.machine import Machine
from planner.types.plan import Plan
from planner.types.request import Policy

ENDLESS_BYTES: Final = 1 << 60


def with_endless_host(machine: Machine) -> Machine | None:
    """Return the machine as if the host's memory had no end; None where a device has its memory from it."""
    host = machine.host
    if host.free_bytes is None or any(device.pool == host.pool for device in machine.devices):
        return None
    pools = (replace(pool, free_bytes=ENDLESS_BYTES) if pool.id == host.pool else pool for pool in machine.pools)
    return replace(machine, host=replace(host, free_bytes=ENDLESS_BYTES), pools=tuple(pools))


def held_against(plan: Plan, machine: Machine, policy: Policy) -> Plan | None:
    """Return the plan that the search finds on this machine, from the one that it finds ``with_endless_host``.

    None where that cannot be said: the host has not enough, or the plan is of another kind.
    """
    *devices, endless = plan.usages
    where = (*plan.placement.layer_devices, plan.placement.output_device)
    is_whole = all(index >= 0 for index in where) or not any(device.usable for device in machine.devices)
    if not is_whole or not plan.is_known:
        return None
    budget_bytes = budget.budgets(machine, policy).of(machine.host.name)
    host = replace(endless, free_bytes=machine.host.free_bytes, budget_bytes=budget_bytes)
    beyond = budget.beyond_reserve(host)
    return None if beyond is None or beyond < 0 else replace(plan, usages=(*devices, host))

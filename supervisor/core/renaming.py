"""What is remembered of devices, once they have other names: it follows the device, and not the name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from supervisor.core.pool import Gone, Pool, Yielded
from supervisor.core.runner import Child, Runner
from supervisor.core.types import LoadPlan

Names = Mapping[str, str]  # by those of before; what is not among them keeps its own


def renamed(pool: Pool, names: Names) -> Pool:
    """Return the pool in which what is held, was given back, is yielded or to be left free goes by these names."""
    return replace(
        pool,
        runners=MappingProxyType({model: _runner(one, names) for model, one in pool.runners.items()}),
        gone=tuple(Gone(one.at, _sizes(one.held_bytes, names)) for one in pool.gone),
        yields=tuple(_yielded(one, names) for one in pool.yields),
    )


def _runner(runner: Runner, names: Names) -> Runner:
    return replace(
        runner,
        plan=None if runner.plan is None else _plan(runner.plan, names),
        child=None if runner.child is None else _child(runner.child, names),
        margins=_sizes(runner.margins, names),
    )


def _plan(plan: LoadPlan, names: Names) -> LoadPlan:
    """Return the plan with its account renamed; what it was launched with stays as it was."""
    return replace(plan, uses=tuple(replace(use, device=names.get(use.device, use.device)) for use in plan.uses))


def _child(child: Child, names: Names) -> Child:
    by_its_names = {said: names.get(device, device) for said, device in child.devices.items()}
    measured = _sizes(child.measured_bytes, names)
    return replace(child, devices=MappingProxyType(by_its_names), measured_bytes=measured)


def _yielded(one: Yielded, names: Names) -> Yielded:
    devices = frozenset(names.get(device, device) for device in one.cap.devices)
    return replace(one, cap=replace(one.cap, devices=devices))


def _sizes(by_device: Mapping[str, int], names: Names) -> Mapping[str, int]:
    return MappingProxyType({names.get(device, device): size for device, size in by_device.items()})

"""What keeps a plan from being better, and what a little more memory would buy: sentences for a reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from planner.requirement import left_on_host
from planner.speed import EQUAL_SPEED
from planner.text import rate, size
from planner.types.machine import HOST, Device, DeviceKind, DeviceName, Machine
from planner.types.plan import DecodeEstimate, Plan, PlanOutcome
from planner.units import GIB

MAX_DEVICES_TRIED: Final = 3  # each takes one more search, and somebody waits for the answer
FULL_BELOW: Final = GIB  # a layer with its cache is seldom larger; with more left, something else was the reason


def limits(plan: Plan) -> Iterator[str]:
    """Yield what the model is short of: where a token's time goes, and which devices are full."""
    if plan.fit_by_llama:
        return
    if plan.decode is not None and len(plan.decode.parts) > 1:
        yield from _of_speed(plan.decode)
    if is_short(plan):
        on_devices = [usage for usage in plan.usages if usage.layers and usage.kind is not DeviceKind.HOST]
        full = [usage for usage in on_devices if usage.headroom_bytes is not None and usage.headroom_bytes < FULL_BELOW]
        if full:
            left = ", ".join(f"{usage.name} ({size(usage.headroom_bytes)} left)" for usage in full)
            yield f"memory: no more fits on {left}"


def _of_speed(decode: DecodeEstimate) -> Iterator[str]:
    """Yield where most of a token's time goes, and why a device has most of the model."""
    slowest = max(decode.parts, key=lambda part: part.seconds)
    share = f"{100 * slowest.seconds * decode.tokens_per_second:.0f} % of a token's time is spent reading"
    if slowest.place == HOST:
        yield f"speed: {share} on the CPU, {size(slowest.read_bytes)} from this machine's memory"
    else:
        yield f"speed: {share} on {slowest.place}"
    on_devices = [part for part in decode.parts if part.place != HOST]
    most = max(on_devices, key=lambda part: part.read_bytes, default=None)
    others = [part.bytes_per_second for part in on_devices if part is not most]
    if most is not None and others and most.bytes_per_second > max(others) * EQUAL_SPEED:
        yield f"{most.place} holds most of it because it reads fastest: {most.bytes_per_second / 1e9:,.0f} GB/s"


def is_short(plan: Plan) -> bool:
    """Say whether more memory could make this plan better: some of it is on the host, or the context was cut short."""
    trained, has_devices = plan.model.n_ctx_train, len(plan.usages) > 1
    chosen = any(decision.step == "context" for decision in plan.decisions)  # there is none where it was pinned
    cut_short = chosen and (plan.n_ctx_per_slot or 0) < (trained or 0)
    return not plan.fit_by_llama and has_devices and (left_on_host(plan) is not None or cut_short)


def one_more_gib(plan: Plan, machine: Machine, search: Callable[[Machine], PlanOutcome]) -> Iterator[str]:
    """Yield what one more GiB on a device would buy, by planning for it; devices that are alike are tried once.

    Those with the least headroom come first. Nothing where more memory would buy nothing.
    """
    if not is_short(plan):
        return
    headroom = {usage.name: usage.headroom_bytes or 0 for usage in plan.usages}
    alike: dict[tuple[object, ...], Device] = {}
    for device in sorted(machine.devices, key=lambda device: headroom[device.name]):
        kind = (device.kind, device.total_bytes, device.free_bytes, device.bandwidth_bytes_per_s)
        if device.usable and device.free_bytes is not None:
            alike.setdefault(kind, device)
    for device in list(alike.values())[:MAX_DEVICES_TRIED]:
        outcome = search(_with_more(machine, device.name))
        gains = ", ".join(_gains(plan, outcome)) if isinstance(outcome, Plan) else ""
        if gains:
            yield f"on {device.name}: {gains}"


def _with_more(machine: Machine, name: DeviceName) -> Machine:
    def grown(device: Device) -> Device:
        total = None if device.total_bytes is None else device.total_bytes + GIB
        return replace(device, total_bytes=total, free_bytes=(device.free_bytes or 0) + GIB)

    return replace(machine, devices=tuple(grown(each) if each.name == name else each for each in machine.devices))


def _gains(before: Plan, after: Plan) -> Iterator[str]:
    if (more := _layers(after) - _layers(before)) > 0:
        yield f"{more} more layer{'s' if more > 1 else ''} on devices"
    if after.request.slots > before.request.slots:
        yield f"{after.request.slots} conversations at a time instead of {before.request.slots}"
    was, now = before.n_ctx_per_slot or 0, after.n_ctx_per_slot or 0
    if now > was:
        yield f"{now:,} tokens of context instead of {was:,}"
    if before.decode is not None and after.decode is not None:
        slow, fast = before.decode.tokens_per_second, after.decode.tokens_per_second
        if fast > slow * EQUAL_SPEED:
            yield f"about {rate(fast)} tokens a second instead of {rate(slow)}"


def _layers(plan: Plan) -> int:
    return sum(index >= 0 for index in plan.placement.layer_devices)

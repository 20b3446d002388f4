"""What follows from a child's failure: a pause before the next try, a larger margin, or an end to trying.

Out of memory while loading is answered by planning again at once with a larger margin on the device that ran out: the
planner then lets the next thing give way, of what nobody pinned (that a layer lies whole on one device, the context,
feed-forward matrices, experts and layers on devices, the prompt cache, the micro-batch; docs/decisions/0006). Each
margin is the failed plan's headroom there and a share of its bytes, so that no plan is tried twice. Out of memory while
serving says that a runner takes more there than any plan counts: that is learned for good.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Final

from planner.types import Decision
from supervisor.core.commands import Command, Learn, LoseLeases, ReportFailure
from supervisor.core.events import ProcessExited
from supervisor.core.runner import Runner, RunnerState
from supervisor.core.types import Failure, Limits, LoadPlan

MIB: Final = 1024 * 1024
# What an allocation of llama.cpp's lacks is seldom more than a twentieth; a driver that fragments wants more.
MARGIN_SHARES: Final = (0.05, 0.10, 0.20, 0.40)
LEAST_MARGIN_BYTES: Final = 64 * MIB  # less would not move a layer of any model that runs out
LEARN_BYTES: Final = 256 * MIB  # the pool of a CUDA device grows in steps of about that much

Outcome = tuple[Runner, tuple[Command, ...]]


def died(runner: Runner, event: ProcessExited, now: float, limits: Limits) -> Outcome:
    """Return what becomes of a runner whose child ended without being told to."""
    shortage = event.shortage
    if shortage is not None and shortage.device is not None and runner.child is not None:
        shortage = replace(shortage, device=runner.child.devices.get(shortage.device, shortage.device))
    what = None if shortage is None else str(shortage)
    failure = Failure(
        at=now,
        reason=": ".join(part for part in (event.exit, what, event.last_error) if part is not None),
        exit=event.exit,
        log_tail=event.log_tail,
        killed=event.killed,
        shortage=shortage,
    )
    return fail(runner, failure, now, limits)


def fail(runner: Runner, failure: Failure, now: float, limits: Limits) -> Outcome:
    """Wait before the next try: not at all after a first failure, then 1, 2, 4 ... seconds, and at last much longer.

    A load that ran out of memory is tried again at once, as long as there are larger margins to try.
    """
    child, while_loading = runner.child, runner.url is None
    crashes = (*(at for at in runner.crashes if at > now - limits.crash_window_s), now)
    is_told_to_go = child is not None and child.stop_reason is not None
    in_use = not while_loading and not is_told_to_go and runner.stays_s(limits) > 0
    state, pause_s, wanted_back = RunnerState.BACKOFF, _pause_s(len(crashes), limits), in_use or runner.wanted_back
    if len(crashes) >= limits.max_crashes:
        state, pause_s = RunnerState.FAILED, limits.crash_window_s
    elif while_loading and failure.shortage is not None and runner.plan is not None:
        runner, failure = _with_larger_margin(runner, runner.plan, failure)
        state, pause_s, wanted_back = RunnerState.BACKOFF, 0.0, True
        if failure.remedy is None:
            state, pause_s = RunnerState.FAILED, limits.crash_window_s
    failed = replace(
        runner,
        state=state,
        since=now,
        child=None,
        deadline=now + pause_s,
        crashes=crashes,
        last_failure=failure,
        failed_last=True,
        wanted_back=wanted_back and state is RunnerState.BACKOFF,
    )
    report = ReportFailure(runner.model, runner.generation, failure, while_loading=while_loading)
    told = child is None or child.pending_failure is not None or not child.serving
    lost = () if told else (LoseLeases(runner.model, runner.generation, failure.reason),)
    return failed, (report, *lost, *(() if while_loading else _learned(runner, failure)))


def _pause_s(n_crashes: int, limits: Limits) -> float:
    return 0.0 if n_crashes == 1 else min(limits.backoff_cap_s, 2.0 ** (n_crashes - 2))


def _with_larger_margin(runner: Runner, plan: LoadPlan, failure: Failure) -> tuple[Runner, Failure]:
    """Take the next step where there is one: the failure then names its remedy."""
    if len(runner.remedies) >= len(MARGIN_SHARES):
        return runner, failure
    where = None if failure.shortage is None else failure.shortage.device
    share = MARGIN_SHARES[len(runner.remedies)]
    margins = dict(runner.margins)
    for use in plan.uses:
        if where is None or use.device == where:
            more = max(LEAST_MARGIN_BYTES, round(share * use.taken_bytes)) + max(0, use.headroom_bytes or 0)
            margins[use.device] = margins.get(use.device, 0) + more
    step = Decision(
        step="out of memory",
        chosen=f"plan again with {share:.0%} more room on {where or 'every device of the plan'}",
        because=f"{failure.reason} (step {len(runner.remedies) + 1} of {len(MARGIN_SHARES)})",
    )
    remedied = replace(runner, margins=MappingProxyType(margins), remedies=(*runner.remedies, step))
    return remedied, replace(failure, remedy=step)


def _learned(runner: Runner, failure: Failure) -> tuple[Command, ...]:
    """Return what an out-of-memory while serving teaches about the device, where it is known which."""
    where = None if failure.shortage is None else failure.shortage.device
    uses = () if runner.plan is None else runner.plan.uses
    return tuple(
        Learn(runner.model, use.device, use.overhead_bytes + LEARN_BYTES) for use in uses if use.device == where
    )

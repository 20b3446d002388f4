"""Write the diagram of a runner's states from the table itself: ``python scripts/render_states.py > docs/states.md``.

Where an event leads is found out by sending it: to runners that are idle and busy, new to failing and past it.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planner.types import LaunchSpec
from supervisor.core import events as each
from supervisor.core.loglines import Shortage
from supervisor.core.runner import HAS_CHILD, Child, Runner, RunnerState
from supervisor.core.runner_table import IGNORED, TRANSITIONS
from supervisor.core.types import Failure, Limits, LoadPlan, ModelId, RunnerId

MODEL: Final = ModelId("m")
PLAN: Final = LoadPlan(LaunchSpec(("llama-server",)), uses=())
LIMITS: Final = Limits(None, 1, 60.0, 60.0, 30.0)
NOW: Final = 100.0

HEAD: Final = """# The states of a runner

Written by `scripts/render_states.py` from `TRANSITIONS` in `supervisor/core/runner_table.py`; do not edit it by hand.
An event that changes no state is not drawn. One that is neither in the table nor among those ignored on purpose is a
defect of the shell, and raises `IllegalTransition`.

```mermaid
stateDiagram-v2
    [*] --> stopped
"""

IGNORED_HEAD: Final = """```

## Ignored on purpose

| state | events |
|---|---|
"""


def _examples(kind: type[each.RunnerEvent]) -> Iterator[each.RunnerEvent]:
    """Yield events of this kind: one for every way on."""
    details: Mapping[type[each.RunnerEvent], list[dict[str, object]]] = {
        each.StartRequested: [{"plan": PLAN}],
        each.ProcessSpawned: [{"pid": 1}],
        each.SpawnFailed: [{"reason": ""}],
        each.WrongDevices: [{"reason": ""}],
        each.BecameReady: [{"url": ""}],
        each.ChildHung: [{"reason": ""}],
        each.PromptCacheChanged: [{"size_bytes": 1}],
        each.StopRequested: [{"drain_until": None}, {"drain_until": NOW + 1}],
        each.ProcessExited: [
            {"exit": "", "last_error": None, "shortage": shortage} for shortage in (None, Shortage("CUDA0"))
        ],
    }
    for detail in details.get(kind, [{}]):
        yield kind(MODEL, 1, **detail)


def _runners(state: RunnerState) -> Iterator[Runner]:
    """Yield runners in this state, as different as matters."""
    failures = (None, Failure(NOW, ""))
    for n_busy, n_crashes, failure in itertools.product((0, 1, 2), (0, LIMITS.max_crashes), failures):
        child = Child(0.0, serving={"": n_busy} if n_busy else {}, pending_failure=failure)
        yield Runner(
            RunnerId("r1"),
            MODEL,
            state=state,
            generation=1,
            plan=PLAN,
            child=child if state in HAS_CHILD else None,
            crashes=(NOW,) * n_crashes,
        )


def arrows() -> dict[tuple[RunnerState, RunnerState], list[str]]:
    """Return the names of the events that lead from one state to another."""
    found: dict[tuple[RunnerState, RunnerState], list[str]] = defaultdict(list)
    for (state, kind), handler in TRANSITIONS.items():
        sent = itertools.product(_runners(state), _examples(kind))
        reached = {handler(runner, event, NOW, LIMITS)[0].state for runner, event in sent if _can_be(runner, event)}
        for after in RunnerState:
            if after in reached - {state}:
                found[state, after].append(kind.__name__)
    return found


def _can_be(runner: Runner, event: each.RunnerEvent) -> bool:
    """Say whether this runner can meet this event: a lease comes back only where one was given out."""
    return bool(runner.serving) or not isinstance(event, each.RequestFinished)


def render() -> str:
    """Return the page."""
    lines = [f"    {before} --> {after}: {', '.join(names)}" for (before, after), names in arrows().items()]
    ignored = [
        f"| {state} | {', '.join(sorted(kind.__name__ for where, kind in IGNORED if where is state))} |"
        for state in RunnerState
    ]
    return HEAD + "\n".join(lines) + "\n" + IGNORED_HEAD + "\n".join(ignored) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())

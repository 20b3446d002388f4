"""How long an unloaded model takes to its first token, beside starting its llama-server by hand.

    python bench/swap.py [--rounds N] [--awake]

First where nothing is loaded, in each round in an order that changes: through ``planner serve``; by hand, with the
flags that the service chose, asked as soon as llama-server says that it listens; and through llama-server's own router
mode with the same flags. Then where one model has to go for the other (one may be loaded at a time): through the
service and through router mode. The ways are compared within each round: printed are the median of the differences and
their quartiles. With ``--awake`` every processor is kept awake meanwhile (``measuring.awake``). Ends with 1 where a
bound is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from measuring import (
    LLAMA_SERVER,
    Way,
    awake,
    get,
    llama_server,
    median,
    post,
    quartiles,
    service,
    stream,
    verdict,
    write_small_model,
)

MODEL: Final = "tiny-chat"
OTHER_MODEL: Final = "tiny-other"
OURS: Final = "planner serve"
BY_HAND: Final = "by hand"
ROUTER: Final = "router mode"
MAX_LATER_MS: Final = 40.0
POLL_S: Final = 0.01
REST_S: Final = 0.5  # before each way, so that none is measured while another one still tidies up
ROUNDS: Final = 36  # each of the six orders as often


def first_token_s(way: Way, model: str = MODEL) -> float:
    """Return the seconds from a request to its first token."""
    return asyncio.run(stream(way, model, 1)).first_token_s


def by_hand(argv: Sequence[str]) -> float:
    """Return the seconds from starting llama-server to its first token."""
    began = time.perf_counter()
    with llama_server(BY_HAND, argv) as way:
        return time.perf_counter() - began + first_token_s(way)


def wait_until(holds: Callable[[], bool]) -> None:
    """Return once this holds."""
    while not holds():
        time.sleep(POLL_S)


def unload(router: Way) -> None:
    """Have the router stop its child, and wait until it has."""
    post(router, "/models/unload", {"model": MODEL})
    wait_until(lambda: all(one["status"]["value"] == "unloaded" for one in get(router.url, "/models")["data"]))


def through_router(router: Way) -> float:
    """Return the seconds from a request to its first token, and have the model unloaded again."""
    took = first_token_s(router)
    unload(router)
    return took


def through_service(way: Way) -> float:
    """Return the seconds from a request to its first token; the model is unloaded again by its keep-alive."""
    took = first_token_s(way)
    wait_until(lambda: all(one["pid"] is None for one in get(way.url, "/status")["runners"]))
    return took


def launch_of(way: Way) -> Mapping[str, Any]:
    """Return the flags and the environment with which the service runs the model, which may be gone again at once."""
    while not (runners := get(way.url, "/status")["runners"]):
        first_token_s(way)
    launch: Mapping[str, Any] = runners[0]["plan"]["launch"]
    return launch


def take_turns(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return what each way took in each round, after one round that does not count."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    orders = itertools.cycle(itertools.permutations(ways))
    for order in [next(orders) for _ in range(rounds + 1)]:
        for name in order:
            time.sleep(REST_S)
            took[name].append(ways[name]())
    return {name: seconds[1:] for name, seconds in took.items()}


def measure_start(folder: Path, models: Path, rounds: int) -> bool:
    """Report how long a model takes where nothing is loaded."""
    settings = {"PLANNER_CONTEXT_LENGTH": "1024", "PLANNER_KEEP_ALIVE": "0", "PLANNER_LLAMA_SERVER": str(LLAMA_SERVER)}
    with service(models, folder / "state", **settings) as through:
        launch = launch_of(through)
        argv = launch["argv"]
        os.environ.update(launch["env"])
        flags = argv[argv.index("--fit") :]
        with llama_server(ROUTER, [argv[0], "--models-dir", str(models), *flags]) as router:
            ways = {
                OURS: lambda: through_service(through),
                BY_HAND: lambda: by_hand(argv),
                ROUTER: lambda: through_router(router),
            }
            took = take_turns(ways, rounds)
    print("where nothing is loaded")
    return report(took, {BY_HAND: MAX_LATER_MS, ROUTER: 0.0})


def measure_exchange(folder: Path, models: Path, rounds: int) -> bool:
    """Report how long a model takes where another one has to go for it."""
    settings = {"PLANNER_CONTEXT_LENGTH": "1024", "PLANNER_MAX_LOADED_MODELS": "1"}
    with service(models, folder / "exchange", PLANNER_LLAMA_SERVER=str(LLAMA_SERVER), **settings) as through:
        argv = launch_of(through)["argv"]
        flags = ["--models-dir", str(models), "--models-max", "1", *argv[argv.index("--fit") :]]
        with llama_server(ROUTER, [argv[0], *flags]) as router:
            first_token_s(router)
            wanted = {way.name: itertools.cycle((OTHER_MODEL, MODEL)) for way in (through, router)}
            ways = {
                OURS: lambda: first_token_s(through, next(wanted[through.name])),
                ROUTER: lambda: first_token_s(router, next(wanted[router.name])),
            }
            took = take_turns(ways, rounds)
    print("where another model has to go")
    return report(took, {ROUTER: 0.0})


def report(took: Mapping[str, Sequence[float]], most_later_ms: Mapping[str, float]) -> bool:
    """Print what each way took and how they compare within the rounds; return whether the bounds hold."""
    for name, seconds in took.items():
        print(f"  {name:<14} {quartiles([one * 1e3 for one in seconds])} ms from the request to the first token")
    held = True
    for other, bound in most_later_ms.items():
        later = [(a - b) * 1e3 for a, b in zip(took[OURS], took[other], strict=True)]
        print(f"  {OURS:<14} {quartiles(later)} ms later than {other}, within each round")
        held &= verdict(f"later first token than {other}", median(later), bound, " ms")
    return held


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--awake", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, awake(wanted=args.awake):
        folder, models = Path(name), Path(name) / "models"
        models.mkdir()
        for model in (MODEL, OTHER_MODEL):
            write_small_model(models / f"{model}.gguf")
        held = [measure(folder, models, args.rounds) for measure in (measure_start, measure_exchange)]
        return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())

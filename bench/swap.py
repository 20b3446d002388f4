"""How long an unloaded model takes to its first token, beside starting its llama-server by hand.

    python bench/swap.py [--rounds N]

In each round: through ``planner serve``, where nothing is loaded; by hand, with the flags that the service chose, asked
as soon as llama-server says that it listens; and through llama-server's own router mode with the same flags. Printed is
how much later than by hand the first token comes, as the median over the rounds. Ends with 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from measuring import LLAMA_SERVER, Way, get, llama_server, median, post, service, stream, verdict, write_small_model

MODEL: Final = "tiny-chat"
MAX_LATER_MS: Final = 40.0
POLL_S: Final = 0.01


def first_token_s(way: Way) -> float:
    """Return the seconds from a request to its first token."""
    return asyncio.run(stream(way, MODEL, 1)).first_token_s


def by_hand(argv: Sequence[str]) -> float:
    """Return the seconds from starting llama-server to its first token."""
    began = time.perf_counter()
    with llama_server("by hand", argv) as way:
        first_token_s(way)
        return time.perf_counter() - began


def wait_until(holds: Callable[[], bool]) -> None:
    """Return once this holds."""
    while not holds():
        time.sleep(POLL_S)


def unload(router: Way) -> None:
    """Have the router stop its child, and wait until it has."""
    post(router, "/models/unload", {"model": MODEL})
    wait_until(lambda: get(router.url, "/models")["data"][0]["status"]["value"] == "unloaded")


def measure(folder: Path, rounds: int) -> bool:
    """Take every way in turn and report."""
    models = folder / "models"
    models.mkdir()
    write_small_model(models / f"{MODEL}.gguf")
    settings = {"PLANNER_CONTEXT_LENGTH": "1024", "PLANNER_KEEP_ALIVE": "0", "PLANNER_LLAMA_SERVER": str(LLAMA_SERVER)}
    with service(models, folder / "state", **settings) as through:
        first_token_s(through)
        (runner,) = get(through.url, "/status")["runners"]
        argv = runner["plan"]["launch"]["argv"]
        os.environ.update(runner["plan"]["launch"]["env"])
        flags = argv[argv.index("--fit") :]
        with llama_server("router mode", [argv[0], "--models-dir", str(models), *flags]) as router:
            seconds: dict[str, list[float]] = {"planner serve": [], "by hand": [], "router mode": []}
            for round_ in range(rounds + 1):
                wait_until(lambda: all(one["pid"] is None for one in get(through.url, "/status")["runners"]))
                took = (first_token_s(through), by_hand(argv), first_token_s(router))
                unload(router)
                for (_, kept), one in zip(seconds.items(), took, strict=True):
                    kept.extend([one] if round_ else [])
    for name, kept in seconds.items():
        print(f"  {name:<14} {median(kept) * 1e3:7.1f} ms from the request to the first token")
    later, router_later = (
        median([(a - b) * 1e3 for a, b in zip(seconds[name], seconds["by hand"], strict=True)])
        for name in ("planner serve", "router mode")
    )
    return all(
        [
            verdict("later first token than by hand", later, MAX_LATER_MS, " ms"),
            verdict("later first token than by hand; router mode's", later, router_later, " ms"),
        ]
    )


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    with tempfile.TemporaryDirectory() as folder:
        return 0 if measure(Path(folder), parser.parse_args().rounds) else 1


if __name__ == "__main__":
    sys.exit(main())

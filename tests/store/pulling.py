"""Pull in a process of its own, one step at a time: what happened is told when a line comes in.

Run as ``python pulling.py STORE REGISTRY NAME``. A step is ``status|completed``, an error ``error|`` and its text. The
event loop stands still while it waits for the line, so that nothing moves between two steps but what is under way.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

from supervisor.api.store import Progress, StoreError
from supervisor.store.folder import StoreFolder
from supervisor.store.store import ModelStore


def tell(status: str, completed: int | str | None) -> None:
    if not sys.stdin.readline():
        sys.exit("nobody listens")
    sys.stdout.write(f"{status}|{completed}\n")
    sys.stdout.flush()


async def main(root: str, registry: str, name: str) -> None:
    async with ModelStore(StoreFolder(Path(root), registry)) as store:
        try:
            async for step in store.pull(name, insecure=False):
                tell(*told(step))
        except StoreError as error:
            tell("error", f"{type(error).__name__}: {error}")


def told(step: Progress) -> tuple[str, int | None]:
    return step.status, step.completed


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])

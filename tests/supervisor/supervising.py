"""What the fixtures of this folder are functions of: the types that tests write for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from supervisor.api.lease import Lease
from supervisor.runtime import Supervisor

Models = Callable[..., Path]
Supervising = Callable[..., AbstractAsyncContextManager[Supervisor]]


async def story_of_loss(lease: Lease) -> str:
    """Return what is told once the runner behind this lease has died."""
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    lease.when_lost(told.set_result)
    return await told

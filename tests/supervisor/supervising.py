"""What the fixtures of this folder are functions of: the types that tests write for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from supervisor.runtime import Supervisor

Models = Callable[..., Path]
Supervising = Callable[..., AbstractAsyncContextManager[Supervisor]]

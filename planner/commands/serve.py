"""``planner serve``: the service."""

from __future__ import annotations

import os
from collections.abc import Sequence

from planner.errors import InvalidRequest


def main(name: str, words: Sequence[str]) -> int:
    """Serve until told to stop, and return the exit status. Raises InvalidRequest."""
    if words:
        raise InvalidRequest(
            f"{name} takes no flags, but {words[0]} was given; settings are environment variables, see `planner config`"
        )
    from supervisor.app import serve

    return serve(os.environ)

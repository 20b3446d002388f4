"""``planner serve``: the service."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

from planner.errors import InvalidRequest

USAGE: Final = """\
planner serve

Serves the models of PLANNER_MODELS and PLANNER_STORE on PLANNER_HOST until it is told to stop. It takes no flags:
`planner config` shows every setting, `planner check` proves them. A HUP has it read its files again; a TERM lets
answers finish, for DRAIN_TIMEOUT at most, a second one does not.
Exit status: 0 stopped, 1 it cannot run, 2 a setting or a file is wrong.
"""


def main(name: str, words: Sequence[str]) -> int:
    """Serve until told to stop, and return the exit status. Raises InvalidRequest."""
    if {"-h", "--help"} & set(words):
        sys.stdout.write(USAGE)
        return 0
    if words:
        raise InvalidRequest(
            f"{name} takes no flags, but {words[0]} was given; settings are environment variables, see `planner config`"
        )
    from supervisor.app import serve

    return serve(os.environ)

"""The command ``planner``: which module a word stands for, and what becomes of everything that goes wrong there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Final

from planner.errors import InvalidRequest, PlannerError

WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130  # 128 + SIGINT
BROKEN_PIPE: Final = 141  # 128 + SIGPIPE

# Each module has main(name, words) -> exit status, and is imported when it is asked for: explain must not pay for what
# serve needs.
COMMANDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "explain": "planner.commands.explain",
        "verify": "planner.commands.verify",
        "devices": "planner.commands.here",
        "doctor": "planner.commands.here",
        "serve": "planner.commands.serve",
        "config": "planner.commands.here",
        "check": "supervisor.check",
        "key": "supervisor.client.keys",
        **dict.fromkeys(
            (
                *("run", "ps", "list", "show", "load", "unload", "stop", "reset", "logs", "yield"),
                *("pull", "create", "rm", "cp"),
            ),
            "supervisor.client.commands",
        ),
        "--version": "planner.commands.here",
    }
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status. Whatever is wrong is one line on stderr, never a traceback."""
    try:
        status = _dispatch(sys.argv[1:] if words is None else words)
        sys.stdout.flush()
    except PlannerError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"planner: error: {line}\n")
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        from planner.usage import USAGE

        sys.stdout.write(USAGE)
        return 0 if words else WRONG_USAGE
    name, *rest = words
    if name not in COMMANDS:
        raise InvalidRequest(f"{name}: no such command; there are {', '.join(COMMANDS)}")
    status: int = import_module(COMMANDS[name]).main(name, rest)
    return status

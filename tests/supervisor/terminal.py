"""A command in a terminal of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

# Runs the command's words against a service; returns its process and the other end of its terminal.
Terminal = Callable[..., "tuple[subprocess.Popen[bytes], int]"]


def read_until(terminal: int, words: str) -> str:
    """Read what the terminal shows until these words are there, and nothing beyond them: that is the next reader's."""
    seen = b""
    while not seen.endswith(words.encode()):
        seen += os.read(terminal, 1)
    return seen.decode()


def read_to_end(terminal: int) -> str:
    """Read what the terminal shows until nobody can write to it any more."""
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # what Linux answers once the last process at the other end has gone
            return seen.decode()

"""A stub of AMD's library, compiled once, and children that load stubs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stub_library import compile_stub

CHILD_TIMEOUT_S = 60.0


@pytest.fixture(scope="session")
def rocm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a ROCM_PATH whose libamd_smi.so knows two cards."""
    folder = tmp_path_factory.mktemp("rocm")
    compile_stub("fake_amdsmi.c", folder / "lib/libamd_smi.so")
    return folder


@pytest.fixture
def python() -> Callable[..., str]:
    """Return a function that runs code in a child interpreter under more variables and returns what it printed."""

    def run(code: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run

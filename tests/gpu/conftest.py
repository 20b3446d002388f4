"""Stub driver libraries, compiled once, and children that load them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[2] / "fixtures/gpu"
CHILD_TIMEOUT_S = 60.0


def _compile(source: str, library: Path, *flags: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.fail("no C compiler for the stub driver libraries: install one (cc)", pytrace=False)
    library.parent.mkdir(parents=True)
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags]
    subprocess.run([*command, "-o", str(library), str(FIXTURES / source)], check=True)


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an NVML that answers from the file named by FAKE_NVML."""
    folder = tmp_path_factory.mktemp("nvml") / "lib"
    _compile("fake_nvml.c", folder / "libnvidia-ml.so.1", "-Wl,-soname,libnvidia-ml.so.1")
    return folder


@pytest.fixture(scope="session")
def rocm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a ROCM_PATH whose libamd_smi.so knows two cards."""
    folder = tmp_path_factory.mktemp("rocm")
    _compile("fake_amdsmi.c", folder / "lib/libamd_smi.so")
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

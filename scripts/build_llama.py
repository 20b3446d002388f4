"""Builds llama.cpp's tools out of llama-cpp-python's source package and installs them into this virtual environment.

pip keeps one wheel per version, whatever it was built with: it would hand back a build without tools, or one that dies
on another processor. So the wheel lies in a cache of our own, in a folder named by everything that shaped it. Nothing
but the standard library is imported: this runs before anything else is installed.

    python scripts/build_llama.py [--backend cpu|cuda|hip|vulkan] [--keep]
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn, TextIO

from build_inputs import (
    BACKEND_ARGUMENTS,
    ROOT,
    BuildError,
    BuildInputs,
    detect_backend,
    gather_inputs,
    toolchain_variables,
)

CONSTRAINTS = ROOT / "constraints.txt"

SERVER = "llama-server"
CHECK_TIMEOUT_S = 60.0  # a tool's --version; a cold ROCm takes seconds
PROGRESS_STEP_PERCENT = 10  # of lines where the output is no terminal
SHOWN_LOG_LINES = 15


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def wheel_cache(environment: Mapping[str, str]) -> Path:
    """Return the folder that holds one folder per key."""
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loadmaster" / "wheels"


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock of this file, waiting for whoever has it, and saying so. The kernel frees it if we die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{busy}, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_wheel(cache: Path, inputs: BuildInputs, environment: Mapping[str, str]) -> Path:
    """Return the wheel built from these inputs, building it where the cache has none. Raises BuildError."""
    finished = cache / inputs.key
    with locked(cache / f"{inputs.key}.lock", "another process builds llama.cpp with the same arguments"):
        if not finished.is_dir():
            for leftover in cache.glob(f"{inputs.key}.tmp-*"):  # of a build that was killed: we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{inputs.key}.tmp-", dir=cache) as scratch:
                result = Path(scratch) / "result"
                result.mkdir()
                build_wheel(inputs, Path(scratch), cache / f"{inputs.key}.log", environment)
                (result / "inputs.json").write_text(json.dumps(asdict(inputs), indent=1))
                result.rename(finished)
    (wheel,) = finished.glob("*.whl")
    return wheel


def build_wheel(inputs: BuildInputs, scratch: Path, log_path: Path, environment: Mapping[str, str]) -> None:
    """Build the wheel into ``scratch/result``. Raises BuildError with the end of the log."""
    temporary = scratch / "tmp"
    temporary.mkdir()
    build_environment = {
        **environment,
        "CMAKE_ARGS": " ".join(inputs.cmake_arguments),
        "CMAKE_BUILD_PARALLEL_LEVEL": environment.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0)))),
        "TMPDIR": str(temporary),  # so that an interrupted build leaves nothing anywhere
    }
    build_environment = toolchain_variables(inputs.backend) | build_environment
    name = inputs.requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-cache-dir", "--no-deps", "--no-binary", name]
    command += ["--wheel-dir", str(scratch / "result"), inputs.requirement]
    say(f"building llama.cpp's tools ({inputs.backend}) from {inputs.requirement}; the full log is {log_path}")
    started = time.monotonic()
    with log_path.open("w") as log, child(command, build_environment) as process:
        assert process.stdout is not None  # noqa: S101  for the type checker: it is a pipe
        follow(process.stdout, log)
        status = process.wait()
    if status != 0:
        raise BuildError(f"llama.cpp's build failed:\n{last_errors(log_path)}\nThe full log is {log_path}")
    say(f"built in {duration(time.monotonic() - started)}")


@contextmanager
def child(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run the command in a process group of its own, which is ended whichever way this is left."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # compilers hold nothing that needs a goodbye
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def last_errors(log_path: Path) -> str:
    """Return the log's last lines that speak of an error, or its last lines."""
    with log_path.open(errors="replace") as log:
        lines = [line.rstrip() for line in log]
    errors = [line for line in lines if re.search(r"\berror\b|\bfatal\b|FAILED|No such file", line, re.IGNORECASE)]
    return "\n".join((errors or lines)[-SHOWN_LOG_LINES:])


# ---------------------------------------------------------------------------------------------------------------------
# Progress


STEP = re.compile(r"^\s*\[\s*(\d+)(?:/(\d+)|%)\]")  # Ninja's [12/274], make's [ 4%]
PHASES = (
    ("Downloading llama_cpp_python", "downloading the source package"),
    ("Configuring CMake", "configuring"),
    ("Building project", "compiling"),
    ("Making wheel", "packing"),
)


def follow(output: Iterable[str], log: TextIO) -> None:
    """Copy the output to the log and show how far it is: one updating line on a terminal, else one per 10 %."""
    terminal = sys.stderr.isatty()
    started, shown_percent, line_open = time.monotonic(), 0, False
    for line in output:
        log.write(line)
        if step := STEP.match(line):
            done, total = int(step[1]), int(step[2] or 100)
            percent = 100 * done // total
            text = f"compiling: {percent:3d} % ({done} of {total}), {duration(time.monotonic() - started)}"
            if terminal:
                print(f"\r{text} ", end="", file=sys.stderr, flush=True)
                line_open = True
            elif percent >= shown_percent + PROGRESS_STEP_PERCENT:
                shown_percent = percent - percent % PROGRESS_STEP_PERCENT
                say(text)
        for marker, phase in PHASES:
            if marker in line:
                say(f"\n{phase}" if line_open else phase)
                line_open = False
    if line_open:
        print(file=sys.stderr)


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def say(text: str) -> None:
    """Tell the user; stderr, since nothing here is a result."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The virtual environment


def server_path() -> Path:
    """Return where the wheel puts llama-server in this environment."""
    return Path(sysconfig.get_path("platlib")) / "bin" / SERVER


def checked_version(server: Path) -> str:
    """Return what ``llama-server --version`` says in an empty environment. Raises BuildError where it does not run.

    Empty, since the service starts it with next to nothing: a library that is found by accident must not count.
    """
    try:
        result = subprocess.run(
            [str(server), "--version"],
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{server} does not run: {error}") from error
    output = (result.stdout + result.stderr).strip()
    version = re.search(r"^version: .*$", output, re.MULTILINE)
    if result.returncode != 0 or version is None:
        raise BuildError(f"{server} --version failed with status {result.returncode}: {output or 'no output'}")
    return version[0]


def read_stamp(stamp: Path) -> dict[str, str]:
    """Return which build is installed; nothing where none is, or it was interrupted."""
    try:
        content = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and server_path().exists() else {}


def install(wheel: Path, inputs: BuildInputs, stamp: Path) -> None:
    """Put the wheel into this environment; the stamp is there only while a whole build is installed.

    Its dependencies come along: the tools do not need them, but an environment that ``pip check`` finds broken would
    be worse than four small packages.
    """
    stamp.unlink(missing_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for arguments in (["--force-reinstall", "--no-deps", str(wheel)], ["-c", str(CONSTRAINTS), inputs.requirement]):
        result = subprocess.run([*pip, *arguments], stdin=subprocess.DEVNULL, check=False)
        if result.returncode != 0:
            raise BuildError(f"pip could not install {wheel}: see its message above")
    try:
        checked_version(server_path())
    except BuildError as error:
        raise BuildError(f"{error}\nRemove {wheel.parent} to have it built anew") from error
    partial = stamp.with_suffix(".tmp")
    partial.write_text(json.dumps({"key": inputs.key, "backend": inputs.backend}))
    partial.rename(stamp)


def prepare(backend: str | None, *, keep: bool, environment: Mapping[str, str]) -> str:
    """Have llama.cpp's tools installed, and return their version.

    Without a backend this machine decides, or, with ``keep``, whatever is installed already. Raises BuildError.
    """
    stamp = Path(sys.prefix) / "llama-build.json"
    with locked(Path(sys.prefix) / "llama-build.lock", f"another process installs llama.cpp into {sys.prefix}"):
        installed = read_stamp(stamp)
        kept = installed.get("backend") if keep else None
        inputs = gather_inputs(backend or kept or announced_backend(), environment)
        if installed.get("key") != inputs.key:
            install(cached_wheel(wheel_cache(environment), inputs, environment), inputs, stamp)
        return f"llama.cpp's tools ({inputs.backend}) are ready: {checked_version(server_path())}"


def announced_backend() -> str:
    """Return the backend for this machine, having said which GPU it leaves idle."""
    backend, warnings = detect_backend()
    for warning in warnings:
        say(warning)
    return backend


def main() -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(description="Build and install llama.cpp's tools.", allow_abbrev=False)
    parser.add_argument("--backend", choices=sorted(BACKEND_ARGUMENTS), help="default: what this machine has")
    parser.add_argument("--keep", action="store_true", help="without --backend: the backend of the installed build")
    arguments = parser.parse_args()
    if sys.prefix == sys.base_prefix:
        say("run this with the python of a virtual environment, for example through `make llama`")
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        say(prepare(arguments.backend, keep=arguments.keep, environment=os.environ))
    except (BuildError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted: nothing was installed, the next run starts over")
        return 130
    return 0


def interrupt(_number: int, _frame: object) -> NoReturn:
    """Leave as Ctrl-C does, so that children are ended and half a build is removed."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""A llama-server that answers what it is told to, and writes down how often it was asked."""

from __future__ import annotations

from pathlib import Path

VERSION = "version: 0.5.0-dev (build 1, commit 0c1e570)"
CUDA_LIST = """Available devices:
  CUDA0: NVIDIA GeForce RTX 3060 (12160 MiB, 11000 MiB free)
  CUDA1: NVIDIA GeForce RTX 4090 (24189 MiB, 23600 MiB free)
"""
NO_DEVICES = "Available devices:\n  (none)\n"


def write_server(folder: Path, listing: str, *, backends: tuple[str, ...] = ("cpu",), status: int = 0) -> Path:
    """Write ``folder/bin/llama-server`` with ggml libraries beside it; its calls go to ``folder/calls``."""
    binary = folder / "bin/llama-server"
    binary.parent.mkdir(parents=True)
    (folder / "lib").mkdir()
    for backend in ("base", *backends):
        (folder / f"lib/libggml-{backend}.so").touch()
    (folder / "version").write_text(VERSION + "\n")
    (folder / "listing").write_text(listing)
    binary.write_text(
        f"""#!/bin/sh
echo "$1" >> {folder}/calls
env >> {folder}/env
case "$1" in
    --version) cat {folder}/version ;;
    --list-devices) cat {folder}/listing ;;
esac
exit {status}
"""
    )
    binary.chmod(0o755)
    return binary


def calls(folder: Path) -> list[str]:
    """Return the flags that the server was started with, in order."""
    file = folder / "calls"
    return file.read_text().splitlines() if file.exists() else []


def write_script(folder: Path, body: str) -> Path:
    """Write ``folder/llama-server`` that does this and no more."""
    binary = folder / "llama-server"
    binary.write_text(f"#!/bin/sh\n{body}\n")
    binary.chmod(0o755)
    return binary


def environ_in(folder: Path) -> dict[str, str]:
    """Return an environment that sets nothing of ours but where the cache is."""
    return {"XDG_CACHE_HOME": str(folder / "cache"), "PATH": "/usr/bin:/bin"}

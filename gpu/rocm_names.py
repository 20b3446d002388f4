"""What pyrsmi knows of AMD's cards that sysfs does not: market names and, as a cross-check, memory.

pyrsmi 1.1 cuts AMD's 64-bit handles to 32 bits (it declares no argument types), prints on the standard streams and
swaps the error stream away, and the library below it can crash; so it runs in a short-lived child process that answers
with JSON on a descriptor of its own. ``python -m gpu.rocm_names FD`` is that child.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

TIMEOUT_S: Final = 5.0  # AMD's library starts in well under a second; a wedged driver must not stop a start
_MAX_ANSWER_BYTES: Final = 1 << 20

# The functions that take a handle first, as pyrsmi calls them.
_HANDLE_FIRST: Final = (
    "amdsmi_get_gpu_asic_info",
    "amdsmi_get_gpu_device_bdf",
    "amdsmi_get_gpu_device_uuid",
    "amdsmi_get_gpu_memory_total",
    "amdsmi_get_gpu_memory_usage",
    "amdsmi_get_gpu_activity",
    "amdsmi_get_processor_handles",
)


def ask(environ: Mapping[str, str], *, timeout_s: float = TIMEOUT_S) -> dict[str, dict[str, Any]]:
    """Return ``{pci bus id: {"name", "total_bytes", "used_bytes"}}``, empty where pyrsmi has no answer in time."""
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb") as answer:  # noqa: PTH123 - a descriptor, not a path
        try:
            child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "gpu.rocm_names", str(write_fd)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=dict(environ),
                cwd=Path(__file__).parent.parent,
                pass_fds=(write_fd,),
            )
        finally:
            os.close(write_fd)
        try:
            # The answer is far smaller than a pipe holds, so the child never waits for us to read it.
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return {}
        finally:
            child.kill()
            child.wait()
        try:
            found = json.loads(answer.read(_MAX_ANSWER_BYTES) or b"{}")
        except ValueError:
            return {}
    return found if isinstance(found, dict) else {}


def _answer() -> dict[str, dict[str, Any]]:
    from pyrsmi import rocml  # noqa: PLC0415 - only the child process loads it

    rocml._load_rocm_library()  # noqa: SLF001 - its argument types must be set before its first call
    for name in _HANDLE_FIRST:
        function = getattr(rocml.rocm_lib, name, None)
        if function is not None:
            function.argtypes = [ctypes.c_void_p, *_REST_OF_ARGUMENTS.get(name, [ctypes.c_void_p])]
    # pyrsmi calls this one with three of its four arguments; without it, it goes through the sockets.
    rocml._init_processor_handles_by_type = lambda: False  # noqa: SLF001 - see above
    # pyrsmi asks a shell for a file that a built-in amdgpu does not have; that sysfs shows cards is proof enough.
    rocml._driver_initialized = lambda: True  # noqa: SLF001 - see above
    rocml.smi_initialize()
    domain_at = 32 if rocml._using_amdsmi_package else 16  # noqa: SLF001 - its two ways encode the domain differently
    found = {}
    for index in range(rocml.smi_get_device_count()):
        bdf = rocml.smi_get_device_unique_id(index)  # despite its name the PCI address
        pci = f"{bdf >> domain_at:04x}:{bdf >> 8 & 0xFF:02x}:{bdf >> 3 & 0x1F:02x}.{bdf & 7:x}"
        found[pci] = {
            "name": str(rocml.smi_get_device_name(index)),
            "total_bytes": rocml.smi_get_device_memory_total(index),
            "used_bytes": rocml.smi_get_device_memory_used(index),
        }
    return found


_REST_OF_ARGUMENTS: Final[Mapping[str, list[Any]]] = {
    "amdsmi_get_gpu_device_uuid": [ctypes.c_void_p, ctypes.c_void_p],
    "amdsmi_get_gpu_memory_total": [ctypes.c_int, ctypes.c_void_p],
    "amdsmi_get_gpu_memory_usage": [ctypes.c_int, ctypes.c_void_p],
    "amdsmi_get_processor_handles": [ctypes.c_void_p, ctypes.c_void_p],
}


def main() -> None:
    """Write the answer to the descriptor named on the command line; an empty one where pyrsmi fails in any way."""
    try:
        found = _answer()
    except Exception:  # noqa: BLE001 - it raises KeyError, RuntimeError, AttributeError and its own; all mean: no answer
        found = {}
    with open(int(sys.argv[1]), "w", encoding="utf-8") as out:  # noqa: PTH123 - a descriptor, not a path
        json.dump(found, out)


if __name__ == "__main__":
    main()

"""Makes a size-only load reserve what a real load reserves: the same pins, and every graph.

A size-only load of llama.cpp differs from a real one in two ways. ``ggml_backend_sched_reserve_size`` clears the
scheduler after the graph was built, and with it the pins of norms to their layer's device: with pipelining every device
but the first is then overstated by some activations. And only the first of the graphs that ``sched_reserve`` reserves
is measured (src/llama-context.cpp). Both are mended from outside, by redirecting three calls between the libraries:
their addresses stand in the tables of the dynamic linker, which are data of this process.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from ctypes import POINTER, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, Final

_PROT_READ_WRITE: Final = 3
_DT_NULL, _DT_STRTAB, _DT_SYMTAB, _DT_PLTRELSZ, _DT_JMPREL = 0, 5, 6, 2, 23  # elf.h
_MAX_BACKENDS: Final = 16  # GGML_SCHED_MAX_BACKENDS

_RESERVE_SIZE: Final = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, POINTER(c_size_t))
_SPLIT_GRAPH: Final = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)


class _LinkMap(ctypes.Structure):
    """``struct link_map`` (link.h): what a handle of ``dlopen`` points to."""

    _fields_ = (("l_addr", c_uint64), ("l_name", c_void_p), ("l_ld", c_void_p))


class _Dynamic(ctypes.Structure):
    """``Elf64_Dyn``."""

    _fields_ = (("tag", c_int64), ("value", c_uint64))


class _Relocation(ctypes.Structure):
    """``Elf64_Rela``."""

    _fields_ = (("offset", c_uint64), ("info", c_uint64), ("addend", c_int64))


class _Symbol(ctypes.Structure):
    """``Elf64_Sym``."""

    _fields_ = (("name", c_uint32), ("rest", ctypes.c_uint8 * 20))


class Reservation:
    """Keeps the redirected calls alive; ``complete`` says whether all three could be redirected."""

    def __init__(self, base: ctypes.CDLL, llama: ctypes.CDLL) -> None:
        """Redirect the calls of these libraries, ggml's base and llama."""
        self._base = base
        self._sizes: Any = None
        self._callbacks = (_RESERVE_SIZE(self._reserve_size), _SPLIT_GRAPH(self._split_graph))
        # The graph's builder has reset the scheduler already; a getter in place of the second reset does nothing.
        harmless = ctypes.cast(base.ggml_backend_sched_get_n_copies, c_void_p).value
        reserve_size, split_graph = (ctypes.cast(callback, c_void_p).value for callback in self._callbacks)
        self.complete = all(
            [
                _redirect(base, b"ggml_backend_sched_reset", harmless),
                _redirect(llama, b"ggml_backend_sched_reserve_size", reserve_size),
                _redirect(llama, b"ggml_backend_sched_split_graph", split_graph),
            ]
        )

    def _reserve_size(self, scheduler: int, graph: int, sizes: Any) -> None:
        """Measure the first graph, and remember where its sizes go."""
        self._base.ggml_backend_sched_reserve_size(c_void_p(scheduler), c_void_p(graph), sizes)
        self._sizes = sizes

    def _split_graph(self, scheduler: int, graph: int) -> None:
        """Measure a later graph too: buffers only grow. One before the first is a probe, which nothing is kept for."""
        if self._sizes is None:
            self._base.ggml_backend_sched_split_graph(c_void_p(scheduler), c_void_p(graph))
            return
        more = (c_size_t * _MAX_BACKENDS)()
        self._base.ggml_backend_sched_reserve_size(c_void_p(scheduler), c_void_p(graph), more)
        for backend in range(self._base.ggml_backend_sched_get_n_backends(c_void_p(scheduler))):
            self._sizes[backend] = max(self._sizes[backend], more[backend])


def _redirect(library: ctypes.CDLL, name: bytes, target: int | None) -> bool:
    """Let this library's calls of that function go to the target; False where it does not call it through a table."""
    for slot in _slots(library, name):
        page = slot // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).mprotect(c_void_p(page), c_size_t(mmap.PAGESIZE), c_int(_PROT_READ_WRITE))
        c_void_p.from_address(slot).value = target
        return True
    return False


def _slots(library: ctypes.CDLL, name: bytes) -> Iterator[int]:
    """Yield the addresses of the entries for that function in the library's table of calls (``DT_JMPREL``)."""
    link_map = _LinkMap.from_address(library._handle)  # noqa: SLF001 - glibc's handle is the map itself
    tags: dict[int, int] = {}
    at = link_map.l_ld
    while (entry := _Dynamic.from_address(at)).tag != _DT_NULL:
        tags[entry.tag] = entry.value
        at += ctypes.sizeof(_Dynamic)
    if not {_DT_STRTAB, _DT_SYMTAB, _DT_PLTRELSZ, _DT_JMPREL} <= tags.keys():
        return
    count = tags[_DT_PLTRELSZ] // ctypes.sizeof(_Relocation)
    for relocation in (_Relocation * count).from_address(tags[_DT_JMPREL]):
        symbol = _Symbol.from_address(tags[_DT_SYMTAB] + (relocation.info >> 32) * ctypes.sizeof(_Symbol))
        if ctypes.string_at(tags[_DT_STRTAB] + symbol.name) == name:
            yield link_map.l_addr + relocation.offset

"""The header of a GGUF file: metadata and tensor table (ggml/docs/gguf.md; ggml/src/gguf.cpp, ``gguf_init_*``).

Takes an open file, reads only the header, keeps only what a planner needs. Every count, length and offset is checked
against the file and a named bound, so any sequence of bytes ends in a header or in one ``ModelFileError``.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

from planner import ggml
from planner.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Mapping

MetadataScalar = int | float | bool | str
MetadataValue = MetadataScalar | tuple[MetadataScalar, ...]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
# Longer arrays are vocabularies: their length is all a planner asks for. LLAMA_MAX_LAYERS ends per-layer arrays at 512.
MAX_KEPT_ARRAY: Final = 1024
# The largest published header, a vocabulary of 260,000 with merges and scores, takes 16 MB.
MAX_HEADER_BYTES: Final = 128 << 20
MAX_METADATA: Final = 1 << 14
# A mixture of 256 experts in 60 layers with every expert a tensor of its own has 50,000.
MAX_TENSORS: Final = 1 << 17
MAX_NAME_BYTES: Final = 63  # GGML_MAX_NAME, the terminating zero left out
MAX_DIMS: Final = 4
MAX_BYTES: Final = (1 << 63) - 1
_READ_AHEAD_BYTES: Final = 1 << 18

_FETCH_AGAIN: Final = "it is incomplete or damaged: fetch it again"

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table; ``offset`` is absolute in the file, ``shape`` innermost first."""

    name: str
    type: ggml.GgmlType
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What one GGUF file says of itself.

    ``metadata`` holds scalars and arrays of up to ``MAX_KEPT_ARRAY`` entries, or all of them where it was read whole,
    ``array_lengths`` the length of every array, kept or not.
    """

    version: int
    byte_order: Literal["little", "big"]
    metadata: Mapping[str, MetadataValue]
    array_lengths: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_bytes: int


def read_header(file: BinaryIO, path: str, *, whole: bool = False) -> Header:
    """Return the header of the GGUF file opened in binary mode; ``path`` is for messages only.

    Vocabularies are left out unless it is read ``whole``, which takes ten times as long. Raises ModelFileError with
    what is wrong, be it a stray byte or a download that broke off.
    """
    try:
        return _read_header(file, whole=whole)
    except _BadHeader as error:
        raise ModelFileError(path, str(error), error.remedy) from error
    except OSError as error:
        raise ModelFileError(path, f"cannot be read ({error.strerror or error})") from error


def _read_header(file: BinaryIO, *, whole: bool) -> Header:
    file_bytes = os.fstat(file.fileno()).st_size
    cursor = _Cursor(file, file_bytes, max_kept_array=MAX_HEADER_BYTES if whole else MAX_KEPT_ARRAY)
    version = _read_preamble(cursor)
    n_tensors = cursor.count(MAX_TENSORS, "tensors")
    n_metadata = cursor.count(MAX_METADATA, "metadata entries")
    metadata: dict[str, MetadataValue] = {}
    array_lengths: dict[str, int] = {}
    for _ in range(n_metadata):
        key = cursor.string()
        if not key or key in metadata or key in array_lengths:
            raise _BadHeader(f"metadata key {key[:80]!r} is empty or appears twice")
        _read_value(cursor, key, metadata, array_lengths)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _BadHeader(f"general.alignment is {alignment!r}, not a power of two")
    tensors, data_offset = _read_tensors(cursor, n_tensors, alignment)
    return Header(
        version, "big" if cursor.order == ">" else "little", metadata, array_lengths, tensors, data_offset, file_bytes
    )


def _read_preamble(cursor: _Cursor) -> int:
    """Check magic and version, settle the byte order, and return the version."""
    magic = cursor.take(len(MAGIC))
    if magic != MAGIC:
        raise _BadHeader("not a GGUF file", "a model converted for llama.cpp is needed")
    raw = cursor.take(4)
    version = int.from_bytes(raw, "little")
    if not version & 0xFFFF:  # llama.cpp tells a foreign byte order in the same way
        version = int.from_bytes(raw, "big")
        cursor.order = ">"
    if version not in VERSIONS:
        hint = "convert the model again with a current llama.cpp" if version == 1 else "a newer reader is needed"
        raise _BadHeader(f"GGUF version {version} is not supported (2 and 3 are)", hint)
    return version


def _read_value(cursor: _Cursor, key: str, metadata: dict[str, MetadataValue], array_lengths: dict[str, int]) -> None:
    kind = cursor.scalar("I")
    if kind == _STRING:
        metadata[key] = cursor.string()
    elif kind in _SCALARS:
        metadata[key] = cursor.scalar(_SCALARS[int(kind)])
    elif kind == _ARRAY:
        kind, array_lengths[key] = int(cursor.scalar("I")), int(cursor.scalar("Q"))
        if kind != _STRING and kind not in _SCALARS:
            raise _BadHeader(f"metadata key {key[:80]!r} is an array of the unknown type {kind}")
        if array_lengths[key] <= cursor.max_kept_array:
            metadata[key] = _read_array(cursor, kind, array_lengths[key])
        else:
            _skip_array(cursor, kind, array_lengths[key])
    else:
        raise _BadHeader(f"metadata key {key[:80]!r} has the unknown type {kind}")


def _read_array(cursor: _Cursor, kind: int, length: int) -> MetadataValue:
    if kind == _STRING:
        return tuple(cursor.string() for _ in range(length))
    return cursor.scalars(_SCALARS[kind], length)


def _skip_array(cursor: _Cursor, kind: int, length: int) -> None:
    if kind == _STRING:
        cursor.skip_strings(length)
    else:
        cursor.skip(length * struct.calcsize(_SCALARS[kind]))


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: int) -> tuple[tuple[TensorInfo, ...], int]:
    """Return the tensor table and the offset of the data, every tensor checked to lie in the file where it must."""
    entries: dict[str, tuple[ggml.GgmlType, tuple[int, ...], int, int]] = {}
    expected = 0
    for _ in range(n_tensors):
        name = cursor.string(MAX_NAME_BYTES)
        if name in entries:
            raise _BadHeader(f"tensor {name!r} appears twice")
        shape = cursor.shape(name)
        type_id, offset = cursor.scalar("I"), int(cursor.scalar("Q"))
        type_ = ggml.TYPES.get(int(type_id))
        if type_ is None:
            raise _BadHeader(
                f"tensor {name!r} has the unknown type {type_id}", "a newer llama.cpp or another conversion is needed"
            )
        if shape[0] % type_.block:
            raise _BadHeader(f"tensor {name!r}: rows of {shape[0]} do not divide into {type_.name} blocks")
        size = ggml.nbytes(type_, shape)
        if size > MAX_BYTES:
            raise _BadHeader(f"tensor {name!r} of shape {shape} is larger than any file")
        if offset != expected:
            raise _BadHeader(f"tensor {name!r} starts at {offset} where {expected} is due")
        expected += ggml.pad(size, alignment)
        entries[name] = (type_, shape, size, offset)
    data_offset = ggml.pad(cursor.position, alignment)
    for name, (_, _, size, offset) in entries.items():
        if data_offset + offset + size > cursor.file_bytes:
            raise _BadHeader(
                f"ends at {cursor.file_bytes:,} bytes, before tensor {name!r} "
                f"({data_offset + offset + size:,} are needed)",
                "the download is incomplete: fetch it again",
            )
    tensors = tuple(
        TensorInfo(name, t, shape, size, data_offset + at) for name, (t, shape, size, at) in entries.items()
    )
    return tensors, data_offset


class _BadHeader(Exception):
    """What is wrong with the bytes; ``read_header`` adds the path."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


class _Cursor:
    """A position in a file that is read ahead in growing pieces, never past its end or the header's bound."""

    def __init__(self, file: BinaryIO, file_bytes: int, *, max_kept_array: int) -> None:
        self.max_kept_array = max_kept_array
        self.order = "<"
        self.position = 0
        self.file_bytes = file_bytes
        self._file = file
        self._data = bytearray()
        self._structs: dict[str, struct.Struct] = {}

    def _need(self, end: int) -> None:
        """Have the bytes up to ``end`` in memory."""
        if end <= len(self._data):
            return
        if end > self.file_bytes:
            raise _BadHeader(
                f"its header runs past the end of the file ({self.file_bytes:,} bytes)",
                _FETCH_AGAIN,
            )
        if end > MAX_HEADER_BYTES:
            raise _BadHeader(f"its header takes more than {MAX_HEADER_BYTES >> 20} MiB", _FETCH_AGAIN)
        target = min(self.file_bytes, MAX_HEADER_BYTES, max(end, len(self._data) * 5 // 4, _READ_AHEAD_BYTES))
        while len(self._data) < target:
            piece = self._file.read(target - len(self._data))
            if not piece:
                raise _BadHeader("shrank while it was read", "wait until it is complete")
            self._data += piece

    def take(self, n_bytes: int) -> bytes:
        """Return the next bytes."""
        end = self.position + n_bytes
        self._need(end)
        piece = bytes(self._data[self.position : end])
        self.position = end
        return piece

    def skip(self, n_bytes: int) -> None:
        """Pass over bytes that must exist."""
        self._need(self.position + n_bytes)
        self.position += n_bytes

    def scalar(self, code: str) -> MetadataScalar:
        """Return one number or truth value of that ``struct`` code."""
        decoder = self._structs.get(code)
        if decoder is None:
            decoder = self._structs[code] = struct.Struct(self.order + code)
        end = self.position + decoder.size
        self._need(end)
        (value,) = decoder.unpack_from(self._data, self.position)
        self.position = end
        return value  # type: ignore[no-any-return]  # struct's codes decide, all of them of this union

    def scalars(self, code: str, length: int) -> tuple[MetadataScalar, ...]:
        """Return an array of ``length`` numbers."""
        return struct.unpack(f"{self.order}{length}{code}", self.take(length * struct.calcsize(code)))

    def count(self, limit: int, what: str) -> int:
        """Return a 64-bit count that is at most ``limit``."""
        value = int(self.scalar("Q"))
        if value > limit:
            raise _BadHeader(f"claims {value:,} {what}, more than any model has ({limit:,})", _FETCH_AGAIN)
        return value

    def string(self, limit: int = MAX_HEADER_BYTES) -> str:
        """Return the next string; bytes that are not UTF-8 are replaced."""
        length = int(self.scalar("Q"))
        if length > limit:
            raise _BadHeader(f"holds a string of {length:,} bytes where {limit:,} are allowed", _FETCH_AGAIN)
        return self.take(length).decode("utf-8", "replace")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's dimensions without trailing ones, at least one of them."""
        n_dims = int(self.scalar("I"))
        if n_dims > MAX_DIMS:
            raise _BadHeader(f"tensor {name!r} has {n_dims} dimensions, more than {MAX_DIMS}")
        shape = [int(self.scalar("Q")) for _ in range(n_dims)] or [1]
        if max(shape) > MAX_BYTES:
            raise _BadHeader(f"tensor {name!r} has the impossible shape {tuple(shape)}")
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        return tuple(shape)

    def skip_strings(self, count: int) -> None:
        """Pass over ``count`` strings: the loop that a vocabulary's 260,000 entries go through."""
        if self.position + 8 * count > self.file_bytes:
            raise _BadHeader(f"claims an array of {count:,} strings, more than the file can hold", _FETCH_AGAIN)
        unpack = struct.Struct(self.order + "Q").unpack_from
        position, remaining = self.position, count
        while remaining:
            self._need(position + 8)
            data, done = self._data, 0
            try:
                for done in range(remaining):  # noqa: B007  # read after the loop broke off
                    position += unpack(data, position)[0] + 8
                remaining = 0
            except (struct.error, OverflowError):  # beyond what has been read ahead
                remaining -= done
        self._need(position)
        self.position = position

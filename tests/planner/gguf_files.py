"""Writes GGUF headers with the gguf package, the independent implementation; the tensor data is a hole in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ALIGNMENT = 32


def write_header(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, str, Sequence[int]]],
    *,
    tokens: int = 0,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write a model of these tensors (name, type, shape innermost first) with ``tokens`` words of vocabulary.

    Keys without a dot-separated prefix of their own belong to the architecture.
    """
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    for key, value in metadata.items():
        _add(writer, key if key.startswith(("general.", "split.")) else f"{architecture}.{key}", value)
    if tokens:
        writer.add_token_list([f"word{number}" for number in range(tokens)])
    data_bytes = 0
    for name, type_name, shape in tensors:
        quantization = gguf.GGMLQuantizationType[type_name.upper()]
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        rows = 1
        for length in shape[1:]:
            rows *= length
        size = shape[0] // block * block_bytes * rows
        packed = [*reversed(shape[1:]), shape[0] // block * block_bytes]
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), size, raw_dtype=quantization)
        data_bytes += -(-size // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header_bytes = -(-path.stat().st_size // ALIGNMENT) * ALIGNMENT
    with path.open("ab") as file:
        file.truncate(header_bytes + data_bytes)
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

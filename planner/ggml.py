"""ggml's tensor types and the bytes of rows and tensors (ggml/src/ggml.c, ``type_traits``, ``ggml_nbytes``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One tensor type: a row is stored in blocks of ``block`` elements, ``block_bytes`` each."""

    id: int
    name: str
    block: int
    block_bytes: int

    @property
    def quantized(self) -> bool:
        """Say whether ggml calls it quantized: exactly the types that are stored in blocks."""
        return self.block > 1


TYPES: Final[Mapping[int, GgmlType]] = {
    row[0]: GgmlType(*row)
    for row in (
        (0, "f32", 1, 4),
        (1, "f16", 1, 2),
        (2, "q4_0", 32, 18),
        (3, "q4_1", 32, 20),
        (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34),
        (9, "q8_1", 32, 36),
        (10, "q2_K", 256, 84),
        (11, "q3_K", 256, 110),
        (12, "q4_K", 256, 144),
        (13, "q5_K", 256, 176),
        (14, "q6_K", 256, 210),
        (15, "q8_K", 256, 292),
        (16, "iq2_xxs", 256, 66),
        (17, "iq2_xs", 256, 74),
        (18, "iq3_xxs", 256, 98),
        (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18),
        (21, "iq3_s", 256, 110),
        (22, "iq2_s", 256, 82),
        (23, "iq4_xs", 256, 136),
        (24, "i8", 1, 1),
        (25, "i16", 1, 2),
        (26, "i32", 1, 4),
        (27, "i64", 1, 8),
        (28, "f64", 1, 8),
        (29, "iq1_m", 256, 56),
        (30, "bf16", 1, 2),
        (34, "tq1_0", 256, 54),
        (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17),
        (40, "nvfp4", 64, 36),
        (41, "q1_0", 128, 18),
        (42, "q2_0", 64, 18),
    )
}
BY_NAME: Final[Mapping[str, GgmlType]] = {type_.name: type_ for type_ in TYPES.values()}

# What llama-server takes for -ctk and -ctv (common/arg.cpp, kv_cache_types).
KV_TYPE_NAMES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


def row_bytes(type_: GgmlType, n_elements: int) -> int:
    """Return the bytes of a row, rounded down to whole blocks as ``ggml_row_size`` does."""
    return type_.block_bytes * n_elements // type_.block


def nbytes(type_: GgmlType, shape: Sequence[int]) -> int:
    """Return the bytes of a contiguous tensor whose innermost dimension comes first (``ggml_nbytes``)."""
    rows = 1
    for n_elements in shape[1:]:
        rows *= n_elements
    return row_bytes(type_, shape[0] if shape else 1) * rows


def pad(size_bytes: int, alignment_bytes: int) -> int:
    """Return the smallest multiple of the alignment that holds the size (``GGML_PAD``)."""
    return -(-size_bytes // alignment_bytes) * alignment_bytes

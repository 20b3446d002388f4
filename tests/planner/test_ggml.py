"""The table of tensor types against the gguf package's."""

from __future__ import annotations

import gguf
import pytest

from planner import ggml


def test_every_type_has_the_size_that_the_reference_gives_it() -> None:
    known = {kind.value: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    for type_ in ggml.TYPES.values():
        if type_.id in known and type_.name != "q8_1":  # never in a file; the package still has its old layout
            assert (type_.block, type_.block_bytes) == known[type_.id], type_.name
    assert len(ggml.TYPES.keys() & known.keys()) > 30


@pytest.mark.parametrize(
    "name,shape,size_bytes",
    [
        ("f32", (7,), 28),
        ("f16", (3, 5, 2), 60),
        ("q4_0", (64, 3), 108),
        ("q6_K", (512, 4, 2), 3360),
        ("mxfp4", (32,), 17),
    ],
)
def test_a_tensor_takes_its_blocks(name: str, shape: tuple[int, ...], size_bytes: int) -> None:
    assert ggml.nbytes(ggml.BY_NAME[name], shape) == size_bytes


def test_types_in_blocks_are_the_quantized_ones() -> None:
    plain = {type_.name for type_ in ggml.TYPES.values() if not type_.quantized}
    assert plain == {"f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64"}


def test_all_cache_types_are_tensor_types() -> None:
    assert set(ggml.KV_TYPE_NAMES) <= ggml.BY_NAME.keys()

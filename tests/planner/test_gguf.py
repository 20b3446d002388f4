"""The header reader against the gguf package, and against every kind of broken file."""

from __future__ import annotations

import io
import struct
import tempfile
from functools import cache
from pathlib import Path

import gguf as reference
import pytest
from gguf_files import write_header
from hypothesis import given
from hypothesis import strategies as st

from planner import gguf
from planner.errors import ModelFileError

TENSORS = [
    ("token_embd.weight", "q6_k", (256, 96)),
    ("blk.0.attn_norm.weight", "f32", (256,)),
    ("blk.0.ffn_down_exps.weight", "mxfp4", (64, 32, 4)),
    ("blk.0.ffn_up.weight", "iq2_xxs", (512, 3)),
    ("output.weight", "bf16", (256, 96)),
]
METADATA = {
    "general.name": "naïve ☃",
    "block_count": 1,
    "attention.head_count": [4, 2, 8],
    "attention.causal": True,
    "rope.freq_base": 10000.0,
    "tokenizer.note": "",
    "labels": ["one", "two"],
    "decoder_start_token_id": -1,
}


def read(path: Path) -> gguf.Header:
    with path.open("rb") as file:
        return gguf.read_header(file, str(path))


def read_or_error(path: Path) -> gguf.Header | ModelFileError:
    try:
        return read(path)
    except ModelFileError as error:
        return error


def problem_of(data: bytes, tmp_path: Path) -> str:
    """Return the message for these bytes, which must be one line that names the file."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return write_header(tmp_path / "model.gguf", "llama", METADATA, TENSORS, tokens=5000)


@pytest.mark.parametrize("endian", list(reference.GGUFEndian))
def test_reads_what_the_reference_implementation_reads(tmp_path: Path, endian: reference.GGUFEndian) -> None:
    path = write_header(tmp_path / "model.gguf", "llama", METADATA, TENSORS, tokens=5000, endian=endian)
    ours, theirs = read(path), reference.GGUFReader(path)
    assert ours.byte_order == endian.name.lower()
    assert ours.data_offset == theirs.data_offset
    assert [(tensor.name, tensor.type.id, tensor.shape, tensor.nbytes, tensor.offset) for tensor in ours.tensors] == [
        (tensor.name, tensor.tensor_type, tuple(map(int, tensor.shape)), tensor.n_bytes, tensor.data_offset)
        for tensor in theirs.tensors
    ]
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF.") and key != "tokenizer.ggml.tokens":
            value = field.contents()
            assert ours.metadata[key] == (tuple(value) if isinstance(value, list) else value)


def test_counts_a_long_array_without_keeping_it(model_file: Path) -> None:
    header = read(model_file)
    assert header.array_lengths["tokenizer.ggml.tokens"] == 5000
    assert "tokenizer.ggml.tokens" not in header.metadata
    assert header.metadata["llama.labels"] == ("one", "two")


def test_reads_version_2_as_version_3(model_file: Path) -> None:
    newer = read(model_file)
    data = bytearray(model_file.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    model_file.write_bytes(data)
    older = read(model_file)
    assert (older.version, newer.version) == (2, 3)
    assert older.tensors == newer.tensors
    assert older.metadata == newer.metadata


@pytest.mark.parametrize("version", [0, 1, 4, 99])
def test_names_a_version_it_does_not_read(model_file: Path, tmp_path: Path, version: int) -> None:
    data = bytearray(model_file.read_bytes())
    data[4:8] = struct.pack("<I", version)
    assert f"GGUF version {version} is not supported" in problem_of(bytes(data), tmp_path)


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\x03\x04 an archive", b"GGML" + bytes(64)])
def test_says_that_another_file_is_no_model(tmp_path: Path, data: bytes) -> None:
    assert "GGUF" in problem_of(data, tmp_path) or "past the end" in problem_of(data, tmp_path)


def test_tells_a_broken_download_from_a_damaged_header(model_file: Path, tmp_path: Path) -> None:
    data = model_file.read_bytes()
    assert "the download is incomplete" in problem_of(data[:-1000], tmp_path)
    assert "past the end of the file" in problem_of(data[:60_000], tmp_path)


@pytest.mark.parametrize(
    "offset,count,problem",
    [(8, 1 << 40, "tensors"), (8, (1 << 64) - 1, "tensors"), (16, 1 << 40, "metadata"), (24, (1 << 64) - 1, "string")],
)
def test_refuses_absurd_counts(model_file: Path, tmp_path: Path, offset: int, count: int, problem: str) -> None:
    data = bytearray(model_file.read_bytes())
    data[offset : offset + 8] = struct.pack("<Q", count)
    assert problem in problem_of(bytes(data), tmp_path)


@pytest.mark.parametrize("length", [1 << 20, 1 << 62, (1 << 64) - 1])
def test_refuses_an_array_that_no_file_can_hold(model_file: Path, tmp_path: Path, length: int) -> None:
    data = model_file.read_bytes()
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    assert "strings" in problem_of(data[:at] + struct.pack("<Q", length) + data[at + 8 :], tmp_path)


def test_refuses_a_tensor_that_lies_elsewhere_than_its_place(model_file: Path, tmp_path: Path) -> None:
    data = bytearray(model_file.read_bytes())
    at = data.index(b"output.weight") + len(b"output.weight") + 4 + 2 * 8 + 4
    data[at : at + 8] = struct.pack("<Q", 32)
    assert "'output.weight' starts at 32" in problem_of(bytes(data), tmp_path)


def test_refuses_a_tensor_type_that_nobody_knows(model_file: Path, tmp_path: Path) -> None:
    data = bytearray(model_file.read_bytes())
    at = data.index(b"output.weight") + len(b"output.weight") + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", 31)
    assert "unknown type 31" in problem_of(bytes(data), tmp_path)


def tensor_entry(name: bytes, row: int, type_id: int, offset: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, row, type_id, offset)


@pytest.mark.parametrize(
    "entries,says",
    [
        ([tensor_entry(b"a", 48, 8, 0)], "rows of 48 do not divide into q8_0 blocks"),
        ([tensor_entry(b"a", 32, 8, 0), tensor_entry(b"a", 32, 8, 64)], "tensor 'a' appears twice"),
        ([tensor_entry(b"a", 1 << 62, 0, 0)], "larger than any file"),
    ],
)
def test_refuses_a_tensor_that_cannot_be(entries: list[bytes], says: str, tmp_path: Path) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0) + b"".join(entries) + bytes(256)
    assert says in problem_of(data, tmp_path)


def test_refuses_a_key_that_appears_twice(tmp_path: Path) -> None:
    entry = struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 7)
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry + entry
    assert "appears twice" in problem_of(data, tmp_path)


class _NoReadAhead(io.FileIO):
    """A file that hands out one byte less than asked for, as a network file system may."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size - 1 if size and size > 1 else size)


def test_reads_a_file_that_comes_in_small_pieces(model_file: Path) -> None:
    with _NoReadAhead(model_file) as file:
        assert gguf.read_header(file, str(model_file)) == read(model_file)  # type: ignore[arg-type]


@cache
def valid_header() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_header(Path(folder) / "model.gguf", "llama", METADATA, TENSORS, tokens=20).read_bytes()[:4096]


@given(data=st.data())
def test_any_bytes_give_a_header_or_one_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Damage a valid header at random places and lengths; nothing but ModelFileError may come out."""
    mutated = bytearray(valid_header())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        patch = data.draw(
            st.binary(min_size=1, max_size=9)
            | st.sampled_from([0, 1, 1 << 31, 1 << 62, (1 << 64) - 1]).map(lambda number: struct.pack("<Q", number))
        )
        mutated[at : at + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(mutated[: data.draw(st.integers(0, len(mutated)))] if data.draw(st.booleans()) else mutated)
    outcome = read_or_error(path)
    if isinstance(outcome, ModelFileError):
        assert "\n" not in str(outcome)
    else:
        assert all(tensor.offset + tensor.nbytes <= outcome.file_bytes for tensor in outcome.tensors)

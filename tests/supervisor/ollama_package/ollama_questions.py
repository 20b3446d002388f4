"""What the models of these tests are asked, and what they are shown."""

from __future__ import annotations

import struct
import zlib

import tiny_models

HELLO = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": tiny_models.TOOL_NAME, "description": "look around"}}
N_CTX = 2048


def picture() -> bytes:
    """Return a red square as PNG."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff\0\0" * 32) * 32
    head = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")

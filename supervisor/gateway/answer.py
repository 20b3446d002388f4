"""What a runner answers, as far as it has come. The parsing is llhttp's, by httptools."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from multidict import CIMultiDict, CIMultiDictProxy

# llama-server sends some three hundred bytes; whoever sends no end of header fields is no HTTP server.
MAX_HEAD_BYTES: Final = 64 << 10
HEAD_END: Final = b"\r\n\r\n"
MAX_KNOWN: Final = 64  # heads; those of answers that come whole differ by their length
# Without extensions (RFC 9112, 7.1), and of no more digits than any chunk has that comes in one piece.
CHUNK_SIZE: Final = re.compile(rb"([0-9a-fA-F]{1,7})\r\n")
CHUNK_END: Final = b"\r\n"
FIRST_FINAL_STATUS: Final = 200  # below: an interim answer, after which the real one comes


class Broken(OSError):
    """The connection, or what came over it, is of no further use; the text says how it ended."""


@dataclass(frozen=True, slots=True)
class Head:
    """What an answer begins with: its status' words and the header fields, and how long that was."""

    n_bytes: int
    reason: str
    headers: CIMultiDictProxy[str]


NO_HEAD: Final = Head(0, "", CIMultiDictProxy(CIMultiDict()))


class Answer:
    """One answer, fed with what comes. ``status``, ``reason`` and ``headers`` are there once it ``has_head``.

    ``is_whole`` once nothing more belongs to it, ``n_unread`` is how many bytes of its body wait to be taken.
    """

    def __init__(self) -> None:
        self.status = 0
        self.has_head = False
        self.is_whole = False
        self.n_unread = 0
        self._parser = HttpResponseParser(self)
        self._head = NO_HEAD
        self._raw_head = b""
        self._is_between_chunks = False
        self._n_head = 0  # of all that came before the body, interim answers included
        self._unread: list[bytes] = []

    @property
    def reason(self) -> str:
        """Return the words beside the status."""
        return self._head.reason

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        """Return the header fields; a chunked body's trailer is not among them."""
        return self._head.headers

    @property
    def n_head_bytes(self) -> int:
        """Return how long the head was."""
        return self._head.n_bytes

    def feed(self, data: bytes) -> None:
        """Take what has come. Raises ``Broken`` where it is no HTTP."""
        had_head = self.has_head
        if not had_head:
            self._raw_head += data
            self._n_head += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            raise Broken(f"it answered what is no HTTP ({error})") from error
        except HttpParserUpgrade as error:
            raise Broken("it wants to speak another protocol") from error
        if had_head:
            self._is_between_chunks = self._is_between_chunks and are_chunks(data)
        if not self.has_head and self._n_head > MAX_HEAD_BYTES:
            raise Broken("its answer's head has no end")

    def is_apart(self, data: bytes, ending: bytes = b"") -> bool:
        """Return whether what has come stands for itself: whole chunks of the body after whole ones, and not its last.

        They may be passed on as they are, and need not be fed. Each has to end so.
        """
        return self._is_between_chunks and are_chunks(data, ending)

    def close(self) -> None:
        """Note that the connection has ended, with which an answer of no told length is whole."""
        self.is_whole |= self.has_head and not self.tells_its_length

    def take(self) -> bytes:
        """Return what has come of the body since the last time."""
        data = self._unread[0] if len(self._unread) == 1 else b"".join(self._unread)
        self._unread.clear()
        self.n_unread = 0
        return data

    @property
    def tells_its_length(self) -> bool:
        """Whether the head says where the body ends."""
        return "Content-Length" in self.headers or "Transfer-Encoding" in self.headers

    # -----------------------------------------------------------------------------------------------------------------
    # httptools' side. It tells no header fields here: streams begin alike, and what was told once is known.

    def on_headers_complete(self) -> None:
        """Note that the head is whole, unless a better one follows."""
        self.status = self._parser.get_status_code()
        head, _, self._raw_head = self._raw_head.lstrip(b"\r\n").partition(HEAD_END)
        if self.status >= FIRST_FINAL_STATUS:
            self._head, rest, self._raw_head, self.has_head = _told(head + HEAD_END), self._raw_head, b"", True
            codings = [one.lower() for one in self.headers.getall("Transfer-Encoding", ())]
            self._is_between_chunks = codings == ["chunked"] and are_chunks(rest)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._unread.append(body)
        self.n_unread += len(body)

    def on_message_complete(self) -> None:
        """Note that the body is whole."""
        self.is_whole = self.has_head


def are_chunks(data: bytes, ending: bytes = b"") -> bool:
    """Return whether these are whole chunks that end so, one after the other, none of them the last one of a body."""
    at = 0
    while at < len(data):
        if (size := CHUNK_SIZE.match(data, at)) is None or not (length := int(size[1], 16)):
            return False
        end = size.end() + length
        at = end + len(CHUNK_END)
        if data[end:at] != CHUNK_END or not data.endswith(ending, size.end(), end):
            return False
    return True


class _Teller:
    """What httptools tells of a head."""

    def __init__(self) -> None:
        self.reason = ""
        self.headers: CIMultiDict[str] = CIMultiDict()

    def on_status(self, status: bytes) -> None:
        self.reason += status.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.add(name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))


@lru_cache(MAX_KNOWN)
def _told(head: bytes) -> Head:
    """Return what a whole head says."""
    heard = _Teller()
    HttpResponseParser(heard).feed_data(head)
    return Head(len(head), heard.reason, CIMultiDictProxy(heard.headers))

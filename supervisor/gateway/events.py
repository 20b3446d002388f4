"""Server-sent events on their way through: a whole one passes at once, the beginning of one waits for its end.

A runner that dies while it writes leaves half an event behind. Its client would stumble over that half, which is no
JSON, before it comes to the event that says what happened.
"""

from __future__ import annotations

from typing import Final

# llama-server ends each event so (tools/server/server-common.cpp, ``format_oai_sse`` and its siblings), in one write.
EVENT_END: Final = b"\n\n"
COMMENT: Final = b":"  # how a line begins that clients skip
# A last event that repeats a long answer with its log probabilities comes to some hundred kilobytes.
MAX_HELD_BYTES: Final = 1 << 20


def sse_event(data: bytes, name: str | None = None) -> bytes:
    """Return one server-sent event with this one line of data, under this name where the API names its events."""
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + data + EVENT_END


def sse_comment(text: bytes) -> bytes:
    """Return a comment in an event stream, which every client skips that does not look for it."""
    return COMMENT + b" " + text + EVENT_END


class WholeEvents:
    """Lets bytes through up to the last event's end and holds the rest back, ``max_held_bytes`` at most.

    What is let through, ``rest`` included, is what was fed, byte for byte. With ``max_held_bytes`` 0 nothing is held:
    an answer that is no event stream.
    """

    def __init__(self, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_held_bytes = max_held_bytes
        self._held = b""
        self.clean = True  # what was let through so far ends with an event's end, or is nothing

    @property
    def is_between(self) -> bool:
        """Whether the next byte begins an event: nothing is held, and what was let through ended with an event."""
        return self.clean and not self._held

    def feed(self, chunk: bytes) -> bytes:
        """Return what may go on now: perhaps nothing."""
        data = self._held + chunk
        last_end = data.rfind(EVENT_END, max(0, len(self._held) - 1))
        passed = 0 if last_end < 0 else last_end + len(EVENT_END)
        if len(data) - passed > self._max_held_bytes:
            passed = len(data)
        if passed:
            self.clean = data.endswith(EVENT_END, 0, passed)
        self._held = data[passed:]
        return data[:passed]

    def rest(self) -> bytes:
        """Return what is still held, for a stream that has ended by itself."""
        held, self._held = self._held, b""
        return held

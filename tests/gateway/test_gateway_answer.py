"""Heads of answers, as programs of all kinds write them."""

from __future__ import annotations

import pytest

from supervisor.gateway.answer import Answer, Broken

WHOLE = b"HTTP/1.1 200 Fine Day\r\nX-Own: 1\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize("before", [b"", b"\r\n\r\n", b"HTTP/1.1 100 Continue\r\nX-Other: 1\r\n\r\n\r\n\r\n"], ids=repr)
@pytest.mark.parametrize("n_bytes", [1, 7, 1000])
def test_a_head_is_what_stands_in_it_whatever_came_before_and_in_whatever_pieces(before: bytes, n_bytes: int) -> None:
    """Empty lines are skipped, and interim answers are none."""
    answer, sent = Answer(), before + WHOLE
    for at in range(0, len(sent), n_bytes):
        answer.feed(sent[at : at + n_bytes])
    assert (answer.status, answer.reason) == (200, "Fine Day")
    assert answer.headers == {"X-Own": "1", "Content-Length": "2"}
    assert answer.n_head_bytes == WHOLE.index(b"{}")
    assert (answer.take(), answer.is_whole) == (b"{}", True)


@pytest.mark.parametrize(
    "first, again",
    [(b"HTTP/1.1 200 OK\r\nX-Own: ", b"x" * 1000), (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 40)],
    ids=["one", "interim answers, one after the other"],
)
def test_heads_without_end_are_given_up(first: bytes, again: bytes) -> None:
    answer = Answer()
    answer.feed(first)
    with pytest.raises(Broken, match="no end"):
        feed_often(answer, again)


def feed_often(answer: Answer, again: bytes) -> None:
    """Feed it the same a thousand times."""
    for _ in range(1000):
        answer.feed(again)

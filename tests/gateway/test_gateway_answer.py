"""Heads of answers, as programs of all kinds write them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@st.composite
def chunked_answers(draw: st.DrawFn) -> list[bytes]:
    """Return an answer in the pieces in which it comes: chunks of all kinds, cut anywhere or between them."""
    data = st.one_of(
        st.binary(min_size=1, max_size=40), st.sampled_from([b"data: a\n\n", b"5\r\nabc\n\n\r\n", b"\r\n" * 3])
    )
    size = st.sampled_from([b"%x", b"%X", b"%04x", b"%x;a=b"])
    chunks = [draw(size) % len(one) + b"\r\n" + one + b"\r\n" for one in draw(st.lists(data, max_size=8))]
    pieces = [CHUNKED, *chunks]
    pieces.append(draw(st.sampled_from([b"0\r\n\r\n", b"0\r\nX-Own: 1\r\n\r\n", b""])))
    whole = b"".join(pieces)
    borders = [0, len(whole), *itertools.accumulate(map(len, pieces))]
    cuts = sorted(draw(st.sets(st.sampled_from(borders) | st.integers(0, len(whole)))))
    return [whole[a:b] for a, b in itertools.pairwise(sorted({0, *cuts, len(whole)}))]


@given(chunked_answers())
def test_what_stands_for_itself_need_not_be_fed(pieces: list[bytes]) -> None:
    """It is the same body as where everything is fed, and nothing that comes after it is misread."""
    fed, other, body = Answer(), Answer(), b""
    for piece in pieces:
        fed.feed(piece)
        if other.is_apart(piece):
            alone = Answer()
            alone.feed(CHUNKED + piece)
            body += alone.take()
            assert not alone.is_whole
        else:
            other.feed(piece)
            body += other.take()
    assert (body, other.is_whole) == (fed.take(), fed.is_whole)


def test_a_stream_stands_for_itself_event_by_event_but_for_its_end_and_what_is_no_chunk() -> None:
    answer, event = Answer(), b"9\r\ndata: a\n\n\r\n"
    assert not answer.is_apart(event)
    answer.feed(CHUNKED + event)
    assert all(map(answer.is_apart, (event, event * 3)))
    others = [event + b"0\r\n\r\n", b"zz\r\n", event[:-1], event[1:], b"+9" + event[1:], b"9\r\ndata: a\n\n\n\n"]
    assert not any(map(answer.is_apart, others))
    answer.feed(event[:5])
    assert not answer.is_apart(event)


def test_a_body_of_a_told_length_is_no_chunks() -> None:
    answer = Answer()
    answer.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    assert not answer.is_apart(b"1\r\na\r\n")

"""Whole events pass at once and untouched; half of one is never seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor.gateway.events import EVENT_END, WholeEvents

STREAMS = st.lists(st.sampled_from([b"\n", b"\n\n", b"\r\n", b"data: 1", b":", b"x", b""])).map(b"".join)


@st.composite
def chunkings(draw: st.DrawFn) -> list[bytes]:
    """Cut a stream anywhere."""
    stream = draw(STREAMS)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)))))
    return [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


@given(chunkings(), st.integers(0, 12))
def test_a_stream_that_ends_by_itself_is_unchanged(chunks: list[bytes], limit: int) -> None:
    events = WholeEvents(limit)
    passed = [events.feed(chunk) for chunk in chunks]
    assert b"".join(passed) + events.rest() == b"".join(chunks)


@given(chunkings())
def test_everything_up_to_the_last_whole_event_has_passed_and_no_more(chunks: list[bytes]) -> None:
    events, fed, passed = WholeEvents(), b"", b""
    for chunk in chunks:
        fed += chunk
        passed += events.feed(chunk)
        assert passed == b"" or passed.endswith(EVENT_END)
        assert EVENT_END not in fed[len(passed) :]
        assert events.clean


@given(chunkings(), st.integers(0, 12))
def test_no_more_is_held_than_the_limit_and_a_cut_in_an_event_is_known(chunks: list[bytes], limit: int) -> None:
    events, fed, passed = WholeEvents(limit), b"", b""
    for chunk in chunks:
        fed += chunk
        passed += events.feed(chunk)
        assert len(fed) - len(passed) <= limit
        assert not events.clean or passed == b"" or passed.endswith(EVENT_END)

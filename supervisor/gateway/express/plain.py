"""Which requests are plain enough for the short way, told by their heads. The parsing is llhttp's, by httptools."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from aiohttp import hdrs
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from multidict import CIMultiDict, CIMultiDictProxy

from supervisor.gateway.openai import FORM, PASSED_THROUGH
from supervisor.gateway.options import MAX_HEADER_FIELDS
from supervisor.gateway.proxy import NOT_TO_RUNNER, forwarded
from supervisor.gateway.upstream import fields_of

HEAD_END: Final = b"\r\n\r\n"
# A head longer than this is no client's of ours; whether it is refused is for aiohttp to say.
MAX_HEAD_BYTES: Final = 16 << 10
# A conversation of some ten thousand words. What is longer takes the runner seconds: there a millisecond is nothing.
MAX_BODY_BYTES: Final = 128 << 10
# A client's heads differ in the length of the body only, as a rule: so many of them are known again. They are short.
MAX_KNOWN: Final = 64
_LENGTH: Final = re.compile(rb"\r\nContent-Length:[ \t]*([0-9]{1,9})[ \t]*\r\n", re.IGNORECASE)
ANY_LENGTH: Final = b"1"
# With any of these there is more to a request than a body of a told length.
NOT_PLAIN: Final = (hdrs.TRANSFER_ENCODING, hdrs.CONTENT_ENCODING, hdrs.EXPECT, hdrs.UPGRADE)


@dataclass(frozen=True, slots=True)
class PlainFields:
    """What the head of a request that may take the short way says, beside the length of its body.

    ``target`` is the path with its query; ``passed_on`` are the lines that go on to a runner. ``keeps`` says that the
    client keeps the connection for more.
    """

    path: str
    target: str
    headers: CIMultiDictProxy[str]
    passed_on: str
    keeps: bool


@dataclass(frozen=True, slots=True)
class PlainHead:
    """The head of a plain request, and where its body begins and ends."""

    fields: PlainFields
    body_at: int
    end: int


class _Heard:
    """What httptools tells of a head."""

    def __init__(self) -> None:
        self.target = b""
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.is_whole = False
        self.repeats = False  # a field that came twice: which of them may is for aiohttp to say

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        told = name.decode("latin-1")
        self.repeats |= told in self.headers
        self.headers.add(told, value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        self.is_whole = True


def plain_head(data: bytes) -> PlainHead | None:
    """Return the head that the data begin with; None where it is not there, or not one of a plain request.

    Plain is a POST of HTTP/1.1 to a path that is passed through, with a body of JSON that is neither packed nor long.
    """
    body_at = data.find(HEAD_END, 0, MAX_HEAD_BYTES) + len(HEAD_END)
    if body_at < len(HEAD_END) or (told := _LENGTH.search(data, 0, body_at)) is None:
        return None
    n_body = int(told[1])
    fields = _plain_fields(data[: told.start(1)] + ANY_LENGTH + data[told.end(1) : body_at])
    if fields is None or not 0 < n_body <= MAX_BODY_BYTES:
        return None
    return PlainHead(fields, body_at, body_at + n_body)


@lru_cache(MAX_KNOWN)
def _plain_fields(head: bytes) -> PlainFields | None:
    """Return what a head says beside the length of its body; None where the request is not plain."""
    heard = _Heard()
    parser = HttpRequestParser(heard)
    try:
        parser.feed_data(head)
    except (HttpParserError, HttpParserUpgrade):
        return None
    target, headers = heard.target.decode("latin-1"), heard.headers
    path = target.partition("?")[0]
    if (
        not heard.is_whole
        or heard.repeats
        or len(headers) > MAX_HEADER_FIELDS
        or hdrs.HOST not in headers
        or parser.get_method() != b"POST"
        or parser.get_http_version() != "1.1"
        or path not in PASSED_THROUGH
        or any(name in headers for name in NOT_PLAIN)
        or headers.get(hdrs.CONTENT_TYPE, "").lower().startswith(FORM)
    ):
        return None
    passed_on = fields_of(forwarded(headers, without=NOT_TO_RUNNER))
    return PlainFields(path, target, CIMultiDictProxy(headers), passed_on, parser.should_keep_alive())

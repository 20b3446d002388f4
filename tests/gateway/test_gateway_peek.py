"""Laws of the peek: it sees what llama-server's parser will see, and refuses the rest in one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.gateway.errors import BadRequest
from supervisor.gateway.peek import Peek, peek

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["model", "stream", "x"]) | st.text(), inner)
    ),
    max_leaves=12,
)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=50)


@given(
    NAMES,
    st.booleans() | st.none() | st.text(),
    st.dictionaries(st.text().filter(lambda key: key not in {"model", "stream"}), VALUES),
    st.data(),
)
def test_only_the_top_level_counts_whatever_stands_around_it(
    name: str, stream: object, others: dict[str, object], data: st.DataObject
) -> None:
    """Order, nesting, escapes and white space make no difference."""
    items = data.draw(st.permutations([("model", name), ("stream", stream), *others.items()]))
    text = json.dumps(dict(items), ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 2])))
    assert peek(text.encode("utf-8", "replace")) == Peek(name, stream is True)


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_of_a_key_that_stands_several_times_the_last_holds(names: list[str]) -> None:
    """As in nlohmann::json, which llama-server parses with."""
    body = "{" + ",".join(f'"model":{json.dumps(name)}' for name in names) + "}"
    assert peek(body.encode()).model == names[-1]


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused_in_one_line(body: bytes) -> None:
    """No byte sequence gets another answer than a name or a ``BadRequest``."""
    try:
        peek(body)
    except BadRequest as error:
        refusal = str(error)
    else:
        refusal = "none"
    assert refusal
    assert "\n" not in refusal


@pytest.mark.parametrize(
    "body,says",
    [
        (b"", "empty"),
        (b"\xff{}", "not UTF-8"),
        (b'{"model": ', "not JSON: Expecting value at character 10"),
        (b"[]", "not a JSON object"),
        (b'{"x": {"model": "nested"}}', '"model" is missing'),
        (b'{"model": 3}', '"model" must be a name'),
        (b'{"model": ""}', '"model" must be a name'),
        (b'{"model": "' + b"x" * 5000 + b'"}', '"model" must be a name'),
        (b'{"model": "m", "n": ' + b"9" * 5000 + b"}", "number too long"),
        (b'{"model": "m", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nesting too deep"),
    ],
)
def test_a_refusal_says_what_is_wrong(body: bytes, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        peek(body)

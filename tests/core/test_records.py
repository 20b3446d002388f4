"""The records that every request changes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from supervisor.core.pool import Pool
from supervisor.core.records import changed
from supervisor.core.runner import Child, Runner
from supervisor.core.types import Limits, ModelId, RunnerId

RECORDS = (Child(1.0), Runner(RunnerId("r1"), ModelId("a")), Pool(Limits(None, 1, 1.0, 1.0, 1.0)))


@pytest.mark.parametrize("record", RECORDS, ids=lambda one: type(one).__name__)
def test_a_changed_record_is_what_a_replaced_one_is(record: Child | Runner | Pool) -> None:
    for one in fields(record):
        assert changed(record, **{one.name: ...}) == replace(record, **{one.name: ...}) != record


@pytest.mark.parametrize("record", RECORDS, ids=lambda one: type(one).__name__)
def test_a_field_that_it_does_not_have_is_not_changed(record: Child | Runner | Pool) -> None:
    with pytest.raises(TypeError, match=f"{type(record).__name__} has no nothing"):
        changed(record, nothing=1)

"""A model by part of its name: what people type, against what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from planner.errors import InvalidRequest
from supervisor.api.names import folded

LISTED: Final = 8  # names in an error line


def choose(name: str, ids: Sequence[str]) -> str:
    """Return the id that a name stands for: the same, the only one that it begins, or the only one that it is part of.

    Case and ``:latest`` do not count. A name that is part of none is returned as it is: the service may know it by an
    alias, and says best what it knows instead. Raises InvalidRequest where several ids fit.
    """
    wanted = folded(name)
    by_name = {folded(each): each for each in ids}
    if wanted in by_name:
        return by_name[wanted]
    for fits in (str.startswith, str.__contains__):
        found = [each for lower, each in by_name.items() if fits(lower, wanted)]
        if len(found) == 1:
            return found[0]
        if found:
            more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
            raise InvalidRequest(f"{name} could be {', '.join(sorted(found)[:LISTED])}{more}: write more of the name")
    return name

"""What devices were seen to take beyond their layers, by the part they play; of others it is told from the like."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from planner.types import DeviceKind


class Mode(Enum):
    """How llama.cpp keeps the inputs of a split graph, and whether weights on the host are handed to its first device.

    It keeps four copies of them only where everything is on devices and no tensor is overridden
    (src/llama-context.cpp, ``pipeline_parallel``).
    """

    PIPELINED = auto()
    UNPIPELINED = auto()
    WITH_HOST = auto()


class Part(NamedTuple):
    """The part that a device plays in a split."""

    mode: Mode
    kind: DeviceKind
    device: str
    first: bool
    output: bool


@dataclass(slots=True)
class Learned:
    """Bytes by part and context. They grow with the context nearly in proportion, so two contexts tell of others."""

    _seen: dict[Part, dict[int, int]] = field(default_factory=dict)

    def learn(self, part: Part, n_ctx: int, size_bytes: int) -> None:
        """Keep what accounting has shown."""
        self._seen.setdefault(part, {})[n_ctx] = size_bytes

    def expected(self, part: Part, n_ctx: int) -> float:
        """Return what this part takes, as far as that can be told: 0 at first, so that nothing is ruled out by a guess.

        Other parts of the same kind of device stand in where this one was not seen, the most alike, then the least.
        """
        if part in self._seen:
            return _on_line(self._seen[part], n_ctx)
        alike = [
            (
                (seen.mode is part.mode) + (seen.first == part.first) + (seen.output == part.output),
                -_on_line(points, n_ctx),
            )
            for seen, points in self._seen.items()
            if seen.kind is part.kind
        ]
        return -max(alike)[1] if alike else 0.0


def _on_line(points: dict[int, int], n_ctx: int) -> float:
    """Return the value at a context by the line through the two nearest that are known; one alone is a constant."""
    if n_ctx in points or len(points) == 1:
        return float(points.get(n_ctx, next(iter(points.values()))))
    (near, here), (far, there) = sorted(points.items(), key=lambda point: abs(point[0] - n_ctx))[:2]
    return here + (there - here) * (n_ctx - near) / (far - near)

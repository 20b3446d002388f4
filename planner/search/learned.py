"""What devices were seen to take beyond their layers, by the part they play; of others it is told from the like."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, NamedTuple

from planner.estimate import PIPELINE_COPIES
from planner.types.machine import DeviceKind

_FAR: Final = 2  # times as long a context
_MASK_BYTES: Final = 2  # of each of the context's tokens for each of a micro-batch's: an f16 (planner.graphs.blocks)


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
    """Bytes by part and context. They grow with the context nearly in proportion, so two contexts tell of others.

    Of one alone others are told by the mask that hides its tokens, which is the most of it.
    """

    _seen: dict[Part, dict[int, int]] = field(default_factory=dict)
    _told: dict[tuple[Part, int, float], float] = field(default_factory=dict)  # of parts that were not seen themselves

    def learn(self, part: Part, n_ctx: int, size_bytes: int) -> None:
        """Keep what accounting has shown."""
        self._told.clear()
        points = self._seen.setdefault(part, {})
        points.pop(n_ctx, None)  # the latest goes last
        points[n_ctx] = size_bytes

    def only(self, mode: Mode) -> Learned:
        """Return what was seen in that mode."""
        return Learned({part: dict(points) for part, points in self._seen.items() if part.mode is mode})

    def expected(self, part: Part, n_ctx: int, n_ubatch: int) -> float:
        """Return what this part takes, as far as that can be told: 0 at first, so that nothing is ruled out by a guess.

        Other parts of the same kind of device stand in where this one was not seen, the most alike, then the least.
        """
        step = _MASK_BYTES * n_ubatch * (PIPELINE_COPIES if part.mode is Mode.PIPELINED else 1)
        if part in self._seen:
            return _on_line(self._seen[part], n_ctx, step)
        of_any_device = (part._replace(device=""), n_ctx, step)
        if of_any_device not in self._told:
            self._told[of_any_device] = self._of_the_like(part, n_ctx, step)
        return self._told[of_any_device]

    def _of_the_like(self, part: Part, n_ctx: int, step: float) -> float:
        alike = [
            (
                (seen.mode is part.mode) + (seen.first == part.first) + (seen.output == part.output),
                -_on_line(points, n_ctx, step),
            )
            for seen, points in self._seen.items()
            if seen.kind is part.kind
        ]
        return -max(alike)[1] if alike else 0.0


def _on_line(points: dict[int, int], n_ctx: int, step: float) -> float:
    """Return the value at a context: the latest that was seen and so many steps from it.

    Where the value at a context far from that one is known too, the step is that of the line through both. Those of
    contexts close together differ by their splits.
    """
    known, size = next(reversed(points.items()))
    far = [other for other in points if max(other, known) >= _FAR * min(other, known)]
    if far:
        other = min(far, key=lambda each: abs(each - n_ctx))
        step = (points[other] - size) / (other - known)
    return size + (n_ctx - known) * step

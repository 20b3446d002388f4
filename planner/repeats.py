"""Layers that repeat themselves: which ones a graph can be built without, where nothing else is changed by that.

Of eighty layers that are alike on one device, the tenth does to the allocator what the ninth did. So the later ones may
be left out of a graph, but for the last; what has to hold for that is looked at while memory is reserved
(``planner.allocator``).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from planner.graphs.parts import Places
    from planner.model import ModelFacts, Tensor

MAX_PERIOD: Final = 8  # layers; windows between full attention, and experts between dense parts, come in eights at most

_BLOCK: Final = re.compile(r"blk\.(\d+)\.(.+)")


class Gap(NamedTuple):
    """Layers that are left out, from ``start`` to before ``end``: each like the one ``period`` layers before it.

    So are the ``2 * period`` layers before them, and ``period`` layers behind.
    """

    start: int
    end: int
    period: int


@lru_cache(maxsize=256)
def gaps(kinds: tuple[Hashable, ...], step: int = 1) -> tuple[Gap, ...]:
    """Return what can be left out of layers of these kinds, in order: the most that one period allows at a time.

    Periods are multiples of ``step``.
    """
    found, at = [], 0
    while at < len(kinds):
        gap = max((_gap(kinds, at, period) for period in range(step, MAX_PERIOD + 1, step)), key=_length)
        if _length(gap):
            found.append(gap)
        at = gap.end if _length(gap) else at + 1
    return tuple(found)


def layer_kinds(model: ModelFacts, places: Places) -> tuple[Hashable, ...]:
    """Return what decides a layer's part of a graph: its own figures, and where it and each of its tensors lies."""
    weights, overridden = places.weights, places.overridden
    return tuple(
        (kind, places.layers[il], places.caches[il], *((weights[name], name in overridden) for name in names))
        for il, (kind, names) in enumerate(_layers(model))
    )


@lru_cache(maxsize=32)
def _layers(model: ModelFacts) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Return each layer's kind, as a number, and its tensors' names; the first and the last are of no other's kind.

    Layers of a kind have tensors of the same names, types and shapes, and the same figures in the header.
    """
    hparams, own = model.hparams, f"{model.hparams.architecture}."
    by_layer: list[list[Tensor]] = [[] for _ in range(hparams.n_layer_all)]
    for tensor in model.tensors:
        block = _BLOCK.match(tensor.name)
        if block and int(block[1]) < len(by_layer):
            by_layer[int(block[1])].append(tensor)
    figures: list[Sequence[object]] = [
        hparams.n_head,
        hparams.n_head_kv,
        hparams.n_ff,
        hparams.swa_layers,
        hparams.recr_layers,
    ]
    figures += [value for key, value in model.metadata.items() if key.startswith(own) and isinstance(value, tuple)]
    numbers: dict[Hashable, int] = {}
    layers = []
    for il, tensors in enumerate(by_layer[: hparams.n_layer]):
        parts = tuple((each.name.split(".", 2)[2], each.type_id, each.shape) for each in tensors)
        apart = il in {0, hparams.n_layer - 1} or not parts
        kind = (il if apart else None, parts, *(values[il] for values in figures if len(values) > il))
        layers.append((numbers.setdefault(kind, len(numbers)), tuple(each.name for each in tensors)))
    return tuple(layers)


def without(n_layer: int, left_out: Sequence[Gap]) -> Iterable[int]:
    """Return the layers that are built."""
    ends = [0, *(gap.end for gap in left_out)]
    starts = [*(gap.start for gap in left_out), n_layer]
    return chain.from_iterable(map(range, ends, starts))


def _length(gap: Gap) -> int:
    return gap.end - gap.start


def _gap(kinds: Sequence[Hashable], first: int, period: int) -> Gap:
    """Return what may be left out of the layers that repeat from this one on; nothing where they are too few.

    A layer's nodes are ordered with those of the next, and the first one finds other memory than all others. What
    follows on the last ones may have some of their nodes on its own device, so they stay.
    """
    end = first + period
    while end < len(kinds) and kinds[end] == kinds[end - period]:
        end += 1
    start = first + 2 + 2 * period
    spare = max(end - start - period, 0)
    return Gap(start, start + spare - spare % period, period)

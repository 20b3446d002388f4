"""What a header's figures say of its tensors' shapes, so that an override which contradicts the file is found out.

llama.cpp creates each tensor with the shape that its hyper-parameters ask for, and refuses a file whose tensor has
another one (src/llama-model-loader.cpp, ``check_tensor_dims``), lacks it or has one that nobody created
(``done_getting_tensors``). What is asked for is each architecture's own; here are the shapes that most share. A file
need not keep to them: what counts is that it does without the overrides and does not with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from planner.hparams import HParams
    from planner.model import Tensor

_Sizes = Callable[["HParams", int], tuple[int | None, ...]]  # None: any size

_BLOCK: Final = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def _up(facts: HParams, il: int) -> tuple[int | None, ...]:
    return facts.n_embd, facts.n_ff[il]


def _up_of_experts(facts: HParams, il: int) -> tuple[int | None, ...]:
    return facts.n_embd, facts.n_ff_exp or facts.n_ff[il], facts.n_expert


_SHARED: Final[Mapping[str, Callable[[HParams], tuple[int | None, ...]]]] = MappingProxyType(
    {
        "token_embd.weight": lambda facts: (facts.n_embd, None),
        "output_norm.weight": lambda facts: (facts.n_embd,),
        "output.weight": lambda facts: (facts.n_embd, None),
    }
)
_OF_BLOCK: Final[Mapping[str, _Sizes]] = MappingProxyType(
    {
        "attn_norm": lambda facts, _: (facts.n_embd,),
        "attn_q": lambda facts, il: (facts.n_embd, facts.head_k_of(il) * facts.n_head[il]),
        "attn_k": lambda facts, il: (facts.n_embd, facts.n_embd_k_gqa(il)),
        "attn_v": lambda facts, il: (facts.n_embd, facts.n_embd_v_gqa(il)),
        "attn_qkv": lambda facts, il: (
            facts.n_embd,
            facts.head_k_of(il) * facts.n_head[il] + facts.n_embd_k_gqa(il) + facts.n_embd_v_gqa(il),
        ),
        "attn_output": lambda facts, il: (facts.head_v_of(il) * facts.n_head[il], facts.n_embd),
        "ffn_norm": lambda facts, _: (facts.n_embd,),
        "ffn_gate": _up,
        "ffn_up": _up,
        "ffn_down": lambda facts, il: (facts.n_ff[il], facts.n_embd),
        "ffn_gate_inp": lambda facts, _: (facts.n_embd, facts.n_expert),
        "ffn_gate_exps": _up_of_experts,
        "ffn_up_exps": _up_of_experts,
        "ffn_down_exps": lambda facts, il: (facts.n_ff_exp or facts.n_ff[il], facts.n_embd, facts.n_expert),
    }
)


def contradiction(tensors: Sequence[Tensor], before: HParams, after: HParams, n_nextn: int) -> str | None:
    """Return which tensor has the shape that the file's own figures ask for and not that of the overridden ones.

    ``n_nextn`` is the number of NextN blocks that the overrides add to the file's.
    """
    for tensor in tensors:
        asked = _asked(tensor.name, after)
        if asked != _asked(tensor.name, before) and _is_as(tensor, _asked(tensor.name, before)):
            if asked is None:
                return f"{tensor.name} is in a block that there would not be"
            if not _is_as(tensor, asked):
                return f"{tensor.name} is {_shown(tensor.shape)}, not {_shown(asked)}"
    if after.n_layer_all > before.n_layer_all:
        return f"there is no block {before.n_layer_all}"
    last = f"blk.{after.n_layer_all - 1}.nextn."
    if n_nextn > 0 and not any(tensor.name.startswith(last) for tensor in tensors):
        return f"there is no {last}*"
    return None


def _asked(name: str, facts: HParams) -> tuple[int | None, ...] | None:
    """Return the shape that is asked for, () where no rule here says; None where the block is none of the model's."""
    if (shared := _SHARED.get(name)) is not None:
        return shared(facts)
    block = _BLOCK.match(name)
    if block is None:
        return ()
    il = int(block[1])
    if il >= facts.n_layer_all:
        return None
    rule = _OF_BLOCK.get(block[2])
    return () if rule is None else rule(facts, il)


def _is_as(tensor: Tensor, asked: tuple[int | None, ...] | None) -> bool:
    if asked is None:
        return False
    sizes = (*tensor.shape, *(1,) * (len(asked) - len(tensor.shape)))
    return not asked or (
        len(sizes) == len(asked) and all(want in {None, size} for size, want in zip(sizes, asked, strict=True))
    )


def _shown(sizes: tuple[int | None, ...]) -> str:
    return " x ".join("any" if size is None else str(size) for size in sizes)

"""The building blocks of llama.cpp's graphs (src/llama-graph.cpp, ``llm_graph_context``), as tensors without values.

A method mirrors the function of its name there: same operations, same operands, same order, for the worst-case batch
that llama.cpp reserves memory for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from planner.cache import window_cells
from planner.context import ContextParams
from planner.ggml import BY_NAME, TYPES, GgmlType
from planner.graph import F16, F32, I32, I64, Graph, Node
from planner.model import HParams, Tensor

# Below this many tokens norms are pinned to their layer's device even where layers stay on the CPU
# (src/llama-context.cpp, graph_get_cb).
PIN_BELOW_TOKENS: Final = 32

_ROTATION: Final = 64  # the smallest Hadamard matrix that turns a quantized cache (src/llama-kv-cache.cpp)


@dataclass(frozen=True, slots=True)
class Places:
    """Which backend holds what: weights by name, blocks, their caches; the CPU is the last backend."""

    weights: Mapping[str, int]
    layers: tuple[int, ...]
    caches: tuple[int, ...]
    output: int
    cpu: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One reservation (src/llama-context.cpp, ``graph_reserve``)."""

    n_tokens: int
    n_outputs: int
    n_seqs: int
    pins_norms: bool
    fuses_attention: bool


@dataclass(frozen=True, slots=True)
class CacheInputs:
    """The inputs of one attention cache: where to write, what to see, how to turn a quantized cache."""

    k_ids: Node
    v_ids: Node | None
    mask: Node
    k_rotation: Node | None
    v_rotation: Node | None
    n_cells: int


class Blocks:
    """One graph under construction for one model, batch and placement of its tensors."""

    def __init__(
        self,
        hparams: HParams,
        tensors: Mapping[str, Tensor],
        params: ContextParams,
        places: Places,
        batch: Batch,
        adapters: Sequence[Mapping[str, Sequence[Tensor]]] = (),
    ) -> None:
        self.graph = Graph()
        self.hparams = hparams
        self.params = params
        self.places = places
        self.batch = batch
        self.flash_attn = batch.fuses_attention
        self._tensors = tensors
        self._adapters = adapters
        self._weights: dict[str, Node] = {}
        self._shared: dict[str, str] = {}

    # -----------------------------------------------------------------------------------------------------------------
    # Leafs

    def weight(self, name: str, home: int | None = None) -> Node | None:
        """Return a tensor of the file, or None where it has none of that name; with ``home``, a copy of it there."""
        name = self._shared.get(name, name)
        node = self._weights.get(name) if home is None else None
        if node is None:
            tensor = self._tensors.get(name)
            if tensor is None:
                return None
            node = self.graph.leaf(TYPES[tensor.type_id], tensor.shape)
            node.home = self.places.weights[name] if home is None else home
            node.is_weight = True
            if home is None:
                self._weights[name] = node
        return node

    def has(self, name: str) -> bool:
        """Say whether the file has a tensor of that name."""
        return self._shared.get(name, name) in self._tensors

    def share(self, block: int, readers: Iterable[int], apart: Collection[str]) -> None:
        """Let other layers read a block's weights under their own names, but for those of the names ``apart``."""
        prefix = f"blk.{block}."
        names = [name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)]
        for il in readers:
            self._shared |= {f"blk.{il}.{name}": prefix + name for name in names if name not in apart}

    def needed(self, name: str, home: int | None = None) -> Node:
        """Return a tensor of the file. Raises KeyError where it has none of that name."""
        node = self.weight(name, home)
        if node is None:
            raise KeyError(name)
        return node

    def output(self, x: Node) -> Node:
        """Return the logits: by the embedding again, in the output's buffer, where the file ties them."""
        if self.has("output.weight"):
            return self.project(x, "output")
        return self.graph.mul_mat(self.needed("token_embd.weight", self.places.output), x)

    def embedded_tokens(self) -> Node:
        """Return the rows of the input batch (``build_inp_embd``): looked up, or given as vectors instead."""
        graph, n_tokens = self.graph, self.batch.n_tokens
        tokens = graph.input(I32, n_tokens)
        vectors = graph.input(F32, self.hparams.n_embd, n_tokens)
        rows = graph.get_rows(self.needed("token_embd.weight"), tokens)
        for a, b in self._adapted("token_embd.weight"):
            rows = graph.same("add", rows, graph.same("scale", graph.mul_mat(b, graph.get_rows(a, tokens))))
        graph.expand(rows)
        graph.expand(vectors)
        return rows

    def cache_inputs(self, n_cells: int, *, latent: bool = False, windowed: bool | None = None) -> CacheInputs:
        """Return the inputs of a cache of that many cells per stream (``build_attn_inp_kv``, ``build_attn_inp_k``).

        ``windowed`` says which layers the cache is for where there are two, None for all.
        """
        graph, batch, params, hparams = self.graph, self.batch, self.params, self.hparams
        v_rows = 1 if not params.v_trans else max(self.v_width(il) for il in range(hparams.n_layer_all))
        streams = 1 if params.kv_unified else batch.n_seqs
        return CacheInputs(
            k_ids=graph.input(I64, batch.n_tokens),
            v_ids=None if latent else graph.input(I64, batch.n_tokens * v_rows),
            mask=graph.input(F16 if self.flash_attn else F32, n_cells, batch.n_tokens // streams, 1, streams),
            k_rotation=None
            if latent
            else self._rotation(params.cache_type_k, hparams.head_k_of, windowed=windowed, grows=True),
            v_rotation=None
            if latent
            else self._rotation(params.cache_type_v, hparams.head_v_of, windowed=windowed, grows=False),
            n_cells=n_cells,
        )

    def _rotation(
        self, type_name: str, head_of: Callable[[int], int], *, windowed: bool | None, grows: bool
    ) -> Node | None:
        """Return the matrix that turns a quantized cache whose heads are all of one size (src/llama-kv-cache.cpp)."""
        swa = self.hparams.swa_layers
        heads = {head_of(il) for il in range(self.hparams.n_layer_all) if windowed is None or swa[il] is windowed}
        if not BY_NAME[type_name].quantized or head_of(0) % _ROTATION or len(heads) != 1:
            return None
        head = heads.pop()
        return self.rotation(head if grows else _ROTATION) if head else None

    def rotation(self, head: int) -> Node:
        """Return a matrix that turns heads of that size: as large as divides it, 64 at least."""
        size = max(head & -head, _ROTATION)
        return self.graph.input(F32, size, size)

    def k_width(self, il: int) -> int:
        """Return the elements that one cell of a layer's K holds."""
        return self.hparams.n_embd_k_gqa(il)

    def v_width(self, il: int) -> int:
        """Return the elements that one cell of a layer's V holds."""
        return self.hparams.n_embd_v_gqa(il)

    def window_cells(self) -> int:
        """Return the cells per stream of the sliding window's cache."""
        return window_cells(self.hparams, self.params)

    # -----------------------------------------------------------------------------------------------------------------
    # Small blocks

    def norm(self, x: Node, name: str, il: int, op: str = "rms_norm") -> Node:
        """Return a normalized tensor, scaled and shifted by the weights that the file has."""
        weight, bias = self.weight(f"{name}.weight") or self.weight(name), self.weight(f"{name}.bias")
        x = self.graph.same(op, x)
        if il >= 0 and self.batch.pins_norms and (weight or bias):
            x.backend = self.places.layers[il]
        if weight:
            x = self.graph.same("mul", x, weight)
        return self.graph.same("add", x, bias) if bias else x

    def project(self, x: Node, name: str) -> Node:
        """Return a product with a weight, scaled where the file has a scale (``build_lora_mm``)."""
        graph = self.graph
        product = graph.mul_mat(self.needed(f"{name}.weight"), x)
        scale = self.weight(f"{name}.scale")
        product = graph.same("mul", product, scale) if scale else product
        for a, b in self._adapted(f"{name}.weight"):
            product = graph.same("add", product, graph.same("scale", graph.mul_mat(b, graph.mul_mat(a, x))))
        return product

    def project_chosen(self, x: Node, name: str, chosen: Node, *, scaled: bool) -> Node:
        """Return the products with the weights of the chosen experts (``build_lora_mm_id``)."""
        graph = self.graph
        product = graph.mul_mat_id(self.needed(f"{name}.weight"), x, chosen)
        scale = self.weight(f"{name}.scale") if scaled else None
        if scale:
            per_expert = graph.repeat(graph.reshape(scale, 1, scale.ne[0], 1), (1, scale.ne[0], x.ne[2], 1))
            product = graph.same("mul", product, graph.get_rows(per_expert, chosen))
        for a, b in self._adapted(f"{name}.weight"):
            low_rank = graph.mul_mat_id(a, x, chosen)
            product = graph.same("add", product, graph.same("scale", graph.mul_mat_id(b, low_rank, chosen)))
        return product

    def _adapted(self, name: str) -> Iterator[tuple[Node, Node]]:
        """Yield A and B of every adapter that changes this weight.

        They lie where it lies, but the scheduler does not know them as weights (src/llama-adapter.cpp sets no usage).
        """
        for adapter in self._adapters:
            if name in adapter:
                nodes = [self.graph.leaf(TYPES[part.type_id], part.shape) for part in adapter[name]]
                for node in nodes:
                    node.home = self.places.weights[name]
                yield nodes[0], nodes[1]

    def biased(self, x: Node, name: str) -> Node:
        """Return the tensor with a bias added, where the file has one."""
        bias = self.weight(f"{name}.bias")
        return self.graph.same("add", x, bias) if bias else x

    def qkv(self, x: Node, il: int, *, clamps: bool = False, rows_normed: bool = False) -> tuple[Node, Node, Node]:
        """Return query, key and value as heads (``build_qkv``): from one fused product, or from three.

        With ``rows_normed``, query and key are normalized as whole rows first.
        """
        graph, hparams, n_tokens, prefix = self.graph, self.hparams, self.batch.n_tokens, f"blk.{il}.attn_"
        head_k, head_v = hparams.head_k_of(il), hparams.head_v_of(il)
        heads = ((head_k, hparams.n_head[il]), (head_k, hparams.n_head_kv[il]), (head_v, hparams.n_head_kv[il]))
        if self.has(f"{prefix}qkv.weight"):
            fused = self.biased(self.project(x, f"{prefix}qkv"), f"{prefix}qkv")
            if clamps:
                fused = graph.same("clamp", fused)
            if not rows_normed:
                q, k, v = (graph.view(fused, (head, n, n_tokens), (4 * head, fused.nb[1])) for head, n in heads)
                return q, k, v
            parts = [graph.cont(graph.view(fused, (head * n, n_tokens), (fused.nb[1],))) for head, n in heads]
        else:
            parts = [self.biased(self.project(x, prefix + part), prefix + part) for part in "qkv"]
            if clamps:
                parts = [graph.same("clamp", part) for part in parts]
        if rows_normed:
            parts = [self.norm(parts[0], f"{prefix}q_norm", il), self.norm(parts[1], f"{prefix}k_norm", il), parts[2]]
        q, k, v = (graph.reshape(part, head, n, n_tokens) for part, (head, n) in zip(parts, heads, strict=True))
        return q, k, v

    def rope(self, x: Node, positions: Node, factors: Node | None = None) -> Node:
        """Return a tensor with positions turned in."""
        return self.graph.same("rope", x, positions, *([factors] if factors else []))

    def rope_factors(self, il: int) -> Node | None:
        """Return the frequency factors, of which every layer has its copy on its own device."""
        home = self.places.layers[il]
        return self.weight("rope_freqs.weight", home) or self.weight("rope_factors_long.weight", home)

    def gated_ffn(self, x: Node, il: int, suffix: str = "", *, limited: bool = False) -> Node:
        """Return a feed-forward part with gate and up in parallel (``build_ffn``, LLM_FFN_PAR)."""
        prefix = f"blk.{il}.ffn_"
        up = self.biased(self.project(x, f"{prefix}up{suffix}"), f"{prefix}up{suffix}")
        gate = self.biased(self.project(x, f"{prefix}gate{suffix}"), f"{prefix}gate{suffix}")
        hidden = self.activated(gate, up, limited=limited)
        return self.biased(self.project(hidden, f"{prefix}down{suffix}"), f"{prefix}down{suffix}")

    def activated(self, gate: Node | None, up: Node, *, limited: bool = False) -> Node:
        """Return a gated activation, with both sides clamped where limited, or a plain one where there is no gate."""
        graph = self.graph
        if gate is None:
            return graph.same("unary", up)
        if not limited:
            return graph.glu(gate, up)
        return graph.same("mul", graph.same("clamp", graph.same("unary", gate)), graph.same("clamp", up))

    def sequential_ffn(self, x: Node, il: int, activations: tuple[str, ...]) -> Node:
        """Return a feed-forward part without a gate of its own: up, activation, down."""
        prefix = f"blk.{il}.ffn_"
        x = self.biased(self.project(x, f"{prefix}up"), f"{prefix}up")
        for op in activations:
            x = self.graph.glu(x) if op == "glu" else self.graph.same(op, x)
        return self.biased(self.project(x, f"{prefix}down"), f"{prefix}down")

    # -----------------------------------------------------------------------------------------------------------------
    # Attention

    def attention(
        self, cache: CacheInputs, q: Node, k: Node, v: Node, il: int, *, sinks: Node | None = None, capped: bool = False
    ) -> Node:
        """Return a layer's attention before its output projection (``build_attn``), K and V stored on the way."""
        graph = self.graph
        if cache.k_rotation:
            q, k = self._rotated(q, cache.k_rotation), self._rotated(k, cache.k_rotation)
        if cache.v_rotation:
            v = self._rotated(v, cache.v_rotation)
        for node in (q, k, v) if any(self.hparams.swa_layers) else (q, v, k):
            graph.expand(node)
        stored_k = self.store_k(cache, k, il)
        stored_v = self._store_v(cache, v, il)
        out = self._heads(cache.mask, q, stored_k, stored_v, il, sinks=sinks, capped=capped)
        return self._rotated(out, cache.v_rotation) if cache.v_rotation else out

    def borrowed_attention(self, cache: CacheInputs, q: Node, il: int, owner: int) -> Node:
        """Return the attention of a layer that reads the cache of an earlier one (``build_attn`` without K and V)."""
        hparams, n_head = self.hparams, self.hparams.n_head_kv[owner]
        if cache.k_rotation:
            q = self._rotated(q, cache.k_rotation)
        self.graph.expand(q)
        stored_k = self._cache(self.params.cache_type_k, self.k_width(owner), cache.n_cells, owner)
        k = self._cells(stored_k, hparams.head_k_of(owner), n_head, cache.n_cells)
        v = self._stored_v(cache, hparams.head_v_of(owner), n_head, owner)[1]
        out = self._heads(cache.mask, q, k, v, il)
        return self._rotated(out, cache.v_rotation) if cache.v_rotation else out

    def latent_attention(
        self,
        cache: CacheInputs,
        q: Node,
        k: Node,
        v: Node,
        il: int,
        *,
        mask: Node | None = None,
        sinks: Node | None = None,
    ) -> Node:
        """Return latent attention (``build_attn`` over ``llm_graph_input_attn_k``): V is a window into K.

        ``mask`` is what hides cells, where it is not the cache's own.
        """
        for node in (q, v, k):
            self.graph.expand(node)
        stored = self.store_k(cache, k, il)
        seen = self.graph.view(stored, (v.ne[0], *stored.ne[1:]), stored.nb[1:])
        v_up = self.needed(f"blk.{il}.attn_v_b.weight")
        return self._heads(mask or cache.mask, q, stored, seen, il, sinks=sinks, v_up=v_up)

    def batch_mask(self) -> Node:
        """Return the mask over the batch's own tokens (``build_attn_inp_no_cache``)."""
        n_tokens = self.batch.n_tokens
        return self.graph.input(F16 if self.flash_attn else F32, n_tokens, n_tokens)

    def uncached_attention(self, mask: Node, q: Node, k: Node, v: Node, il: int) -> Node:
        """Return attention over the batch's own tokens (``build_attn`` over ``llm_graph_input_attn_no_cache``)."""
        for node in (q, k, v):
            self.graph.expand(node)
        return self._heads(mask, q, k, v, il)

    def _rotated(self, x: Node, rotation: Node) -> Node:
        size = rotation.ne[0]
        rows = x.ne[0] * x.ne[1] * x.ne[2] * x.ne[3] // size
        flat = self.graph.reshape(x, size, rows) if x.is_contiguous else self.graph.cont(x, size, rows)
        return self.graph.reshape(self.graph.mul_mat(rotation, flat), *x.ne)

    def _cache(self, type_name: str, width: int, n_cells: int, il: int) -> Node:
        node = self.graph.leaf(BY_NAME[type_name], (width, n_cells, self.params.n_stream))
        node.home = self.places.caches[il]
        return node

    def store_k(self, cache: CacheInputs, k: Node, il: int) -> Node:
        """Write keys into a layer's cache, and return its cells as heads (``cpy_k``, ``get_k``)."""
        graph = self.graph
        head, n_head, n_tokens, _ = k.ne
        width = head * n_head
        stored = self._cache(self.params.cache_type_k, width, cache.n_cells, il)
        rows = graph.view(k, (width, n_tokens), (k.nb[2],))
        graph.expand(graph.set_rows(self._merged(stored), rows, cache.k_ids))
        return self._cells(stored, head, n_head, cache.n_cells)

    def _store_v(self, cache: CacheInputs, v: Node, il: int) -> Node:
        graph = self.graph
        head, n_head, n_tokens, _ = v.ne
        width = head * n_head
        if cache.v_ids is None:
            raise ValueError("a latent cache stores no V")
        stored, cells = self._stored_v(cache, head, n_head, il)
        if not self.params.v_trans:
            rows = graph.view(v, (width, n_tokens), (v.nb[2],))
            graph.expand(graph.set_rows(self._merged(stored), rows, cache.v_ids))
            return cells
        widest = stored.ne[0]
        dense = v.nb[2] == F32.block_bytes * width
        rows = graph.reshape(v, width, n_tokens) if dense else graph.cont(v, width, n_tokens)
        if width < widest:
            rows = graph.new("pad", F32, (widest, n_tokens, 1, 1), rows)
        column = graph.reshape(stored, 1, widest * cache.n_cells * self.params.n_stream)
        graph.expand(graph.set_rows(column, graph.reshape(rows, 1, widest * n_tokens), cache.v_ids))
        return cells

    def _stored_v(self, cache: CacheInputs, head: int, n_head: int, il: int) -> tuple[Node, Node]:
        """Return a layer's V cache, and its cells as heads; with flash attention off it lies transposed."""
        type_ = BY_NAME[self.params.cache_type_v]
        if not self.params.v_trans:
            stored = self._cache(type_.name, head * n_head, cache.n_cells, il)
            return stored, self._cells(stored, head, n_head, cache.n_cells)
        widest = max(self.v_width(layer) for layer in range(self.hparams.n_layer_all))
        stored = self._cache(type_.name, widest, cache.n_cells, il)
        column = type_.block_bytes * cache.n_cells
        shape = (cache.n_cells, n_head, head, self.params.n_stream)
        return stored, self.graph.view(stored, shape, (column * head, column, column * widest))

    def _merged(self, stored: Node) -> Node:
        if self.params.n_stream == 1:
            return stored
        return self.graph.reshape(stored, stored.ne[0], stored.ne[1] * stored.ne[2])

    def _cells(self, stored: Node, head: int, n_head: int, n_cells: int) -> Node:
        row = _row_bytes(stored.type, head)
        width = _row_bytes(stored.type, stored.ne[0])
        return self.graph.view(stored, (head, n_head, n_cells, self.params.n_stream), (row, width, width * n_cells))

    def _heads(
        self,
        mask: Node,
        q: Node,
        k: Node,
        v: Node,
        il: int,
        *,
        sinks: Node | None = None,
        v_up: Node | None = None,
        capped: bool = False,
    ) -> Node:
        """Return attention over the stored cells (``build_attn_mha``)."""
        graph, streams = self.graph, k.ne[3]
        v_trans = v.nb[1] > v.nb[2]
        per_stream = q.ne[2] // streams
        q = graph.view(q, (q.ne[0], q.ne[1], per_stream, streams), (q.nb[1], q.nb[2], q.nb[2] * per_stream))
        q, k, v = (graph.permute_heads(node) for node in (q, k, v))
        if self.flash_attn:
            v = graph.transpose(v) if v_trans else v
            k, v = (graph.new("cpy", F16, node.ne, node) if node.type is F32 else node for node in (k, v))
            out = graph.flash_attn(q, k, v, mask, sinks)
            graph.fused_attention.append((out, il))
            if v_up:
                out = graph.mul_mat(v_up, graph.permute_heads(out))
                out = graph.cont(graph.permute_heads(out))
            out = graph.reshape(out, out.ne[0] * out.ne[1], out.ne[2] * out.ne[3])
        else:
            scores = graph.mul_mat(k, q)
            for op in ("scale", "unary", "scale") if capped else ():
                scores = graph.same(op, scores)
            scores = graph.same("soft_max", scores, mask, *([sinks] if sinks else []))
            values = graph.mul_mat(v if v_trans else graph.cont(graph.transpose(v)), scores)
            if v_up:
                values = graph.mul_mat(v_up, values)
            merged = graph.permute_heads(values)
            out = graph.cont(merged, merged.ne[0] * merged.ne[1], merged.ne[2] * merged.ne[3])
            if not self.params.kv_offload:
                out.backend = self.places.cpu
        graph.expand(out)
        return out


def _row_bytes(type_: GgmlType, n_elements: int) -> int:
    return type_.block_bytes * n_elements // type_.block

"""The parts of llama.cpp's graphs that read weights (src/llama-graph.cpp, ``llm_graph_context``), without values.

A method mirrors the function of its name there: same operations, same operands, same order, for the worst-case batch
that llama.cpp reserves memory for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from planner.context import ContextParams
from planner.ggml import TYPES
from planner.graph import F32, FLASH_ATTN, I32, Graph, Node
from planner.model import HParams, Tensor
from planner.repeats import Gap, without

# Below this many tokens norms are pinned to their layer's device even where layers stay on the CPU
# (src/llama-context.cpp, graph_get_cb).
PIN_BELOW_TOKENS: Final = 32

# Whose feed-forward parts read scales where the file has them, and whose shared experts (src/models, build_ffn).
_FFN_SCALES: Final = """
    bitnet cohere2 cohere2moe deepseek32 dots3note gemma4 glm-dsa hy_v3 llama llama-embed mistral3 nanbeige nemotron_h
    nemotron_h_moe qwen3 qwen35
"""
_SHARED_SCALES: Final = """
    cohere2moe deepseek32 dots3note glm-dsa hy_v3 nemotron_h nemotron_h_moe qwen35moe qwen3next qwen4exp
"""
_READ_FFN_SCALES: Final = frozenset(_FFN_SCALES.split())
_READ_SHARED_SCALES: Final = frozenset(_SHARED_SCALES.split())

# Which biases are not read, whatever the file has.
_PROJECTIONS: Final = frozenset({"attn_output", "ffn_gate", "ffn_up", "ffn_down"})
_UNREAD_BIASES: Final[Mapping[str, frozenset[str]]] = {
    "dream": frozenset({"output"}),
    "ernie4_5": _PROJECTIONS,
    "ernie4_5-moe": _PROJECTIONS,
    "falcon-h1": frozenset({"attn_output"}),
    "llada": _PROJECTIONS,
    "qwen2vl": frozenset({"output"}),
    "refact": _PROJECTIONS,
}


@dataclass(frozen=True, slots=True)
class Places:
    """Which backend holds what: weights by name, blocks, their caches; the CPU is the last backend.

    ``overridden`` are the weights that lie where an override says, every copy of them.
    """

    weights: Mapping[str, int]
    overridden: frozenset[str]
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
    unfused: frozenset[str]  # operations of one step that are built from plainer ones instead


class Parts:
    """One graph under construction for one model, batch and placement of its tensors."""

    def __init__(
        self,
        hparams: HParams,
        tensors: Mapping[str, Tensor],
        params: ContextParams,
        places: Places,
        batch: Batch,
        adapters: Sequence[Mapping[str, Sequence[Tensor]]] = (),
        left_out: Sequence[Gap] = (),
    ) -> None:
        self.graph = Graph()
        self.layers = without(hparams.n_layer, left_out)
        self.hparams = hparams
        self.params = params
        self.places = places
        self.batch = batch
        self.flash_attn = FLASH_ATTN not in batch.unfused
        self._tensors = tensors
        self._adapters = adapters
        self._weights: dict[tuple[str, int], Node] = {}
        self._adapter_nodes: dict[str, list[tuple[Node, Node]]] = {}
        self._shared: dict[str, str] = {}
        self.tokens: Node | None = None  # the batch's, once they are embedded

    # -----------------------------------------------------------------------------------------------------------------
    # Leafs

    def weight(self, name: str, home: int | None = None) -> Node | None:
        """Return a tensor of the file, or None where it has none of that name; with ``home``, the copy that is there.

        An override moves all copies to one place, and makes them one.
        """
        name = self._shared.get(name, name)
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if home is None or name in self.places.overridden:
            home = self.places.weights[name]
        node = self._weights.get((name, home))
        if node is None:
            node = self._weights[name, home] = self.graph.leaf(TYPES[tensor.type_id], tensor.shape)
            node.home = home
            node.is_weight = True
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
        tokens = self.tokens = graph.input(I32, n_tokens)
        vectors = graph.input(F32, self.hparams.n_embd, n_tokens)
        rows = graph.get_rows(self.needed("token_embd.weight"), tokens)
        for a, b in self._adapted("token_embd.weight"):
            rows = graph.same("add", rows, graph.same("scale", graph.mul_mat(b, graph.get_rows(a, tokens))))
        graph.expand(rows)
        graph.expand(vectors)
        return rows

    # -----------------------------------------------------------------------------------------------------------------
    # Small blocks

    def norm(self, x: Node, name: str, il: int, op: str = "rms_norm") -> Node:
        """Return a normalized tensor, scaled and shifted by the weights that the file has."""
        weight, bias = self.weight(f"{name}.weight") or self.weight(name), self.weight(f"{name}.bias")
        x = self.graph.same(op, x)
        if il >= 0 and (weight or bias):
            self.pin(x, il)
        if weight:
            x = self.graph.same("mul", x, weight)
        return self.graph.same("add", x, bias) if bias else x

    def pin(self, x: Node, il: int) -> Node:
        """Keep a tensor on its layer's device (src/llama-context.cpp, ``graph_get_cb``)."""
        if self.batch.pins_norms:
            x.backend = self.places.layers[il]
        return x

    def project(self, x: Node, name: str, *, scaled: bool = True) -> Node:
        """Return a product with a weight, scaled where the file has a scale and it is read (``build_lora_mm``)."""
        graph = self.graph
        product = graph.mul_mat(self.needed(f"{name}.weight"), x)
        scale = self.weight(f"{name}.scale") if scaled else None
        product = graph.same("mul", product, scale) if scale else product
        for a, b in self._adapted(f"{name}.weight"):
            product = graph.same("add", product, graph.same("scale", graph.mul_mat(b, graph.mul_mat(a, x))))
        return product

    def product(self, x: Node, name: str) -> Node:
        """Return a plain product with a weight, which neither scales nor adapters change (``ggml_mul_mat``)."""
        return self.graph.mul_mat(self.needed(f"{name}.weight"), x)

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

    def _adapted(self, name: str) -> Sequence[tuple[Node, Node]]:
        """Return A and B of every adapter that changes this weight.

        They lie where it lies, but the scheduler does not know them as weights (src/llama-adapter.cpp sets no usage).
        """
        name = self._shared.get(name, name)
        if name not in self._adapter_nodes:
            self._adapter_nodes[name] = [self._adapter_pair(name, a[name]) for a in self._adapters if name in a]
        return self._adapter_nodes[name]

    def _adapter_pair(self, name: str, parts: Sequence[Tensor]) -> tuple[Node, Node]:
        a, b = (self.graph.leaf(TYPES[part.type_id], part.shape) for part in parts)
        a.home = b.home = self.places.weights[name]
        return a, b

    def biased(self, x: Node, name: str) -> Node:
        """Return the tensor with a bias added, where the file has one and it is read."""
        unread = _UNREAD_BIASES.get(self.hparams.architecture, frozenset())
        bias = None if name.rpartition(".")[2] in unread else self.weight(f"{name}.bias")
        return self.graph.same("add", x, bias) if bias else x

    def qkv(
        self, x: Node, il: int, *, clamps: bool = False, rows_normed: bool = False, plain: bool = False
    ) -> tuple[Node, Node, Node]:
        """Return query, key and value as heads (``build_qkv``): from one fused product, or from three.

        With ``rows_normed``, query and key are normalized as whole rows first; with ``plain``, scales and biases that
        the file has for them are not read.
        """
        graph, hparams, n_tokens, prefix = self.graph, self.hparams, self.batch.n_tokens, f"blk.{il}.attn_"
        head_k, head_v = hparams.head_k_of(il), hparams.head_v_of(il)
        heads = ((head_k, hparams.n_head[il]), (head_k, hparams.n_head_kv[il]), (head_v, hparams.n_head_kv[il]))
        if self.has(f"{prefix}qkv.weight"):
            fused = self._part(x, f"{prefix}qkv", plain=plain)
            if clamps:
                fused = graph.same("clamp", fused)
            if not rows_normed:
                q, k, v = (graph.view(fused, (head, n, n_tokens), (4 * head, fused.nb[1])) for head, n in heads)
                return q, k, v
            parts = [graph.cont(graph.view(fused, (head * n, n_tokens), (fused.nb[1],))) for head, n in heads]
        else:
            parts = [self._part(x, prefix + part, plain=plain) for part in "qkv"]
            if clamps:
                parts = [graph.same("clamp", part) for part in parts]
        if rows_normed:
            parts = [self.norm(parts[0], f"{prefix}q_norm", il), self.norm(parts[1], f"{prefix}k_norm", il), parts[2]]
        q, k, v = (graph.reshape(part, head, n, n_tokens) for part, (head, n) in zip(parts, heads, strict=True))
        return q, k, v

    def _part(self, x: Node, name: str, *, plain: bool) -> Node:
        product = self.project(x, name, scaled=not plain)
        return product if plain else self.biased(product, name)

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
        up = self._ffn_product(x, f"{prefix}up{suffix}")
        gate = self._ffn_product(x, f"{prefix}gate{suffix}")
        return self._ffn_product(self.activated(gate, up, limited=limited), f"{prefix}down{suffix}")

    def _ffn_product(self, x: Node, name: str) -> Node:
        """Return a feed-forward part's product: shifted and then scaled, where the file says so and it is read."""
        product = self.biased(self.project(x, name, scaled=False), name)
        readers = _READ_SHARED_SCALES if name.endswith("_shexp") else _READ_FFN_SCALES
        scale = self.weight(f"{name}.scale") if self.hparams.architecture in readers else None
        return self.graph.same("mul", product, scale) if scale else product

    def activated(self, gate: Node | None, up: Node, *, limited: bool = False) -> Node:
        """Return a gated activation, with both sides clamped where limited, or a plain one where there is no gate."""
        graph = self.graph
        if gate is None:
            return graph.same("unary", up)
        if not limited:
            return graph.glu(gate, up)
        return graph.same("mul", graph.same("clamp", graph.same("unary", gate)), graph.same("clamp", up))

    def sequential_ffn(self, x: Node, il: int, activations: tuple[str, ...]) -> Node:
        """Return a feed-forward part without a gate of its own: up, activation, divided where the file says, down."""
        prefix = f"blk.{il}.ffn_"
        x = self._ffn_product(x, f"{prefix}up")
        for op in activations:
            x = self.graph.glu(x) if op == "glu" else self.graph.same(op, x)
        if divisors := self.weight(f"blk.{il}.ffn.act.scales"):
            x = self.graph.same("div", x, divisors)
        return self._ffn_product(x, f"{prefix}down")

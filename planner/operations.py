"""Which operation reads a weight, and which devices run it (src/llama-arch.cpp, LLM_TENSOR_INFOS; ``supports_op``).

llama.cpp puts a weight on a device only where the device runs the operation that reads it; what it cannot run stays on
the host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from planner import ggml
from planner.types.machine import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.model import ModelFacts, Tensor


class Operation(StrEnum):
    """The operation that reads a weight, as far as devices differ by it."""

    MUL_MAT = "mul_mat"
    MUL_MAT_ID = "mul_mat_id"
    GET_ROWS = "get_rows"
    ELEMENTWISE = "elementwise"  # ADD, MUL, DIV
    SCALE = "scale"
    SSM_CONV = "ssm_conv"
    SSM_SCAN = "ssm_scan"
    OTHER = "other"  # ROPE, ADD_ID, IM2COL, RWKV_WKV6: run everywhere


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as a slot asks for it. The tied output is a second asking for ``token_embd``."""

    tensor: Tensor
    reads: Operation
    tied: bool = False
    lazy: bool = False


_EXPERTS: Final = r"ffn_(down|gate|up|gate_up)_exps|ffn_(down|gate|up)_chexps"
_LOOKUPS: Final = (
    r"token_embd|position_embd|token_types|per_layer_token_embd|attn_compressor_ape|attn_rel_b|ffn_gate_tid2eid"
    r"|nextn\.embed_tokens|d2t|markov_w1|selector_(predecessor|successor)"
)
_ELEMENTWISE: Final = (
    r".*norm.*|ffn\.act|exp_probs_b(_vl)?|.*_res_score|hc_(attn|ffn)_(base|scale)|output_hc_(base|scale)"
    r"|time_mix_(lerp_\w+|decay|w0|a0|v0|ln|k_k|k_a|r_k)|channel_mix_lerp_[kr]|ssm_d|ssm_conv1d_[qkv]"
    r"|layer_output_scale|altup_correct_scale|gamma|(attn|ffn)_conv_base|hrm\.z_l_init"
)
# The first that matches decides; what none matches is multiplied as a matrix.
_BY_STEM: Final = (
    (re.compile(_EXPERTS), Operation.MUL_MAT_ID),
    (re.compile(_LOOKUPS), Operation.GET_ROWS),
    (re.compile(r"attn_sinks"), Operation.SCALE),
    (re.compile(r"ssm_conv1d|shortconv\.conv|ple_conv1d"), Operation.SSM_CONV),
    (re.compile(r"rope_\w+|time_mix_first|conv1d|conv[12]|dw"), Operation.OTHER),
    (re.compile(_ELEMENTWISE), Operation.ELEMENTWISE),
)
_SCANS: Final = frozenset(
    {"mamba", "mamba2", "jamba", "falcon-h1", "plamo2", "granitehybrid", "nemotron_h", "nemotron_h_moe"}
)


def operation(architecture: str, stem: str, suffix: str) -> Operation:
    """Return the operation that reads the weight ``stem.suffix``, block and number taken off its name."""
    if stem == "ssm_a":
        return Operation.SSM_SCAN if architecture in _SCANS else Operation.ELEMENTWISE
    if stem == "indexer_compressor_ape":
        return Operation.ELEMENTWISE if architecture == "glm5-next" else Operation.GET_ROWS
    found = next((operation for pattern, operation in _BY_STEM if pattern.fullmatch(stem)), Operation.MUL_MAT)
    if suffix == "bias":
        return Operation.OTHER if found is Operation.MUL_MAT_ID else Operation.ELEMENTWISE
    return found


# ggml-cuda.cu, ggml_backend_cuda_device_supports_op
CUDA_NO_MUL_MAT: Final = frozenset({"tq1_0", "tq2_0", "q8_1", "i8", "i16", "i32", "i64", "f64"})
_CUDA_NO_ROWS: Final = CUDA_NO_MUL_MAT - {"i32"} | {"nvfp4", "q8_K"}
_CUDA_ROWS_BY_BLOCK: Final = frozenset({"iq4_nl", "mxfp4"})
_CUDA_ROW_BLOCK: Final = 256
_CUDA_SCAN_STATES: Final = frozenset({96, 128, 256})
_CUDA_SCAN_STATE_OF_MAMBA_1: Final = 16
_VULKAN_SCAN_STATES: Final = frozenset({128, 256})  # ggml-vulkan.cpp, ggml_backend_vk_device_supports_op
_SCAN_HEAD_MULTIPLE: Final = 16
_CONV_ROW_MULTIPLE: Final = 128


def runs_on(kind: DeviceKind, reads: Operation, tensor: Tensor, model: ModelFacts) -> bool:
    """Say whether devices of this kind run the operation on this weight; where that is not known, yes.

    An RPC worker always says yes (ggml-rpc.cpp).
    """
    answer = _ANSWERS.get(kind)
    return answer is None or answer(reads, tensor, model)


def _cuda(reads: Operation, tensor: Tensor, model: ModelFacts) -> bool:
    type_ = ggml.TYPES[tensor.type_id].name
    rows = _rows(tensor)
    if reads is Operation.SSM_SCAN:
        return _cuda_scans(tensor, rows, model)
    multiplies = type_ not in CUDA_NO_MUL_MAT
    return {
        Operation.MUL_MAT: multiplies,
        Operation.MUL_MAT_ID: multiplies,
        Operation.GET_ROWS: type_ not in _CUDA_NO_ROWS
        and (type_ not in _CUDA_ROWS_BY_BLOCK or tensor.shape[0] % _CUDA_ROW_BLOCK == 0),
        Operation.ELEMENTWISE: type_ in {"f32", "f16"},
        Operation.SCALE: type_ in {"f32", "bf16"},
        Operation.SSM_CONV: rows % _CONV_ROW_MULTIPLE == 0,
        Operation.OTHER: True,
    }[reads]


def _cuda_scans(tensor: Tensor, rows: int, model: ModelFacts) -> bool:
    d_state, d_inner, n_group = (_ssm(model, name) for name in ("state_size", "inner_size", "group_count"))
    if tensor.shape[0] == 1:  # Mamba-2
        return d_state in _CUDA_SCAN_STATES and d_inner // rows % _SCAN_HEAD_MULTIPLE == 0
    return d_state == _CUDA_SCAN_STATE_OF_MAMBA_1 and rows % _CONV_ROW_MULTIPLE == 0 and n_group <= 1


def _vulkan(reads: Operation, tensor: Tensor, model: ModelFacts) -> bool:
    type_ = ggml.TYPES[tensor.type_id].name
    if reads is Operation.ELEMENTWISE:
        return type_ in {"f32", "f16"}
    if reads is Operation.SSM_SCAN:
        in_heads = _ssm(model, "inner_size") // _rows(tensor) % _SCAN_HEAD_MULTIPLE == 0
        return tensor.shape[0] == 1 and _ssm(model, "state_size") in _VULKAN_SCAN_STATES and in_heads
    return True


def _rows(tensor: Tensor) -> int:
    """Return the tensor's rows, at least one."""
    return max(tensor.shape[1], 1) if len(tensor.shape) > 1 else 1


def _ssm(model: ModelFacts, name: str) -> int:
    value = model.metadata.get(f"{model.hparams.architecture}.ssm.{name}", 0)
    return int(value) if isinstance(value, int) else 0


_ANSWERS: Final[dict[DeviceKind, Callable[[Operation, Tensor, ModelFacts], bool]]] = {
    DeviceKind.CUDA: _cuda,
    DeviceKind.ROCM: _cuda,
    DeviceKind.VULKAN: _vulkan,
}

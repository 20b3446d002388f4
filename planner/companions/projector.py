"""The projector: an encoder of images with its own weights and graphs, on one device (tools/mtmd/clip.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from planner import ggml
from planner.accounting import DeviceBytes, figure
from planner.buffers import buffer_type
from planner.charges import Charge
from planner.estimate import CUDA_HEADS
from planner.types.machine import HOST, DeviceKind
from planner.types.usage import NOTHING, UNKNOWN_FIGURE, Figure, HostDetail, Source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.model import Attachment
    from planner.types.machine import Device, LlamaBuild

ARCHITECTURE: Final = "clip"
# Tokens per side and patches merged per token and side of the image that is reserved for (``load_hparams``,
# ``set_warmup_n_tokens``). Encoders whose graphs are ``build_vit``'s; those not in the first table take their own size.
_WARMUP: Final[Mapping[str, tuple[int, int]]] = {
    "dots_ocr": (46, 2),
    "exaone4_5": (46, 2),
    "gemma4v": (16, 3),
    "glm4v": (46, 2),
    "hunyuanvl": (32, 2),
    "kimivl": (16, 2),
    "lfm2": (16, 2),
    "lightonocr": (16, 1),
    "paddleocr": (28, 2),
    "phi4": (16, 1),
    "pixtral": (16, 1),
    "qwen2.5vl_merger": (46, 2),
    "qwen2vl_merger": (46, 2),
    "qwen3vl_merger": (46, 2),
    "youtuvl": (16, 2),
}
_OWN_SIZE: Final = frozenset(
    {"gemma3", "idefics3", "internvl", "janus_pro", "ldp", "ldpv2", "llama4", "mlp", "nemotron_v2_vl"}
)
# What a large photo takes where the encoder takes it as it is: most such encoders scale down to that (``load_hparams``,
# ``set_limit_image_tokens``), and those that do not are for whole pages at full resolution.
LARGE_IMAGE_TOKENS: Final = 4096
_TAKES_LARGE_IMAGES: Final = frozenset(
    {
        "deepseek4v", "glm4v", "hunyuanvl", "ling3vl", "muse-glimmer", "qwen2.5o", "qwen2.5vl_merger",
        "qwen2vl_merger", "qwen3vl_merger", "youtuvl",
    }
)  # fmt: skip
# Of the others, the most that the encoder makes of an image (``load_hparams``, ``set_limit_image_tokens``).
_MOST_TOKENS: Final[Mapping[str, int]] = {"gemma4v": 1120, "kimivl": 1024, "lfm2": 256, "pixtral": 1024}
MOST_TOKENS_FLAG: Final = "--image-max-tokens"
# As real loads showed.
_EVERY_TENSOR_IS_LOADED: Final = frozenset({"gemma3", "pixtral", "qwen2.5vl_merger", "qwen2vl_merger"})
_MERGES: Final = ("spatial_merge_size", "projector.scale_factor")
_WINDOWED: Final = ("n_wa_pattern", "window_size", "wa_layer_indexes")

# Rows of the encoder's width that live at the widest moments of a block, one more than real loads showed.
_ROWS_IN_ATTENTION: Final = 7
_ROWS_IN_FFN: Final = 4
_GATED_HIDDEN_ROWS: Final = 3  # gate, up and their product; without a gate one
_ROWS_OF_INDICES: Final = 8  # positions in several dimensions, the order of windows
_COLOURS: Final = 3
_F32_BYTES: Final = 4
_SMALL_TENSORS_BYTES: Final = 256 * 1024
_ATTENTION_KINDS: Final = frozenset({DeviceKind.RPC, DeviceKind.HOST})  # that take any head size


def refusal(projector: Attachment) -> str | None:
    """Return why llama.cpp would not load this projector, or None."""
    if projector.metadata.get("general.architecture") != ARCHITECTURE:
        return f"{projector.path} is no projector"
    return None


def charge(projector: Attachment, device: Device, build: LlamaBuild, most_tokens: int = 0) -> Charge:
    """Return what the projector takes on this device, which may be the host.

    The compute buffers are upper bounds of those that are reserved when the server starts. An image of more tokens has
    llama.cpp free them and allocate larger ones; where there is no room for those, it fails the request and aborts at
    the next image (``clip_encode``). So what ``most_tokens`` take beyond them is kept free.
    """
    rule, kind = buffer_type(device), _kind(projector)
    size = sum(rule.allocation(ggml.TYPES[each.type_id], each.shape[0], each.nbytes) for each in projector.tensors)
    weights = figure(size, build, certain=rule.certain and kind in _EVERY_TENSOR_IS_LOADED)
    n_patches = _warmup_patches(projector)
    bounds = _compute_bytes(projector, device.kind, n_patches)
    largest = _compute_bytes(projector, device.kind, max(n_patches, most_tokens * _merge(projector) ** 2))
    kept = [large - small for large, small in zip(largest or (0, 0), bounds or (0, 0), strict=True)]
    computes = [Figure(each, Source.ESTIMATED) for each in bounds] if bounds else [UNKNOWN_FIGURE] * 2
    not_built = () if bounds else (f"the compute buffers of a projector of kind {kind or 'unnamed'}",)
    if device.kind is DeviceKind.HOST:  # its inputs and its graph share one buffer
        detail = HostDetail(allocated_bytes=size, image_reserve_bytes=kept[0])
        return Charge("projector", {HOST: DeviceBytes(weights, NOTHING, computes[0])}, detail, not_built)
    where = {
        str(device.name): DeviceBytes(weights, NOTHING, computes[0], kept[0]),
        HOST: DeviceBytes(NOTHING, NOTHING, computes[1]),
    }
    return Charge("projector", where, HostDetail(image_reserve_bytes=kept[1]), not_built)


def image_tokens(projector: Attachment, passthrough: Sequence[str] = ()) -> int:
    """Return the most tokens that a photo takes of the context; 0 where the encoder's kind and file do not say.

    Encoders that say nothing make each image as large as the next, or cut it into parts: 64 to 1,120 tokens each.
    ``passthrough`` are the flags that llama-server gets beside; an operator's limit among them holds where the file
    has none of its own, which not every encoder would give up.
    """
    kind, side = _kind(projector), _integer(projector, "patch_size") * _merge(projector)
    told = [int(value) for name, value in pairwise(passthrough) if name == MOST_TOKENS_FLAG and value.isdecimal()]
    said = min(_integer(projector, "image_max_pixels") // side**2, LARGE_IMAGE_TOKENS) if side else 0
    own = LARGE_IMAGE_TOKENS if kind in _TAKES_LARGE_IMAGES else said or _MOST_TOKENS.get(kind, 0)
    return told[-1] if own and not said and any(told[-1:]) else own


def _kind(projector: Attachment) -> str:
    value = projector.metadata.get("clip.projector_type") or projector.metadata.get("clip.vision.projector_type")
    return value if isinstance(value, str) else ""


def _compute_bytes(projector: Attachment, kind: DeviceKind, n_patches: int) -> tuple[int, int] | None:
    """Return bounds of the buffers of the projector's device and of the host for an image of so many patches.

    That is None for graphs of other making.
    """
    patch, width, hidden = (
        _integer(projector, name) for name in ("patch_size", "embedding_length", "feed_forward_length")
    )
    heads = _integer(projector, "attention.head_count")
    if not (n_patches and heads) or projector.metadata.get("clip.has_audio_encoder"):
        return None
    image = _COLOURS * n_patches * patch**2 * _F32_BYTES
    row = n_patches * _F32_BYTES
    gated = any("ffn_gate" in tensor.name for tensor in projector.tensors)
    ffn = _ROWS_IN_FFN * width + (_GATED_HIDDEN_ROWS if gated else 1) * hidden
    patches = 3 * image // 2 + 2 * width * row  # the image, its columns in f16, and what they become
    square = row * n_patches
    masks = square if any(f"clip.vision.{name}" in projector.metadata for name in _WINDOWED) else 0
    head = _integer(projector, "attention.head_dim") or width // heads
    fuses = kind in _ATTENTION_KINDS or (kind is DeviceKind.CUDA and head in CUDA_HEADS)
    scores = 0 if fuses else 2 * heads * square
    small = masks + _ROWS_OF_INDICES * row + _SMALL_TENSORS_BYTES
    attention = _ROWS_IN_ATTENTION * width * row + scores + (masks // 2 if fuses else masks)  # as f16
    return small + max(attention, ffn * row, patches), small + image


def _warmup_patches(projector: Attachment) -> int:
    """Return the patches of the image that is reserved for, 0 where they are not known."""
    kind, patch = _kind(projector), _integer(projector, "patch_size")
    if not patch:
        return 0
    side, _ = _WARMUP.get(kind, (0, 0))
    per_side = _integer(projector, "image_size") // patch if kind in _OWN_SIZE else side * _merge(projector)
    return per_side**2


def _merge(projector: Attachment) -> int:
    """Return how many patches become one token, per side; 0 where it is not known."""
    _, merge = _WARMUP.get(_kind(projector), (0, 0))
    return next((found for name in _MERGES if (found := _integer(projector, name))), merge)


def _integer(projector: Attachment, name: str) -> int:
    value = projector.metadata.get(f"clip.vision.{name}", 0)
    return int(value) if isinstance(value, int) else 0

"""Weights in the layout that oneDNN multiplies in, for inference on a CPU.

A plain linear layer hands oneDNN its weights as they lie, and reduced precisions have them laid out anew in every call.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from asr_exit.attention import SelfAttention
from asr_exit.conformer import FeedForward

_TYPICAL_ROWS = 256  # what the layout is chosen for; it serves any number


def can_pack() -> bool:
    """Whether oneDNN is there and multiplies bf16 on this processor (on x86: AVX-512 or better)."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(module: nn.Module) -> None:
    """Let every linear layer in `module` multiply with packed weights, in place; its parameters stay as they are.

    The last thing done to a module: packed weights can neither be copied nor converted. For a reduced precision
    on a CPU, and without gradients. Does nothing where oneDNN is missing or cannot multiply bf16 on this processor.
    """
    if not can_pack():
        return
    packed: dict[nn.Linear, Tensor] = {}
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and "forward" not in vars(layer):
            packed[layer] = _packed(layer.weight.detach())
            layer.forward = partial(_multiply, packed[layer], layer.bias, "none")  # type: ignore[method-assign]
    for part in module.modules():
        if isinstance(part, FeedForward) and part.up in packed:  # SiLU while the product is at hand
            part.expand = partial(_multiply, packed[part.up], part.up.bias, "swish")  # type: ignore[method-assign]
        if isinstance(part, SelfAttention) and part.qkv in packed:  # without the queries
            weight, bias = (x.detach()[part.qkv.in_features :] for x in (part.qkv.weight, part.qkv.bias))
            part.keys_values = partial(_multiply, _packed(weight), bias, "none")  # type: ignore[method-assign]


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)  # type: ignore[no-any-return]


def _multiply(packed: Tensor, bias: Tensor, then: str, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], "")

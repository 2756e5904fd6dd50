"""Which device to run on, and in which precision. A device that was asked for is never replaced in silence."""

from __future__ import annotations

import os
from typing import Literal, cast

from asr_exit.errors import ConfigError
from asr_exit.processor import computes_in_bf16

DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str) -> str:
    """Resolves "auto" to "cuda" where torch finds one, else "cpu". Raises ConfigError when "cuda" is not there."""
    import torch

    if name not in DEVICES:
        raise ConfigError(f"unknown device {name!r}: use {', '.join(DEVICES)}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device cuda was asked for, but torch finds no CUDA device: use --device cpu or auto")
    return "cuda" if name == "cuda" or (name == "auto" and available) else "cpu"


def pick_precision(name: str, device: str) -> Literal["fp32", "bf16"]:
    """Resolves "auto" to "bf16" where the device multiplies matrices in it, else "fp32"."""
    if name != "auto":
        return cast("Literal['fp32', 'bf16']", name)
    return "bf16" if computes_in_bf16(device) else "fp32"


def usable_cores() -> int:
    """Logical processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

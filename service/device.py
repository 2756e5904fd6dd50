"""Which device to run on, and in which precision. A device that was asked for is never replaced in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from asr_exit.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


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
    return "bf16" if _computes_in_bf16(device) else "fp32"


def _computes_in_bf16(device: str) -> bool:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.is_bf16_supported()
    return _BF16_FLAGS & _cpu_flags() != set()


def _cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor can do, by Linux's names; nothing on other systems."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())

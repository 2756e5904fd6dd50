"""What the processor computes in."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


@cache
def computes_in_bf16(device: str) -> bool:
    """Whether `device` ("cpu", "cuda", ...) multiplies matrices in bf16; others emulate it many times more slowly."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.is_bf16_supported()
    return _BF16_FLAGS & cpu_flags() != set()


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What an x86 processor can do, by Linux's names; nothing elsewhere."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())

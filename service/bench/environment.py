"""Where and when something was measured, so that a figure can be told from another machine's."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

_CPU_INFO = Path("/proc/cpuinfo")


def environment(device: str) -> dict[str, object]:
    """Date (UTC), commit (None outside a checkout), hardware, and what else the machine was doing."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "device": device,
        "logical_cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": round(psutil.getloadavg()[0], 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def caption_of(values: dict[str, object]) -> str:
    """The environment in one line, to stand under a table."""
    return (
        f"{values['hardware']}, {values['logical_cpus']} logical CPUs, load average {values['load_average']}, "
        f"torch {values['torch']}, {values['threads']} thread(s), commit {values['commit'] or 'unknown'}, "
        f"{values['date']}"
    )


def _cpu_name() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short commit of the checkout this package runs from, with a plus sign if tracked files were changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    finished = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return finished.stdout.strip()

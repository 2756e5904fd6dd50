"""The recogniser on phones and small boards: exported segments in ONNX Runtime, without torch.

Importing this package loads numpy and onnxruntime when a name is first used, and never torch. `asr_exit.edge.export` is
the other side: it makes what this reads, and needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asr_exit.edge.backend import EdgeModel
    from asr_exit.edge.device import DeviceState, Thermal
    from asr_exit.edge.recognizer import EdgeRecognizer

_HOMES = {"DeviceState": "device", "EdgeModel": "backend", "EdgeRecognizer": "recognizer", "Thermal": "device"}

__all__ = ["DeviceState", "EdgeModel", "EdgeRecognizer", "Thermal"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

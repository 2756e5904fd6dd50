"""Streaming speech recognition that picks its depth for every chunk of audio."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asr_exit.budget import Budget
    from asr_exit.checkpoint import Model, load
    from asr_exit.config import ModelConfig
    from asr_exit.engine import Engine
    from asr_exit.errors import AsrExitError
    from asr_exit.load_control import LoadSignal
    from asr_exit.policy import ExitPolicy, parse_policy
    from asr_exit.recognizer import Recognizer
    from asr_exit.stream import ChunkResult, Fill, Stream, StreamOptions
    from asr_exit.transcript import Transcript

# Public names load their module when first used: features, CTC and policies must import without torch.
_HOMES = {
    "AsrExitError": "errors",
    "Budget": "budget",
    "ChunkResult": "stream",
    "Engine": "engine",
    "ExitPolicy": "policy",
    "Fill": "stream",
    "LoadSignal": "load_control",
    "Model": "checkpoint",
    "ModelConfig": "config",
    "Recognizer": "recognizer",
    "Stream": "stream",
    "StreamOptions": "stream",
    "Transcript": "transcript",
    "load": "checkpoint",
    "parse_policy": "policy",
}

__all__ = [
    "AsrExitError",
    "Budget",
    "ChunkResult",
    "Engine",
    "ExitPolicy",
    "Fill",
    "LoadSignal",
    "Model",
    "ModelConfig",
    "Recognizer",
    "Stream",
    "StreamOptions",
    "Transcript",
    "load",
    "parse_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

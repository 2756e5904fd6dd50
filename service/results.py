"""What a listener gets to see, whether it came over the wire or from this process. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChunkDepth:
    """Depth and cost of one chunk of audio. Times are milliseconds from the start of the stream."""

    index: int
    start_ms: float
    end_ms: float
    exit_layer: int
    decision: str  # confident, budget, load, full, final
    encoder_macs: int
    latency_ms: float


@dataclass(frozen=True, slots=True)
class CaptionWord:
    """One word with its times from the start of the stream."""

    text: str
    start_ms: float
    end_ms: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Caption:
    """One result: a final one stays, an interim one replaces the interim one before."""

    text: str
    committed: str  # the part of `text` that is settled
    is_final: bool
    stability: float
    confidence: float
    end_ms: float  # audio processed so far
    latency_ms: float
    words: tuple[CaptionWord, ...]
    chunks: tuple[ChunkDepth, ...]  # since the caption before

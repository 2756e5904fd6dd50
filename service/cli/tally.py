"""Adds up what a stream said and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.results import Caption, ChunkDepth


@dataclass
class Tally:
    """Take every caption of a stream, then read the totals."""

    full_macs_per_second: int
    finals: list[str] = field(default_factory=list)
    chunks: list[ChunkDepth] = field(default_factory=list)
    encoder_macs: int = 0
    audio_s: float = 0.0

    def add(self, caption: Caption) -> None:
        """Takes one caption."""
        if caption.is_final and caption.text:
            self.finals.append(caption.text)
        self.encoder_macs += sum(chunk.encoder_macs for chunk in caption.chunks)
        self.chunks += real_chunks(caption.chunks)
        self.audio_s = max(self.audio_s, caption.end_ms / 1000)

    @property
    def text(self) -> str:
        """The transcript."""
        return " ".join(self.finals)

    @property
    def mean_exit_layer(self) -> float:
        """Over all chunks; 0 without any."""
        return mean_exit_layer(self.chunks)

    @property
    def macs_fraction(self) -> float:
        """Encoder operations spent over what full depth costs for this audio."""
        full = self.full_macs_per_second * self.audio_s
        return self.encoder_macs / full if full else 0.0

    def latency_ms(self, share: float) -> float:
        """The latency that `share` (0..1) of the chunks stay within."""
        ordered = sorted(chunk.latency_ms for chunk in self.chunks)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def summary(self) -> dict[str, object]:
        """The totals, for --json."""
        return {
            "type": "summary",
            "text": self.text,
            "audio_seconds": round(self.audio_s, 3),
            "chunks": len(self.chunks),
            "mean_exit_layer": round(self.mean_exit_layer, 3),
            "encoder_macs": self.encoder_macs,
            "macs_fraction": round(self.macs_fraction, 4),
            "latency_ms": {"p50": round(self.latency_ms(0.5), 1), "p95": round(self.latency_ms(0.95), 1)},
        }


def real_chunks(chunks: Sequence[ChunkDepth]) -> list[ChunkDepth]:
    """Without the record of the work done after the last chunk."""
    return [chunk for chunk in chunks if chunk.decision != "final"]


def mean_exit_layer(chunks: Sequence[ChunkDepth]) -> float:
    """0 without any."""
    return sum(chunk.exit_layer for chunk in chunks) / len(chunks) if chunks else 0.0

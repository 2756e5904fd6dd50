"""What was said in a whole recording, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asr_exit.engine import Engine
from asr_exit.stream import ChunkResult, StreamOptions
from asr_exit.words import Word


@dataclass(frozen=True)
class Transcript:
    """What was said, and what it cost."""

    text: str
    words: tuple[Word, ...]
    chunks: tuple[ChunkResult, ...]  # empty for an offline pass
    encoder_macs: int
    full_macs: int  # of the same audio at full depth
    audio_seconds: float

    @property
    def mean_exit_layer(self) -> float:
        """Mean over the chunks; 0 when there are none."""
        layers = [chunk.exit_layer for chunk in self.chunks if chunk.chunk_ms > 0]
        return sum(layers) / len(layers) if layers else 0.0


def transcribe(engine: Engine, samples: np.ndarray, options: StreamOptions) -> Transcript:
    """Stream (N,) float32 samples at the model's rate through a free slot of `engine`, chunk by chunk.

    Raises:
        AudioError: samples of the wrong type or not finite. EngineError: computation failed.
    """
    stream = engine.open(options)
    chunks: list[ChunkResult] = []
    try:
        engine.push(stream, samples)
        engine.finish(stream)
        while not stream.ended:
            output = engine.step()
            for _, error in output.failures:
                raise error
            chunks += output.results
    finally:
        engine.close(stream)
    finals = [result for result in chunks if result.is_final]
    return Transcript(
        text=" ".join(result.committed for result in finals if result.committed),
        words=tuple(word for result in finals for word in result.words),
        chunks=tuple(chunks),
        encoder_macs=stream.total_macs,
        full_macs=engine.macs.full(stream.next_frame),
        audio_seconds=len(samples) / engine.config.features.sample_rate_hertz,
    )

"""Captions from a recogniser in this process, in the form in which a server's arrive."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from service.audio_input import AudioFormat, AudioInput
from service.results import Caption, CaptionWord, ChunkDepth

if TYPE_CHECKING:
    from asr_exit.edge import EdgeRecognizer
    from asr_exit.stream import ChunkResult


def local_captions(recognizer: EdgeRecognizer, parts: Iterable[bytes], rate_hz: int) -> Iterator[Caption]:
    """Yields captions of 16-bit mono samples as they come, until `parts` ends or is interrupted.

    Raises AudioError for audio that cannot be decoded, EngineError when recognition fails.
    """
    audio = AudioInput(AudioFormat("linear16", rate_hz))
    recognizer.begin()
    try:
        for part in _until_interrupted(parts):
            begin = time.perf_counter()
            for result in recognizer.push(audio.push(part)):
                yield _caption(result, begin)
        begin = time.perf_counter()
        for result in (*recognizer.push(audio.finish()), *recognizer.finish()):
            yield _caption(result, begin)
    finally:
        recognizer.close()


def _until_interrupted(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Ctrl-C is how a microphone ends: what was said so far still becomes final."""
    with contextlib.suppress(KeyboardInterrupt):
        yield from parts


def _caption(result: ChunkResult, begin: float) -> Caption:
    """`begin`: when the last of the chunk's audio came."""
    latency_ms = 1000 * (time.perf_counter() - begin)
    words = tuple(CaptionWord(word.text, word.start_ms, word.end_ms, word.confidence) for word in result.words)
    chunk = ChunkDepth(
        index=result.chunk_index,
        start_ms=result.start_ms,
        end_ms=result.end_ms,
        exit_layer=result.exit_layer,
        decision=result.reason.value,
        encoder_macs=result.encoder_macs,
        latency_ms=latency_ms,
    )
    return Caption(
        text=" ".join(part for part in (result.committed, result.tail) if part),
        committed=result.committed,
        is_final=result.is_final,
        stability=result.stability,
        confidence=sum(word.confidence for word in words) / len(words) if words else 0.0,
        end_ms=result.end_ms,
        latency_ms=latency_ms,
        words=words,
        chunks=(chunk,),
    )

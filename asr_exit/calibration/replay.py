"""What a policy costs and gets wrong, measured with the engine, recording by recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from asr_exit.calibration.workers import Recording, samples_of
from asr_exit.checkpoint import Model
from asr_exit.engine import Engine
from asr_exit.metrics import WordErrors, word_errors
from asr_exit.policy import Reason
from asr_exit.stream import Stream, StreamOptions


@dataclass(frozen=True)
class Mixed:
    """A recording under noise at `snr_db`; `start` shifts the noise, which repeats to length."""

    recording: Recording
    noise: Recording
    snr_db: float
    start: int = 0

    def samples(self) -> np.ndarray:
        """(N,) float32 in [-1, 1]: scaled down as a whole where the sum would clip."""
        speech, noise = samples_of(self.recording.path), samples_of(self.noise.path)
        noise = noise.take(np.arange(self.start, self.start + len(speech)), mode="wrap")
        power = float(np.mean(noise**2)) or 1.0
        gain = np.sqrt(float(np.mean(speech**2)) / power / 10 ** (self.snr_db / 10))
        mixed = speech + np.float32(gain) * noise
        return (mixed / max(1.0, float(np.abs(mixed).max(initial=0.0)))).astype(np.float32)


@dataclass(frozen=True)
class Joined:
    """Several recordings in a row as one: for what only shows in long streams."""

    recordings: tuple[Recording, ...]

    def samples(self) -> np.ndarray:
        """(N,) float32."""
        return np.concatenate([samples_of(recording.path) for recording in self.recordings])

    @property
    def text(self) -> str:
        """What is said in all of them."""
        return " ".join(recording.text for recording in self.recordings)


Source = Recording | Mixed | Joined


def audio_of(source: Source) -> tuple[np.ndarray, str]:
    """Samples and transcript."""
    if isinstance(source, Recording):
        return samples_of(source.path), source.text
    return source.samples(), source.recording.text if isinstance(source, Mixed) else source.text


@dataclass
class Replay:
    """One recording through the engine. Per chunk: exit index, MACs and seconds of audio."""

    text: str = ""
    errors: WordErrors = field(default_factory=lambda: WordErrors(0, 0, 0, 0))
    macs: int = 0
    full_macs: int = 0
    exits: list[int] = field(default_factory=list)
    chunk_macs: list[int] = field(default_factory=list)
    chunk_seconds: list[float] = field(default_factory=list)
    words: list[tuple[str, float, float]] = field(default_factory=list)  # text, start and end in seconds


def replay(
    model: Model, sources: Sequence[Source], options: StreamOptions | Sequence[StreamOptions], slots: int = 16
) -> list[Replay]:
    """Stream every recording; `options` for all of them, or one each.

    Raises:
        AudioError: a recording that cannot be read. EngineError: a stream failed.
    """
    each = [options] * len(sources) if isinstance(options, StreamOptions) else list(options)
    engine = Engine(model, slots=min(slots, max(1, len(sources))))
    results = [Replay() for _ in sources]
    longest_first = sorted(range(len(sources)), key=lambda index: -_length(sources[index]))
    for index, stream in _run(engine, sources, each, longest_first, results):
        results[index].full_macs = engine.macs.full(stream.next_frame)
        results[index].macs = stream.total_macs
        results[index].errors = word_errors(audio_of(sources[index])[1], results[index].text)
    return results


def _length(source: Source) -> int:
    return len(audio_of(source)[0]) if isinstance(source, Recording) else 0


def _run(
    engine: Engine,
    sources: Sequence[Source],
    options: Sequence[StreamOptions],
    order: Sequence[int],
    results: Sequence[Replay],
) -> Iterator[tuple[int, Stream]]:
    remaining, running = iter(order), dict[Stream, int]()
    layers = engine.config.exit_layers
    while True:
        for index in islice(remaining, engine.free_slots):
            stream = engine.open(options[index])
            engine.push(stream, audio_of(sources[index])[0])
            engine.finish(stream)
            running[stream] = index
        if not running:
            return
        output = engine.step()
        for _, failure in output.failures:
            raise failure
        for result in output.results:
            index = running[result.stream]
            found = results[index]
            if result.reason is not Reason.FINAL:
                found.exits.append(layers.index(result.exit_layer))
                found.chunk_macs.append(result.encoder_macs)
                found.chunk_seconds.append(result.chunk_ms / 1000)
            if result.is_final and result.committed:
                found.text = f"{found.text} {result.committed}".strip()
                found.words += [(word.text, word.start_ms / 1000, word.end_ms / 1000) for word in result.words]
            if result.end_of_stream:
                engine.close(result.stream)
                del running[result.stream]
                yield index, result.stream


@dataclass(frozen=True)
class Outcome:
    """A set of replays: share of full-depth MACs, and errors."""

    macs_fraction: float
    errors: WordErrors
    mean_exit: float  # index

    @property
    def wer(self) -> float:
        return self.errors.rate


def outcome(replays: Sequence[Replay]) -> Outcome:
    """Totals over recordings."""
    errors = WordErrors(0, 0, 0, 0)
    for item in replays:
        errors += item.errors
    exits = [exit_index for item in replays for exit_index in item.exits]
    spent, full = sum(item.macs for item in replays), sum(item.full_macs for item in replays)
    return Outcome(spent / max(1, full), errors, float(np.mean(exits)) if exits else 0.0)

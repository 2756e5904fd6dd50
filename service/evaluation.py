"""Word errors, depth and cost of every policy over a set of recordings, many streams at a time through the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from asr_exit.audio import MODEL_RATE_HZ, load_audio
from asr_exit.engine import Engine
from asr_exit.metrics import WordErrors, word_errors
from asr_exit.policy import Reason
from asr_exit.tokenizer import normalise

if TYPE_CHECKING:
    from asr_exit.stream import Stream, StreamOptions
    from service.corpus import Utterance

_BLOCK = 64  # recordings in memory at once; each is decoded once for all policies


@dataclass
class PolicyTotals:
    """Running totals of one policy."""

    errors: WordErrors = field(default_factory=lambda: WordErrors(0, 0, 0, 0))
    layers: int = 0
    chunks: int = 0
    encoder_macs: int = 0
    full_macs: int = 0
    compute_s: float = 0.0
    audio_s: float = 0.0

    def row(self, policy: str) -> dict[str, object]:
        """One row of the table: `wer`, `macs_fraction` and `rtf` are fractions, not per cent."""
        return {
            "policy": policy,
            "wer": self.errors.rate,
            "mean_exit_layer": self.layers / max(1, self.chunks),
            "macs_fraction": self.encoder_macs / max(1, self.full_macs),
            "rtf": self.compute_s / self.audio_s if self.audio_s else 0.0,
        }


@dataclass(frozen=True)
class Evaluation:
    """What came out, by policy in the order asked for."""

    utterances: int
    hours: float
    rows: list[dict[str, object]]


def evaluate(
    engine: Engine,
    utterances: Sequence[Utterance],
    policies: Mapping[str, StreamOptions],
    on_done: Callable[[str], None] = lambda policy: None,
) -> Evaluation:
    """Runs every recording with every policy; `on_done` is called for each with the policy's name.

    All slots of the engine are used at once. Real-time factors are engine time over audio time at that batch size.
    Raises AudioError for a recording that cannot be read, EngineError when recognition fails.
    """
    totals = {name: PolicyTotals() for name in policies}
    audio_s = 0.0
    remaining = iter(utterances)
    while block := list(islice(remaining, _BLOCK)):
        recordings = [(load_audio(utterance.path), normalise(utterance.text)) for utterance in block]
        audio_s += sum(samples.size for samples, _ in recordings) / MODEL_RATE_HZ
        for name, options in policies.items():
            for _ in run_block(engine, recordings, options, totals[name]):
                on_done(name)
    return Evaluation(len(utterances), audio_s / 3600, [total.row(name) for name, total in totals.items()])


def run_block(
    engine: Engine, recordings: Iterable[tuple[np.ndarray, str]], options: StreamOptions, totals: PolicyTotals
) -> Iterator[str]:
    """Streams pairs of samples (float32 (N,) at 16 kHz) and reference; yields each hypothesis when it is done."""
    remaining = iter(recordings)
    running: dict[Stream, tuple[str, list[str], float]] = {}
    while True:
        for samples, reference in islice(remaining, engine.free_slots):
            stream = engine.open(options)
            engine.push(stream, samples)
            engine.finish(stream)
            running[stream] = (reference, [], samples.size / MODEL_RATE_HZ)
        if not running:
            return
        output = engine.step()
        totals.compute_s += output.step_ms / 1000
        for _, failure in output.failures:
            raise failure
        for result in output.results:
            reference, finals, audio_s = running[result.stream]
            totals.encoder_macs += result.encoder_macs
            if result.reason is not Reason.FINAL:
                totals.layers += result.exit_layer
                totals.chunks += 1
            if result.is_final and result.committed:
                finals.append(result.committed)
            if result.end_of_stream:
                totals.full_macs += engine.macs.full(result.stream.next_frame)
                totals.audio_s += audio_s
                totals.errors += word_errors(reference, " ".join(finals))
                del running[result.stream]
                engine.close(result.stream)
                yield " ".join(finals)

"""What every exit says about every chunk of held-out recordings, and what an exit policy then costs and gets wrong.

Shapes: E exits, N chunks and F encoder frames of all recordings joined, T frames of one recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from asr_exit.audio import load_audio
from asr_exit.checkpoint import Model
from asr_exit.cost import SegmentMacs
from asr_exit.engine import Engine
from asr_exit.errors import ConfigError
from asr_exit.evidence import ExitScores, collapse, score
from asr_exit.features import log_mel
from asr_exit.metrics import WordErrors, word_errors
from asr_exit.stream import Stream, StreamOptions
from asr_exit.tokenizer import Tokenizer
from recipes.librispeech.corpora import Utterance


@dataclass(frozen=True)
class Observations:
    """One pass over a set, at full depth."""

    tokenizer: Tokenizer
    references: tuple[str, ...]
    seconds: float
    confidence: dict[str, np.ndarray]  # criterion -> (E, N); the larger the surer
    ids: np.ndarray  # (E, F) best pieces
    edits: np.ndarray  # (E, N) pieces to change for the deepest exit's answer in that chunk
    macs: np.ndarray  # (E, N) cost of leaving there, skipped layers filled by propagation
    full_macs: np.ndarray  # (N,)
    chunk_of_frame: np.ndarray  # (F,)
    bounds: np.ndarray  # (recordings + 1,) first frame of each recording, and F

    def outcome(self, exits: np.ndarray) -> tuple[float, float]:
        """Cost as a share of full depth, and word error rate, when chunk n leaves at exits[n]; simulated."""
        cost = self.macs[exits, np.arange(len(exits))].sum() / self.full_macs.sum()
        chosen = self.ids[exits[self.chunk_of_frame], np.arange(self.ids.shape[1])]
        total = WordErrors(0, 0, 0, 0)
        for index, reference in enumerate(self.references):
            pieces = collapse(chosen[self.bounds[index] : self.bounds[index + 1]])
            total += word_errors(reference, self.tokenizer.decode(pieces.tolist()))
        return float(cost), total.rate


@torch.inference_mode()
def observe(model: Model, utterances: Iterable[Utterance], chunk_ms: float) -> Observations:
    """One offline pass per recording with the chunk mask, which equals streaming at full depth.

    Raises:
        AudioError: a recording that cannot be read. ConfigError: no recording as long as one frame.
    """
    chunk_frames, exits = model.config.chunk_frames(chunk_ms), model.config.num_exits
    ids: list[np.ndarray] = []
    scores: list[list[ExitScores]] = []  # per chunk, per exit
    frames: list[int] = []  # per chunk
    references: list[str] = []
    bounds, seconds = [0], 0.0
    for utterance in utterances:
        references.append(utterance.text)
        samples = load_audio(utterance.path)
        seconds += len(samples) / model.config.features.sample_rate_hertz
        features = torch.from_numpy(log_mel(samples, model.config.features))[None]
        if features.shape[1]:
            output = model.encoder(features, torch.tensor([features.shape[1]]), chunk_frames=chunk_frames)
            stacked = torch.cat(output.logits)  # (E, T, V)
            for part in stacked.split(chunk_frames, dim=1):
                hidden = part.new_zeros(exits, part.shape[1], 1)  # similarity is not asked for
                scores.append(score(part, hidden, hidden, [None] * exits, want_log_probs=False))
                frames.append(part.shape[1])
                ids.append(np.stack([item.frames.ids for item in scores[-1]]))
        bounds.append(sum(frames))
    if not frames:
        raise ConfigError("the recordings are shorter than a frame; give longer ones to calibrate on")
    evidence = [[item.evidence for item in chunk] for chunk in scores]
    return Observations(
        tokenizer=model.tokenizer,
        references=tuple(references),
        seconds=seconds,
        confidence={
            "posterior": np.array([[item.max_posterior for item in chunk] for chunk in evidence]).T,
            "entropy": -np.array([[item.entropy for item in chunk] for chunk in evidence]).T,
        },
        ids=np.concatenate(ids, axis=1),
        edits=np.array([_edits_to_last(chunk) for chunk in ids]).T,
        macs=np.array([[_macs(model.macs, exit_index, count) for count in frames] for exit_index in range(exits)]),
        full_macs=np.array([model.macs.full(count) for count in frames]),
        chunk_of_frame=np.repeat(np.arange(len(frames)), frames),
        bounds=np.array(bounds),
    )


def _macs(macs: SegmentMacs, exit_index: int, frames: int) -> int:
    """Cost of a chunk that leaves at an exit after its policy has read that exit and all before it."""
    read = sum(macs.segment(index, frames, with_head=True) for index in range(exit_index + 1))
    return macs.stem(frames) + read + (macs.config.num_exits - 1 - exit_index) * macs.propagate(frames)


def _edits_to_last(ids: np.ndarray) -> list[int]:
    """(E, T) -> edit distance of each exit's pieces to the last exit's."""
    pieces = [collapse(row).tolist() for row in ids]
    return [edit_distance(item, pieces[-1]) for item in pieces]


def edit_distance(left: Sequence[int], right: Sequence[int]) -> int:
    """Fewest substitutions, insertions and deletions."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def stream_outcome(
    model: Model, utterances: Iterable[Utterance], options: StreamOptions, slots: int = 16
) -> tuple[float, float]:
    """Cost as a share of full depth, and word error rate, measured with the engine.

    Raises:
        AudioError: a recording that cannot be read. EngineError: a stream failed.
    """
    engine = Engine(model, slots=slots)
    total, spent, full = WordErrors(0, 0, 0, 0), 0, 0
    for reference, hypothesis, stream in _stream_all(engine, utterances, options):
        total += word_errors(reference, hypothesis)
        spent += stream.total_macs
        full += engine.macs.full(stream.next_frame)
    return spent / max(1, full), total.rate


def _stream_all(
    engine: Engine, utterances: Iterable[Utterance], options: StreamOptions
) -> Iterator[tuple[str, str, Stream]]:
    """Fills every slot; yields reference, hypothesis and stream of each recording when it is done."""
    remaining = iter(utterances)
    running: dict[Stream, tuple[str, list[str]]] = {}
    while True:
        for utterance in islice(remaining, engine.free_slots):
            stream = engine.open(options)
            engine.push(stream, load_audio(utterance.path))
            engine.finish(stream)
            running[stream] = (utterance.text, [])
        if not running:
            return
        output = engine.step()
        for _, failure in output.failures:
            raise failure
        for result in output.results:
            reference, finals = running[result.stream]
            if result.is_final and result.committed:
                finals.append(result.committed)
            if result.end_of_stream:
                engine.close(result.stream)
                del running[result.stream]
                yield reference, " ".join(finals), result.stream

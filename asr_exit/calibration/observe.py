"""What every exit says about every chunk of held-out recordings, at full depth: one offline pass each.

Shapes: E exits, N chunks of all recordings joined, T frames of one recording, n chunks of one recording.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from asr_exit.calibration.workers import Recording, Workers, samples_of
from asr_exit.checkpoint import Model
from asr_exit.encoder import segment_states
from asr_exit.errors import ConfigError
from asr_exit.evidence import ExitScores, collapse, score, with_beam_share
from asr_exit.features import log_mel
from asr_exit.policy import Criterion, Evidence
from asr_exit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Observation:
    """One recording."""

    ids: np.ndarray  # (E, T) best pieces
    evidence: tuple[tuple[Evidence, ...], ...]  # per exit, per chunk
    frames: tuple[int, ...]  # per chunk
    seconds: float
    edits: np.ndarray  # (E, n) pieces to change for the deepest exit's answer in that chunk
    harm: np.ndarray  # (E, n) word errors more than at full depth when this chunk alone leaves at that exit
    errors: int  # word errors at full depth
    words: int  # of the reference
    static_errors: tuple[int, ...] = ()  # per exit, word errors when every chunk leaves there


@dataclass(frozen=True)
class Observations:
    """A set of recordings."""

    recordings: tuple[Recording, ...]  # those with at least one frame
    items: tuple[Observation, ...]
    macs: np.ndarray  # (E, N) MACs of leaving there, nothing filled
    fill_macs: np.ndarray  # (N,) MACs of filling one segment of a chunk by propagation
    seen_chunks: int  # how many chunks back the layers look

    @property
    def full_macs(self) -> float:
        """MACs at full depth."""
        return float(self.macs[-1].sum())

    @property
    def ends(self) -> np.ndarray:
        """(N,) number of the first chunk after each chunk's recording."""
        counts = [len(item.frames) for item in self.items]
        return np.repeat(np.cumsum(counts), counts)

    def only(self, kept: Collection[int]) -> Observations:
        """The recordings with these places."""
        owner = np.repeat(np.arange(len(self.items)), [len(item.frames) for item in self.items])
        columns = np.isin(owner, list(kept))
        places = [place for place in range(len(self.items)) if place in kept]
        items = tuple(self.items[place] for place in places)
        recordings = tuple(self.recordings[place] for place in places)
        return replace(
            self, recordings=recordings, items=items, macs=self.macs[:, columns], fill_macs=self.fill_macs[columns]
        )

    @property
    def edits(self) -> np.ndarray:
        """(E, N)."""
        return np.concatenate([item.edits for item in self.items], axis=1)

    @property
    def harm(self) -> np.ndarray:
        """(E, N)."""
        return np.concatenate([item.harm for item in self.items], axis=1)

    @property
    def evidence(self) -> list[list[Evidence]]:
        """Per exit, per chunk."""
        return [[e for item in self.items for e in item.evidence[k]] for k in range(len(self.macs))]

    @property
    def seconds(self) -> float:
        return sum(item.seconds for item in self.items)

    @property
    def words(self) -> int:
        return sum(item.words for item in self.items)

    @property
    def full_wer(self) -> float:
        """Word error rate at full depth."""
        return sum(item.errors for item in self.items) / max(1, self.words)

    def confidence(self, criterion: Criterion) -> np.ndarray:
        """(E, N) what `criterion` measures; negated where low is sure, so that larger is surer. NaN = never sure."""
        sign = -1.0 if criterion.low_is_sure else 1.0
        values = [criterion.measures(k, row) for k, row in enumerate(self.evidence)]
        return np.nan_to_num(sign * np.array(values), nan=-np.inf)

    def wer(self, exits: np.ndarray) -> float:
        """Word error rate when chunk n leaves at exits[n], as if the harm done by each chunk simply added up."""
        more = self.harm[exits, np.arange(len(exits))].sum()
        return self.full_wer + float(more) / max(1, self.words)

    def static_wer(self, exit_index: int) -> float:
        """Word error rate when every chunk leaves at one exit: exact."""
        return sum(item.static_errors[exit_index] for item in self.items) / max(1, self.words)

    def macs_fraction(self, exits: np.ndarray) -> float:
        """Cost of the same as a share of full depth: layers are filled where a later chunk goes that deep in time."""
        chunks = np.arange(len(exits))
        spent = float(self.macs[exits, chunks].sum())
        for segment in range(1, len(self.macs)):
            skipped = exits < segment
            deep = np.where(skipped, len(exits) + self.seen_chunks, chunks)
            next_deep = np.minimum.accumulate(deep[::-1])[::-1]
            needed = skipped & (next_deep - chunks <= self.seen_chunks) & (next_deep < self.ends)
            spent += float(self.fill_macs[needed].sum())
        return spent / self.full_macs


def observe(workers: Workers, recordings: Sequence[Recording], chunk_ms: float, beams: int = 0) -> Observations:
    """Observe every recording; `beams` > 0 adds the evidence of so many prefix beams (slow).

    Raises:
        AudioError: a recording that cannot be read. ConfigError: no recording as long as one frame.
    """
    found = workers.map(_observe_all, list(recordings), chunk_ms, beams)
    pairs = [(recording, item) for recording, item in zip(recordings, found, strict=True) if item is not None]
    items = [item for _, item in pairs]
    if not items:
        raise ConfigError("the recordings are shorter than a frame; give longer ones to calibrate on")
    costs = workers.model.macs
    frames = [count for item in items for count in item.frames]
    each = {count: [costs.judged_to_exit(k, count) for k in range(costs.config.num_exits)] for count in set(frames)}
    seen = max(1, costs.config.left_context_frames // costs.config.chunk_frames(chunk_ms))
    return Observations(
        recordings=tuple(recording for recording, _ in pairs),
        items=tuple(items),
        macs=np.array([each[count] for count in frames], dtype=np.float64).T,
        fill_macs=np.array([costs.propagate(count) for count in frames], dtype=np.float64),
        seen_chunks=seen,
    )


def _observe_all(
    model: Model, recordings: Sequence[Recording], chunk_ms: float, beams: int
) -> list[Observation | None]:
    return [_observe(model, recording, chunk_ms, beams) for recording in recordings]


@torch.inference_mode()
def _observe(model: Model, recording: Recording, chunk_ms: float, beams: int) -> Observation | None:
    samples = samples_of(recording.path)
    features = torch.from_numpy(log_mel(samples, model.config.features))[None]
    if features.shape[1] == 0:
        return None
    chunk_frames = model.config.chunk_frames(chunk_ms)
    states, logits = _states(model, features, chunk_frames)
    frames, labels = states[0][1].shape[1], model.config.labels_per_frame
    sizes = [min(chunk_frames, frames - start) for start in range(0, frames, chunk_frames)]
    previous: list[ExitScores | None] = [None] * len(sizes)
    scores: list[list[ExitScores]] = []
    for (before, after), exit_logits in zip(states, logits, strict=True):
        rows: list[ExitScores] = []
        for first, count, size in _blocks(sizes):
            start, end = first * chunk_frames, first * chunk_frames + count * size
            low, high = (x[0, start:end].unflatten(0, (count, size)) for x in (before, after))
            said = exit_logits[0, start * labels : end * labels].unflatten(0, (count, size * labels))
            found = score(said, low, high, previous[first : first + count], want_log_probs=beams > 0)
            rows += [with_beam_share(item, beams) for item in found] if beams else found
        scores.append(rows)
        previous = list(rows)
    ids = [[item.frames.ids for item in row] for row in scores]
    harm, static_errors, words = _harm(model.tokenizer, ids, recording.text)
    return Observation(
        ids=np.stack([np.concatenate(row) for row in ids]),
        evidence=tuple(tuple(item.evidence for item in row) for row in scores),
        frames=tuple(sizes),
        seconds=len(samples) / model.config.features.sample_rate_hertz,
        edits=_edits(ids),
        harm=harm,
        errors=static_errors[-1],
        words=words,
        static_errors=static_errors,
    )


def _blocks(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of chunks of one size: (first chunk, how many, frames each); only the last chunk may be shorter."""
    if len(sizes) > 1 and sizes[-1] != sizes[0]:
        return [(0, len(sizes) - 1, sizes[0]), (len(sizes) - 1, 1, sizes[-1])]
    return [(0, len(sizes), sizes[0])]


def _states(model: Model, features: Tensor, chunk_frames: int) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Per exit the (1, T, D) states before and after its segment, and its (1, L, V) logits."""
    with segment_states(model.encoder) as states:
        output = model.encoder(features, torch.tensor([features.shape[1]]), chunk_frames=chunk_frames)
    return states, output.logits


def _edits(ids: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    pieces = [[collapse(part).tolist() for part in row] for row in ids]
    deepest = pieces[-1]
    return np.array([[Levenshtein.distance(a, b) for a, b in zip(row, deepest, strict=True)] for row in pieces])


def _harm(
    tokenizer: Tokenizer, ids: Sequence[Sequence[np.ndarray]], reference: str
) -> tuple[np.ndarray, tuple[int, ...], int]:
    """(E, n) errors more than at full depth for one chunk leaving early, errors of each exit, reference words."""
    deepest, wanted = list(ids[-1]), reference.split()

    def errors(parts: Sequence[np.ndarray]) -> int:
        text = tokenizer.decode(collapse(np.concatenate(parts)).tolist())
        return int(Levenshtein.distance(wanted, text.split()))

    static = tuple(errors(row) for row in ids)
    base = static[-1]
    harm = np.zeros((len(ids), len(deepest)), np.int32)
    for k, row in enumerate(ids[:-1]):
        for n, part in enumerate(row):
            if part.tobytes() != deepest[n].tobytes():
                harm[k, n] = errors([*deepest[:n], part, *deepest[n + 1 :]]) - base
    return harm, static, len(wanted)

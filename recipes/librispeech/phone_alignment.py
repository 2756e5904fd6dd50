"""Where the phones of an utterance begin: a monophone hidden Markov model, trained on the recordings themselves.

Three states per phone from left to right, mixtures of Gaussians with diagonal covariances, Viterbi training, and
silence that may stand between words; as Kaldi's `train_mono`, but begun with the words that a CTC model found. Its
frames are 10 ms, an eighth of the model's.

Shapes: B utterances, F feature frames, C coefficients, S states of a transcript's graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipes.librispeech.mixtures import Mixtures

SILENCE = "sil"
STATES_PER_PHONE = 3
CEPSTRA = 13
COMPONENTS = (1, 2, 4, 8, 8)  # of each state's mixture, one entry per round of training
SILENCE_PENALTY = 5.0  # nats, so that silence is not found inside fluent speech


def coefficients(log_mel: np.ndarray) -> np.ndarray:
    """(F, M) -> (F, 39): cepstra with first and second differences, zero mean and unit variance each, float32."""
    mel = log_mel.astype(np.float32)
    bands = mel.shape[1]
    basis = np.cos(np.pi / bands * np.outer(np.arange(bands) + 0.5, np.arange(CEPSTRA))).astype(np.float32)
    cepstra = mel @ basis

    def slope(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((2, 2), (0, 0)), mode="edge")
        return (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10

    first = slope(cepstra)
    joined = np.concatenate([cepstra, first, slope(first)], axis=1)
    return (joined - joined.mean(axis=0)) / (joined.std(axis=0) + 1e-3)


@dataclass(frozen=True)
class Graph:
    """The states a transcript runs through, with silence around every word.

    Where `may_skip[j]`, state j may follow the last one before the silence that precedes it.
    """

    states: np.ndarray  # (S,) acoustic states
    owner: np.ndarray  # (S,) index of the phone, silences counted
    may_skip: np.ndarray  # (S,) bool
    phones: tuple[str, ...]  # silences included


def graph_of(words: Sequence[Sequence[str]], number_of: dict[str, int]) -> Graph:
    """Graph of a transcript given as the phones of its words."""
    phones = [SILENCE]
    for word in words:
        phones += [*word, SILENCE]
    numbers = np.array([number_of[phone] for phone in phones])
    states = (numbers[:, None] * STATES_PER_PHONE + np.arange(STATES_PER_PHONE)).reshape(-1)
    owner = np.repeat(np.arange(len(phones)), STATES_PER_PHONE)
    may_skip = np.zeros(len(states), bool)
    for index in range(1, len(phones)):
        if phones[index - 1] == SILENCE and index >= 2:
            may_skip[index * STATES_PER_PHONE] = True
    return Graph(states, owner, may_skip, tuple(phones))


def viterbi(scores: Sequence[np.ndarray], graphs: Sequence[Graph]) -> list[np.ndarray | None]:
    """Position in its graph of every frame of each utterance; None where the frames are too few for the phones.

    Args:
        scores: per utterance (F, states) log-likelihoods.
    """
    batch, frames = len(scores), max(len(item) for item in scores)
    width = max(len(graph.states) for graph in graphs)
    states = np.zeros((batch, width), np.int64)
    skip = np.zeros((batch, width), bool)
    for row, graph in enumerate(graphs):
        states[row, : len(graph.states)] = graph.states
        skip[row, : len(graph.states)] = graph.may_skip
    reach = STATES_PER_PHONE + 1
    padded = np.full((batch, width + reach), -np.inf, np.float32)
    score = padded[:, reach:]
    came = np.zeros((frames, batch, width), np.int8)
    enters_silence = np.concatenate([np.zeros((batch, 1), bool), states[:, 1:] == 0], axis=1)
    price = np.where(enters_silence, np.float32(-SILENCE_PENALTY), np.float32(0))
    emissions = np.zeros((batch, frames, scores[0].shape[1]), np.float32)
    for row, item in enumerate(scores):
        emissions[row, : len(item)] = item
    ends = np.array([len(item) for item in scores])
    score[:, 0] = emissions[:, 0, 0]
    score[:, STATES_PER_PHONE] = np.take_along_axis(emissions[:, 0], states[:, STATES_PER_PHONE, None], axis=1)[:, 0]
    last_scores = [score.copy()] * batch
    for frame in range(1, frames):
        stay, step = score, padded[:, reach - 1 : -1] + price
        jump = np.where(skip, padded[:, :width], -np.inf)
        best = np.maximum(stay, step)
        came[frame] = step > stay
        jumped = jump > best
        came[frame][jumped] = 2
        padded[:, reach:] = np.maximum(best, jump) + np.take_along_axis(emissions[:, frame], states, axis=1)
        for row in np.flatnonzero(ends == frame + 1).tolist():
            last_scores[row] = score[row].copy()
    found: list[np.ndarray | None] = []
    steps = (0, 1, reach)
    for row, graph in enumerate(graphs):
        size = len(graph.states)
        final = last_scores[row]
        at: int = size - 1 if final[size - 1] >= final[size - 1 - STATES_PER_PHONE] else size - 1 - STATES_PER_PHONE
        if not np.isfinite(final[at]):
            found.append(None)
            continue
        path = np.empty(ends[row], np.int64)
        for frame in range(int(ends[row]) - 1, -1, -1):
            path[frame] = at
            at -= steps[int(came[frame, row, at])]
        found.append(path)
    return found


@dataclass(frozen=True)
class Spoken:
    """A recording to align: its log-mel, the phones of its words, and the frames that cut them apart, roughly."""

    features: np.ndarray  # (F, M)
    words: tuple[tuple[str, ...], ...]
    cuts: np.ndarray  # (words + 1,)


@dataclass(frozen=True)
class Phones:
    """The phones of a recording, silences included: phone i is feature frames starts[i] to starts[i + 1]."""

    phones: tuple[str, ...]
    starts: np.ndarray  # (phones + 1,)


class PhoneAligner:
    """Trains on some recordings, then aligns any."""

    def __init__(self, recordings: Sequence[Spoken], seed: int = 0) -> None:
        """Train: from the rough cuts of the words, phones of equal length, to the phones' own times."""
        names = sorted({phone for item in recordings for word in item.words for phone in word})
        self._number = {SILENCE: 0} | {name: index + 1 for index, name in enumerate(names)}
        rng = np.random.default_rng(seed)
        frames = [coefficients(item.features) for item in recordings]
        graphs = [graph_of(item.words, self._number) for item in recordings]
        states = len(self._number) * STATES_PER_PHONE
        self._mixtures = Mixtures(states, frames[0].shape[1])
        labels = [self._rough(item) for item in recordings]
        for components in COMPONENTS:
            self._mixtures.split(components, rng)
            everything, theirs = np.concatenate(frames), np.concatenate(labels)
            self._mixtures.fit(everything[theirs >= 0], theirs[theirs >= 0])
            paths = self._paths(frames, graphs)
            labels = [
                graph.states[path] if path is not None else np.full(len(item), -1)
                for graph, path, item in zip(graphs, paths, frames, strict=True)
            ]

    def _rough(self, item: Spoken) -> np.ndarray:
        """(F,) states: phones of a word in equal parts; the quietest twentieth, and what is in no word, is silence."""
        labels = np.zeros(len(item.features), np.int64)
        for word, first, last in zip(item.words, item.cuts[:-1], item.cuts[1:], strict=True):
            states = np.repeat([self._number[phone] for phone in word], STATES_PER_PHONE) * STATES_PER_PHONE
            states += np.tile(np.arange(STATES_PER_PHONE), len(word))
            here = np.arange(first, min(last, len(labels)))
            labels[here] = states[(here - first) * len(states) // max(1, last - first)]
        loudness = item.features.mean(axis=1, dtype=np.float32)
        quiet = loudness < np.quantile(loudness, 0.05)
        labels[quiet] = np.arange(np.count_nonzero(quiet)) % STATES_PER_PHONE
        return labels

    def _paths(self, frames: Sequence[np.ndarray], graphs: Sequence[Graph], batch: int = 24) -> list[np.ndarray | None]:
        paths: list[np.ndarray | None] = [None] * len(frames)
        order = sorted(range(len(frames)), key=lambda index: len(frames[index]))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            scores = [self._mixtures.log_likelihoods(frames[index]) for index in part]
            for index, path in zip(part, viterbi(scores, [graphs[index] for index in part]), strict=True):
                paths[index] = path
        return paths

    def align(self, recordings: Sequence[Spoken]) -> list[Phones | None]:
        """Phones of each recording; None where it holds a phone never trained, or too few frames."""
        known = [all(phone in self._number for word in item.words for phone in word) for item in recordings]
        asked = [item for item, good in zip(recordings, known, strict=True) if good]
        graphs = [graph_of(item.words, self._number) for item in asked]
        paths = iter(zip(graphs, self._paths([coefficients(item.features) for item in asked], graphs), strict=True))
        return [_phones(*next(paths)) if good else None for good in known]


def _phones(graph: Graph, path: np.ndarray | None) -> Phones | None:
    if path is None:
        return None
    owners = graph.owner[path]
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    return Phones(tuple(graph.phones[owner] for owner in owners[starts]), np.append(starts, len(path)))

"""Where the words of a training utterance begin and end: CTC forced alignment by a trained model.

Shapes: T labels that an exit writes, V vocabulary, S = 2 N + 1 states of N tokens with blanks around, F feature frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from asr_exit.checkpoint import Model
from asr_exit.tokenizer import BLANK_ID, WORD_START

EDGE_FRAMES = 25  # feature frames kept before the first and after the last token, at most


def token_frames(log_probs: np.ndarray, tokens: Sequence[int]) -> list[tuple[int, int]] | None:
    """First and last label of every token on the likeliest CTC path (Viterbi).

    Args:
        log_probs: (T, V) log-posteriors.
    Returns:
        One pair for each of `tokens`; None where CTC cannot place them in T frames.
    """
    labels = np.full(2 * len(tokens) + 1, BLANK_ID)
    labels[1::2] = tokens
    emissions = log_probs[:, labels]
    may_skip = np.zeros(len(labels), bool)  # past the blank between two different tokens
    may_skip[3::2] = labels[3::2] != labels[1:-2:2]
    frames, states = emissions.shape
    came_from = np.zeros((frames, states), np.int8)
    score = np.full(states, -np.inf)
    score[:2] = emissions[0, :2]
    for frame in range(1, frames):
        ways = np.full((3, states), -np.inf)
        ways[0] = score
        ways[1, 1:] = score[:-1]
        ways[2, 2:] = np.where(may_skip[2:], score[:-2], -np.inf)
        came_from[frame] = ways.argmax(axis=0)
        score = ways.max(axis=0) + emissions[frame]
    state = states - 1 if score[-1] >= score[-2] else states - 2
    if not np.isfinite(score[state]):
        return None
    spans: list[list[int]] = [[-1, -1] for _ in tokens]
    for frame in range(frames - 1, -1, -1):
        if state % 2:
            span = spans[state // 2]
            span[0] = frame
            span[1] = max(span[1], frame)
        state -= int(came_from[frame, state])
    return [(first, last) for first, last in spans]


@dataclass(frozen=True)
class Aligned:
    """A recording and where the model shows its words."""

    features: np.ndarray  # (F, M) log-mel
    words: tuple[tuple[int, int], ...]  # labels of each word's first and last token

    def cuts(self, frames_per_token: int, late: int) -> np.ndarray:
        """Feature frames that cut the words apart: between two of them, at the quietest place.

        Args:
            frames_per_token: feature frames of a label. late: feature frames by which tokens show too late.
        Returns:
            (words + 1,) rising; word i is `features[cuts[i] : cuts[i + 1]]`.
        """
        loudness, end = _loudness(self.features), len(self.features)

        def centre(frame: int) -> int:
            return min(max(frame * frames_per_token + frames_per_token // 2 - late, 0), end - 1)

        cuts = [max(0, centre(self.words[0][0]) - EDGE_FRAMES)]
        for (_, last), (first, _) in itertools.pairwise(self.words):
            low = max(cuts[-1] + 1, centre(last))
            high = max(low + 1, centre(first))
            cuts.append(low + int(loudness[low:high].argmin()) if low < end else low)
        cuts.append(max(cuts[-1] + 1, min(end, centre(self.words[-1][1]) + EDGE_FRAMES)))
        return np.array(cuts)


def _loudness(features: np.ndarray) -> np.ndarray:
    return np.convolve(features.mean(axis=1, dtype=np.float64), np.ones(3) / 3, mode="same")


def lateness(recordings: Sequence[Aligned], frames_per_token: int) -> int:
    """Feature frames by which a model shows its tokens too late: those with which the cuts are quietest on average."""

    def loudness_of_cuts(late: int) -> float:
        total, count = 0.0, 0
        for recording in recordings:
            loudness = _loudness(recording.features)
            cuts = recording.cuts(frames_per_token, late)[1:-1]
            cuts = cuts[cuts < len(loudness)]
            total += float((loudness[cuts] - loudness.mean()).sum())
            count += len(cuts)
        return total / max(1, count)

    return min(range(0, 2 * frames_per_token + 1, 2), key=loudness_of_cuts)


def align(model: Model, features: Sequence[np.ndarray], texts: Sequence[str]) -> list[Aligned | None]:
    """The words of a batch of recordings, (F, M) log-mel each; None where the model cannot place the text."""
    found: list[Aligned | None] = []
    for mel, text, log_probs in zip(features, texts, offline_log_probs(model, features), strict=True):
        tokens = model.tokenizer.encode(text)
        starts = [i for i, token in enumerate(tokens) if model.pieces[token].startswith(WORD_START)]
        spans = token_frames(log_probs, tokens) if len(starts) == len(text.split()) else None
        ends = [*starts[1:], len(tokens)]
        words = spans and tuple((spans[i][0], spans[j - 1][1]) for i, j in zip(starts, ends, strict=True))
        found.append(Aligned(mel, words) if words else None)
    return found


@torch.inference_mode()
def offline_log_probs(model: Model, features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(T, V) log-posteriors of the last exit for each (F, M) of a batch, with the whole recordings in view."""
    lengths = torch.tensor([len(item) for item in features])
    padded = torch.zeros(len(features), int(lengths.max()), features[0].shape[1])
    for row, item in zip(padded, features, strict=True):
        row[: len(item)] = torch.from_numpy(item.astype(np.float32))
    output = model.encoder(padded, lengths, chunk_frames=None)
    log_probs = output.logits[-1].float().log_softmax(dim=-1).numpy()
    return [row[:length] for row, length in zip(log_probs, output.lengths.tolist(), strict=True)]

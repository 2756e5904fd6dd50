"""Where the words of a training utterance begin and end: CTC forced alignment by a trained model.

Shapes: T encoder frames, V vocabulary, S = 2 N + 1 states of N tokens with blanks around them, F feature frames.
"""

from __future__ import annotations

import numpy as np
import torch

from asr_exit.checkpoint import Model
from asr_exit.tokenizer import BLANK_ID

EDGE_FRAMES = 25  # feature frames kept before the first and after the last token, at most


def token_frames(log_probs: np.ndarray, tokens: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """First and last frame of every token on the likeliest CTC path (Viterbi).

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


def word_cuts(
    features: np.ndarray, spans: list[tuple[int, int]], word_starts: list[int], frames_per_token: int, shift: int = 0
) -> np.ndarray:
    """Feature frames at which the words of an utterance are cut apart.

    Between the last token of a word and the first of the next lies the cut, at the quietest place.

    Args:
        features: (F, M) log-mel. spans: encoder frames of the tokens. word_starts: number of each word's first token.
        frames_per_token: feature frames of an encoder frame. shift: feature frames by which tokens are seen late.
    Returns:
        (words + 1,) rising; word i is `features[cuts[i] : cuts[i + 1]]`.
    """
    loudness = np.convolve(features.mean(axis=1, dtype=np.float64), np.ones(3) / 3, mode="same")

    def centre(frame: int) -> int:
        return int(np.clip(frame * frames_per_token + frames_per_token // 2 - shift, 0, len(features) - 1))

    cuts = [max(0, centre(spans[0][0]) - EDGE_FRAMES)]
    for start in word_starts[1:]:
        low = max(cuts[-1] + 1, centre(spans[start - 1][1]))
        high = max(low + 1, centre(spans[start][0]))
        cuts.append(low + int(loudness[low:high].argmin()) if low < len(features) else low)
    cuts.append(max(cuts[-1] + 1, min(len(features), centre(spans[-1][1]) + EDGE_FRAMES)))
    return np.array(cuts)


@torch.inference_mode()
def offline_log_probs(model: Model, features: list[np.ndarray]) -> list[np.ndarray]:
    """(T, V) log-posteriors of the last exit for each (F, M) of a batch, with the whole recordings in view."""
    lengths = torch.tensor([len(item) for item in features])
    padded = torch.zeros(len(features), int(lengths.max()), features[0].shape[1])
    for row, item in zip(padded, features, strict=True):
        row[: len(item)] = torch.from_numpy(item.astype(np.float32))
    output = model.encoder(padded, lengths, chunk_frames=None)
    log_probs = output.logits[-1].float().log_softmax(dim=-1).numpy()
    return [row[:length] for row, length in zip(log_probs, output.lengths.tolist(), strict=True)]

"""What an exit says about a chunk, computed on the device in one go and brought to the host in one transfer.

The host side needs no torch, because devices run it, too; `score` and `summarise` are called by torch code only.
Shapes: B streams, T frames, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asr_exit.ctc import BLANK, FrameScores
from asr_exit.policy import Evidence

if TYPE_CHECKING:
    from torch import Tensor

NUM_COLUMNS = 6  # numbers per chunk that `summarise` leaves for `unpack`
UNJUDGED = Evidence(math.nan, math.nan, math.nan, math.nan, math.nan)  # stops no chunk


@dataclass(frozen=True)
class ExitScores:
    """One chunk's answer at one exit, on the host."""

    frames: FrameScores
    evidence: Evidence


def score(
    logits: Tensor,
    before: Tensor,
    after: Tensor,
    previous: Sequence[ExitScores | None],
    want_log_probs: bool,
    want_evidence: bool = True,
) -> list[ExitScores]:
    """Per-stream scores and, if wanted, evidence of a batch.

    Args:
        logits: (B, T, V) of this exit. before, after: (B, T, D) hidden states around the segment.
        previous: per stream what the exit before said about this chunk, or None.
        want_log_probs: also bring (T, V) log-posteriors to the host (beam search needs them).
        want_evidence: a policy will look at it. False saves most of this function's time; evidence is then `UNJUDGED`.
    """
    import torch

    log_probs = logits.float().log_softmax(dim=-1)
    top, ids = log_probs.max(dim=-1)
    summary = summarise(log_probs, top, ids, before, after) if want_evidence else top[:, :0]
    packed = torch.cat((summary, ids.to(top.dtype), top), dim=1).cpu().numpy()
    table = log_probs.cpu().numpy() if want_log_probs else None
    return [
        unpack(row, logits.shape[1], earlier, None if table is None else table[index])
        for index, (row, earlier) in enumerate(zip(packed, previous, strict=True))
    ]


def unpack(row: np.ndarray, num_frames: int, earlier: ExitScores | None, log_probs: np.ndarray | None) -> ExitScores:
    """One chunk's numbers as they come from the device: summary (or nothing), (T,) best pieces, (T,) log-posteriors."""
    first = len(row) - 2 * num_frames
    best = row[first : first + num_frames].astype(np.int64)
    scores = FrameScores(best, row[first + num_frames :], log_probs)
    return ExitScores(scores, _evidence(row[:first].tolist(), best, earlier) if first else UNJUDGED)


def summarise(log_probs: Tensor, top: Tensor, ids: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """(B, NUM_COLUMNS) in the order in which `unpack` reads it; arguments as in `score`."""
    import torch

    entropy = -(log_probs.exp() * log_probs).sum(dim=-1) / math.log(log_probs.shape[-1])
    spoken = (ids != BLANK).to(top.dtype)
    count = spoken.sum(dim=1)
    silent = count == 0
    posterior = top.exp()

    def over_spoken(x: Tensor) -> Tensor:
        return torch.where(silent, x.mean(dim=1), (x * spoken).sum(dim=1) / count.clamp(min=1))

    similarity = torch.cosine_similarity(before, after, dim=-1).mean(dim=1)
    columns = [
        over_spoken(posterior),
        posterior.mean(1),
        over_spoken(entropy),
        entropy.mean(1),
        1 - spoken.mean(1),
        similarity,
    ]
    return torch.stack(columns, dim=1)


def _evidence(summary: list[float], best: np.ndarray, earlier: ExitScores | None) -> Evidence:
    return Evidence(
        max_posterior=summary[0],
        max_posterior_all=summary[1],
        entropy=summary[2],
        entropy_all=summary[3],
        blank_mass=summary[4],
        agreement=0.0 if earlier is None else float(np.array_equal(collapse(best), collapse(earlier.frames.ids))),
        similarity=summary[5],
    )


def collapse(ids: np.ndarray) -> np.ndarray:
    """Greedy CTC collapse of (T,) ids: repeats merged, blanks dropped."""
    keep = np.ones(len(ids), bool)
    keep[1:] = ids[1:] != ids[:-1]
    return ids[keep & (ids != BLANK)]

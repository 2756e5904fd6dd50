"""What an exit says about a chunk, computed on the device in one go and brought to the host in one transfer.

Shapes: B streams, T frames, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asr_exit.ctc import BLANK, FrameScores
from asr_exit.policy import Evidence

_SUMMARY = 6  # columns before the per-frame ones


@dataclass(frozen=True)
class ExitScores:
    """One chunk's answer at one exit, on the host."""

    frames: FrameScores
    evidence: Evidence


def score(
    logits: Tensor, before: Tensor, after: Tensor, previous_ids: list[np.ndarray | None], want_log_probs: bool
) -> list[ExitScores]:
    """Per-stream scores and evidence of a batch.

    Args:
        logits: (B, T, V) of this exit. before, after: (B, T, D) hidden states around the segment.
        previous_ids: per stream the (T,) best pieces of the exit before, or None.
        want_log_probs: also bring (T, V) log-posteriors to the host (beam search needs them).
    """
    log_probs = logits.float().log_softmax(dim=-1)
    top, ids = log_probs.max(dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1) / math.log(logits.shape[-1])
    spoken = (ids != BLANK).to(top.dtype)
    count = spoken.sum(dim=1)
    silent = count == 0
    posterior = top.exp()

    def over_spoken(x: Tensor) -> Tensor:
        return torch.where(silent, x.mean(dim=1), (x * spoken).sum(dim=1) / count.clamp(min=1))

    similarity = torch.cosine_similarity(before, after, dim=-1).mean(dim=1)
    summary = [
        over_spoken(posterior),
        posterior.mean(1),
        over_spoken(entropy),
        entropy.mean(1),
        1 - spoken.mean(1),
        similarity,
    ]
    packed = torch.cat((torch.stack(summary, dim=1), ids.to(top.dtype), top), dim=1).cpu().numpy()
    table = log_probs.cpu().numpy() if want_log_probs else None
    frames = logits.shape[1]
    results: list[ExitScores] = []
    for row, previous in zip(packed, previous_ids, strict=True):
        best = row[_SUMMARY : _SUMMARY + frames].astype(np.int64)
        agreement = 0.0 if previous is None else float(np.array_equal(collapse(best), collapse(previous)))
        values = row[:_SUMMARY].tolist()
        evidence = Evidence(
            max_posterior=values[0],
            max_posterior_all=values[1],
            entropy=values[2],
            entropy_all=values[3],
            blank_mass=values[4],
            agreement=agreement,
            similarity=values[5],
        )
        index = len(results)
        scores = FrameScores(best, row[_SUMMARY + frames :], None if table is None else table[index])
        results.append(ExitScores(scores, evidence))
    return results


def collapse(ids: np.ndarray) -> np.ndarray:
    """Greedy CTC collapse of (T,) ids: repeats merged, blanks dropped."""
    keep = np.ones(len(ids), bool)
    keep[1:] = ids[1:] != ids[:-1]
    return ids[keep & (ids != BLANK)]

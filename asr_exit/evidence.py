"""What an exit says about a chunk, computed on the device in one go and brought to the host in one transfer.

Shapes: B streams, T frames, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asr_exit.beam import PrefixBeamDecoder
from asr_exit.ctc import BLANK, FrameScores
from asr_exit.policy import Evidence

UNJUDGED = Evidence(math.nan, math.nan, math.nan, math.nan, math.nan)  # stops no chunk
NUM_COLUMNS = 7  # numbers of evidence per stream that come from the device


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
    beams: int = 0,
) -> list[ExitScores]:
    """Per-stream scores and, if wanted, evidence of a batch; one transfer to the host.

    Args:
        logits: (B, T, V) of this exit. before, after: (B, T, D) hidden states around the segment.
        previous: per stream what the exit before said about this chunk, or None.
        want_log_probs: also bring (T, V) log-posteriors to the host (beam search needs them).
        want_evidence: a policy will look at it. False saves most of this function's time; evidence is then `UNJUDGED`.
        beams: prefix beams for `Evidence.beam_share`; 0 = nobody looks at it.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    top, ids = log_probs.max(dim=-1)
    columns = [_summary(log_probs, top, ids, before, after)] if want_evidence else []
    columns += [ids.to(top.dtype), top]
    if want_log_probs or beams:
        columns.append(log_probs.flatten(1))
    packed = torch.cat(columns, dim=1).cpu().numpy()
    frames, first = logits.shape[1], NUM_COLUMNS if want_evidence else 0
    labels = packed[:, first : first + frames].astype(np.int64)
    summaries = packed[:, :first].tolist()
    results: list[ExitScores] = []
    for row, best, summary, earlier in zip(packed, labels, summaries, previous, strict=True):
        table = row[first + 2 * frames :].reshape(frames, -1) if want_log_probs or beams else None
        scores = FrameScores(best, row[first + frames : first + 2 * frames], table)
        evidence = _evidence(summary, scores, earlier, beams) if want_evidence else UNJUDGED
        results.append(ExitScores(scores, evidence))
    return results


def _summary(log_probs: Tensor, top: Tensor, ids: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """(B, NUM_COLUMNS) in the order in which `_evidence` reads it."""
    entropy = (log_probs.exp() * log_probs).sum(dim=-1) / -math.log(log_probs.shape[-1])
    posterior = top.exp()
    similarity = torch.cosine_similarity(before, after, dim=-1)
    blank = (ids == BLANK).to(top.dtype)
    values = torch.stack((posterior, entropy, blank, similarity), dim=1)  # (B, 4, T)
    means = values.mean(dim=2)
    spoken = 1 - blank
    over_spoken = (values[:, :2] * spoken[:, None]).sum(dim=2) / spoken.sum(dim=1, keepdim=True)
    over_spoken = torch.where(means[:, 2:3] == 1, means[:, :2], over_spoken)
    return torch.cat((over_spoken, means, posterior.amin(dim=1, keepdim=True)), dim=1)


def _evidence(summary: list[float], scores: FrameScores, earlier: ExitScores | None, beams: int) -> Evidence:
    posterior, entropy, posterior_all, entropy_all, blank_mass, similarity, lowest = summary
    share = math.nan
    if beams:
        decoder = PrefixBeamDecoder(beam_size=beams, top_tokens=beams)
        share = decoder.advance(decoder.initial(), scores).confidence
    return Evidence(
        max_posterior=posterior,
        max_posterior_all=posterior_all,
        entropy=entropy,
        entropy_all=entropy_all,
        blank_mass=blank_mass,
        agreement=0.0 if earlier is None else float(_same_text(scores.ids, earlier.frames.ids)),
        similarity=similarity,
        lowest_posterior=lowest,
        beam_share=share,
        previous=None if earlier is None or earlier.evidence is UNJUDGED else earlier.evidence,
    )


def _same_text(ids: np.ndarray, others: np.ndarray) -> bool:
    return ids.tobytes() == others.tobytes() or collapse(ids).tobytes() == collapse(others).tobytes()


def collapse(ids: np.ndarray) -> np.ndarray:
    """Greedy CTC collapse of (T,) ids: repeats merged, blanks dropped."""
    keep = np.ones(len(ids), bool)
    keep[1:] = ids[1:] != ids[:-1]
    return ids[keep & (ids != BLANK)]

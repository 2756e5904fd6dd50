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


@dataclass(frozen=True)
class ExitScores:
    """One chunk's answer at one exit, on the host."""

    frames: FrameScores
    evidence: Evidence
    text: bytes = b""  # its collapsed labels, for comparison; only where there is evidence


def score(
    logits: Tensor,
    before: Tensor | None,
    after: Tensor,
    previous: Sequence[ExitScores | None],
    want_log_probs: bool,
    want_evidence: bool = True,
    beams: int = 0,
) -> list[ExitScores]:
    """Per-stream scores and, if wanted, evidence of a batch; one transfer to the host.

    Args:
        logits: (B, T, V) of this exit. before, after: (B, T, D) hidden states around the segment; `before` None = no
            policy looks at `Evidence.similarity`, which is then not a number.
        previous: per stream what the exit before said about this chunk, or None.
        want_log_probs: also bring (T, V) log-posteriors to the host (beam search needs them).
        want_evidence: a policy will look at it. False saves most of this function's time; evidence is then `UNJUDGED`.
        beams: prefix beams for `Evidence.beam_share`; 0 = nobody looks at it.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    top, ids = _best(log_probs)
    columns = [top, ids.to(top.dtype)]
    if want_evidence:
        columns.append(torch.linalg.vecdot(log_probs.exp(), log_probs))
        columns.append(torch.full_like(top, torch.nan) if before is None else _cosine(before, after))
    if want_log_probs or beams:
        columns.append(log_probs.flatten(1))
    packed = torch.cat(columns, dim=1).cpu().numpy()
    batch, frames, vocab = logits.shape
    tops = packed[:, :frames]
    labels = packed[:, frames : 2 * frames].astype(np.int64)
    tables = packed[:, -frames * vocab :].reshape(batch, frames, vocab) if want_log_probs or beams else None
    scores = [FrameScores(labels[i], tops[i], None if tables is None else tables[i]) for i in range(batch)]
    if not want_evidence:
        return [ExitScores(item, UNJUDGED) for item in scores]
    negative_entropy, similarity = packed[:, 2 * frames : 4 * frames].reshape(batch, 2, frames).swapaxes(0, 1)
    summaries = _summaries(tops, labels, negative_entropy / -math.log(vocab), similarity)
    keep = labels != BLANK
    keep[:, 1:] &= labels[:, 1:] != labels[:, :-1]
    results: list[ExitScores] = []
    for i, earlier in enumerate(previous):
        text = labels[i, keep[i]].tobytes()
        results.append(ExitScores(scores[i], _evidence(summaries[i], text, scores[i], earlier, beams), text))
    return results


def _best(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value and its place along the last dimension; on a CPU numpy's argmax is much faster than torch's."""
    if log_probs.is_cpu:
        return log_probs.amax(dim=-1), torch.from_numpy(log_probs.numpy().argmax(axis=-1))
    return log_probs.max(dim=-1)


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    """(B, T, D) twice -> (B, T)."""
    squares = torch.linalg.vecdot(before, before) * torch.linalg.vecdot(after, after)
    return torch.linalg.vecdot(before, after) * squares.clamp(min=1e-16).rsqrt()


def _summaries(
    log_posterior: np.ndarray, labels: np.ndarray, entropy: np.ndarray, similarity: np.ndarray
) -> list[list[float]]:
    """All (B, T) -> per stream the numbers that `_evidence` reads, in its order."""
    posterior, spoken = np.exp(log_posterior), labels != BLANK
    blank_mass = 1.0 - spoken.mean(axis=1)
    judged = spoken | (blank_mass == 1.0)[:, None]
    weight = judged / judged.sum(axis=1, keepdims=True)
    columns = (
        (posterior * weight).sum(axis=1),
        posterior.mean(axis=1),
        (entropy * weight).sum(axis=1),
        entropy.mean(axis=1),
        blank_mass,
        similarity.mean(axis=1),
        posterior.min(axis=1),
    )
    return np.array(columns).T.tolist()


def _evidence(
    summary: list[float], text: bytes, scores: FrameScores, earlier: ExitScores | None, beams: int
) -> Evidence:
    *shared, similarity, lowest = summary
    share = math.nan
    if beams:
        decoder = PrefixBeamDecoder(beam_size=beams, top_tokens=beams)
        share = decoder.advance(decoder.initial(), scores).confidence
    if earlier is None or earlier.evidence is UNJUDGED:
        return Evidence(*shared, 0.0, similarity, lowest, share)
    return Evidence(*shared, float(text == earlier.text), similarity, lowest, share, earlier.evidence)


def collapse(ids: np.ndarray) -> np.ndarray:
    """Greedy CTC collapse of (T,) ids: repeats merged, blanks dropped."""
    keep = np.ones(len(ids), bool)
    keep[1:] = ids[1:] != ids[:-1]
    return ids[keep & (ids != BLANK)]

"""What an exit says about a chunk, computed on the device in one go and brought to the host in one transfer.

The host side needs no torch, because devices run it, too; `score` and `summarise` are called by torch code only.
Shapes: B streams, T frames, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from asr_exit.beam import PrefixBeamDecoder
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
    text: bytes = b""  # its collapsed labels, for comparison; only where there is evidence


def score(
    logits: Tensor,
    before: Tensor | None,
    after: Tensor,
    previous: Sequence[ExitScores | None],
    want_log_probs: bool,
    want_evidence: bool = True,
) -> list[ExitScores]:
    """Per-stream scores and, if wanted, evidence of a batch; one transfer to the host.

    Only what is needed per frame is computed on the device; means over frames are cheaper on the host.

    Args:
        logits: (B, T, V) of this exit. before, after: (B, T, D) hidden states around the segment; `before` None = no
            policy looks at `Evidence.similarity`, which is then not a number.
        previous: per stream what the exit before said about this chunk, or None.
        want_log_probs: also bring (T, V) log-posteriors to the host (beam search needs them).
        want_evidence: a policy will look at it. False saves most of this function's time; evidence is then `UNJUDGED`.
    """
    import torch

    log_probs = logits.float().log_softmax(dim=-1)
    top, ids = _best(log_probs)
    columns = [top, ids.to(top.dtype)]
    if want_evidence:
        columns.append(torch.linalg.vecdot(log_probs.exp(), log_probs))
        columns.append(torch.full_like(top, math.nan) if before is None else _cosine(before, after))
    if want_log_probs:
        columns.append(log_probs.flatten(1))
    packed = torch.cat(columns, dim=1).cpu().numpy()
    batch, frames, vocab = logits.shape
    tops, labels = packed[:, :frames], packed[:, frames : 2 * frames].astype(np.int64)
    tables = packed[:, -frames * vocab :].reshape(batch, frames, vocab) if want_log_probs else None
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
        results.append(ExitScores(scores[i], _evidence(summaries[i], text, earlier), text))
    return results


def unpack(row: np.ndarray, num_frames: int, earlier: ExitScores | None, log_probs: np.ndarray | None) -> ExitScores:
    """One chunk's numbers as a graph leaves them: summary (or nothing), (T,) best pieces, (T,) log-posteriors."""
    first = len(row) - 2 * num_frames
    best, top = row[first : first + num_frames].astype(np.int64), row[first + num_frames :]
    scores = FrameScores(best, top, log_probs)
    if not first:
        return ExitScores(scores, UNJUDGED)
    text = collapse(best).tobytes()
    return ExitScores(scores, _evidence([*row[:first].tolist(), math.exp(top.min())], text, earlier), text)


def with_beam_share(scores: ExitScores, beams: int) -> ExitScores:
    """`scores`, which hold log-posteriors, with `Evidence.beam_share` of so many prefix beams over the chunk alone."""
    decoder = PrefixBeamDecoder(beam_size=beams, top_tokens=beams)
    share = decoder.advance(decoder.initial(), scores.frames).confidence
    return replace(scores, evidence=replace(scores.evidence, beam_share=share))


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


def _best(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value and its place along the last dimension; on a CPU numpy's argmax is much faster than torch's."""
    import torch

    if log_probs.is_cpu:
        return log_probs.amax(dim=-1), torch.from_numpy(log_probs.numpy().argmax(axis=-1))
    return log_probs.max(dim=-1)


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    """(B, T, D) twice -> (B, T)."""
    import torch

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


def _evidence(summary: list[float], text: bytes, earlier: ExitScores | None) -> Evidence:
    posterior, posterior_all, entropy, entropy_all, blank_mass, similarity, lowest = summary
    agreement, previous = 0.0, None
    if earlier is not None and earlier.evidence is not UNJUDGED:
        agreement, previous = float(text == earlier.text), earlier.evidence
    return Evidence(
        posterior,
        posterior_all,
        entropy,
        entropy_all,
        blank_mass,
        agreement,
        similarity,
        lowest,
        previous=previous,
    )


def collapse(ids: np.ndarray) -> np.ndarray:
    """Greedy CTC collapse of (T,) ids: repeats merged, blanks dropped."""
    keep = np.ones(len(ids), bool)
    keep[1:] = ids[1:] != ids[:-1]
    return ids[keep & (ids != BLANK)]

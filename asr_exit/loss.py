"""CTC at every exit, and what exits or views teach each other.

Shapes: B batch, T encoder frames, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from asr_exit.tokenizer import BLANK_ID


def ctc_loss(logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Mean negative log-likelihood per target token.

    Args:
        logits: (B, T, V), any float type; the softmax is taken in fp32. lengths: (B,) valid frames.
        targets: ids joined end to end, (sum of target_lengths,).
    Returns:
        Scalar fp32. Utterances that CTC cannot place count zero.
    """
    log_probs = logits.float().log_softmax(dim=-1).transpose(0, 1)
    total = F.ctc_loss(log_probs, targets, lengths, target_lengths, blank=BLANK_ID, reduction="sum", zero_infinity=True)
    return total / target_lengths.sum().clamp(min=1)


def exit_losses(logits: Sequence[Tensor], lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """`ctc_loss` of each exit, (number of exits,). One call for all exits, which are equal in shape."""
    exits = len(logits)
    stacked = torch.cat([item.float() for item in logits]).log_softmax(dim=-1).transpose(0, 1)
    each = F.ctc_loss(
        stacked,
        targets.repeat(exits),
        lengths.repeat(exits),
        target_lengths.repeat(exits),
        blank=BLANK_ID,
        reduction="none",
        zero_infinity=True,
    )
    return each.view(exits, -1).sum(dim=1) / target_lengths.sum().clamp(min=1)


def consistency_loss(logits: Sequence[Tensor], lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """Symmetric divergence between the posteriors of two views of each utterance (CR-CTC, arXiv 2410.05101).

    Args:
        logits: per exit (2 B, T, V); row b + B is another view of row b, frame by frame.
    Returns:
        Per exit, divided by the number of target tokens, (exits,) fp32. Each view learns from the other, held fixed.
    """
    log_probs = torch.stack([item.float().log_softmax(dim=-1) for item in logits])
    first, second = log_probs.chunk(2, dim=1)
    divergence = 0.5 * (_divergence(first.detach(), second) + _divergence(second.detach(), first))
    half = len(lengths) // 2
    return _per_token(divergence, lengths[:half], target_lengths[:half])


def distillation_losses(logits: Sequence[Tensor], lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """Divergence of every exit but the last from the last, which is held fixed, (exits - 1,) fp32 per target token."""
    log_probs = torch.stack([item.float().log_softmax(dim=-1) for item in logits])
    return _per_token(_divergence(log_probs[-1:].detach(), log_probs[:-1]), lengths, target_lengths)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of log-posteriors (..., V), summed over V."""
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def _per_token(divergence: Tensor, lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """(exits, B, T) summed over valid frames, divided by the number of tokens, (exits,)."""
    valid = torch.arange(divergence.shape[-1], device=lengths.device) < lengths[:, None]
    return (divergence * valid).sum(dim=(1, 2)) / target_lengths.sum().clamp(min=1)


def random_depth(batch: int, chunks: int, num_segments: int, generator: torch.Generator | None = None) -> Tensor:
    """Segments that each chunk runs, (B, chunks) int64 uniform in 1..num_segments: what a serving policy may do."""
    return torch.randint(1, num_segments + 1, (batch, chunks), generator=generator)

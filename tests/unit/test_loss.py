"""CTC against a hand-worked case, exits against single calls."""

from __future__ import annotations

import math

import pytest
import torch

from asr_exit.loss import ctc_loss, exit_losses, random_depth


def test_two_frames_one_token_by_hand() -> None:
    # Uniform over {blank, a, b}: paths of "a" in two frames are aa, a-, -a: 3 of 9.
    loss = ctc_loss(torch.zeros(1, 2, 3), torch.tensor([2]), torch.tensor([1]), torch.tensor([1]))
    assert float(loss) == pytest.approx(-math.log(3 / 9))


def test_exits_equal_single_calls() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(3, 12, 7) for _ in range(4)]
    lengths, targets, target_lengths = torch.tensor([12, 9, 7]), torch.tensor([1, 2, 2, 3, 4]), torch.tensor([2, 2, 1])
    together = exit_losses(logits, lengths, targets, target_lengths)
    alone = torch.stack([ctc_loss(item, lengths, targets, target_lengths) for item in logits])
    torch.testing.assert_close(together, alone)


def test_padding_frames_do_not_matter() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 10, 5)
    changed = logits.clone()
    changed[:, 6:] = 100.0
    arguments = (torch.tensor([6]), torch.tensor([1, 3]), torch.tensor([2]))
    assert float(ctc_loss(logits, *arguments)) == float(ctc_loss(changed, *arguments))


def test_impossible_alignment_counts_zero_and_has_no_gradient() -> None:
    logits = torch.randn(1, 1, 5, requires_grad=True)
    loss = ctc_loss(logits, torch.tensor([1]), torch.tensor([1, 1]), torch.tensor([2]))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_bf16_logits_give_fp32_loss() -> None:
    loss = ctc_loss(torch.zeros(1, 4, 3, dtype=torch.bfloat16), torch.tensor([4]), torch.tensor([1]), torch.tensor([1]))
    assert loss.dtype == torch.float32


def test_random_depth_covers_every_depth() -> None:
    depth = random_depth(50, 20, 6, torch.Generator().manual_seed(1))
    assert depth.shape == (50, 20)
    assert set(depth.flatten().tolist()) == {1, 2, 3, 4, 5, 6}

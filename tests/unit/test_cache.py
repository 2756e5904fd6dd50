"""What batches are told about their frames: angles and masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asr_exit import cache
from asr_exit.attention import additive, rotary, visible
from asr_exit.cache import CachePool
from asr_exit.config import ModelConfig

CONFIG = ModelConfig(vocab_size=20, d_model=16, ff_dim=32, num_heads=2, num_layers=4, subsampling_channels=4)


def pool(slots: int = 3) -> CachePool:
    return CachePool(CONFIG, slots, [(1, 80)], torch.device("cpu"))


@pytest.mark.parametrize("start", [0, cache._TABLE_FRAMES - 4, cache._TABLE_FRAMES, 12 * 3600 * 24 * 365])
def test_angles_are_exact_from_the_first_frame_to_a_year_later(start: int) -> None:
    positions = np.array([[0, 1, 2, 3, 4], [start, start + 1, start + 2, start + 3, start + 4]])
    found = pool()._rotary(positions)
    expected = rotary(torch.from_numpy(positions), 8, torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("chunk_frames", [2, 4, 8, 16])
def test_masks_are_those_of_the_offline_pass(chunk_frames: int) -> None:
    streams = pool(4)
    slots = np.array([streams.acquire() for _ in range(4)])
    rng = np.random.default_rng(chunk_frames)
    for turn in range(40):
        members = slots if turn % 5 == 0 else rng.permutation(slots)[: rng.integers(1, 5)]
        frames = np.full(len(members), chunk_frames)
        if turn % 7 == 3:
            streams.leave_hole(0, members, frames)
            continue
        start = streams.segments[0].clock[members]
        context, _, _ = streams.begin(0, members, frames, chunk_frames, (len(members) + 1, chunk_frames))
        held = torch.from_numpy(streams.segments[0].positions[members])
        seen = visible(torch.from_numpy(start[:, None]), held, chunk_frames, CONFIG.left_context_frames)
        assert context.mask is not None
        assert torch.equal(context.mask[:-1], additive(seen, torch.float32))
        assert (context.mask[-1] == additive(torch.zeros(1, 1, 1, dtype=torch.bool), torch.float32)).all()

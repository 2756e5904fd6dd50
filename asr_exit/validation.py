"""Loss and greedy word error rate of every exit on held-out clips, while a model is being trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_exit.data import Batch, Clip, FeatureStore, collate
from asr_exit.encoder import Encoder
from asr_exit.loss import exit_losses
from asr_exit.parallel import Group
from asr_exit.tokenizer import BLANK_ID, Tokenizer

CHUNK_FRAMES = 8
BATCH_FRAMES = 12_000


def greedy_texts(logits: Tensor, lengths: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Best path of (B, T, V), repeats and blanks removed."""
    texts = []
    for row, length in zip(logits.argmax(dim=-1), lengths.tolist(), strict=True):
        ids = torch.unique_consecutive(row[:length]).tolist()
        texts.append(tokenizer.decode([index for index in ids if index != BLANK_ID]))
    return texts


def held_out_batches(store: FeatureStore, fill: np.ndarray, limit: int | None) -> Iterator[Batch]:
    """Clips in batches of similar length; a `limit` spreads over the whole set."""
    clips = sorted(store.clips, key=lambda clip: clip.utterance_id)
    if limit is not None and len(clips) > limit:
        clips = [clips[i] for i in np.linspace(0, len(clips) - 1, limit).astype(int)]
    group: list[Clip] = []
    for clip in sorted(clips, key=lambda clip: clip.frames):
        if group and clip.frames * (len(group) + 1) > BATCH_FRAMES:
            yield collate(store, group, fill)
            group = []
        group.append(clip)
    if group:
        yield collate(store, group, fill)


def validate(
    model: Encoder,
    store: FeatureStore,
    tokenizer: Tokenizer,
    fill: np.ndarray,
    *,
    segments: int | None,
    limit: int | None,
    bf16: bool,
    device: torch.device,
    group: Group,
) -> dict[str, Any]:
    """Results of the first `segments` exits on up to `limit` clips, in chunks of 8 frames, shared over processes.

    Returns:
        "loss" (CTC per token) and "wer" per exit, "utterances", and "example" (reference, text of the last exit).
        Without the jiwer package there is no "wer".
    """
    mine: list[
        tuple[str, list[str], int, list[float]]
    ] = []  # per batch row: reference, text per exit, tokens, loss sums
    with torch.inference_mode():
        for number, batch in enumerate(held_out_batches(store, fill, limit)):
            if number % group.size != group.rank:
                continue
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = model(
                    batch.features.to(device),
                    batch.feature_lengths.to(device),
                    chunk_frames=min(CHUNK_FRAMES, model.config.max_chunk_frames),
                    num_segments=segments,
                )
            targets, target_lengths = batch.targets.to(device), batch.target_lengths.to(device)
            losses = exit_losses(output.logits, output.lengths, targets, target_lengths).tolist()
            tokens = int(target_lengths.sum())
            by_exit = [greedy_texts(logits, output.lengths, tokenizer) for logits in output.logits]
            for row, texts in enumerate(zip(*by_exit, strict=True)):
                first = row == 0  # a batch's loss is booked once
                sums = [loss * tokens for loss in losses] if first else [0.0] * len(losses)
                mine.append((batch.texts[row], list(texts), tokens if first else 0, sums))
    rows = [row for part in group.gather(mine) for row in part]
    if not rows:
        return {}
    tokens = max(1, sum(row[2] for row in rows))
    result: dict[str, Any] = {
        "loss": [round(total / tokens, 4) for total in np.sum([row[3] for row in rows], axis=0).tolist()],
        "utterances": len(rows),
        "example": [rows[-1][0], rows[-1][1][-1]],
    }
    if importlib.util.find_spec("jiwer") is not None:
        from asr_exit.metrics import wer

        references = [row[0] for row in rows]
        rates = [wer(references, texts).rate for texts in zip(*(row[1] for row in rows), strict=True)]
        result = {"wer": [round(rate, 4) for rate in rates], **result}
    return result

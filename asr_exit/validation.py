"""Loss and greedy word error rate of every exit on held-out clips, while a model is being trained."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Decoded:
    """One held-out utterance: what was said, and what every exit wrote."""

    utterance_id: str
    reference: str
    texts: tuple[str, ...]


def decode_exits(
    model: Encoder,
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    *,
    segments: int | None = None,
    chunk_frames: int | None = CHUNK_FRAMES,
    bf16: bool = False,
    device: torch.device | None = None,
) -> tuple[list[Decoded], np.ndarray, int]:
    """Greedy text of the first `segments` exits (default: all) under the streaming mask of `chunk_frames`.

    Returns:
        The utterances, the summed CTC loss of every exit (exits,), and the number of target tokens.
    """
    device = device or torch.device("cpu")
    decoded: list[Decoded] = []
    total, tokens = np.zeros(segments or model.config.num_exits), 0
    with torch.inference_mode():
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = model(
                    batch.features.to(device),
                    batch.feature_lengths.to(device),
                    chunk_frames=None if chunk_frames is None else min(chunk_frames, model.config.max_chunk_frames),
                    num_segments=segments,
                )
            targets, target_lengths = batch.targets.to(device), batch.target_lengths.to(device)
            count = int(target_lengths.sum())
            losses = exit_losses(output.logits, output.lengths, targets, target_lengths)
            total, tokens = total + count * losses.cpu().double().numpy(), tokens + count
            by_exit = zip(*(greedy_texts(logits, output.lengths, tokenizer) for logits in output.logits), strict=True)
            decoded += map(Decoded, batch.ids, batch.texts, by_exit)
    return decoded, total, tokens


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
    batches = itertools.islice(held_out_batches(store, fill, limit), group.rank, None, group.size)
    parts = group.gather(decode_exits(model, batches, tokenizer, segments=segments, bf16=bf16, device=device))
    rows = [row for decoded, _, _ in parts for row in decoded]
    if not rows:
        return {}
    loss = sum(total for _, total, _ in parts) / max(1, sum(tokens for _, _, tokens in parts))
    longest = max(rows, key=lambda row: len(row.reference))
    result: dict[str, Any] = {
        "loss": [round(value, 4) for value in loss.tolist()],
        "utterances": len(rows),
        "example": [longest.reference, longest.texts[-1]],
    }
    if importlib.util.find_spec("jiwer") is not None:
        from asr_exit.metrics import wer

        references = [row.reference for row in rows]
        rates = [wer(references, texts).rate for texts in zip(*(row.texts for row in rows), strict=True)]
        result = {"wer": [round(rate, 4) for rate in rates], **result}
    return result

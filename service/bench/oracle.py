"""The oracle: the depth that a policy with the answer at hand would choose, as in Duo-LLM (arXiv 2410.10846)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from rapidfuzz.distance import Levenshtein

from asr_exit.calibration.observe import Observation
from asr_exit.evidence import collapse
from asr_exit.tokenizer import Tokenizer


def same_text(item: Observation) -> tuple[int, ...]:
    """Per chunk the shallowest exit whose pieces equal the deepest exit's."""
    return tuple(int(exit_index) for exit_index in (item.edits == 0).argmax(axis=0))


def no_more_errors(item: Observation, tokenizer: Tokenizer, reference: str) -> tuple[int, ...]:
    """Per chunk the shallowest exit that leaves the utterance with no more word errors than full depth.

    Chunks are decided in order, each with the choices before it made and full depth after it: a greedy search, so the
    true optimum may be cheaper still.
    """
    wanted, deepest = reference.split(), len(item.ids) - 1
    bounds = np.cumsum([0, *item.frames]) * (item.ids.shape[1] // sum(item.frames))
    parts = [[row[a:b] for a, b in pairwise(bounds)] for row in item.ids]
    chosen = list(parts[deepest])
    exits: list[int] = []
    for chunk in range(len(item.frames)):
        for exit_index in range(deepest + 1):
            chosen[chunk] = parts[exit_index][chunk]
            text = tokenizer.decode(collapse(np.concatenate(chosen)).tolist())
            if exit_index == deepest or Levenshtein.distance(wanted, text.split()) <= item.errors:
                exits.append(exit_index)
                break
    return tuple(exits)

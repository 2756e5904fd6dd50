"""Phones as a second task in training: CTC over a word's sounds, read from the state after a shallow segment.

English spelling hides what its sounds share, and a few hours of speech do not show it. A pronunciation lexicon says it
outright, to lower layers that must tell phones apart while deeper ones spell (hierarchical multitask training, Sanabria
and Metze, arXiv 1807.07104). Only training has this output; nothing of it is exported.
The bundled model gained nothing by it.

Shapes: B batch, T encoder frames, D model dimension, P phones and the blank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from asr_exit.encoder import ExitHead
from asr_exit.errors import ConfigError
from asr_exit.loss import ctc_loss
from asr_exit.tokenizer import BLANK_ID

LEXICON = "lexicon.json"  # in the data folder: {word: "phone phone ..."}
LABELS_PER_FRAME = 2  # a frame of 80 ms holds a phone on average, and CTC needs room between equal ones


class PhoneExit(nn.Module):
    """An exit head over phones. Zero at first and without random draws, so that a run with it
    begins as it does without."""

    def __init__(self, d_model: int, lexicon: Mapping[str, Sequence[str]]) -> None:
        """`lexicon`: phones of every word.

        Raises:
            ConfigError: it is empty.
        """
        super().__init__()
        names = sorted({phone for phones in lexicon.values() for phone in phones})
        if not names:
            raise ConfigError("the lexicon holds no phone; make it again with `python -m recipes.librispeech.lexicon`")
        numbers = {name: number for number, name in enumerate(names, start=BLANK_ID + 1)}
        self._ids = {word: tuple(numbers[phone] for phone in phones) for word, phones in lexicon.items()}
        with torch.random.fork_rng(devices=[]):
            self.head = ExitHead(d_model, len(names) + 1, labels_per_frame=LABELS_PER_FRAME)
        nn.init.zeros_(self.head.out.weight)
        nn.init.zeros_(self.head.out.bias)
        self.last = float("nan")  # what `loss` said last

    def targets(self, text: str) -> tuple[int, ...]:
        """Numbers of the phones of a text, from 1 on; () where a word of it is not in the lexicon."""
        found: list[int] = []
        for word in text.split():
            if word not in self._ids:
                return ()
            found += self._ids[word]
        return tuple(found)

    def forward(self, state: Tensor) -> Tensor:
        """(B, T, D) -> (B, `LABELS_PER_FRAME` * T, P) logits."""
        return self.head(state.float())  # type: ignore[no-any-return]

    def loss(self, state: Tensor, lengths: Tensor, texts: Sequence[str]) -> Tensor:
        """CTC per phone, scalar fp32; of the texts that the lexicon has all words of. 0 where there is none.

        Args:
            state: (B, T, D). lengths: (B,) valid frames. texts: B of them.
        """
        targets = [self.targets(text) for text in texts]
        rows = torch.tensor([row for row, phones in enumerate(targets) if phones], device=state.device)
        known = [phones for phones in targets if phones]
        logits = self(state)
        if not known:
            return logits.sum() * 0.0  # every process has gradients of the same parameters
        loss = ctc_loss(
            logits.index_select(0, rows),
            LABELS_PER_FRAME * lengths.index_select(0, rows),
            torch.tensor([phone for phones in known for phone in phones], device=state.device),
            torch.tensor([len(phones) for phones in known], device=state.device),
        )
        self.last = float(loss.detach())
        return loss


def read_lexicon(data: Path) -> dict[str, tuple[str, ...]]:
    """The pronunciations beside prepared data.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    path = data / LEXICON
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {word: tuple(phones.split()) for word, phones in entries.items()}
    except FileNotFoundError:
        raise ConfigError(
            f"no {LEXICON} in {data}: run `python -m recipes.librispeech.lexicon --data {data}`"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no lexicon, an object of words and their phones: {error}") from error

"""Byte-pair pieces for CTC: sentencepiece, with the unknown slot (id 0) doubling as the CTC blank."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from asr_exit.errors import CheckpointError, ConfigError

BLANK_ID = 0
WORD_START = "▁"  # sentencepiece's marker of a piece that begins a word
ALPHABET = "abcdefghijklmnopqrstuvwxyz'"
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "`": "'"})
_OTHER = re.compile(r"[^a-z' ]+")


def normalise(text: str) -> str:
    """Lower case; keep a-z, apostrophe and single spaces. Everything else separates words.

    Words of apostrophes alone are dropped.
    """
    kept = _OTHER.sub(" ", text.translate(_APOSTROPHES).lower())
    return " ".join(word for word in kept.split() if word.strip("'"))


class Tokenizer:
    """Text to piece ids and back. Ids run from 1; 0 is the blank and is never produced from normalised text."""

    def __init__(self, proto: bytes) -> None:
        """`proto`: a serialised sentencepiece model.

        Raises:
            CheckpointError: `proto` is not such a model, or its unknown id is not 0.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise CheckpointError(f"the tokenizer is not a sentencepiece model: {error}") from error
        if self._processor.unk_id() != BLANK_ID:
            raise CheckpointError(f"the tokenizer's unknown id must be {BLANK_ID}, not {self._processor.unk_id()}")
        self.proto = proto
        self.pieces: tuple[str, ...] = tuple(
            self._processor.id_to_piece(index) for index in range(self._processor.get_piece_size())
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, blank included."""
        return len(self.pieces)

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int = 256) -> Tokenizer:
        """Learn byte-pair merges from `lines` (any case; normalised here).

        Raises:
            ConfigError: too little text for `vocab_size` pieces.
        """
        sentences = [line for line in map(normalise, lines) if line]
        if not sentences:
            raise ConfigError("no text to train the tokenizer on; give at least one transcript")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=1.0,
                required_chars=ALPHABET,
                normalization_rule_name="identity",
                unk_id=BLANK_ID,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ConfigError(
                f"cannot learn {vocab_size} pieces from {len(sentences)} lines; "
                f"use a smaller vocabulary or more text ({error})"
            ) from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Piece ids of `text`, normalised first. Never contains the blank."""
        return [int(index) for index in self._processor.encode(normalise(text))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; blanks are skipped."""
        joined = "".join(self.pieces[index] for index in ids if index != BLANK_ID)
        return " ".join(joined.replace(WORD_START, " ").split())

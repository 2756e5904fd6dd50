"""Options and decoders of the entry points that turn posteriors into text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from asr_exit.checkpoint import Model
from asr_exit.ctc import CtcDecoder, FrameScores
from asr_exit.decoders import make_decoder
from asr_exit.fusion import LanguageModel
from asr_exit.ngram import NgramModel
from asr_exit.stream import StreamOptions
from asr_exit.words import Word, words_from_tokens


def add_language_model_options(parser: argparse.ArgumentParser) -> None:
    """--lm, --lm-weight, --lm-word-bonus, --lm-unknown-penalty, --beam-size."""
    parser.add_argument("--lm", type=Path, help="n-gram language model, a file or `bundled`; needs the beam")
    parser.add_argument("--lm-weight", type=float, default=LanguageModel.weight)
    parser.add_argument("--lm-word-bonus", type=float, default=LanguageModel.word_bonus)
    parser.add_argument("--lm-unknown-penalty", type=float, default=LanguageModel.unknown_penalty)
    parser.add_argument("--beam-size", type=int, default=StreamOptions.beam_size)


def decoder_named(name: str, model: Model, ngrams: NgramModel | None, options: argparse.Namespace) -> CtcDecoder[Any]:
    """`greedy`, `beam`, or `lm`, the beam with the language model. Raises ConfigError for a number out of range."""
    if name == "greedy":
        return make_decoder(StreamOptions(), model.pieces)
    fusion = None
    if name == "lm" and ngrams is not None:
        fusion = LanguageModel(ngrams, options.lm_weight, options.lm_word_bonus, options.lm_unknown_penalty)
    asked = StreamOptions(decoder="beam", beam_size=options.beam_size, language_model=fusion)
    return make_decoder(asked, model.pieces)


def decode(decoder: CtcDecoder[Any], log_probs: np.ndarray, model: Model) -> tuple[Word, ...]:
    """Words of (T, V) log-posteriors of a whole recording."""
    if not len(log_probs):
        return ()
    state = decoder.advance(decoder.initial(), FrameScores.from_log_probs(log_probs)).settle()
    return words_from_tokens(state.tokens(), model.pieces, model.config.label_ms)

"""The language model that a server was given, and which streams use it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from asr_exit.fusion import LanguageModel
from asr_exit.ngram import load_ngram_model
from service.errors import invalid

if TYPE_CHECKING:
    from asr_exit.stream import StreamOptions
    from service.config import LanguageModelConfig


class ServedLanguageModel:
    """Loaded once, read by all streams."""

    def __init__(self, config: LanguageModelConfig) -> None:
        """Raises CheckpointError for a file that is no language model, ConfigError for a number out of range."""
        self._beam_size = config.beam_size
        self._fusion = None
        if config.path:
            model = load_ngram_model(config.path)
            self._fusion = LanguageModel(model, config.weight, config.word_bonus, config.unknown_penalty)

    def apply(self, asked: float | None, options: StreamOptions) -> StreamOptions:
        """`options` with the language model, unless the weight asked for is 0; None is the server's.

        Raises StreamError when a weight is asked for and there is no model, ConfigError for a weight out of range.
        """
        if self._fusion is None:
            if asked:
                raise invalid("no language model is served here: leave language_model_weight unset, or send 0")
            return options
        if asked == 0:
            return options
        fusion = self._fusion if asked is None else replace(self._fusion, weight=asked)
        beam_size = max(self._beam_size, options.beam_size)
        return replace(options, decoder="beam", beam_size=beam_size, language_model=fusion)

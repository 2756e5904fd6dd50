"""When an utterance ends: rules over silence and length, in the style of Kaldi's online endpointing.

Silence is what the CTC decoder calls blank. Only the text is cut; the encoder and the CTC context go on, so a word that
is being spoken across the cut is neither lost nor doubled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from asr_exit.config import require

LONGEST_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class EndpointRule:
    """Holds when all its conditions do. Raises ConfigError when one is out of range."""

    min_silence_ms: float  # at the end
    must_contain_speech: bool = True  # False: silence alone, since the last final result, counts, too
    min_utterance_ms: float = 0.0  # from the first word, or without one from the last final result

    def __post_init__(self) -> None:
        for name in ("min_silence_ms", "min_utterance_ms"):
            value = getattr(self, name)
            require(0 <= value <= LONGEST_MS, f"endpoint rule: {name}={value:g} must be from 0 to {LONGEST_MS}")
        require(
            self.min_silence_ms > 0 or self.min_utterance_ms > 0,
            "endpoint rule: min_silence_ms or min_utterance_ms must be more than 0, or it would always hold",
        )

    def holds(self, *, contains_speech: bool, silence_ms: float, utterance_ms: Callable[[], float]) -> bool:
        """Whether an utterance of this length, asked for if it matters, ends here, given the silence at its end."""
        return (
            (contains_speech or not self.must_contain_speech)
            and silence_ms >= self.min_silence_ms
            and (self.min_utterance_ms == 0 or utterance_ms() >= self.min_utterance_ms)
        )

"""Exit thresholds for a quantised model: as many chunks leave at every exit as before.

Quantisation shifts an exit's confidence a little, and not by the same amount everywhere. Both models are run over the
same recordings; a threshold moves to the value that the same share of the quantised model's chunks reaches at that
exit. Needs neither transcripts nor knowledge of how the thresholds were solved, so any calibration can be carried over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asr_exit.backend import StreamingModel
from asr_exit.engine import Engine
from asr_exit.errors import ConfigError
from asr_exit.policy import Evidence, Full
from asr_exit.stream import StreamOptions
from asr_exit.transcript import transcribe

# criterion -> what of the evidence it looks at; learned ones, and those that compare texts, stay as they are
CRITERIA = {
    "posterior": "max_posterior",
    "posterior-all": "max_posterior_all",
    "entropy": "entropy",
    "entropy-all": "entropy_all",
    "similarity": "similarity",
}
DIGITS = 5


@dataclass(frozen=True)
class _Observer(Full):
    """Full depth; keeps what every exit but the last says about every chunk."""

    needs_evidence = True
    needs_similarity = True
    seen: list[list[Evidence]] = field(default_factory=list)

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        while len(self.seen) <= exit_index:
            self.seen.append([])
        assert evidence is not None
        self.seen[exit_index].append(evidence)
        return False


def observe(model: StreamingModel, recordings: Iterable[np.ndarray], chunk_ms: float) -> dict[str, np.ndarray]:
    """Per criterion (exits - 1, chunks): what each exit says about each chunk of (N,) float32 recordings.

    Raises:
        ConfigError: not one whole chunk in all of them.
    """
    engine, observer = Engine(model, slots=1), _Observer()
    options = StreamOptions(chunk_ms=chunk_ms, policy=observer)
    for samples in recordings:
        transcribe(engine, samples, options)
    if not observer.seen:
        raise ConfigError("the recordings are shorter than a frame; give longer ones to recalibrate on")
    return {
        name: np.array([[getattr(evidence, attribute) for evidence in chunks] for chunks in observer.seen])
        for name, attribute in CRITERIA.items()
    }


def carry_over(threshold: float, before: np.ndarray, after: np.ndarray) -> float:
    """The value that as large a share of `after` (N,) lies below as of `before` (N,) lies below `threshold`.

    A threshold that no chunk, or every chunk, reached stays as it is.
    """
    below = float((before < threshold).mean())
    if below in (0.0, 1.0):
        return threshold
    return round(float(np.clip(np.quantile(after, below), 0.0, 1.0)), DIGITS)


def recalibrate(
    calibration: Mapping[str, Any], before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """`calibration` with every list of thresholds, however deep it is nested, carried over; all else is kept.

    Args:
        before, after: from `observe`, of the exact and of the quantised model.
    """

    def walk(value: Any, move: Callable[[int, Any], Any] | None) -> Any:
        if isinstance(value, Mapping):
            return {
                key: [move(index, one) for index, one in enumerate(item)]
                if move is not None and key == "thresholds" and isinstance(item, (list, tuple))
                else walk(item, mover(key) or move)
                for key, item in value.items()
            }
        return [walk(item, move) for item in value] if isinstance(value, (list, tuple)) else value

    def mover(criterion: str) -> Callable[[int, Any], Any] | None:
        if criterion not in CRITERIA:
            return None

        def move(exit_index: int, threshold: Any) -> Any:
            if threshold is None or exit_index >= len(before[criterion]):
                return threshold
            return carry_over(float(threshold), before[criterion][exit_index], after[criterion][exit_index])

        return move

    return dict(walk(calibration, None))

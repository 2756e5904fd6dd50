"""Threshold criteria: leave at the first exit whose evidence is on the sure side of that exit's threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from asr_exit.errors import ConfigError
from asr_exit.policies.base import Evidence, ExitPolicy, is_number
from asr_exit.policies.table import CostTable

Thresholds = float | tuple[float | None, ...]
BEAMS = 8


@dataclass(frozen=True)
class Criterion(ExitPolicy):
    """Common part: one threshold for all exits, or one per exit with None for "not here".

    The last exit needs none: a per-exit tuple may leave it out. With a `table` the thresholds follow a wanted cost.
    """

    threshold: Thresholds
    table: CostTable | None = field(default=None, compare=False, repr=False)
    needs_evidence: ClassVar[bool] = True  # type: ignore[misc]
    needs_similarity: ClassVar[bool] = False  # type: ignore[misc]
    beams: ClassVar[int] = 0  # type: ignore[misc]
    label: ClassVar[str] = ""
    low_is_sure: ClassVar[bool] = False
    largest: ClassVar[float] = 1.0  # thresholds lie from 0 to here

    def __post_init__(self) -> None:
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        for value in values:
            if value is None and isinstance(self.threshold, tuple):
                continue
            if not is_number(value) or not 0.0 <= value <= self.largest:
                raise ConfigError(f"{self.label} threshold {value!r} must be a number from 0 to {self.largest:g}")

    @property
    def name(self) -> str:
        return self.label if isinstance(self.threshold, tuple) else f"{self.label}:{self.threshold:g}"

    @property
    def adjustable(self) -> bool:
        return self.table is not None

    def at(self, macs_fraction: float) -> Self:
        return self if self.table is None else replace(self, threshold=self.table.at(macs_fraction))

    def deepest(self, num_exits: int) -> int:
        if isinstance(self.threshold, tuple) and len(self.threshold) not in (num_exits - 1, num_exits):
            raise ConfigError(
                f"{self.label} has {len(self.threshold)} thresholds; a model with {num_exits} exits needs "
                f"{num_exits - 1} or {num_exits}"
            )
        return num_exits - 1

    def max_exit(self, num_exits: int, chunk_index: int = 0) -> int:
        """The first exit whose own threshold lets every chunk leave: evidence is not needed there."""
        deepest = self.deepest(num_exits)
        if not isinstance(self.threshold, tuple):
            return deepest
        always = self.largest if self.low_is_sure else 0.0
        return next((k for k, value in enumerate(self.threshold[:deepest]) if value == always), deepest)

    def threshold_at(self, exit_index: int) -> float | None:
        """Threshold of one exit; None where the criterion never stops."""
        if not isinstance(self.threshold, tuple):
            return self.threshold
        return self.threshold[exit_index] if exit_index < len(self.threshold) else None

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        """The number that is held against the threshold; not a number = unknown, which never stops."""
        raise NotImplementedError

    def measures(self, exit_index: int, evidence: Sequence[Evidence]) -> list[float]:
        """`measure` of many chunks."""
        return [self.measure(exit_index, item) for item in evidence]

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        return evidence is not None and self.is_sure(exit_index, self.measure(exit_index, evidence))

    def is_sure(self, exit_index: int, value: float) -> bool:
        """Whether a chunk with this `measure` leaves."""
        threshold = self.threshold_at(exit_index)
        if threshold is None:
            return False
        return value <= threshold if self.low_is_sure else value >= threshold


class Posterior(Criterion):
    """Leave when `Evidence.max_posterior` reaches the threshold.

    The cheap per-chunk form of the sentence confidence of arXiv 2309.09546 ("Training dynamic models using early exits
    for automatic speech recognition on resource-constrained devices"), which needs K beams: see `Sentence`.
    """

    label = "posterior"

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        return evidence.max_posterior


class PosteriorAll(Criterion):
    """As `Posterior`, but over all frames: one minus it, times the frames, is the expected number of wrong frames."""

    label = "posterior-all"

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        return evidence.max_posterior_all


class Sentence(Criterion):
    """Leave when the best of K prefix beams holds a large enough share of the probability of all K.

    Sentence confidence, exp(s1) / sum_k exp(s_k), of arXiv 2309.09546. A stream has no whole sentence to judge, so the
    beams run over the chunk alone, from an empty prefix.
    """

    label = "sentence"
    beams = BEAMS

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        return evidence.beam_share


class Entropy(Criterion):
    """Leave when `Evidence.entropy` falls to the threshold.

    Frame entropy as in arXiv 2309.09546, but divided by ln V instead of V, so that it lies in [0, 1], and averaged over
    non-blank frames; thresholds of that paper do not transfer.
    """

    label = "entropy"
    low_is_sure = True

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        return evidence.entropy


class EntropyAll(Criterion):
    """As `Entropy`, but over all frames, as in the paper."""

    label = "entropy-all"
    low_is_sure = True

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        return evidence.entropy_all


class Patience(Criterion):
    """Leave when so many exits in a row gave the chunk the same text as the exit before (PABEE, arXiv 2006.04152)."""

    label = "patience"
    largest = 64.0

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        run, at = 0, evidence
        while at.agreement == 1.0:
            run += 1
            if at.previous is None:
                break
            at = at.previous
        return float(run)


class Similarity(Criterion):
    """Leave when hidden states have stopped changing: mean cosine with the exit before (MuE, arXiv 2211.11152)."""

    label = "similarity"
    needs_similarity = True

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        return evidence.similarity

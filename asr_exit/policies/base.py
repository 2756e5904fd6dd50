"""What every exit policy has in common, and the evidence that it looks at."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, Protocol, Self, TypeGuard

import numpy as np


class Reason(StrEnum):
    """Why a chunk ended at its exit."""

    CONFIDENT = "confident"  # the policy's criterion was met
    BUDGET = "budget"  # the caller's compute budget set the ceiling
    LOAD = "load"  # the machine's load set the ceiling
    FULL = "full"  # as deep as the policy goes
    FINAL = "final"  # the end of the utterance or stream was drained at full depth


_NO_MEMO: tuple[object, int, float] = None, -1, math.nan


class Evidence:
    """What one exit knows about one chunk of one stream. Frames whose most likely label is blank are blank frames.

    Attributes:
        max_posterior: mean over non-blank frames of the largest posterior; over all frames if all are blank.
        max_posterior_all: the same over all frames.
        entropy: mean over non-blank frames of -sum_v p ln p / ln V, in [0, 1]; over all frames if all are blank.
        entropy_all: the same over all frames.
        blank_mass: share of blank frames.
        agreement: 1 if the greedy text of the chunk equals the previous exit's, else 0; 0 at the first exit.
        similarity: mean cosine between a frame's hidden state at this exit and at the one before (at the first exit:
            before the first layer).
        lowest_posterior: smallest over all frames of the largest posterior.
        beam_share: share of the best of K prefix beams in the probability of all K; only for a policy that asks.
        previous: what the exit before said about the same chunk; None at the first exit.
        memo: what `QExit` computed from all this, so that the next exit need not again: (weights, exit index, value).

    A value that is not a number never stops a chunk. All but the last three stand in `numbers`, in this order: a row of
    the array that was computed for the whole batch, so that one object per stream and exit costs little.
    """

    __slots__ = ("beam_share", "memo", "numbers", "previous")

    def __init__(
        self,
        max_posterior: float,
        max_posterior_all: float,
        entropy: float,
        entropy_all: float,
        blank_mass: float,
        agreement: float = 0.0,
        similarity: float = 0.0,
        lowest_posterior: float = math.nan,
        beam_share: float = math.nan,
        previous: Evidence | None = None,
    ) -> None:
        numbers = (max_posterior, max_posterior_all, entropy, entropy_all, blank_mass, agreement, similarity)
        self.numbers = np.array((*numbers, lowest_posterior))
        self.beam_share, self.previous, self.memo = beam_share, previous, _NO_MEMO

    @classmethod
    def of_row(cls, numbers: np.ndarray, previous: Evidence | None, beam_share: float = math.nan) -> Evidence:
        """From (8,) float64 in the order of the attributes."""
        made = cls.__new__(cls)
        made.numbers, made.previous, made.beam_share, made.memo = numbers, previous, beam_share, _NO_MEMO
        return made

    @property
    def max_posterior(self) -> float:
        return self.numbers.item(0)

    @property
    def max_posterior_all(self) -> float:
        return self.numbers.item(1)

    @property
    def entropy(self) -> float:
        return self.numbers.item(2)

    @property
    def entropy_all(self) -> float:
        return self.numbers.item(3)

    @property
    def blank_mass(self) -> float:
        return self.numbers.item(4)

    @property
    def agreement(self) -> float:
        return self.numbers.item(5)

    @property
    def similarity(self) -> float:
        return self.numbers.item(6)

    @property
    def lowest_posterior(self) -> float:
        return self.numbers.item(7)


class ExitPolicy(Protocol):
    """Chooses the exit of a chunk. Inherit from it to get the defaults: full depth, no evidence, never stop."""

    @property
    def name(self) -> str:
        """Short name for tables and logs, e.g. "exit:4"."""

    @property
    def needs_evidence(self) -> bool:
        """Whether `stop` looks at its evidence; if not, the engine need not compute any."""
        return False

    @property
    def needs_similarity(self) -> bool:
        """Whether `stop` looks at `Evidence.similarity`, which is then computed."""
        return self.needs_evidence

    @property
    def beams(self) -> int:
        """How many prefix beams `Evidence.beam_share` must be computed with; 0 = `stop` does not look at it."""
        return 0

    @property
    def adjustable(self) -> bool:
        """Whether `at` can meet a wanted mean cost. A budget is then a target, else a cap."""
        return False

    def at(self, macs_fraction: float) -> Self:
        """This policy, set to spend `macs_fraction` of full depth on average; itself where that cannot be chosen."""
        return self

    def deepest(self, num_exits: int) -> int:
        """Deepest exit index that any chunk may take: deeper layers never run, and its answers are final.

        Raises:
            ConfigError: the policy does not fit a model with `num_exits` exits.
        """
        return num_exits - 1

    def max_exit(self, num_exits: int, chunk_index: int = 0) -> int:
        """Deepest exit index for chunk `chunk_index` of a stream, known before anything is computed.

        Raises:
            ConfigError: the policy does not fit a model with `num_exits` exits.
        """
        return self.deepest(num_exits)

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        """Whether to leave at `exit_index`, which lies above the ceiling."""
        return False


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite int or float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

"""When to leave: exit policies and the evidence they look at.

Before a chunk is computed the engine asks `max_exit`; after every exit shallower than that ceiling it asks `stop`, of
all streams at once through `stops`. Budget and load may lower the ceiling further (`asr_exit.budget`,
`asr_exit.load_control`), and a budget moves a calibrated policy to other thresholds (`ExitPolicy.at`). A policy holds
no stream state, so one object serves any number of streams. No torch here: evidence arrives as floats.
"""

from __future__ import annotations

from asr_exit.policies.base import Evidence, ExitPolicy, Reason
from asr_exit.policies.criteria import (
    Criterion,
    Entropy,
    EntropyAll,
    Patience,
    Posterior,
    PosteriorAll,
    Sentence,
    Similarity,
)
from asr_exit.policies.learned import ExitWeights, Gate, JointGate, QExit, stops
from asr_exit.policies.parse import CRITERIA, calibration_for, default_criterion, parse_policy
from asr_exit.policies.static import Fixed, Full, RandomDepth, Scheduled
from asr_exit.policies.table import CostTable

__all__ = [
    "CRITERIA",
    "CostTable",
    "Criterion",
    "Entropy",
    "EntropyAll",
    "Evidence",
    "ExitPolicy",
    "ExitWeights",
    "Fixed",
    "Full",
    "Gate",
    "JointGate",
    "Patience",
    "Posterior",
    "PosteriorAll",
    "QExit",
    "RandomDepth",
    "Reason",
    "Scheduled",
    "Sentence",
    "Similarity",
    "calibration_for",
    "default_criterion",
    "parse_policy",
    "stops",
]

"""Policies from text and from a model's calibration."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asr_exit.errors import ConfigError
from asr_exit.policies.base import ExitPolicy, is_number
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
from asr_exit.policies.learned import ExitWeights, Gate, JointGate, QExit
from asr_exit.policies.static import Fixed, Full, RandomDepth
from asr_exit.policies.table import CostTable

CRITERIA: dict[str, type[Criterion]] = {
    kind.label: kind
    for kind in (Posterior, PosteriorAll, Sentence, Entropy, EntropyAll, Patience, Similarity, Gate, JointGate, QExit)
}
LEARNED = ("gate", "joint-gate", "q-exit")
DEFAULT_CRITERION = "posterior"  # of models whose calibration names none
_KNOWN = (
    "auto, full, exit:LAYER, random[:SEED[/MEAN]], and with calibrated or given thresholds (NAME[:THRESHOLD]) "
    + ", ".join(CRITERIA)
)


def parse_policy(
    spec: str,
    *,
    exit_layers: Sequence[int],
    calibration: Mapping[str, Any] | None = None,
    chunk_ms: float | None = None,
) -> ExitPolicy:
    """Policy from text: auto, full, exit:4 (or fixed:4), posterior[:0.9], entropy[:0.2], ..., random[:seed[/mean]].

    "auto" is the criterion that calibration found best for this model; full where it is not calibrated. `CRITERIA`
    names all of them. Without a number a criterion uses `calibration[name]["thresholds"]` (one number, or a list with
    one entry per exit), and its cost table where there is one, so that it can follow a budget. Per-exit thresholds
    are separated by slashes: "posterior:0.95/0.9/0.9/0.85/0.8", with "-" for "not here".

    Args:
        chunk_ms: chunk length of the stream; of several calibrations the one for the nearest length is taken.

    Raises:
        ConfigError: unknown name (the message suggests the nearest), a bad argument, or no calibration for it.
    """
    name, colon, argument = (part.strip() for part in spec.strip().lower().partition(":"))
    if name not in _PARSERS and name not in CRITERIA:
        near = difflib.get_close_matches(name, [*_PARSERS, *CRITERIA], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown policy {spec!r}; {hint}Known: {_KNOWN}")
    if colon and not argument:
        raise ConfigError(f"policy {spec!r}: nothing follows the colon")
    rows = calibration_for(calibration or {}, chunk_ms)
    return _PARSERS.get(name, _parse_criterion)(name, argument, tuple(exit_layers), rows)


def calibration_for(calibration: Mapping[str, Any], chunk_ms: float | None) -> Mapping[str, Any]:
    """Of a calibration of several chunk lengths the part for the one nearest to `chunk_ms` (as a ratio)."""
    others = calibration.get("by_chunk_ms")
    if chunk_ms is None or not isinstance(others, Mapping):
        return calibration
    own = calibration.get("chunk_ms")
    choices = [*([float(own)] if is_number(own) else []), *map(float, others)]
    best = min(choices, key=lambda length: abs(math.log(length / chunk_ms)))
    return calibration if best == own else others[f"{best:g}"]


def default_criterion(calibration: Mapping[str, Any]) -> str | None:
    """What "auto" stands for; None where the model is not calibrated for it."""
    name = calibration.get("default", DEFAULT_CRITERION)
    row = calibration.get(name, {}) if name in CRITERIA else {}
    return name if isinstance(row, Mapping) and "thresholds" in row else None


def _parse_full(name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]) -> ExitPolicy:
    if argument:
        raise ConfigError(f"policy 'full' takes no argument, got {argument!r}; to stop at a layer use 'exit:LAYER'")
    return Full()


def _parse_fixed(name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]) -> ExitPolicy:
    choices = "/".join(map(str, exit_layers))
    if not argument.isdecimal() or int(argument) not in exit_layers:
        raise ConfigError(f"policy {name!r} needs an exit layer, {name}:{choices}; got {argument!r}")
    return Fixed(int(argument), exit_every=exit_layers[0])


def _parse_random(name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]) -> ExitPolicy:
    seed, slash, mean = argument.partition("/")
    try:
        if argument and not seed.isdecimal():
            raise ValueError
        return RandomDepth(int(seed or 0), float(mean) if slash else None)
    except ValueError:
        raise ConfigError(
            "policy 'random' takes a whole number as seed and, after a slash, a mean depth from 0 to 1, e.g. "
            f"'random:7' or 'random:7/0.6', got {argument!r}"
        ) from None


def _parse_auto(name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]) -> ExitPolicy:
    if argument:
        raise ConfigError(f"policy 'auto' takes no argument, got {argument!r}; did you mean 'posterior:{argument}'?")
    criterion = default_criterion(calibration)
    return Full() if criterion is None else _parse_criterion(criterion, "", exit_layers, calibration)


def _parse_criterion(
    name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]
) -> ExitPolicy:
    table = None
    stored = calibration.get(name)
    stored = stored if isinstance(stored, Mapping) else {}
    if argument:
        try:
            values = [None if part == "-" else float(part) for part in argument.split("/")]
        except ValueError:
            raise ConfigError(
                f"policy {name!r} takes numbers from 0 to {CRITERIA[name].largest:g}, e.g. '{name}:0.5', "
                f"got {argument!r}"
            ) from None
    else:
        values = _calibrated(name, stored)
        table = CostTable.parse(stored["table"]) if stored.get("table") else None
    extra = {"weights": ExitWeights.parse(stored, name)} if name in LEARNED else {}
    threshold = values[0] if len(values) == 1 and values[0] is not None else tuple(values)
    policy = CRITERIA[name](threshold, table, **extra)
    policy.deepest(len(exit_layers))
    if table is not None:
        policy.at(1.0).deepest(len(exit_layers))
    return policy


def _calibrated(name: str, stored: Mapping[str, Any]) -> list[float | None]:
    """The thresholds stored with the model for criterion `name`."""
    thresholds = stored.get("thresholds")
    if thresholds is None:
        raise ConfigError(
            f"this model has no calibrated thresholds for {name!r}; run 'asr-exit calibrate', give one, e.g. "
            f"'{name}:0.5', or use 'full' or 'exit:LAYER'"
        )
    values = list(thresholds) if isinstance(thresholds, (list, tuple)) else [thresholds]
    if not values or not all(value is None or is_number(value) for value in values):
        raise ConfigError(f"the model's calibration for {name!r} is not a list of numbers: {thresholds!r}")
    return values


_PARSERS: dict[str, Callable[[str, str, tuple[int, ...], Mapping[str, Any]], ExitPolicy]] = {
    "auto": _parse_auto,
    "full": _parse_full,
    "fixed": _parse_fixed,
    "exit": _parse_fixed,
    "random": _parse_random,
}

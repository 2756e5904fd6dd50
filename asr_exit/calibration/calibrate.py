"""From held-out recordings to what a checkpoint stores about its exit policies.

Observe once at full depth, solve every criterion's thresholds for a grid of mean costs on that record, then replay a
few rows of each in the engine: an early exit changes what deeper layers see later (fill `propagate`), which the record
cannot know, so cost and word errors of the table are corrected by what the engine measured, interpolated in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from asr_exit.calibration.compare import best_measured, unseen_wer
from asr_exit.calibration.gates import train_gates, train_hazards
from asr_exit.calibration.observe import Observations, observe
from asr_exit.calibration.replay import outcome, replay
from asr_exit.calibration.solve import Row, choose, exits_of, solve, static_thresholds, thinned
from asr_exit.calibration.workers import Recording, Workers
from asr_exit.errors import ConfigError
from asr_exit.policies.criteria import BEAMS
from asr_exit.policies.learned import FEATURES, ExitWeights
from asr_exit.policy import CRITERIA, Criterion, Gate, JointGate, QExit
from asr_exit.stream import Fill, StreamOptions

TOLERANCE = 0.0175  # relative word errors that early exits may cost on the calibration set
PROBES = (0.25, 0.5, 0.75)  # rows replayed per criterion, by their place in the table
PROBE_SECONDS = 1500.0  # of audio per replayed row
FINALISTS = 3  # the best of them are measured in the engine, on everything
TRIES = 8  # rows that one of these may step up when the engine measures more errors than predicted
CHUNK_MS = (640, 160, 320, 1280)  # the first is what is meant where nobody says


def calibrate(
    workers: Workers,
    recordings: Sequence[Recording],
    *,
    name: str,
    chunks_ms: Sequence[int] = CHUNK_MS,
    criteria: Sequence[str] | None = None,
    target: float | None = None,
    tolerance: float = TOLERANCE,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_length: Callable[[dict[str, Any]], None] = lambda calibration: None,
) -> dict[str, Any]:
    """Calibration of the workers' model, ready for `save_model`; chunk lengths not asked for stay as they are.

    Args:
        name: of the recordings, for the record.
        chunks_ms: chunk lengths to calibrate for; the first is the default one of a model that has none.
        criteria: None = all that the model can have: `joint-gate` needs gates that were trained with it.
        target: wanted mean cost of the default thresholds, as a share of full depth; None asks for the cheapest row
            that adds at most `tolerance` (relative) word errors.
        on_stage: told what begins.
        on_length: given what there is, ready for `save_model`, whenever one chunk length is done.

    Raises:
        ConfigError: nothing to calibrate, a criterion that is unknown or not the model's, or a target outside (0, 1].
        AudioError: a recording that cannot be read.
    """
    gates = workers.model.calibration.get(JointGate.label)
    if criteria is None:
        criteria = [label for label in CRITERIA if gates or label != JointGate.label]
    unknown = [criterion for criterion in criteria if criterion not in CRITERIA]
    if unknown or not criteria or not chunks_ms:
        raise ConfigError(f"cannot calibrate {', '.join(unknown) or 'nothing'}; criteria are {', '.join(CRITERIA)}")
    if JointGate.label in criteria and not gates:
        raise ConfigError(f"the model has no gates for {JointGate.label!r}; train it with gate_weight above 0")
    if target is not None and not 0.0 < target <= 1.0:
        raise ConfigError(f"the target {target:g} must be a share of full depth, above 0 and at most 1")
    stored, parts = workers.model.calibration, _by_length(workers.model.calibration)
    default = f"{stored.get('chunk_ms') or chunks_ms[0]:g}"
    for chunk_ms in chunks_ms:
        part = _for_chunk(workers, recordings, name, float(chunk_ms), criteria, target, tolerance, on_stage)
        if gates and JointGate.label not in criteria:  # only training could make them again
            part[JointGate.label] = {key: gates[key] for key in ("weights", "features")}
        parts[f"{chunk_ms:g}"] = part
        calibration = dict(parts[default])
        if others := {length: parts[length] for length in sorted(parts, key=float) if length != default}:
            calibration["by_chunk_ms"] = others
        on_length(calibration)
    return calibration


def _by_length(calibration: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each chunk length's part of a stored calibration."""
    if not calibration.get("chunk_ms"):
        return {}
    parts = dict(calibration.get("by_chunk_ms", {}))
    parts[f"{calibration['chunk_ms']:g}"] = {k: v for k, v in calibration.items() if k != "by_chunk_ms"}
    return parts


def _for_chunk(
    workers: Workers,
    recordings: Sequence[Recording],
    name: str,
    chunk_ms: float,
    criteria: Sequence[str],
    target: float | None,
    tolerance: float,
    on_stage: Callable[[str], None],
) -> dict[str, Any]:
    on_stage(f"{chunk_ms:g} ms: observing {len(recordings)} recordings")
    observations = observe(workers, recordings, chunk_ms, BEAMS if "sentence" in criteria else 0)
    probe = _Probe(workers, observations, chunk_ms)
    result: dict[str, Any] = {
        "chunk_ms": chunk_ms,
        "fill": str(Fill.PROPAGATE),
        "data": f"{name}, {len(recordings)} utterances, {observations.seconds / 3600:.2f} h",
        "date": datetime.now(UTC).date().isoformat(),
        "full_wer": round(observations.full_wer, 4),
        "tolerance": tolerance,
    }
    tables: dict[str, tuple[Criterion, list[Row]]] = {}
    for label in criteria:
        on_stage(f"{chunk_ms:g} ms: {label}")
        policy = trained(label, observations, workers.model.calibration)
        rows = thinned(probe.corrected(policy, table(policy, observations)))
        tables[label] = policy, rows
        chosen = choose(rows, observations.full_wer, target, tolerance)
        result[label] = chosen.stored(CRITERIA[label]) | _weights(policy)
        result[label]["table"] = [row.stored(CRITERIA[label]) for row in rows]
    cheap = [label for label in criteria if CRITERIA[label].beams == 0] or list(criteria)
    limit = (1.0 + tolerance) * observations.full_wer
    for label in cheap:
        wer = unseen_wer(observations, partial(_solved, label, stored=workers.model.calibration))
        result[label]["wer_unseen"] = round(wer, 4)
    for label in sorted(cheap, key=lambda label: float(result[label]["wer_unseen"]))[:FINALISTS]:
        on_stage(f"{chunk_ms:g} ms: measuring {label}, which may become the default")
        result[label] |= _measured(probe, *tables[label], result[label], limit, target)
    result["default"] = best_measured(result, limit, target)
    return result


def trained(label: str, observations: Observations, stored: Mapping[str, Any] | None = None) -> Criterion:
    """The criterion of that name that never leaves; a learned one with weights trained on the observations.

    Args:
        stored: the model's calibration, which holds the weights of `joint-gate`.
    """
    never = (None,) * (len(observations.macs) - 1)
    if label == Gate.label:
        return Gate(never, weights=train_gates(observations.evidence, observations.harm))
    if label == JointGate.label:
        return JointGate(never, weights=ExitWeights.parse((stored or {}).get(label, {}), label))
    if label == QExit.label:
        return QExit(never, weights=train_hazards(observations.evidence, observations.harm))
    return CRITERIA[label](never)


def table(policy: Criterion, observations: Observations) -> list[Row]:
    """Rows of thresholds with the cost and word errors that the observations promise, cheapest first."""
    confidence = observations.confidence(policy)
    fills = np.arange(len(observations.macs) - 1, -1, -1)[:, None] * observations.fill_macs
    costs = (observations.macs + fills) / (observations.full_macs / observations.macs.shape[1])
    rows = []
    for thresholds in dict.fromkeys(solve(confidence, observations.harm, observations.edits, costs)):
        exits = exits_of(confidence, thresholds)
        rows.append(Row(observations.macs_fraction(exits), observations.wer(exits), thresholds))
    for k in range(len(confidence) - 1):  # a criterion must not do worse than an exit that it could always take
        cost = observations.macs_fraction(np.full(confidence.shape[1], k))
        rows.append(Row(cost, observations.static_wer(k), static_thresholds(k, len(confidence))))
    return thinned(rows)


def _solved(label: str, observations: Observations, stored: Mapping[str, Any]) -> tuple[Criterion, list[Row]]:
    policy = trained(label, observations, stored)
    return policy, table(policy, observations)


def _weights(policy: Criterion) -> dict[str, Any]:
    weights = getattr(policy, "weights", None)
    if not isinstance(weights, ExitWeights):
        return {}
    return {"weights": [list(row) for row in weights.rows], "features": list(FEATURES)}


class _Probe:
    """Replays rows in the engine on a part of the recordings, spread over all of them."""

    def __init__(self, workers: Workers, observations: Observations, chunk_ms: float) -> None:
        self._workers, self._all = workers, observations
        self._options = StreamOptions(chunk_ms=chunk_ms, fill=Fill.PROPAGATE)
        step = max(1, int(observations.seconds / PROBE_SECONDS))
        self._part = observations.only(range(0, len(observations.items), step))

    def measure(self, policy: Criterion, row: Row, everywhere: bool = False) -> tuple[float, float]:
        """(Share of full MACs, word error rate) of the row's thresholds, in the engine."""
        setting = dataclasses.replace(policy, threshold=tuple(row.native(type(policy))))
        options = dataclasses.replace(self._options, policy=setting)
        recordings = (self._all if everywhere else self._part).recordings
        found = outcome(self._workers.map(replay, recordings, options))
        return found.macs_fraction, found.wer

    def corrected(self, policy: Criterion, rows: Sequence[Row]) -> list[Row]:
        """`rows` as the engine would measure them; both ends are exact as they are."""
        confidence = self._part.confidence(policy)
        places, dearer, worse = [rows[0].macs_fraction], [0.0], [0.0]
        for share in PROBES if len(rows) > 2 else ():
            row = rows[1 + int(share * (len(rows) - 2))]
            if row.macs_fraction <= places[-1] or row is rows[-1]:
                continue
            exits = exits_of(confidence, row.thresholds)
            cost, wer = self.measure(policy, row)
            places.append(row.macs_fraction)
            dearer.append(cost - self._part.macs_fraction(exits))
            worse.append(wer / max(1e-9, self._part.wer(exits)) - 1.0)
        places.append(max(1.0, rows[-1].macs_fraction))
        dearer.append(0.0)
        worse.append(0.0)
        return [
            row
            if row.is_static
            else Row(
                min(1.0, row.macs_fraction + float(np.interp(row.macs_fraction, places, dearer))),
                row.wer * (1.0 + float(np.interp(row.macs_fraction, places, worse))),
                row.thresholds,
            )
            for row in rows
        ]


def _measured(
    probe: _Probe,
    policy: Criterion,
    rows: Sequence[Row],
    stored: Mapping[str, Any],
    limit: float,
    target: float | None,
) -> dict[str, Any]:
    """The stored row as the engine measures it on everything; above `limit` word errors, a more expensive one."""
    place = next(i for i, row in enumerate(rows) if row.stored(type(policy))["thresholds"] == stored["thresholds"])
    for step in range(TRIES):
        row = rows[min(place + step, len(rows) - 1)]
        cost, wer = probe.measure(policy, row, everywhere=True)
        if wer <= limit or target is not None:
            break
    return row.stored(type(policy)) | {"macs_fraction_measured": round(cost, 4), "wer_measured": round(wer, 4)}

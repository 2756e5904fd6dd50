"""`asr-exit bench depth`: every exit criterion against every static exit, random depth and the oracle.

All figures are measured with the engine, fill `propagate`. A criterion's curve comes from its calibrated table, set to
a grid of mean costs. Between measured points a curve stands for a mix of both settings (some recordings with one, some
with the other), which anybody could serve. Intervals are paired bootstraps over recordings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from asr_exit.budget import Budget
from asr_exit.calibration.observe import observe
from asr_exit.calibration.replay import Joined, Mixed, Replay, Source, replay
from asr_exit.calibration.workers import Recording, Workers
from asr_exit.errors import ConfigError
from asr_exit.policy import CRITERIA, ExitPolicy, Fixed, Full, RandomDepth, Scheduled, calibration_for, parse_policy
from asr_exit.stream import Fill, StreamOptions
from service.bench.oracle import no_more_errors, same_text
from service.bench.paired import Point, difference, errors_at, hull, worst_window

BUDGETS = (0.3, 0.5, 0.7, 0.9)
SNRS_DB = (20.0, 10.0, 5.0, 0.0)
EQUAL_COSTS = (0.4, 0.5, 0.6, 0.7, 0.8)
JOINED_SECONDS = 120.0  # of the streams on which 30 s windows are checked
SET_BAR, WINDOW_BAR, WER_BAR, COST_BAR, ORACLE_BAR = 0.03, 0.10, 0.02, 0.60, 0.60


@dataclass
class DepthStudy:
    """Everything that was measured; `values` is what goes into the JSON file."""

    static: list[Point] = field(default_factory=list)
    curves: dict[str, list[Point]] = field(default_factory=dict)
    random: list[Point] = field(default_factory=list)
    oracles: list[Point] = field(default_factory=list)
    default: Point | None = None
    example: tuple[Recording, Replay] | None = None
    values: dict[str, Any] = field(default_factory=dict)


class Runner:
    """Measures settings over one set of recordings."""

    def __init__(
        self, workers: Workers, recordings: Sequence[Recording], chunk_ms: float, on_point: Callable[[str], None]
    ) -> None:
        self.workers, self.model, self.recordings = workers, workers.model, list(recordings)
        self.options = StreamOptions(chunk_ms=chunk_ms, fill=Fill.PROPAGATE)
        self._on_point = on_point

    def policy(self, spec: str) -> ExitPolicy:
        """A calibrated policy of the model."""
        layers = self.model.config.exit_layers
        return parse_policy(
            spec, exit_layers=layers, calibration=self.model.calibration, chunk_ms=self.options.chunk_ms
        )

    def point(
        self,
        name: str,
        policies: ExitPolicy | list[ExitPolicy],
        sources: Sequence[Source] | None = None,
        **options: Any,
    ) -> Point:
        """One setting on every recording (or on `sources`); a policy for all, or one each."""
        self._on_point(name)
        sources = self.recordings if sources is None else sources
        each = policies if isinstance(policies, list) else [policies] * len(sources)
        pairs = [
            (source, dataclasses.replace(self.options, policy=policy, **options))
            for source, policy in zip(sources, each, strict=True)
        ]
        return Point.of(name, self.workers.map(_replay_pairs, pairs))


def _replay_pairs(model: Any, pairs: Sequence[tuple[Source, StreamOptions]]) -> list[Replay]:
    return replay(model, [source for source, _ in pairs], [options for _, options in pairs])


def study(
    runner: Runner, *, criteria: Sequence[str], points: int, noise: Sequence[Recording], seed: int = 0
) -> DepthStudy:
    """Run everything; `noise` recordings (may be none) are mixed in for depth against signal-to-noise ratio.

    Raises:
        ConfigError: the model is not calibrated for a criterion asked for.
    """
    found = DepthStudy()
    config = runner.model.config
    tables = calibration_for(runner.model.calibration, runner.options.chunk_ms)
    for layer in config.exit_layers[:-1]:
        found.static.append(runner.point(f"exit:{layer}", Fixed(layer, config.exit_every)))
    found.static.append(runner.point("full", Full()))
    default = runner.policy("auto")
    if not default.adjustable:
        raise ConfigError("this model has no cost tables: run 'asr-exit calibrate' first")
    found.default = runner.point(f"auto ({default.name})", default)
    for label in criteria:
        rows = [row["macs_fraction"] for row in tables[label]["table"]]
        inner = np.linspace(min(rows), 1.0, points + 2)[1:-1]
        policy = runner.policy(label)
        found.curves[label] = [runner.point(f"{label} at {cost:.2f}", policy.at(float(cost))) for cost in inner]
    for mean in np.linspace(0.0, 1.0, points + 2)[1:-1]:
        draws: list[ExitPolicy] = [RandomDepth(seed + index, float(mean)) for index in range(len(runner.recordings))]
        found.random.append(runner.point(f"random/{mean:.2f}", draws))
    _oracles(runner, found)
    found.values = {
        "recordings": len(runner.recordings),
        "hours": sum(sum(item.chunk_seconds) for item in found.static[0].replays) / 3600,
        "chunk_ms": runner.options.chunk_ms,
        "default": default.name,
        "static": [_row(point, config.exit_layers) for point in found.static],
        "criteria": {label: [_row(p, config.exit_layers) for p in curve] for label, curve in found.curves.items()},
        "random": [_row(point, config.exit_layers) for point in found.random],
        "oracles": [_row(point, config.exit_layers) for point in found.oracles],
        "default_row": _row(found.default, config.exit_layers),
        "comparisons": _comparisons(found),
        "budgets": _budgets(runner, default, found.static[-1]),
        "snr": _noisy(runner, default, found.default, noise, config.exit_layers),
    }
    replays = found.default.replays
    longest = max(range(len(replays)), key=lambda index: replays[index].full_macs)
    found.example = runner.recordings[longest], replays[longest]
    return found


def _row(point: Point, layers: Sequence[int]) -> dict[str, Any]:
    return {
        "name": point.name,
        "wer": point.wer,
        "macs_fraction": point.cost,
        "mean_exit_layer": _mean_layer(point, layers),
    }


def _mean_layer(point: Point, layers: Sequence[int]) -> float:
    exits = [layers[index] for item in point.replays for index in item.exits]
    return float(np.mean(exits)) if exits else 0.0


def _oracles(runner: Runner, found: DepthStudy) -> None:
    observed = observe(runner.workers, runner.recordings, runner.options.chunk_ms)
    items = dict(zip(observed.recordings, observed.items, strict=True))
    tokenizer = runner.model.tokenizer

    def schedule(choose: Callable[[Any, Recording], tuple[int, ...]]) -> list[ExitPolicy]:
        return [Scheduled(choose(items[r], r) if r in items else ()) for r in runner.recordings]

    found.oracles = [
        runner.point("oracle (same text)", schedule(lambda item, _: same_text(item))),
        runner.point("oracle (no more errors)", schedule(lambda item, r: no_more_errors(item, tokenizer, r.text))),
    ]


def _comparisons(found: DepthStudy) -> dict[str, Any]:
    default, full = found.default, found.static[-1]
    assert default is not None
    words, cost = default.words, default.cost
    against_full = difference(default.errors, full.errors, words)
    static = difference(errors_at(hull(found.static), cost), default.errors, words)
    random = difference(errors_at([found.static[0], *found.random, full], cost), default.errors, words)
    oracle = found.oracles[-1]
    share = (1 - cost) / (1 - oracle.cost) if oracle.cost < 1 else 0.0
    result: dict[str, Any] = {
        "default_against_full": dataclasses.asdict(against_full) | {"relative": against_full.wer_difference / full.wer},
        "static_of_equal_cost_minus_default": dataclasses.asdict(static),
        "random_of_equal_cost_minus_default": dataclasses.asdict(random),
        "share_of_oracle_saving": share,
        "bars": {
            f"at most {COST_BAR:.0%} of full MACs": cost <= COST_BAR,
            f"at most {WER_BAR:.0%} relative word errors more": against_full.wer_difference <= WER_BAR * full.wer,
            "better than static of equal cost, surely": static.low > 0,
            "better than random of equal cost, surely": random.low > 0,
            f"share of the oracle's saving at least {ORACLE_BAR:.0%}": share >= ORACLE_BAR,
        },
    }
    if {"posterior", "entropy"} <= found.curves.keys():
        ends = [found.static[0], full]
        posterior, entropy = ([*ends, *found.curves[name]] for name in ("posterior", "entropy"))
        result["entropy_minus_posterior"] = {
            f"{at:g}": dataclasses.asdict(difference(errors_at(entropy, at), errors_at(posterior, at), words))
            for at in EQUAL_COSTS
        }
    return result


def _budgets(runner: Runner, policy: ExitPolicy, full: Point) -> dict[str, Any]:
    """The set as it is, and joined to long streams for the windows."""
    joined = _joined(runner.recordings)
    rows = []
    for asked in BUDGETS:
        whole = runner.point(f"budget {asked:g}", policy, budget=Budget(mean_depth=asked))
        long = runner.point(f"budget {asked:g}, long", policy, joined, budget=Budget(mean_depth=asked))
        rows.append(
            {
                "asked": asked,
                "spent": whole.cost,
                "wer": whole.wer,
                "spent_long_streams": long.cost,
                "worst_30s_deviation": worst_window(long.replays, asked),
            }
        )
    wers = [row["wer"] for row in rows]
    return {
        "rows": rows,
        "bars": {
            f"spent within {SET_BAR} over the set": all(abs(row["spent"] - row["asked"]) <= SET_BAR for row in rows),
            f"within {WINDOW_BAR} over any 30 s": all(row["worst_30s_deviation"] <= WINDOW_BAR for row in rows),
            "word errors fall with the budget": all(a >= b for a, b in pairwise(wers)),
        },
    }


def _joined(recordings: Sequence[Recording]) -> list[Joined]:
    """Recordings in a row, about `JOINED_SECONDS` at 8 s each."""
    size = max(1, round(JOINED_SECONDS / 8))
    return [Joined(tuple(recordings[start : start + size])) for start in range(0, len(recordings), size)]


def _noisy(
    runner: Runner, policy: ExitPolicy, clean: Point, noise: Sequence[Recording], layers: Sequence[int]
) -> dict[str, Any]:
    if not noise:
        return {}
    rows = [{"snr_db": None, **_row(clean, layers)}]
    rng = np.random.default_rng(0)
    picks = [(int(rng.integers(len(noise))), int(rng.integers(1 << 20))) for _ in runner.recordings]
    for snr_db in SNRS_DB:
        sources = [
            Mixed(recording, noise[which], snr_db, start)
            for recording, (which, start) in zip(runner.recordings, picks, strict=True)
        ]
        rows.append({"snr_db": snr_db, **_row(runner.point(f"{snr_db:g} dB", policy, sources), layers)})
    depths = [float(str(row["mean_exit_layer"])) for row in rows]
    return {
        "rows": rows,
        "bars": {"deeper with more noise": all(a < b for a, b in pairwise(depths))},
    }


def calibrated_criteria(tables: Any, wanted: Sequence[str] | None) -> list[str]:
    """The criteria to run. Raises ConfigError for one that the model has no table of."""
    ready = [label for label in CRITERIA if isinstance(tables.get(label), dict) and tables[label].get("table")]
    missing = [label for label in wanted or () if label not in ready]
    if missing or not ready:
        raise ConfigError(
            f"this model has no cost table for {', '.join(missing) or 'any criterion'}: run 'asr-exit calibrate' first"
        )
    return [label for label in ready if wanted is None or label in wanted]

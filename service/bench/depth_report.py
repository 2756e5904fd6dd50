"""The depth study as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(values: Mapping[str, Any], caption: str) -> str:
    """One page: every setting, comparisons with their intervals, budgets, noise."""
    lines = [
        f"{values['recordings']} recordings, {values['hours']:.2f} h, chunks of {values['chunk_ms']:g} ms, fill "
        f"`propagate`, default policy `{values['default']}`. {caption}",
        "",
    ]
    rows = [values["default_row"], *values["static"], *values["oracles"]]
    for curve in values["criteria"].values():
        rows += curve
    rows += values["random"]
    lines += table(
        ("setting", "WER %", "MACs, % of full depth", "mean exit layer"),
        [
            (row["name"], _percent(row["wer"], 2), _percent(row["macs_fraction"]), f"{row['mean_exit_layer']:.2f}")
            for row in rows
        ],
    )
    lines += _comparisons(values["comparisons"])
    budgets = values["budgets"]
    lines += ["", "Budgets (`mean_depth`), over the set and over recordings joined to long streams:", ""]
    lines += table(
        ("asked", "spent", "WER %", "spent, long streams", "worst deviation over 30 s"),
        [
            (
                row["asked"],
                f"{row['spent']:.3f}",
                _percent(row["wer"], 2),
                f"{row['spent_long_streams']:.3f}",
                f"{row['worst_30s_deviation']:.3f}",
            )
            for row in budgets["rows"]
        ],
    )
    lines += _bars(budgets["bars"])
    if values["snr"]:
        lines += ["", "Noise:", ""]
        lines += table(
            ("signal-to-noise ratio", "WER %", "MACs, % of full depth", "mean exit layer"),
            [
                (
                    "clean" if row["snr_db"] is None else f"{row['snr_db']:g} dB",
                    _percent(row["wer"], 2),
                    _percent(row["macs_fraction"]),
                    f"{row['mean_exit_layer']:.2f}",
                )
                for row in values["snr"]["rows"]
            ],
        )
        lines += _bars(values["snr"]["bars"])
    return "\n".join(lines) + "\n"


def _comparisons(found: Mapping[str, Any]) -> list[str]:
    full = found["default_against_full"]
    lines = [
        "",
        "Differences of word error rates in points, with paired bootstrap 95 % intervals over recordings:",
        "",
    ]
    rows = [
        ("default minus full depth", full),
        ("best static mix of equal cost minus default", found["static_of_equal_cost_minus_default"]),
        ("random of equal cost minus default", found["random_of_equal_cost_minus_default"]),
    ]
    rows += [
        (f"entropy minus posterior at {at} of full MACs", item)
        for at, item in found.get("entropy_minus_posterior", {}).items()
    ]
    lines += table(
        ("comparison", "difference", "95 % interval"),
        [
            (name, f"{100 * item['wer_difference']:+.2f}", f"{100 * item['low']:+.2f} to {100 * item['high']:+.2f}")
            for name, item in rows
        ],
    )
    lines += [
        "",
        f"Relative to full depth: {100 * full['relative']:+.2f} % word errors. "
        f"Share of the oracle's saving: {100 * found['share_of_oracle_saving']:.0f} %.",
    ]
    return lines + _bars(found["bars"])


def _bars(bars: Mapping[str, bool]) -> list[str]:
    return ["", *(f"- {name}: {'met' if holds else 'NOT met'}" for name, holds in bars.items())]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table; all columns but the first are right-aligned."""
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return [_line(head), rule, *map(_line, rows)]


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"

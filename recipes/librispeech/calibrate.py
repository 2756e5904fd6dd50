"""Thresholds for the policies `posterior` and `entropy`, solved on held-out audio and stored in the model.

    python -m recipes.librispeech.calibrate --model IN.safetensors --librispeech DIR --subset dev-clean \\
        --out OUT.safetensors [--target 0.6]

This is the plain calibration. One offline pass at full depth records what every exit says about every chunk; candidate
thresholds (one for all exits, or one per exit at equal risk) are simulated on that record; the settings that none beats
in cost and word errors become the table; the chosen row of each policy is then measured with the engine. The simulation
does not know what filled-in layers do to later chunks, nor does the search look beyond these two families of
thresholds: solving on the running engine, and a row for every budget, are refinements on top of the same format.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from asr_exit.checkpoint import Model, load, save_model
from asr_exit.errors import AsrExitError, ConfigError
from asr_exit.policy import parse_policy
from asr_exit.stream import Fill, StreamOptions
from recipes.librispeech.corpora import Corpus, Utterance, read_librispeech, read_manifest
from recipes.librispeech.observe import observe, stream_outcome
from recipes.librispeech.thresholds import choose, search

CHUNK_MS = 640.0
TARGET = 0.6  # share of full depth, where no row is as good as full depth
TOLERANCE = 0.02  # relative word error rate that early exits may cost
CRITERIA = ("posterior", "entropy")


def calibrate(model: Model, corpus: Corpus, target: float | None = None) -> dict[str, Any]:
    """Calibration of `model` on `corpus`: per criterion `thresholds`, `table`, and the chosen row's outcome.

    `target`: wanted mean cost as a share of full depth; None asks for the cheapest row that is as good as full depth.

    Raises:
        ConfigError: `target` outside (0, 1]. AudioError: a recording that cannot be read.
    """
    if target is not None and not 0.0 < target <= 1.0:
        raise ConfigError(f"the target {target:g} must be a share of full depth, above 0 and at most 1")
    observations = observe(model, _progress(corpus, "observing"), CHUNK_MS)
    deepest = np.full(len(observations.full_macs), model.config.num_exits - 1)
    _, full_wer = observations.outcome(deepest)
    options = StreamOptions(chunk_ms=CHUNK_MS, fill=Fill.PROPAGATE)
    _, full_measured = stream_outcome(model, _progress(corpus, "measuring full"), options)
    result: dict[str, Any] = {
        "chunk_ms": CHUNK_MS,
        "fill": str(Fill.PROPAGATE),
        "data": f"{corpus.name}, {len(corpus.utterances)} utterances, {observations.seconds / 3600:.2f} h",
        "date": datetime.now(UTC).date().isoformat(),
        "full_wer": round(full_wer, 4),
        "full_wer_measured": round(full_measured, 4),
    }
    for criterion in CRITERIA:
        rows = search(observations, criterion)
        chosen = choose(rows, full_wer, target, TOLERANCE, TARGET).stored()
        table = [row.stored() for row in rows]
        policy = parse_policy(criterion, exit_layers=model.config.exit_layers, calibration={criterion: chosen})
        measured = stream_outcome(
            model, _progress(corpus, f"measuring {criterion}"), dataclasses.replace(options, policy=policy)
        )
        result[criterion] = {
            **chosen,
            "macs_fraction_measured": round(measured[0], 4),
            "wer_measured": round(measured[1], 4),
            "table": table,
        }
    return result


def _progress(corpus: Corpus, what: str) -> Iterable[Utterance]:
    return track(corpus.utterances, description=what, console=Console(stderr=True))


def read_corpus(librispeech: Path | None, subset: str, manifest: Path | None, limit: int | None) -> Corpus:
    """The held-out recordings; with `limit`, that many spread over the whole set.

    Raises:
        ConfigError: neither or both sources given, or nothing usable there.
    """
    if (librispeech is None) == (manifest is None):
        raise ConfigError("give either --librispeech with --subset, or --manifest")
    corpus = read_librispeech(librispeech / subset) if librispeech else read_manifest(manifest or Path())
    if limit is not None and 0 < limit < len(corpus.utterances):
        kept = [corpus.utterances[i] for i in np.linspace(0, len(corpus.utterances) - 1, limit).astype(int)]
        corpus = dataclasses.replace(corpus, utterances=tuple(kept))
    return corpus


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Solve exit thresholds on held-out audio.")
    parser.add_argument("--model", type=Path, required=True, help="model file (.safetensors)")
    parser.add_argument("--librispeech", type=Path, help="folder that holds the subsets")
    parser.add_argument("--subset", default="dev-clean", help="held-out subset of it")
    parser.add_argument("--manifest", type=Path, help="manifest.tsv of another held-out corpus")
    parser.add_argument("--limit", type=int, help="use only so many recordings")
    parser.add_argument(
        "--target",
        type=float,
        help="wanted mean cost, share of full depth (default: the least that keeps the word error rate of full depth "
        f"within {TOLERANCE:.0%}, else {TARGET})",
    )
    parser.add_argument("--out", type=Path, required=True, help="model file to write; may equal --model")
    options = parser.parse_args(arguments)
    try:
        model = load(options.model)
        corpus = read_corpus(options.librispeech, options.subset, options.manifest, options.limit)
        calibration = calibrate(model, corpus, options.target)
        state = model.encoder.state_dict()
        save_model(options.out, model.config, state, model.tokenizer, calibration, model.provenance)
        load(options.out)
    except AsrExitError as error:
        sys.exit(f"calibrate: {error}")
    print(json.dumps(calibration, indent=1))


if __name__ == "__main__":
    main()

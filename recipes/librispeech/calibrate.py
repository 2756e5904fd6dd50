"""Thresholds of the exit policies, solved on held-out audio and stored in the model.

    python -m recipes.librispeech.calibrate --model IN.safetensors --librispeech DIR --subset dev-clean \\
        --out OUT.safetensors [--processes 2] [--target 0.6]

The same as `asr-exit calibrate`; see `asr_exit.calibration.calibrate` for what is done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_exit.calibration.calibrate import CHUNK_MS, TOLERANCE, calibrate
from asr_exit.calibration.workers import Recording, Workers
from asr_exit.checkpoint import load, save_model
from asr_exit.errors import AsrExitError, ConfigError
from recipes.librispeech.corpora import Corpus, read_librispeech, read_manifest


def read_corpus(librispeech: Path | None, subset: str, manifest: Path | None) -> Corpus:
    """The held-out recordings. Raises ConfigError: neither or both sources given, or nothing usable there."""
    if (librispeech is None) == (manifest is None):
        raise ConfigError("give either --librispeech with --subset, or --manifest")
    return read_librispeech(librispeech / subset) if librispeech else read_manifest(manifest or Path())


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Solve exit thresholds on held-out audio.")
    parser.add_argument("--model", type=Path, required=True, help="model file (.safetensors)")
    parser.add_argument("--librispeech", type=Path, help="folder that holds the subsets")
    parser.add_argument("--subset", default="dev-clean", help="held-out subset of it")
    parser.add_argument("--manifest", type=Path, help="manifest.tsv of another held-out corpus")
    parser.add_argument("--limit", type=int, help="use only so many recordings, from all over the set")
    parser.add_argument("--chunk-ms", type=int, nargs="+", default=CHUNK_MS, help="saved one by one; others stay")
    parser.add_argument("--target", type=float, help="wanted mean cost of the default thresholds")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative word errors they may add else")
    parser.add_argument("--processes", type=int, default=1, help="one core each")
    parser.add_argument("--out", type=Path, required=True, help="model file to write; may equal --model")
    options = parser.parse_args(arguments)
    try:
        model = load(options.model)
        corpus = read_corpus(options.librispeech, options.subset, options.manifest)
        recordings = [Recording(utterance.path, utterance.text) for utterance in corpus.utterances]
        if options.limit:
            recordings = recordings[:: max(1, len(recordings) // options.limit)][: options.limit]

        def save(calibration: dict[str, Any]) -> None:
            state = model.encoder.state_dict()
            save_model(options.out, model.config, state, model.tokenizer, calibration, model.provenance)

        with Workers(model, options.processes) as workers:
            calibration = calibrate(
                workers,
                recordings,
                name=corpus.name,
                chunks_ms=options.chunk_ms,
                target=options.target,
                tolerance=options.tolerance,
                on_stage=lambda stage: print(stage, file=sys.stderr),
                on_length=save,
            )
        load(options.out)
    except AsrExitError as error:
        sys.exit(f"calibrate: {error}")
    print(json.dumps(calibration, indent=1))


if __name__ == "__main__":
    main()

"""A run folder, or a model file, to a model for phones and small boards.

    python -m recipes.librispeech.export --run RUN --out edge-model [--precision int8] \\
        [--librispeech DIR --subset dev-clean --limit 100]

`asr_exit.edge` runs what comes out without torch. With recordings, the exits' thresholds are carried over to int8 on
them. `asr-exit export` does the same from a model file alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from asr_exit.checkpoint import load
from asr_exit.edge.export import export_model
from asr_exit.errors import AsrExitError, ConfigError
from recipes.librispeech.bundle import bundle
from recipes.librispeech.corpora import read_librispeech


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Export a model for devices.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder of recipes.librispeech.train")
    source.add_argument("--model", type=Path, help="model file, e.g. a calibrated one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an earlier export is replaced")
    parser.add_argument("--precision", choices=("int8", "fp32"), default="int8")
    parser.add_argument("--librispeech", type=Path, help="folder that holds the subset to recalibrate on")
    parser.add_argument("--subset", help="held-out subset, e.g. dev-clean")
    parser.add_argument("--limit", type=int, help="only so many of its recordings")
    options = parser.parse_args(arguments)
    try:
        if (options.librispeech is None) != (options.subset is None):
            raise ConfigError("--librispeech and --subset belong together")
        recordings: list[Path] = []
        if options.librispeech:
            corpus = read_librispeech(options.librispeech / options.subset)
            recordings = [utterance.path for utterance in corpus.utterances[: options.limit]]
        with tempfile.TemporaryDirectory() as folder:
            name = options.run.resolve().name if options.run else ""
            model = bundle(options.run, Path(folder) / f"{name}.safetensors") if options.run else load(options.model)
            manifest = export_model(model, options.out, precision=options.precision, calibrate_on=recordings)
    except (AsrExitError, OSError) as error:
        sys.exit(f"export: {error}")
    size = sum(graph.bytes for graph in manifest.graphs) / 1e6
    print(f"{options.out}: {manifest.precision}, {len(manifest.graphs)} graphs, {size:.1f} MB")


if __name__ == "__main__":
    main()

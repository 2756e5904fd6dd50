"""Transcribes recordings with an exported model and keeps every exit's log-posteriors; runs on either processor.

python transcribe.py EDGE_MODEL RECORDINGS.npz RESULTS.npz
"""

from __future__ import annotations

import json
import platform
import sys

import numpy as np

from asr_exit.edge import EdgeModel
from asr_exit.engine import Engine
from asr_exit.stream import Fill, StreamOptions
from asr_exit.transcript import transcribe
from service.bench.probe import Probe


def main(folder: str, recordings: str, results: str) -> None:
    """See the module."""
    engine = Engine(EdgeModel(folder), slots=1)
    engine.backend = probe = Probe(engine.backend, keep_log_probs=True)
    texts: list[str] = []
    arrays: dict[str, np.ndarray] = {}
    for name, samples in np.load(recordings).items():
        probe.log_probs.clear()
        texts.append(transcribe(engine, samples, StreamOptions(chunk_ms=640, fill=Fill.PROPAGATE)).text)
        arrays |= {f"{name}/{segment}": np.concatenate(parts) for segment, parts in probe.log_probs.items()}
    np.savez(results, about=json.dumps({"machine": platform.machine(), "texts": texts}), **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])

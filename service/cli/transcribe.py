"""`asr-exit transcribe`: files in this process, without a server."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from asr_exit.transcript import Transcript

HELP = "transcribe audio files in this process"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files and how to read them."""
    from service.cli.options import (
        add_decoder_options,
        add_model_options,
        add_recognition_options,
        add_runtime_options,
    )

    parser.add_argument("audio", nargs="+", metavar="AUDIO", help="audio file")
    add_recognition_options(parser, chunk_ms=640)
    add_decoder_options(parser)
    parser.add_argument(
        "--offline",
        action="store_true",
        help="one pass over the whole file; with --chunk-ms it sees as much as streaming would, without, everything",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each file")
    add_model_options(parser)
    add_runtime_options(parser, "torch")


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each file."""
    import json
    import time

    from asr_exit.audio import load_audio
    from asr_exit.config import require

    require(
        not (arguments.offline and (arguments.budget or arguments.fill)),
        "--offline runs everything at one depth: leave out --budget and --fill",
    )
    transcribe = _on_device(arguments) if arguments.runtime == "edge" else _with_torch(arguments)
    for path in arguments.audio:
        samples = load_audio(path)
        begin = time.perf_counter()
        transcript = transcribe(samples)
        if not arguments.json:
            print(f"{path}: {transcript.text}" if len(arguments.audio) > 1 else transcript.text, flush=True)
            continue
        values = {
            "audio": path,
            "text": transcript.text,
            "audio_seconds": round(transcript.audio_seconds, 3),
            "mean_exit_layer": round(transcript.mean_exit_layer, 3),
            "encoder_macs": transcript.encoder_macs,
            "macs_fraction": round(transcript.encoder_macs / transcript.full_macs, 4) if transcript.full_macs else 0.0,
            "real_time_factor": round((time.perf_counter() - begin) / transcript.audio_seconds, 4),
            "words": [
                {"text": word.text, "start_ms": word.start_ms, "end_ms": word.end_ms, "confidence": word.confidence}
                for word in transcript.words
            ],
            "chunks": [
                {
                    "start_ms": chunk.start_ms,
                    "end_ms": chunk.end_ms,
                    "exit_layer": chunk.exit_layer,
                    "decision": chunk.reason.value,
                    "encoder_macs": chunk.encoder_macs,
                }
                for chunk in transcript.chunks
            ],
        }
        print(json.dumps(values), flush=True)
    return 0


def _with_torch(arguments: argparse.Namespace) -> Callable[[np.ndarray], Transcript]:
    from asr_exit.recognizer import Recognizer
    from service.cli.options import load_model, stream_options

    model, device = load_model(arguments)
    recognizer = Recognizer(model, stream_options(arguments, model), device=device)
    if arguments.offline:
        return lambda samples: recognizer.transcribe_offline(samples, chunk_ms=arguments.chunk_ms)
    return recognizer.transcribe


def _on_device(arguments: argparse.Namespace) -> Callable[[np.ndarray], Transcript]:
    from asr_exit.config import require
    from service.cli.options import edge_recognizer

    require(not arguments.offline, "--offline needs torch: leave out --runtime edge")
    require(not arguments.model, "--runtime edge reads an exported model: give --edge-model instead of --model")
    return edge_recognizer(arguments).transcribe

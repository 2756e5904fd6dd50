"""What the benches that measure a server from outside have in common: what is said to it, and how it is started."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.bench.speakers import Speech

_TARGET = 0.75  # of a chunk, as the server's default is of 640 ms


def speeches(arguments: argparse.Namespace) -> list[Speech]:
    """The recordings named, or the bundled sample at several speeds."""
    from importlib.resources import files

    from asr_exit.audio import load_audio
    from service.bench.speakers import speech_of, varied
    from service.bench.streams import sample_audio
    from service.cli.recordings import list_recordings

    if not (arguments.manifest or arguments.librispeech):
        text = (files("asr_exit") / "assets" / "sample.txt").read_text(encoding="utf-8")
        return varied(sample_audio(), text)
    return [speech_of(load_audio(item.path), item.text) for item in list_recordings(arguments)]


def serve_arguments(arguments: argparse.Namespace, slots: int) -> tuple[list[str], str]:
    """Command line and configuration file of the server under test."""
    line = ["--streams", str(slots), "--precision", arguments.precision, "--device", "cpu"]
    line += ["--model", arguments.model] if arguments.model else []
    shed = str(not arguments.no_shedding).lower()
    target_ms = _TARGET * arguments.chunk_ms
    return line, f"[load]\nshed_depth = {shed}\ntarget_latency_ms = {target_ms}\n[log]\nlevel = 'error'\n"


def model_name(arguments: argparse.Namespace) -> str:
    """For a report."""
    return arguments.model or "bundled"

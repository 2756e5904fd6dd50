"""`asr-exit stream`: audio to a server, captions back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.results import Caption

    Listen = Callable[[Iterable[bytes], int], Iterator[Caption]]  # 16-bit samples and their rate in Hz

HELP = "stream a file, standard input or the microphone to a server, or to a model on this device, and print captions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One source of audio, where to send it, and what to ask for."""
    from service.cli.options import (
        add_access_options,
        add_decoder_options,
        add_recognition_options,
        add_runtime_options,
    )

    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "audio", nargs="?", metavar="AUDIO", help="audio file, or - for raw 16-bit mono samples on stdin"
    )
    source.add_argument(
        "--microphone", action="store_true", help="listen to the default microphone (needs sounddevice)"
    )
    parser.add_argument(
        "--rate", type=int, default=16_000, metavar="HZ", help="of stdin or microphone (default: 16000)"
    )
    add_access_options(parser)
    add_runtime_options(parser, "server")
    add_recognition_options(parser, chunk_ms=None)
    add_decoder_options(parser)
    parser.add_argument("--realtime", action="store_true", help="send a file no faster than it would be spoken")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: captions, then a summary")


def run(arguments: argparse.Namespace) -> int:
    """Streams until the audio ends; Ctrl-C ends a microphone."""
    import json

    from service.cli import sources
    from service.cli.captions import caption_view
    from service.cli.tally import Tally

    rate_hz = arguments.rate
    if arguments.microphone:
        parts = sources.microphone_parts(rate_hz)
    elif arguments.audio == "-":
        parts = sources.stdin_parts(rate_hz)
    else:
        recorded, rate_hz = sources.file_parts(arguments.audio)
        parts = sources.paced(recorded, 2 * rate_hz) if arguments.realtime else iter(recorded)
    with _on_device(arguments) if arguments.runtime == "edge" else _on_server(arguments) as (listen, layers, full_macs):
        tally = Tally(full_macs)
        with caption_view(layers, as_json=arguments.json) as view:
            for caption in listen(parts, rate_hz):
                tally.add(caption)
                view.show(caption)
    if arguments.json:
        print(json.dumps(tally.summary()))
    else:
        print(
            f"{tally.audio_s:.1f} s of audio, mean exit layer {tally.mean_exit_layer:.1f} of {layers[-1]}, "
            f"{100 * tally.macs_fraction:.0f} % of full-depth operations",
            file=sys.stderr,
        )
    return 0


@contextmanager
def _on_server(arguments: argparse.Namespace) -> Iterator[tuple[Listen, Sequence[int], int]]:
    """What listens, the layers of its exits, and full-depth MACs per second of audio."""
    from asr_exit.budget import Budget
    from asr_exit.config import require
    from service.cli.options import access
    from service.client import SpeechClient, StreamSettings

    own = ("decoder", "beam_size", "lm", "lm_word_bonus", "lm_unknown_penalty")
    require(
        all(getattr(arguments, name) is None for name in own),
        "the server has its own decoder and language model: of the options for them only --lm-weight can be used",
    )
    budget = Budget.parse(arguments.budget) if arguments.budget else Budget()

    def listen(parts: Iterable[bytes], rate_hz: int) -> Iterator[Caption]:
        settings = StreamSettings(
            rate_hz=rate_hz,
            word_times=arguments.json,
            chunk_ms=arguments.chunk_ms or model.default_chunk_ms,
            policy=arguments.policy,
            fill=arguments.fill,
            budget=budget,
            language_model_weight=arguments.lm_weight,
        )
        return client.stream(parts, settings)

    with SpeechClient(arguments.server, access(arguments)) as client:
        model = client.model()
        exits = model.exits
        yield listen, [item.layer for item in exits], exits[-1].encoder_macs_per_second


@contextmanager
def _on_device(arguments: argparse.Namespace) -> Iterator[tuple[Listen, Sequence[int], int]]:
    """As `_on_server`, in this process."""
    from service.cli.options import edge_recognizer
    from service.on_device import local_captions

    recognizer = edge_recognizer(arguments)
    config = recognizer.model.config
    full = recognizer.model.macs.full(config.max_chunk_frames)
    per_second = round(full * 1000 / (config.max_chunk_frames * config.frame_ms))
    yield partial(local_captions, recognizer), config.exit_layers, per_second

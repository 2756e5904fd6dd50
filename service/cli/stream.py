"""`asr-exit stream`: audio to a server, captions back."""

from __future__ import annotations

import argparse
import sys

HELP = "stream a file, standard input or the microphone to a server and print captions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One source of audio, where to send it, and what to ask for."""
    from service.cli.options import add_access_options, add_recognition_options

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
    add_recognition_options(parser, chunk_ms=None)
    parser.add_argument("--realtime", action="store_true", help="send a file no faster than it would be spoken")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: captions, then a summary")


def run(arguments: argparse.Namespace) -> int:
    """Streams until the audio ends; Ctrl-C ends a microphone."""
    import json

    from asr_exit.budget import Budget
    from service.cli import sources
    from service.cli.captions import caption_view
    from service.cli.options import access
    from service.cli.tally import Tally
    from service.client import SpeechClient, StreamSettings

    budget = Budget.parse(arguments.budget) if arguments.budget else Budget()
    rate_hz = arguments.rate
    if arguments.microphone:
        parts = sources.microphone_parts(rate_hz)
    elif arguments.audio == "-":
        parts = sources.stdin_parts(rate_hz)
    else:
        recorded, rate_hz = sources.file_parts(arguments.audio)
        parts = sources.paced(recorded, 2 * rate_hz) if arguments.realtime else iter(recorded)
    settings = StreamSettings(
        rate_hz=rate_hz,
        word_times=arguments.json,
        chunk_ms=arguments.chunk_ms or 0,
        policy=arguments.policy,
        fill=arguments.fill,
        budget=budget,
    )
    with SpeechClient(arguments.server, access(arguments)) as client:
        exits = client.model().exits
        tally = Tally(exits[-1].encoder_macs_per_second)
        with caption_view([item.layer for item in exits], as_json=arguments.json) as view:
            for caption in client.stream(parts, settings):
                tally.add(caption)
                view.show(caption)
    if arguments.json:
        print(json.dumps(tally.summary()))
    else:
        print(
            f"{tally.audio_s:.1f} s of audio, mean exit layer {tally.mean_exit_layer:.1f} of {exits[-1].layer}, "
            f"{100 * tally.macs_fraction:.0f} % of full-depth operations",
            file=sys.stderr,
        )
    return 0

"""`asr-exit demo`: everything in one process, but over a real connection."""

from __future__ import annotations

import argparse

HELP = "start a server, stream the bundled sample to it at real-time pace and show live captions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What may be tried out."""
    from service.cli.options import add_model_options, add_recognition_options

    add_recognition_options(parser, chunk_ms=640)
    parser.add_argument("--fast", action="store_true", help="send the sample as fast as it is recognised")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Shows captions and a summary."""
    import sys
    import time
    from importlib.resources import as_file, files

    from asr_exit.budget import Budget
    from asr_exit.config import from_mapping
    from asr_exit.metrics import wer
    from asr_exit.tokenizer import normalise
    from service.background import BackgroundServer
    from service.cli import sources
    from service.cli.captions import caption_view
    from service.cli.options import load_model
    from service.cli.tally import Tally
    from service.client import SpeechClient, StreamSettings
    from service.config import ServeConfig

    model, device = load_model(arguments)
    assets = files("asr_exit") / "assets"
    reference = (assets / "sample.txt").read_text(encoding="utf-8")
    with as_file(assets / "sample.flac") as path:
        recorded, rate_hz = sources.file_parts(str(path))
    tables = {"listen": {"port": 0}, "model": {"device": device, "threads": arguments.threads}}
    settings = StreamSettings(
        rate_hz=rate_hz,
        chunk_ms=arguments.chunk_ms or 0,
        policy=arguments.policy,
        fill=arguments.fill,
        budget=Budget.parse(arguments.budget) if arguments.budget else Budget(),
    )
    layers = model.config.num_layers
    with BackgroundServer(model, from_mapping(ServeConfig, tables)) as server, SpeechClient(server.address) as client:
        tally = Tally(client.model().exits[-1].encoder_macs_per_second)
        print(
            f"server on {server.address}, model {model.name}, {layers} layers, an exit every {model.config.exit_every}"
        )
        print("each bar is one chunk: the higher, the deeper into the encoder it went", flush=True)
        parts = recorded if arguments.fast else sources.paced(recorded, 2 * rate_hz)
        begin = time.monotonic()
        with caption_view(model.config.exit_layers) as view:
            for caption in client.stream(parts, settings):
                tally.add(caption)
                view.show(caption)
        elapsed_s = time.monotonic() - begin
    errors = wer([normalise(reference)], [normalise(tally.text)])
    print(f"\n{tally.audio_s:.1f} s of audio in {elapsed_s:.1f} s, {len(tally.chunks)} chunks")
    print(f"depth:     mean exit layer {tally.mean_exit_layer:.1f} of {layers}")
    print(f"compute:   {100 * tally.macs_fraction:.0f} % of full-depth encoder operations")
    print(f"latency:   {tally.latency_ms(0.5):.0f} ms median, {tally.latency_ms(0.95):.0f} ms for 95 % of the chunks")
    print(f"words:     {errors.errors} errors in {errors.words} words", flush=True)
    if not tally.text:
        print("asr-exit demo: no caption came back", file=sys.stderr)
        return 1
    return 0

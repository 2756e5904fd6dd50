"""Options that several subcommands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from typing import Literal

    from asr_exit.backend import StreamingModel
    from asr_exit.checkpoint import Model
    from asr_exit.edge import EdgeRecognizer
    from asr_exit.fusion import LanguageModel
    from asr_exit.stream import StreamOptions
    from service.client import Access

    class DecoderOptions(TypedDict):
        """How posteriors become text."""

        decoder: Literal["greedy", "beam"]
        beam_size: int
        language_model: LanguageModel | None


TOKEN_VARIABLE = "ASR_EXIT_TOKEN"


def add_recognition_options(parser: argparse.ArgumentParser, *, chunk_ms: int | None) -> None:
    """--chunk-ms, --policy, --budget, --fill."""
    shown = "the server's" if chunk_ms is None else str(chunk_ms)
    parser.add_argument(
        "--chunk-ms", type=int, choices=(160, 320, 640, 1280), help=f"audio per chunk (default: {shown})"
    )
    parser.add_argument(
        "--policy", default="", metavar="P", help="auto, full, exit:LAYER, posterior[:THRESHOLD] or entropy[:THRESHOLD]"
    )
    parser.add_argument(
        "--budget",
        metavar="B",
        help="most to spend: 0.5 (of full depth, on average), macs=2e8 (a second of audio), rtf=0.05, max_exit=6; "
        "joined by commas",
    )
    parser.add_argument(
        "--fill", default="", metavar="F", help="what skipped layers get: propagate (default), catch_up or hole"
    )


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """--server and what it asks for: --tls, --tls-ca, --tls-cert, --tls-key, --token."""
    parser.add_argument("--server", default="127.0.0.1:50051", metavar="HOST:PORT", help="default: 127.0.0.1:50051")
    parser.add_argument("--tls", action="store_true", help="encrypt, trusting the usual authorities")
    parser.add_argument("--tls-ca", default="", metavar="PEM", help="encrypt, trusting these authorities")
    parser.add_argument("--tls-cert", default="", metavar="PEM", help="own certificate, for mutual TLS")
    parser.add_argument("--tls-key", default="", metavar="PEM", help="its private key")
    parser.add_argument("--token", metavar="TOKEN", help=f"default: the environment variable {TOKEN_VARIABLE}")


def access(arguments: argparse.Namespace) -> Access:
    """What `add_access_options` was told."""
    import os

    from service.client import Access

    token = arguments.token or os.environ.get(TOKEN_VARIABLE, "")
    return Access(arguments.tls, arguments.tls_ca, arguments.tls_cert, arguments.tls_key, token)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --threads."""
    parser.add_argument("--model", metavar="FILE", help="model file (default: the bundled one)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")


def add_decoder_options(parser: argparse.ArgumentParser) -> None:
    """--decoder, --beam-size, --lm, --lm-weight, --lm-word-bonus, --lm-unknown-penalty."""
    parser.add_argument(
        "--decoder", choices=("greedy", "beam"), help="of the exits' posteriors (default: greedy; beam with --lm)"
    )
    parser.add_argument("--beam-size", type=int, metavar="N", help="hypotheses of the beam (default: 8)")
    parser.add_argument(
        "--lm",
        metavar="FILE",
        help="n-gram language model: `bundled`, or a file of recipes.librispeech.lm, .arpa or .arpa.gz",
    )
    for name, meaning in (
        ("weight", "of its log-probabilities against the acoustics'"),
        ("word-bonus", "added for each word"),
        ("unknown-penalty", "taken off for a word it does not know"),
    ):
        parser.add_argument(f"--lm-{name}", type=float, metavar="X", help=meaning)


def decoder_options(arguments: argparse.Namespace) -> DecoderOptions:
    """Fields of StreamOptions from what `add_decoder_options` added. Raises ConfigError or CheckpointError."""
    from asr_exit.config import require
    from asr_exit.fusion import LanguageModel
    from asr_exit.ngram import load_ngram_model
    from asr_exit.stream import StreamOptions

    given = {
        name: getattr(arguments, f"lm_{name}")
        for name in ("weight", "word_bonus", "unknown_penalty")
        if getattr(arguments, f"lm_{name}") is not None
    }
    require(bool(arguments.lm) or not given, "--lm-weight, --lm-word-bonus and --lm-unknown-penalty need --lm")
    require(not arguments.lm or arguments.decoder != "greedy", "--lm needs the beam: leave out --decoder greedy")
    language_model = LanguageModel(load_ngram_model(arguments.lm), **given) if arguments.lm else None
    decoder: Literal["greedy", "beam"] = arguments.decoder or ("beam" if language_model else "greedy")
    beam_size = StreamOptions.beam_size if arguments.beam_size is None else arguments.beam_size
    return {"decoder": decoder, "beam_size": beam_size, "language_model": language_model}


def add_runtime_options(parser: argparse.ArgumentParser, default: str) -> None:
    """--runtime, --edge-model."""
    parser.add_argument(
        "--runtime", choices=(default, "edge"), default=default, help=f"edge = ONNX Runtime here (default: {default})"
    )
    parser.add_argument("--edge-model", metavar="DIR", help="what `asr-exit export` wrote, for --runtime edge")


def edge_recognizer(arguments: argparse.Namespace) -> EdgeRecognizer:
    """A recogniser on the device, without torch. Raises ConfigError, CheckpointError."""
    from asr_exit.config import require

    require(bool(arguments.edge_model), "--runtime edge needs --edge-model DIR; make one: asr-exit export --out DIR")
    try:
        from asr_exit.edge import EdgeModel, EdgeRecognizer
    except ImportError as error:
        from asr_exit.errors import ConfigError

        raise ConfigError(f"--runtime edge needs ONNX Runtime ({error}): pip install 'asr-exit[edge]'") from None
    model = EdgeModel(arguments.edge_model, threads=getattr(arguments, "threads", 1))
    return EdgeRecognizer(model, stream_options(arguments, model, model.manifest.chunk_ms))


def load_model(arguments: argparse.Namespace) -> tuple[Model, str]:
    """Loads the model the options ask for, limits torch's threads, and returns it with its device."""
    import torch

    from asr_exit.checkpoint import load
    from asr_exit.config import require
    from service.allocator import keep_freed_memory
    from service.device import pick_device

    require(arguments.threads >= 1, f"--threads {arguments.threads} must be at least 1")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    device = pick_device(arguments.device)
    return load(arguments.model, device), device


def stream_options(
    arguments: argparse.Namespace, model: StreamingModel, chunk_ms: float | None = None
) -> StreamOptions:
    """The engine's options from --chunk-ms (default: `chunk_ms`), --policy, --budget, --fill and the decoder's options.

    Raises ConfigError or CheckpointError.
    """
    from asr_exit.budget import Budget
    from asr_exit.policy import parse_policy
    from asr_exit.stream import Fill, StreamOptions

    return StreamOptions(
        chunk_ms=arguments.chunk_ms or chunk_ms or StreamOptions.chunk_ms,
        policy=parse_policy(
            arguments.policy or "full",
            exit_layers=model.config.exit_layers,
            calibration=model.calibration,
            chunk_ms=arguments.chunk_ms or StreamOptions.chunk_ms,
        ),
        budget=Budget.parse(arguments.budget) if arguments.budget else Budget(),
        fill=Fill.parse(arguments.fill or "propagate"),
        **decoder_options(arguments),
    )

"""Word error rate of every exit: of chunk lengths, decoders and subsets, with bootstrap intervals.

    python -m recipes.librispeech.evaluate --model model.safetensors --librispeech DIR --subset dev-clean \\
        [--chunk-ms 320,640,1280,0] [--decoders greedy,beam,lm --lm lm.bin] [--exits 2,6,12] [--json out.json]

One pass over each recording with the mask of the chunk length gives what streaming in such chunks gives, at every exit;
0 is the whole recording at once. What policies, budgets and fills do is for `asr-exit evaluate` to say.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from asr_exit.audio import load_audio
from asr_exit.checkpoint import Model, load
from asr_exit.errors import AsrExitError, ConfigError
from asr_exit.metrics import bootstrap_interval, wer
from asr_exit.ngram import load_ngram_model
from asr_exit.recognizer import Recognizer
from asr_exit.words import text_from_words
from recipes.librispeech.corpora import Utterance, read_librispeech, read_manifest
from recipes.librispeech.decoding import add_language_model_options, decode, decoder_named

DECODERS = ("greedy", "beam", "lm")


@dataclass(frozen=True)
class Result:
    """Word errors of one exit. Rates are fractions.

    `decoder_rtf` is decoding time over audio time, without the encoder.
    """

    chunk_ms: int
    decoder: str
    exit_layer: int
    wer: float
    low: float
    high: float
    substitutions: int
    insertions: int
    deletions: int
    words: int
    decoder_rtf: float


def evaluate(model: Model, utterances: Sequence[Utterance], options: argparse.Namespace) -> list[Result]:
    """One row for each chunk length, decoder and exit that `options` (of the command line) name.

    Raises:
        ConfigError: an option out of range. CheckpointError: no language model there.
        AudioError: a recording that cannot be read.
    """
    chunks = [_whole(part, "--chunk-ms") for part in options.chunk_ms.split(",")]
    layers = (
        [_whole(part, "--exits") for part in options.exits.split(",")] if options.exits else model.config.exit_layers
    )
    names = options.decoders.split(",")
    if unknown := [layer for layer in layers if layer not in model.config.exit_layers]:
        raise ConfigError(
            f"no exit after layer {unknown[0]}; there are {', '.join(map(str, model.config.exit_layers))}"
        )
    if unknown := [name for name in names if name not in DECODERS]:
        raise ConfigError(f"unknown decoder {unknown[0]!r}; use {', '.join(DECODERS)}")
    if ("lm" in names) != (options.lm is not None):
        raise ConfigError("--lm FILE and the decoder lm belong together: --decoders greedy,beam,lm --lm FILE")
    ngrams = load_ngram_model(options.lm) if options.lm else None
    decoders = {name: decoder_named(name, model, ngrams, options) for name in names}
    recognizer = Recognizer(model)
    results: list[Result] = []
    for chunk_ms in chunks:
        rows = [(name, layer) for name in names for layer in layers]
        texts: dict[tuple[str, int], list[str]] = {row: [] for row in rows}
        spent = dict.fromkeys(rows, 0.0)
        seconds = 0.0
        for utterance in utterances:
            samples = load_audio(utterance.path)
            seconds += len(samples) / model.config.features.sample_rate_hertz
            exits = recognizer.log_posteriors(samples, chunk_ms or None)
            for name, layer in rows:
                begin = time.thread_time()
                words = decode(decoders[name], exits[model.config.exit_layers.index(layer)], model)
                spent[name, layer] += time.thread_time() - begin
                texts[name, layer].append(text_from_words(words))
        references = [utterance.text for utterance in utterances]
        for name, layer in rows:
            total, bounds = wer(references, texts[name, layer]), bootstrap_interval(references, texts[name, layer])
            counts = (total.substitutions, total.insertions, total.deletions, total.words)
            rtf = spent[name, layer] / max(seconds, 1e-9)
            results.append(Result(chunk_ms, name, layer, total.rate, *bounds, *counts, rtf))
    return results


def _whole(text: str, option: str) -> int:
    if not text.strip().isdecimal():
        raise ConfigError(f"{option}: {text!r} is not a whole number")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Word error rate of every exit.")
    parser.add_argument("--model", type=Path, help="model file (default: the bundled one)")
    parser.add_argument("--librispeech", type=Path, help="folder that holds the subsets; needs --subset")
    parser.add_argument("--subset", help="subset to read, e.g. dev-clean")
    parser.add_argument("--manifest", type=Path, help="manifest.tsv of another corpus")
    parser.add_argument("--every", type=int, default=1, help="only each n-th recording (default: all)")
    parser.add_argument("--chunk-ms", default="640", help="comma-separated; 0 = whole recording (default: 640)")
    parser.add_argument("--decoders", default="greedy", help="of greedy, beam, lm; comma-separated (default: greedy)")
    parser.add_argument("--exits", help="layers, comma-separated (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    add_language_model_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        if (options.manifest is None) == (options.librispeech is None) or options.every < 1:
            raise ConfigError("give either --librispeech with --subset or --manifest, and --every from 1 on")
        if options.manifest:
            corpus = read_manifest(options.manifest)
        else:
            corpus = read_librispeech(options.librispeech / (options.subset or ""))
        utterances = corpus.utterances[:: options.every]
        rows = evaluate(load(options.model), utterances, options)
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    except (AsrExitError, OSError) as error:
        sys.exit(f"evaluate: {error}")
    skipped = ", ".join(f"{count} {reason}" for reason, count in corpus.skipped.items()) or "none"
    print(f"{len(utterances)} recordings of {corpus.name}, {rows[0].words} words; skipped: {skipped}")
    print("chunk ms  decoder  exit    WER %  95 % interval   sub   ins   del  decoder RTF")
    for row in rows:
        interval = f"{100 * row.low:6.2f}-{100 * row.high:.2f}"
        edits = f"{row.substitutions:5d} {row.insertions:5d} {row.deletions:5d}"
        shown = row.chunk_ms or "whole"
        print(
            f"{shown!s:>8}  {row.decoder:7s}  {row.exit_layer:4d}  {100 * row.wer:7.2f}  {interval:13s} {edits}  "
            f"{row.decoder_rtf:11.4f}"
        )


if __name__ == "__main__":
    main()

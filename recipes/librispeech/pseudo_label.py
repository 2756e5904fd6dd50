"""Transcripts for recordings that have none, by a trained model, as a manifest for `prepare`.

    python -m recipes.librispeech.pseudo_label --model model.safetensors --audio LibriSpeech/unlabelled \\
        --out runs/pseudo/manifest.tsv [--threshold 0.9] [--lm lm.bin]
    python -m recipes.librispeech.prepare ... --manifest runs/pseudo/manifest.tsv

Only recordings that the model is sure of are listed: those whose words have a mean confidence (geometric mean of each
word's posteriors) of at least the threshold. Kahn et al., "Self-training for end-to-end speech recognition" (ICASSP
2020). Beside the manifest, manifest.json says which model made it and what was left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch

from asr_exit.checkpoint import Model, load
from asr_exit.ctc import CtcDecoder
from asr_exit.errors import AsrExitError, ConfigError
from asr_exit.ngram import load_ngram_model
from asr_exit.recognizer import Recognizer
from asr_exit.words import text_from_words
from recipes.librispeech.bundle import without_paths
from recipes.librispeech.corpora import AUDIO_SUFFIXES
from recipes.librispeech.decoding import add_language_model_options, decode, decoder_named
from recipes.librispeech.shards import MIN_SECONDS, read_samples, write_atomically


@dataclass(frozen=True)
class Labelled:
    """One recording and what the model heard in it."""

    path: Path
    seconds: float
    text: str
    confidence: float  # mean over the words; 0 without any


def recordings(folder: Path) -> list[Path]:
    """Every sound under `folder`, sorted.

    Raises:
        ConfigError: none there.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix in AUDIO_SUFFIXES)
    if not found:
        raise ConfigError(f"no recordings ({', '.join(AUDIO_SUFFIXES)}) under {folder}")
    return found


def label(
    model: Model, paths: Iterable[Path], decoder: CtcDecoder[Any], chunk_ms: float | None, skipped: Counter[str]
) -> Iterator[Labelled]:
    """Transcribes at the last exit with the mask of `chunk_ms` (None: whole recording). Bad clips are only counted."""
    recognizer = Recognizer(model)
    rate_hz = model.config.features.sample_rate_hertz
    for path in paths:
        try:
            samples = read_samples(path, rate_hz)
        except (soundfile.SoundFileError, ValueError, OSError):
            skipped["does not decode"] += 1
            continue
        seconds = len(samples) / rate_hz
        if seconds < MIN_SECONDS:
            skipped["too short"] += 1
            continue
        words = decode(decoder, recognizer.log_posteriors(samples, chunk_ms)[-1], model)
        confidence = sum(word.confidence for word in words) / len(words) if words else 0.0
        yield Labelled(path, seconds, text_from_words(words), confidence)


def write_manifest(out: Path, found: Sequence[Labelled], made_by: dict[str, Any]) -> None:
    """`out` as `corpora.read_manifest` reads it, and beside it a .json with `made_by`. Both appear by rename."""
    lines = ["utt_id\tspeaker_id\trel_path\tseconds\ttranscript\tconfidence"]
    for item in found:
        speaker = item.path.stem.split("-")[0]
        where = os.path.relpath(item.path.resolve(), out.parent.resolve())
        fields = (item.path.stem, speaker, where, f"{item.seconds:.2f}", item.text.upper(), f"{item.confidence:.4f}")
        lines.append("\t".join(fields))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out.with_suffix(".json"), json.dumps(made_by, indent=1).encode())
    write_atomically(out, ("\n".join(lines) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Transcribe recordings without transcripts for training.")
    parser.add_argument("--model", type=Path, help="model file (default: the bundled one)")
    parser.add_argument(
        "--audio", type=Path, required=True, help="folder; names as in LibriSpeech, SPEAKER-CHAPTER-UTT"
    )
    parser.add_argument("--out", type=Path, required=True, help="manifest.tsv to write")
    parser.add_argument("--threshold", type=float, default=0.9, help="least mean word confidence (default: 0.9)")
    parser.add_argument("--chunk-ms", type=int, default=0, help="mask of chunks so long; 0 = whole recording (default)")
    parser.add_argument("--threads", type=int, default=1)
    add_language_model_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        if not 0 <= options.threshold <= 1:
            raise ConfigError(f"--threshold {options.threshold:g} must be 0 to 1")
        paths = recordings(options.audio)
        model = load(options.model)
        ngrams = load_ngram_model(options.lm) if options.lm else None
        decoder = decoder_named("lm" if ngrams else "greedy", model, ngrams, options)
        skipped: Counter[str] = Counter()
        heard = list(label(model, paths, decoder, options.chunk_ms or None, skipped))
        kept = [item for item in heard if item.text and item.confidence >= options.threshold]
        skipped["not sure enough"] += len(heard) - len(kept)
        hours, kept_hours = (sum(item.seconds for item in items) / 3600 for items in (heard, kept))
        made_by = {
            "model": model.name,
            "provenance": without_paths(dict(model.provenance)),
            "threshold": options.threshold,
            "language_model": options.lm.name if options.lm else None,
            "kept": len(kept),
            "kept_hours": round(kept_hours, 3),
            "hours": round(hours, 3),
            "skipped": dict(+skipped),
        }
        write_manifest(options.out, kept, made_by)
    except AsrExitError as error:
        sys.exit(f"pseudo_label: {error}")
    except OSError as error:
        sys.exit(f"pseudo_label: cannot write {options.out}: {error.strerror or error}")
    left_out = ", ".join(f"{count} {reason}" for reason, count in (+skipped).items()) or "none"
    print(
        f"{options.out.name}: {len(kept)} of {len(paths)} recordings, {kept_hours:.2f} of {hours:.2f} h kept "
        f"({100 * kept_hours / max(hours, 1e-9):.0f} %); left out: {left_out}"
    )


if __name__ == "__main__":
    main()

"""Extra training speech from the synthesizers flite and espeak-ng, reading random sentences of a text.

    python -m recipes.librispeech.synthesize --text sentences.txt.xz --hours 3 --out DIR

writes DIR/manifest.tsv and one .flac per sentence. Programs that are not installed are left out with a message.
"""

from __future__ import annotations

import argparse
import csv
import lzma
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from asr_exit.errors import ConfigError
from asr_exit.tokenizer import normalise

SAMPLE_RATE_HERTZ = 16_000
WORDS_PER_SECOND = 2.7  # of the voices used; sets how many sentences fill the hours asked for
FLITE_SHARE = 2 / 3  # of the clips, where both programs are there
FLITE_VOICES = ("slt", "rms", "awb", "kal16")
ESPEAK_VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-us-nyc", "en-gb-x-rp")
ESPEAK_VARIANTS = ("", "+f2", "+f3", "+f4", "+m2", "+m3", "+m5", "+m7")


@dataclass(frozen=True, slots=True)
class Order:
    """One clip to make."""

    id: str
    speaker: str
    text: str
    command: tuple[str, ...]  # the text file and the output file are appended with `text_flag` and `out_flag`
    text_flag: str
    out_flag: str


def installed() -> tuple[str, ...]:
    """Names of the synthesizers found on this machine."""
    return tuple(name for name in ("flite", "espeak-ng") if shutil.which(name))


def read_sentences(path: Path) -> list[str]:
    """Normalised lines of 3 to 20 words of a plain or .xz text.

    Raises:
        ConfigError: no such file or no such line.
    """
    if not path.is_file():
        raise ConfigError(f"no text at {path}; give one sentence per line, plain or .xz")
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        sentences = [line for line in map(normalise, lines) if 3 <= line.count(" ") + 1 <= 20]
    if not sentences:
        raise ConfigError(f"{path} has no line of 3 to 20 words")
    return sentences


def plan(sentences: Sequence[str], hours: float, programs: Sequence[str], seed: int) -> list[Order]:
    """Random sentences and voices that last about `hours` in all. Deterministic in `seed`."""
    rng = np.random.default_rng(seed)
    words_left = hours * 3600 * WORDS_PER_SECOND
    orders: list[Order] = []
    for index in rng.permutation(len(sentences)):
        if words_left <= 0:
            break
        text = sentences[index]
        words_left -= text.count(" ") + 1
        use_flite = "flite" in programs and ("espeak-ng" not in programs or rng.random() < FLITE_SHARE)
        orders.append((_flite_order if use_flite else _espeak_order)(len(orders), text, rng))
    return orders


def _flite_order(number: int, text: str, rng: np.random.Generator) -> Order:
    voice = FLITE_VOICES[rng.integers(len(FLITE_VOICES))]
    stretch = f"duration_stretch={rng.uniform(0.85, 1.2):.2f}"
    command = ("flite", "-voice", voice, "--setf", stretch)
    return Order(f"syn-{number:06d}", f"flite-{voice}", text, command, "-f", "-o")


def _espeak_order(number: int, text: str, rng: np.random.Generator) -> Order:
    voice = ESPEAK_VOICES[rng.integers(len(ESPEAK_VOICES))] + ESPEAK_VARIANTS[rng.integers(len(ESPEAK_VARIANTS))]
    pitch, words_per_minute = str(rng.integers(25, 76)), str(rng.integers(130, 190))
    command = ("espeak-ng", "-v", voice, "-p", pitch, "-s", words_per_minute)
    return Order(f"syn-{number:06d}", f"espeak-{voice}", text, command, "-f", "-w")


def _speak(order: Order, out: Path) -> float:
    """Make one clip. Returns its seconds, 0 when the program failed."""
    with tempfile.TemporaryDirectory() as scratch:
        text_file, wav = Path(scratch) / "text", Path(scratch) / "out.wav"
        text_file.write_text(order.text + ".\n", encoding="utf-8")
        arguments = [*order.command, order.text_flag, str(text_file), order.out_flag, str(wav)]
        done = subprocess.run(arguments, capture_output=True, check=False, timeout=60)
        if done.returncode != 0 or not wav.is_file():
            return 0.0
        samples, rate = soundfile.read(wav, dtype="float32")
    samples = soxr.resample(samples, rate, SAMPLE_RATE_HERTZ)
    peak = float(np.abs(samples).max(initial=0.0))
    if peak == 0.0:
        return 0.0
    soundfile.write(out / f"{order.id}.flac", samples * (0.5 / peak), SAMPLE_RATE_HERTZ)
    return len(samples) / SAMPLE_RATE_HERTZ


def _speak_all(orders: Sequence[Order], out: Path) -> list[float]:
    return [_speak(order, out) for order in orders]


def synthesize(text: Path, hours: float, out: Path, *, seed: int = 0, processes: int = 2) -> Path | None:
    """Write about `hours` of synthetic speech under `out`.

    Returns:
        Path of the manifest, or None (with a message) when no synthesizer is installed.
    """
    programs = installed()
    if not programs:
        print("no synthetic speech: neither flite nor espeak-ng is installed", file=sys.stderr)
        return None
    out.mkdir(parents=True, exist_ok=True)
    orders = plan(read_sentences(text), hours, programs, seed)
    parts = [orders[start : start + 100] for start in range(0, len(orders), 100)]
    with ProcessPoolExecutor(processes) as pool:
        seconds = [item for part in pool.map(_speak_all, parts, [out] * len(parts)) for item in part]
    manifest = out / "manifest.tsv"
    with manifest.open("w", encoding="utf-8", newline="") as lines:
        table = csv.writer(lines, delimiter="\t", lineterminator="\n")
        table.writerow(("utt_id", "speaker_id", "rel_path", "seconds", "transcript"))
        for order, length in zip(orders, seconds, strict=True):
            if length > 0:
                table.writerow((order.id, order.speaker, f"{order.id}.flac", f"{length:.3f}", order.text.upper()))
    print(f"{sum(seconds) / 3600:.2f} h of synthetic speech by {', '.join(programs)} in {out}")
    return manifest


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Synthetic speech from flite and espeak-ng.")
    parser.add_argument("--text", type=Path, required=True, help="one sentence per line, plain or .xz")
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    synthesize(options.text, options.hours, options.out, seed=options.seed, processes=options.processes)


if __name__ == "__main__":
    main()

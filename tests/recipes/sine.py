"""Speech for recipes that needs no recordings: every letter is a pair of tones, every space a pause."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

RATE_HERTZ = 16_000
LETTER_SECONDS = 0.1
LETTER_FRAMES = LETTER_SECONDS * 100  # feature frames
SENTENCES = (
    "a cat sat on the mat",
    "the dog ran to the red barn",
    "rain in the north",
    "no one can see the moon",
    "ten men met at dawn",
    "read the note at once",
    "she had one hat",
    "the street is dry",
)


def speak(text: str, seed: int = 0) -> np.ndarray:
    """(N,) float32 at 16 kHz; clean but for faint noise."""
    rng = np.random.default_rng(seed)
    samples = int(LETTER_SECONDS * RATE_HERTZ)
    time = np.arange(samples) / RATE_HERTZ
    window = np.hanning(samples)
    parts = [np.zeros(samples)]
    for letter in text:
        code = ord(letter) - ord("a")
        low, high = 300 + 120 * (code % 6), 1500 + 400 * (code // 6)
        tone = np.sin(2 * np.pi * low * time) + np.sin(2 * np.pi * high * time)
        parts.append(np.zeros(samples) if letter == " " else 0.2 * window * tone)
    parts.append(np.zeros(samples))
    clean = np.concatenate(parts)
    return (clean + 1e-3 * rng.standard_normal(len(clean))).astype(np.float32)


def write_librispeech(folder: Path, subset: str, sentences: tuple[str, ...] = SENTENCES) -> Path:
    """`sentences` in the LibriSpeech layout under FOLDER/SUBSET. Returns the chapter's folder."""
    chapter = folder / subset / "1" / "2"
    chapter.mkdir(parents=True)
    lines = []
    for number, text in enumerate(sentences):
        soundfile.write(chapter / f"1-2-{number:04d}.flac", speak(text, number), RATE_HERTZ)
        lines.append(f"1-2-{number:04d} {text.upper()}\n")
    (chapter / "1-2.trans.txt").write_text("".join(lines))
    return chapter

"""A word n-gram language model from text, for the prefix beam.

    python -m recipes.librispeech.lm --text sentences.txt.xz [--counts word_counts.txt.gz] --out lm.bin \\
        [--order 3] [--min-count 3] [--prune 0,1] [--heldout other.txt]

Text is one sentence per line; it is lower-cased and stripped to a-z and apostrophes here. Counts are lines of a word, a
tab and a number: words of other text, to be known and expected in that proportion. Files may be plain, .gz or .xz. ARPA
files of other tools need no conversion to be used; `--arpa FILE --out lm.bin` makes them smaller and quicker to load.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from asr_exit.arpa import read_arpa
from asr_exit.errors import AsrExitError, ConfigError
from asr_exit.ngram import NgramModel, load_ngram_model
from asr_exit.tokenizer import normalise
from recipes.librispeech.kneser_ney import estimate, read_text


def open_text(path: Path) -> TextIO:
    """A plain, .gz or .xz text file. Raises ConfigError when it is not there."""
    if not path.is_file():
        raise ConfigError(f"no text at {path}")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def sentences(path: Path) -> Iterator[str]:
    """Normalised lines. Raises ConfigError for a file that is no text, or cut off."""
    try:
        with open_text(path) as lines:
            for line in lines:
                yield normalise(line)
    except (lzma.LZMAError, EOFError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read to its end: {error}") from error


def read_counts(path: Path) -> dict[str, int]:
    """Word counts. Raises ConfigError for a line that is not a word and a number."""
    counts: dict[str, int] = {}
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                word, _, value = line.strip().rpartition("\t")
                word = normalise(word)
                if not value.isdecimal():
                    raise ConfigError(f"{path}, line {number}: {line.strip()!r} is not a word, a tab and a number")
                if word and " " not in word:
                    counts[word] = counts.get(word, 0) + int(value)
    except (EOFError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read to its end: {error}") from error
    return counts


def perplexity(model: NgramModel, lines: Iterator[str]) -> tuple[float, float, int]:
    """Perplexity per word (ends of sentences included), share of unknown words, running words."""
    total, words, unknown, tokens = 0.0, 0, 0, 0
    for line in lines:
        sentence = line.split()
        if sentence:
            total += model.sentence_log_prob(sentence)
            words += len(sentence)
            tokens += len(sentence) + 1
            unknown += sum(model.index(word) == model.unknown for word in sentence)
    if not words:
        raise ConfigError("the held-out text has no words")
    return math.exp(-total / tokens), unknown / words, words


def build(
    text: Sequence[Path], counts: Path | None, order: int, min_count: int, prune: Sequence[int]
) -> tuple[NgramModel, int]:
    """The model, and how many running words it was made from."""
    extra: Mapping[str, int] = read_counts(counts) if counts else {}
    lines = (line for path in text for line in sentences(path))
    stream, words, running = read_text(lines, min_count=min_count, extra=extra)
    model = estimate(stream, words, order=order, prune=prune, extra=extra)
    sources = [path.name for path in text] + ([counts.name] if counts else [])
    model.provenance |= {
        "sources": sources,
        "running_words": running,
        "estimation": "modified Kneser-Ney",
        "min_count": min_count,
        "prune": list(prune),
    }
    return model, running


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make an n-gram language model for the prefix beam.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, nargs="+", help="sentences, one per line")
    source.add_argument("--arpa", type=Path, help="a finished model in the ARPA format, to be converted")
    parser.add_argument("--counts", type=Path, help="word counts of other text: word, tab, number")
    parser.add_argument("--order", type=int, default=3, help="longest n-grams, in words (default: 3)")
    parser.add_argument("--min-count", type=int, default=3, help="rarer words are unknown words (default: 3)")
    parser.add_argument(
        "--prune",
        default="0,1",
        help="for n-grams of 2, 3, ... words: drop those that occur at most so often (default: 0,1; 0 keeps all)",
    )
    parser.add_argument("--heldout", type=Path, help="text to report the perplexity on")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        prune = [int(part) if part.strip().isdecimal() else -1 for part in options.prune.split(",")]
        if not 1 <= options.order <= 5:
            raise ConfigError(f"--order {options.order} must be 1 to 5")
        if options.arpa:
            model = read_arpa(options.arpa)
        else:
            model, running = build(options.text, options.counts, options.order, options.min_count, prune)
            print(f"{running / 1e6:.2f} M running words, {len(model.words)} different ones kept")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        model.save(options.out)
        model = load_ngram_model(options.out)
        sizes = ", ".join(f"{len(level.log_prob)} of {number}" for number, level in enumerate(model.levels, 1))
        print(f"n-grams: {sizes} word(s)")
        if options.heldout:
            value, unknown, words = perplexity(model, sentences(options.heldout))
            print(f"{options.heldout.name}: perplexity {value:.1f}, {100 * unknown:.2f} % of {words} words unknown")
    except (AsrExitError, OSError) as error:
        sys.exit(f"lm: {error}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    size = options.out.stat().st_size / 1e6
    print(f"{options.out.name}: {size:.1f} MB in {time.monotonic() - begin:.0f} s, at most {peak:.2f} GB of memory")


if __name__ == "__main__":
    main()

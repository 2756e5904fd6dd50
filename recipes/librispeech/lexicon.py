"""Pronunciations of words, from espeak-ng, in a phone set that is coarse enough for a few hours of speech.

    python -m recipes.librispeech.lexicon --data DATA

writes those of every word in the training shards to DATA/lexicon.json, for configurations with a `phone_weight`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from asr_exit.data import FeatureStore
from asr_exit.errors import AsrExitError, ConfigError
from asr_exit.phones import LEXICON
from recipes.librispeech.shards import write_atomically

WORDS_PER_CALL = 500
# what espeak-ng tells apart and listeners hardly do: its phoneme mnemonics -> phones
MERGED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("a#", "@2", "@-", "@5", "a#:"), ("@",)),
    **dict.fromkeys(("I2", "I#", "i#"), ("I",)),
    **dict.fromkeys(("0", "A", "A~", "a:"), ("A:",)),
    **dict.fromkeys(("O2", "O", "O~"), ("O:",)),
    **dict.fromkeys(("3:", "V3"), ("3",)),
    **dict.fromkeys(("o@",), ("O@",)),
    **dict.fromkeys(("x", "?2"), ("k",)),
    **dict.fromkeys(("aa", "a2"), ("a",)),
    **dict.fromkeys(("U2", "U#"), ("U",)),
    **dict.fromkeys(("?", "|", ""), ()),
    "e": ("E",),
    "i": ("i:",),
    "t2": ("t",),
    "r-": ("r",),
    "n-": ("n",),
    "l#": ("l",),
    "C": ("S",),
    "@L": ("@", "l"),
    "i@": ("i:", "@"),
    "i@3": ("i:", "3"),
    "U@": ("U", "3"),
    "aI3": ("aI", "3"),
    "aI@": ("aI", "@"),
}
_VOWELS = "@ 3 A: A@ E I O: O@ OI U V a aI aU eI e@ i: oU u:"
_CONSONANTS = "D N S T Z b d dZ f g h j k l m n p r s t t# tS v w z"
PHONES = frozenset(_VOWELS.split() + _CONSONANTS.split())
# words that are seldom said the way espeak-ng says them alone
WEAK_FORMS: dict[str, tuple[str, ...]] = {
    word: tuple(phones.split())
    for word, phones in {
        "a": "@",
        "an": "@ n",
        "and": "@ n d",
        "are": "3",
        "as": "@ z",
        "at": "@ t",
        "but": "b @ t",
        "can": "k @ n",
        "for": "f 3",
        "from": "f r @ m",
        "had": "h @ d",
        "has": "h @ z",
        "have": "h @ v",
        "her": "h 3",
        "of": "@ v",
        "or": "3",
        "than": "D @ n",
        "that": "D @ t",
        "the": "D @",
        "them": "D @ m",
        "to": "t @",
        "was": "w @ z",
        "your": "j 3",
    }.items()
}


def pronounce(words: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Phones of each of `words` (normalised); words that espeak-ng says in no phone known here are left out.

    Raises:
        ConfigError: espeak-ng is not installed.
    """
    if not shutil.which("espeak-ng"):
        raise ConfigError("no espeak-ng on this machine, which tells how words are pronounced; install it")
    wanted = sorted(set(words) - WEAK_FORMS.keys())
    known = dict(WEAK_FORMS)
    for start in range(0, len(wanted), WORDS_PER_CALL):
        part = wanted[start : start + WORDS_PER_CALL]
        command = ["espeak-ng", "-q", "-x", "--sep=_", "-v", "en-us", "--stdin"]
        done = subprocess.run(command, input="\n\n".join(part) + "\n", capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        if len(lines) != len(part):
            raise ConfigError(f"espeak-ng said {len(lines)} words where {len(part)} were asked for")
        for word, line in zip(part, lines, strict=True):
            if phones := phones_of(line):
                known[word] = phones
    return known


def phones_of(mnemonics: str) -> tuple[str, ...]:
    """Phones of what espeak-ng writes, e.g. "b_'V_t#_3"; () where one of them is unknown."""
    phones: list[str] = []
    for item in mnemonics.strip().replace(" ", "_").split("_"):
        bare = item.strip("',;%=!*")
        phones += MERGED.get(bare, (bare,))
    return tuple(phones) if all(phone in PHONES for phone in phones) else ()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the pronunciations of the training data's words.")
    parser.add_argument("--data", type=Path, required=True, help="what prepare wrote")
    options = parser.parse_args(arguments)
    try:
        words = {word for clip in FeatureStore(options.data / "train").clips for word in clip.text.split()}
        known = pronounce(words)
        entries = {word: " ".join(known[word]) for word in sorted(words & known.keys())}
        write_atomically(options.data / LEXICON, json.dumps(entries, indent=0).encode())
    except AsrExitError as error:
        sys.exit(f"lexicon: {error}")
    except OSError as error:
        sys.exit(f"lexicon: cannot write below {options.data}: {error.strerror or error}")
    print(f"{LEXICON}: {len(entries)} of {len(words)} words")


if __name__ == "__main__":
    main()

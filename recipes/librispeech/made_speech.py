"""The command line of steps that make training speech out of a text and the recordings: `diphones` and `splice`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from asr_exit.checkpoint import Model, load
from asr_exit.data import FeatureStore
from asr_exit.errors import AsrExitError
from recipes.librispeech.shards import add_corpus
from recipes.librispeech.synthesize import read_sentences

Made = Iterator[tuple[str, str, np.ndarray]]  # (speaker, text, features) of utterances
# from the model that finds the words, the recordings, the text and the options: how many speakers, and what they say
Make = Callable[[Model, FeatureStore, Sequence[str], argparse.Namespace], tuple[int, Made]]


def run(step: str, corpus: str, make: Make, arguments: Sequence[str] | None, *, description: str, hours: float) -> None:
    """Parse `arguments`, make the speech, add it to the data as `corpus`.

    `step`: name for errors, which end the process. `hours`: made unless given.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="what prepare wrote; shards are added to its train")
    parser.add_argument("--text", type=Path, required=True, help="sentences, one per line, plain or .xz")
    parser.add_argument("--hours", type=float, default=hours, help=f"of speech (default: {hours:g})")
    parser.add_argument("--model", type=Path, help="model file that finds the words (default: the bundled one)")
    parser.add_argument("--min-words", type=int, default=600, help="of a speaker, to be a voice (default: 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        sentences = read_sentences(options.text)
        model = load(options.model)
        store = FeatureStore(options.data / "train", model.tokenizer)
        speakers, made = make(model, store, sentences, options)
        total, hours_made = add_corpus(options.data, corpus, made)
    except AsrExitError as error:
        sys.exit(f"{step}: {error}")
    except OSError as error:
        sys.exit(f"{step}: cannot write below {options.data}: {error.strerror or error}")
    print(f"{total} utterances, {hours_made:.2f} h, of {speakers} speakers")

"""Train variants on equal hours of audio and compare every exit.

    python -m recipes.librispeech.ablate --data DATA --out DIR --hours 30 \\
        [--layers 4] [--only "plain,CR-CTC,local"] [--score FOLDER] [--start-from MODEL]

With --start-from every row goes on from that model, with all of the bundled model's methods but one. A variant that is
there already is not trained again; an interrupted one goes on. Writes DIR/ablation.md and .json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from asr_exit.checkpoint import load
from asr_exit.data import FeatureStore
from asr_exit.encoder import Encoder
from asr_exit.errors import AsrExitError, ConfigError
from asr_exit.joint_gates import without_gates
from asr_exit.metrics import bootstrap_reduction, wer
from asr_exit.phones import LEXICON
from asr_exit.schedule import TrainConfig
from asr_exit.tokenizer import Tokenizer
from asr_exit.validation import Decoded, decode_exits, held_out_batches
from asr_exit.warm_start import in_shape_of
from recipes.librispeech.variants import DIPHONES, SPLICED, SYNTHETIC, going_on, variants


def train_variant(
    name: str, config: TrainConfig, data: Path, out: Path, threads: int, start_from: Path | None = None
) -> Path:
    """Run the training of one variant in a process of its own, unless it is done. Returns its run folder.

    Raises:
        ConfigError: the training failed; its output says why.
    """
    run = folder_of(name, out)
    run.mkdir(parents=True, exist_ok=True)
    if (run / "done").is_file():
        return run
    settings = run / "variant.json"
    settings.write_text(json.dumps(config.to_dict(), indent=1), encoding="utf-8")
    command = [sys.executable, "-m", "recipes.librispeech.train", "--data", str(data), "--out", str(run)]
    command += ["--config-file", str(settings), "--threads", str(threads)]
    begun = (run / "state.pt").is_file()
    command += ["--resume"] if begun or start_from is None else ["--start-from", str(start_from)]
    if subprocess.run(command, check=False).returncode:
        raise ConfigError(f"the training of {name!r} failed; see above")
    (run / "done").touch()
    return run


def on_other_data(config: TrainConfig, name: str, data: Path) -> TrainConfig:
    """`config` for what prepare wrote to `data`, with that folder's number of pieces.

    Raises:
        ConfigError: there is no such data.
    """
    try:
        pieces = json.loads((data / "data.json").read_text(encoding="utf-8"))["vocab_size"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--also must be NAME=DATA, DATA a folder that prepare wrote; {name!r}: {error}") from error
    return dataclasses.replace(config, name=name, model=dataclasses.replace(config.model, vocab_size=pieces))


def folder_of(name: str, out: Path) -> Path:
    """The run folder of a row."""
    return out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def lacking(name: str, config: TrainConfig, data: Path) -> str:
    """What a row needs and the prepared data does not have, in words; without it the row would repeat another."""
    description = json.loads((data / "data.json").read_text(encoding="utf-8"))
    if config.augment.room_probability > 0 and not description.get("room_envelopes"):
        return "impulse responses of rooms (prepare --rooms)"
    if name in ("noise", "without noise") and not any((data / "noise").glob("*.json")):
        return "noise (prepare --noise)"
    if config.phone_weight > 0 and not (data / LEXICON).is_file():
        return "pronunciations (lexicon)"
    corpora = {json.loads(path.read_text(encoding="utf-8"))["corpus"] for path in (data / "train").glob("*.json")}
    for corpus, speech, made_by in (
        (SYNTHETIC, "synthetic speech", "prepare --synthetic-hours"),
        (SPLICED, "spliced speech", "splice"),
        (DIPHONES, "diphone speech", "diphones"),
    ):
        if speech in name and corpus not in corpora:
            return f"{speech} ({made_by})"
    return ""


def score(run: Path, folder: Path, chunk_frames: int) -> list[Decoded]:
    """Every exit's text of a finished run, moving-average weights, fp32, streaming chunks; kept in the run folder."""
    config = TrainConfig.from_dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    tokenizer = Tokenizer((run / "tokenizer.model").read_bytes())

    def encoder() -> Encoder:
        made = Encoder(config.model).eval()
        made.load_state_dict(without_gates(load_file(run / "ema.safetensors"))[0])
        return made

    return _decoded(run / _texts_of(folder, chunk_frames), encoder, tokenizer, folder, chunk_frames)


def score_start(model: Path, layers: int, out: Path, folder: Path, chunk_frames: int) -> list[Decoded]:
    """The same of the first `layers` layers of the model that the rows start from."""
    source = load(model)

    def encoder() -> Encoder:
        return in_shape_of(source.config.with_layers(layers), source.encoder)

    kept = out / _texts_of(folder, chunk_frames, str(model.resolve()))
    return _decoded(kept, encoder, source.tokenizer, folder, chunk_frames)


def _texts_of(folder: Path, chunk_frames: int, model: str = "") -> str:
    return f"texts-{zlib.crc32(f'{folder.resolve()}{model}'.encode()):08x}-{chunk_frames}.json"


def _decoded(
    kept: Path, make: Callable[[], Encoder], tokenizer: Tokenizer, folder: Path, chunk_frames: int
) -> list[Decoded]:
    """Decode what `folder` holds, unless the file `kept` has the texts from before."""
    if kept.is_file():
        entries = json.loads(kept.read_text(encoding="utf-8"))
        return [Decoded(name, reference, tuple(texts)) for name, reference, texts in entries]
    encoder = make()
    batches = held_out_batches(FeatureStore(folder, tokenizer), encoder.feature_mean.numpy(), None)
    frames = chunk_frames * 8 // encoder.config.subsampling  # chunks of equal length in milliseconds
    decoded, _, _ = decode_exits(encoder, batches, tokenizer, chunk_frames=frames)
    decoded = sorted(decoded, key=lambda item: item.utterance_id)
    kept.write_text(json.dumps([(item.utterance_id, item.reference, item.texts) for item in decoded]))
    return decoded


def compare(results: Mapping[str, Sequence[Decoded]], exit_layers: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """A row per variant: word error rate at every exit, and its reduction against the first variant's, in per cent."""
    names = list(results)
    first = {layer: index for index, layer in enumerate(exit_layers[names[0]])}
    rows: list[dict[str, Any]] = []
    for name, decoded in results.items():
        references = [item.reference for item in decoded]
        row: dict[str, Any] = {"variant": name, "wer": {}, "reduction": {}}
        for index, layer in enumerate(exit_layers[name]):
            texts = [item.texts[index] for item in decoded]
            row["wer"][layer] = 100 * wer(references, texts).rate
            if name != names[0] and rows[0]["wer"].get(layer):  # without errors there is nothing to reduce
                before = [item.texts[first[layer]] for item in results[names[0]]]
                row["reduction"][layer] = [100 * value for value in bootstrap_reduction(references, before, texts)]
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]], layers: Sequence[int], hours: float) -> str:
    """The table."""
    lines = [
        f"Word error rate in per cent after {hours:g} h of audio seen; in brackets the relative reduction against the",
        "first row with its 95 % bootstrap interval (utterances resampled in pairs).",
        "",
        "| variant | " + " | ".join(f"exit {layer}" for layer in layers) + " |",
        "| --- |" + " ---: |" * len(layers),
    ]
    for row in rows:
        cells = []
        for layer in layers:
            rate, reduction = row["wer"].get(layer), row["reduction"].get(layer)
            cell = "" if rate is None else f"{rate:.1f}"
            cells.append(cell + (" ({:+.0f}: {:+.0f} to {:+.0f})".format(*reduction) if reduction else ""))
        lines.append(f"| {row['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train and compare variants of the recipe.")
    parser.add_argument("--data", type=Path, required=True, help="what prepare wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, required=True, help="of audio seen, for every variant")
    parser.add_argument("--layers", type=int, default=12, help="of the joint models; 4 trains several times faster")
    parser.add_argument("--only", help="comma-separated names; the first one is the baseline. Default: all")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=DATA",
        help="one more row: the first variant on what prepare wrote elsewhere, e.g. with other pieces or more corpora",
    )
    parser.add_argument("--score", type=Path, help="folder of prepared shards to score on; default DATA/dev")
    parser.add_argument("--start-from", type=Path, metavar="MODEL", help="model file that all rows go on from")
    parser.add_argument("--chunk-frames", type=int, default=8, help="of 80 ms")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        if options.start_from:
            known = going_on(options.hours, options.layers, load(options.start_from).encoder.config.head_hidden)
        else:
            known = variants(options.hours, options.layers)
        names = options.only.split(",") if options.only else list(known)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(f"unknown variants {', '.join(unknown)}; known: {', '.join(known)}")
        held_out = options.score or options.data / "dev"
        FeatureStore(held_out)  # not there: say so before an hour of training
        folders = dict.fromkeys(names, options.data)
        for entry in options.also:
            name, _, folder = entry.partition("=")
            known[name], folders[name] = on_other_data(known[names[0]], name, Path(folder)), Path(folder)
        for name, folder in list(folders.items()):
            if missing := lacking(name, known[name], folder):
                print(f"{name}: left out, {folder} has no {missing}", file=sys.stderr)
                del folders[name]
        if not folders:
            raise ConfigError("no row is left to train")
        results, layers = {}, {}
        for name, folder in folders.items():
            run = train_variant(name, known[name], folder, options.out, options.threads, options.start_from)
            results[name] = score(run, held_out, options.chunk_frames)
            layers[name] = known[name].model.exit_layers
            if options.start_from and len(results) == 1:
                before = (options.start_from, options.layers, options.out, held_out, options.chunk_frames)
                results["the model as it was"], layers["the model as it was"] = score_start(*before), layers[name]
            rows = compare(results, layers)
            (options.out / "ablation.json").write_text(json.dumps({"hours": options.hours, "rows": rows}, indent=1))
            table = markdown(rows, sorted({layer for item in layers.values() for layer in item}), options.hours)
            (options.out / "ablation.md").write_text(table, encoding="utf-8")
        print(table)
    except AsrExitError as error:
        sys.exit(f"ablate: {error}")


if __name__ == "__main__":
    main()

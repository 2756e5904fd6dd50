"""Train a model on what `prepare` wrote.

    python -m recipes.librispeech.train --data DATA --out RUN --config local --minutes 95 [--resume]

and with a process per core (faster where cores are shared with others):

    torchrun --nproc-per-node 2 -m recipes.librispeech.train --threads 1 --data DATA --out RUN --config local

`--dedicated 2` trains what a joint model's first exit is measured against: 2 layers, no other exit counts. Such a model
can become the front of a deeper one: `--start-from MODEL --front-from DEDICATED` and a config with `frozen_segments=1`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asr_exit.errors import AsrExitError
from asr_exit.parallel import Group
from asr_exit.schedule import TrainConfig
from asr_exit.train import Trainer
from recipes.librispeech.configs import CONFIGS
from recipes.librispeech.variants import last_exit_only

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model


def provenance(config: TrainConfig, arguments: Sequence[str], threads: int, processes: int) -> dict[str, Any]:
    """Who made this: commit, command, versions, hardware, seed."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../../asr_exit", "../../recipes")
    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted": [line.split(maxsplit=1)[1] for line in changed.splitlines()],
        "command": " ".join(["python -m recipes.librispeech.train", *(Path(a).name for a in arguments)]),
        "seed": config.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": {"processor": _processor(), "processes": processes, "threads": threads, "device": "cpu"},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read(path: Path) -> TrainConfig:
    try:
        return TrainConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AsrExitError) as error:
        sys.exit(f"train: {path} holds no training configuration: {error}")


def _source(path: Path | None, data: Path, option: str) -> Model | None:
    """The model file to start from."""
    if path is None:
        return None
    from asr_exit.checkpoint import load  # needs safetensors, which training alone does not

    model = load(path)
    if model.tokenizer.proto != (data / "tokenizer.model").read_bytes():
        sys.exit(f"train: --{option}: the model's tokenizer is not the data's; prepare with --tokenizer-of MODEL")
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="Train an early-exit model.")
    parser.add_argument("--data", type=Path, required=True, help="what prepare wrote")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", choices=sorted(CONFIGS), default="local")
    which.add_argument("--config-file", type=Path, help="config.json of another run, or one edited by hand")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="length of the run in wall-clock minutes")
    length.add_argument("--hours", type=float, help="length of the run in hours of audio seen")
    parser.add_argument("--accumulate", type=int, help="batches per update and process")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--dedicated", type=int, metavar="LAYERS", help="only the first LAYERS; only their exit counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--start-from", type=Path, help="model file whose first segments the run starts from")
    parser.add_argument("--front-from", type=Path, help="model file whose segments replace the first of --start-from")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's state.pt")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    config = _read(options.config_file) if options.config_file else CONFIGS[options.config]()
    if options.minutes is not None or options.hours is not None:
        config = dataclasses.replace(config, minutes=options.minutes, hours=options.hours)
    if options.accumulate is not None:
        config = dataclasses.replace(config, accumulate=options.accumulate)
    if options.seed is not None:
        config = dataclasses.replace(config, seed=options.seed)
    group = Group.from_environment()
    try:
        if options.dedicated is not None:
            config = last_exit_only(config, options.dedicated)
        made = provenance(config, given, options.threads, group.size)
        before = options.out / "provenance.json"
        earlier = json.loads(before.read_text()) if options.resume and before.is_file() else {}
        made = {"config": config.name, "seed": config.seed, "sittings": [*earlier.get("sittings", []), made]}
        made |= {key: earlier[key] for key in ("started_from", "front_from") if key in earlier}
        source = _source(options.start_from, options.data, "start-from")
        front = _source(options.front_from, options.data, "front-from")
        if source is None and not options.resume:
            if front is not None:
                sys.exit("train: --front-from needs --start-from, which has the deeper segments")
            if config.frozen_segments:
                sys.exit("train: frozen_segments would hold random weights fixed; give a model with --start-from")
        for key, model in (("started_from", source), ("front_from", front)):
            if model is not None:
                made[key] = model.provenance
        trainer = Trainer(config, options.data, options.out, provenance=made, group=group)
        if options.resume:
            trainer.resume()
        elif (options.out / "state.pt").exists():
            sys.exit(f"train: {options.out} holds a run already; add --resume or choose another --out")
        elif source is not None:
            trainer.start_from(source.encoder, None if front is None else front.encoder)
        trainer.run()
    except AsrExitError as error:
        sys.exit(f"train: {error}")
    finally:
        group.close()


if __name__ == "__main__":
    main()

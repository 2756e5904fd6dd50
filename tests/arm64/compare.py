"""An exported model on an emulated 64-bit Arm processor against this one: texts and every exit's log-posteriors.

    tests/arm64/prepare.sh ARM_ROOT
    python -m tests.arm64.compare ARM_ROOT EDGE_MODEL AUDIO...

Emulation proves function and equality, never speed. The processor is a Cortex-A76: what newer ones add (SVE) is
emulated wrongly for int8.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
EMULATOR = ("qemu-aarch64-static", "-cpu", "cortex-a76")


@dataclass(frozen=True)
class ArmReport:
    """What came out on both processors."""

    machines: tuple[str, str]
    texts: tuple[list[str], list[str]]  # here, there
    max_error_by_exit: list[float]  # of log-posteriors
    same_label: float  # share of frames and exits with the same best label

    @property
    def differing_texts(self) -> int:
        return sum(ours != theirs for ours, theirs in zip(*self.texts, strict=True))


def compare(root: Path, model: Path, recordings: Sequence[np.ndarray]) -> ArmReport:
    """Run (N,) float32 recordings at the model's rate on both. Raises CalledProcessError when either fails."""
    with tempfile.TemporaryDirectory() as scratch:
        audio = Path(scratch) / "audio.npz"
        np.savez(audio, **{f"{index:04}": samples for index, samples in enumerate(recordings)})
        arguments = [str(REPOSITORY / "tests/arm64/transcribe.py"), str(model), str(audio)]
        here, there = Path(scratch) / "here.npz", Path(scratch) / "there.npz"
        native = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, *arguments, str(here)], check=True, env=native)
        emulated = {
            "QEMU_LD_PREFIX": str(root),
            "PYTHONPATH": f"{REPOSITORY}:{root / 'site'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": os.environ["PATH"],
        }
        python = str(root / "usr/bin/python3.11")
        subprocess.run([*EMULATOR, python, *arguments, str(there)], check=True, env=emulated)
        return _report(np.load(here), np.load(there))


def _report(here: np.lib.npyio.NpzFile, there: np.lib.npyio.NpzFile) -> ArmReport:
    about = [json.loads(str(results["about"])) for results in (here, there)]
    errors: dict[int, float] = {}
    same, frames = 0, 0
    for name in here.files:
        if name != "about":
            exit_index = int(name.split("/")[1])
            ours, theirs = here[name], there[name]
            errors[exit_index] = max(errors.get(exit_index, 0.0), float(np.abs(ours - theirs).max(initial=0.0)))
            same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
            frames += len(ours)
    return ArmReport(
        machines=(about[0]["machine"], about[1]["machine"]),
        texts=(about[0]["texts"], about[1]["texts"]),
        max_error_by_exit=[errors[index] for index in sorted(errors)],
        same_label=same / max(1, frames),
    )


def main(arguments: Sequence[str]) -> None:
    """Command line."""
    from asr_exit.audio import load_audio

    root, model, *paths = arguments
    report = compare(Path(root), Path(model), [load_audio(path) for path in paths])
    errors = ", ".join(f"{error:.1e}" for error in report.max_error_by_exit)
    print(f"{' and '.join(report.machines)}: {len(paths)} recordings, {report.differing_texts} texts differ")
    print(f"largest error of log-posteriors by exit: {errors}; same best label in {report.same_label:.2%} of frames")
    for ours, theirs in zip(*report.texts, strict=True):
        if ours != theirs:
            print(f"  {ours}\n  {theirs}")


if __name__ == "__main__":
    main(sys.argv[1:])

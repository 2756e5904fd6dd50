"""Training needs torch, numpy and sentencepiece, and nothing else that this project installs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("safetensors", "jiwer", "soundfile", "soxr", "grpc", "google", "rich", "tensorboard", "psutil", "librosa")
# "None" in sys.modules makes an import fail as if the package were not installed; find_spec would raise ValueError
BARE = f"""
import importlib.abc, importlib.machinery, importlib.util, runpy, sys
ABSENT = {ABSENT!r}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ABSENT else find_spec(name, package)
sys.meta_path.insert(0, Absent())
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("recipes.librispeech.train", run_name="__main__")
"""


def test_trains_without_any_other_package(data: Path, tmp_path: Path) -> None:
    arguments = ["--data", data, "--out", tmp_path / "run", "--config", "tiny", "--hours", "0.01", "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", BARE, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "done"
    assert len(last["loss"]) == 2
    assert "wer" not in last
    assert (tmp_path / "run" / "state.pt").is_file()
    assert not (tmp_path / "run" / "ema.safetensors").exists()

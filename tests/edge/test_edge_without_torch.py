"""A device has numpy and ONNX Runtime, and nothing else: everything else is made impossible to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_exit.edge import EdgeRecognizer
from tests.conftest import babble

pytestmark = pytest.mark.timeout(600)  # exporting the model for the first test takes torch its time

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not on this device")
sys.meta_path.insert(0, Blocked())
"""
SERVER_SIDE = {"torch", "sentencepiece", "grpc", "google", "safetensors", "jiwer", "psutil", "onnx", "onnxscript"}
FILES = {"soundfile", "soxr", "rich"}


def run(blocked: set[str], code: str, *arguments: str) -> str:
    script = f"BLOCKED = {blocked!r}\n{BLOCK}\n{code}"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout


def test_the_runtime_needs_numpy_and_onnxruntime_only(fp32: Path, tmp_path: Path) -> None:
    samples = babble(4.0, 2)
    np.save(tmp_path / "a.npy", samples)
    code = """
import asr_exit, asr_exit.edge, numpy, sys
from asr_exit.budget import Budget
from asr_exit.policy import parse_policy
from asr_exit.stream import Fill, StreamOptions
recognizer = asr_exit.edge.EdgeRecognizer(sys.argv[1])
text = recognizer.transcribe(numpy.load(sys.argv[2])).text
policy = parse_policy("posterior:0.5", exit_layers=recognizer.model.config.exit_layers)
for fill in Fill:
    budget = Budget(real_time_factor=0.9)
    options = StreamOptions(policy=policy, budget=budget, fill=fill, decoder="beam")
    recognizer.transcribe(numpy.load(sys.argv[2]), options)
recognizer.push(numpy.load(sys.argv[2])); recognizer.finish()
print(text)
"""
    out = run(SERVER_SIDE | FILES, code, str(fp32), str(tmp_path / "a.npy"))
    assert out.strip() == EdgeRecognizer(fp32).transcribe(samples).text


def test_the_command_line_needs_no_torch_on_a_device(fp32: Path, tmp_path: Path) -> None:
    audio = tmp_path / "a.wav"
    soundfile.write(audio, babble(3.0, 4), 16_000)
    code = "import service.cli.main as cli; sys.exit(cli.main(sys.argv[1:]))"
    arguments = [str(audio), "--runtime", "edge", "--edge-model", str(fp32)]
    text = run(SERVER_SIDE, code, "transcribe", *arguments).strip()
    assert text
    assert text in run(SERVER_SIDE, code, "stream", *arguments)


def test_training_modules_do_need_torch() -> None:
    """The block above works."""
    code = "try:\n    import asr_exit.checkpoint\nexcept ImportError as error:\n    print(error)"
    assert "torch is not on this device" in run(SERVER_SIDE, code)

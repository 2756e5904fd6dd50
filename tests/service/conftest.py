"""A real server on a loopback port that runs the shared random model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import soundfile
import torch

from asr_exit.checkpoint import Model, save_model
from asr_exit.config import from_mapping
from asr_exit.stream import StepOutput
from service.background import BackgroundServer
from service.client import Caption, SpeechClient, StreamSettings
from service.config import ServeConfig


@pytest.fixture(scope="session")
def model_path(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared random model as a file, for servers in a process of their own."""
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    save_model(path, model.config, model.encoder.state_dict(), model.tokenizer, dtype=torch.float32)
    return path


@pytest.fixture(scope="session")
def server(model: Model) -> Iterator[BackgroundServer]:
    """One server for all tests that do not need settings of their own."""
    with BackgroundServer(model, serve_config()) as running:
        yield running


@pytest.fixture
def client(server: BackgroundServer) -> Iterator[SpeechClient]:
    """A client of that server."""
    with SpeechClient(server.address) as connected:
        yield connected


def serve_config(**tables: dict[str, object]) -> ServeConfig:
    """Defaults on a free loopback port, with the given keys changed."""
    fixed: dict[str, dict[str, object]] = {
        "listen": {"port": 0},
        "load": {"shed_depth": False},
        "model": {"precision": "fp32"},  # what the library is compared in
    }
    tables = fixed | tables
    return from_mapping(ServeConfig, tables)


def pcm16(samples: np.ndarray) -> bytes:
    """Float samples as little-endian 16-bit."""
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def parts(data: bytes, size: int = 3200) -> list[bytes]:
    """`data` in pieces of `size` bytes."""
    return [data[start : start + size] for start in range(0, len(data), size)]


def write_wav(path: Path, data: bytes) -> Path:
    """16-bit samples at 16 kHz as a file."""
    soundfile.write(path, np.frombuffer(data, "<i2"), 16_000, subtype="PCM_16")
    return path


def own_finals(server: BackgroundServer, data: bytes) -> list[Caption]:
    """What our own client gets for 16-bit samples, to compare others with: the final results, with words."""
    with SpeechClient(server.address) as client:
        captions = list(client.stream(parts(data), StreamSettings(word_times=True)))
    return [caption for caption in captions if caption.is_final and caption.text]


def macs_spent(model: Model, call: Callable[[grpc.Channel], object], on_step: Callable[[], None] = lambda: None) -> int:
    """Encoder MACs that `call` costs a server of its own, at full depth but for what the call's budget changes."""
    with BackgroundServer(model, serve_config(stream={"policy": "full"})) as server:
        macs: list[int] = []
        (engine,) = server.server.engines
        step = engine.step

        def counted(*given: object) -> StepOutput:
            output = step(*given)
            macs.extend(result.encoder_macs for result in output.results)
            on_step()
            return output

        engine.step = counted  # type: ignore[method-assign]
        with grpc.insecure_channel(server.address) as channel:
            call(channel)
        return sum(macs)


def python_with(module: str, package: str, variable: str) -> str:
    """An interpreter that has a foreign client: the one that `variable` names, else this one. Skips without."""
    python = os.environ.get(variable, sys.executable)
    found = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"{python} has no {package}: set {variable} to an interpreter that has it")
    return python

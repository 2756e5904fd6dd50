"""A real server on a loopback port that runs the shared random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from asr_exit.checkpoint import Model, save_model
from asr_exit.config import from_mapping
from service.background import BackgroundServer
from service.client import SpeechClient
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

"""Shared fixtures: a small model with random weights, so that tests need no trained one, and speech-like noise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from asr_exit.checkpoint import Model
from asr_exit.config import ModelConfig
from asr_exit.encoder import Encoder
from asr_exit.tokenizer import Tokenizer

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "how vexingly quick daft zebras jump",
    "it's the early bird that catches the worm",
]


def random_model(seed: int = 0, **changes: object) -> Model:
    """A model whose random weights are large enough that every layer, and every cached frame, shows in the output."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(TEXT, vocab_size=48)
    values: dict[str, object] = {
        "vocab_size": tokenizer.vocab_size,
        "d_model": 32,
        "ff_dim": 64,
        "num_heads": 2,
        "subsampling_channels": 8,
    }
    config = ModelConfig.from_dict(values | changes)
    encoder = Encoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for segment in encoder.segments:
            segment.head.out.weight.mul_(2.0)
    encoder.set_feature_stats(torch.full((80,), 8.0), torch.full((80,), 3.0))
    encoder.eval().requires_grad_(False)
    return Model("random", config, encoder, tokenizer, {}, {})


def babble(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise with speech-like bursts: (N,) float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    n = int(seconds * 16_000)
    t = np.arange(n) / 16_000
    envelope = np.clip(np.sin(2 * np.pi * 1.7 * t + seed) + 0.3 * np.sin(2 * np.pi * 0.31 * t), 0, None)
    tones = sum(np.sin(2 * np.pi * f * t * (1 + 0.05 * np.sin(2 * np.pi * 0.7 * t))) for f in rng.uniform(120, 3000, 4))
    return (0.05 * envelope * (tones + rng.standard_normal(n))).astype(np.float32)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """For `pytest -n 2`: tests of one file, or of a folder that shares costly fixtures, stay in one process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFileOrFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.split("::")[0])
            if path.parent.name == "edge" or path.stem == "test_export":  # they export models
                return "edge"
            return "recipes" if path.parent.name == "recipes" else str(path)

    return ByFileOrFolder(config, log)


@pytest.fixture(scope="session")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

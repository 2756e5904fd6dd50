"""A small model of four exits, exported once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asr_exit.checkpoint import Model, save_model
from asr_exit.edge import EdgeModel
from asr_exit.edge.export import export_model
from service.cli.main import main
from tests.conftest import random_model

CALIBRATION = {"posterior": {"thresholds": [0.5, 0.4, None]}, "entropy": {"table": [{"thresholds": [0.3, 0.3, 0.3]}]}}


@pytest.fixture(scope="session")
def source() -> Model:
    """Random weights; four segments of one layer, so that two are of the same kind; two labels a frame."""
    return random_model(seed=7, num_layers=4, exit_every=1, head_hidden=(16, 0, 0, 0), labels_per_frame=2)


@pytest.fixture(scope="session")
def source_path(source: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "small.safetensors"
    state = source.encoder.state_dict()
    save_model(path, source.config, state, source.tokenizer, CALIBRATION, dtype=torch.float32)
    return path


@pytest.fixture(scope="session")
def fp32(source: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exact export."""
    out = tmp_path_factory.mktemp("exports") / "fp32"
    export_model(source, out, precision="fp32")
    return out


@pytest.fixture(scope="session")
def int8(source_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantised export in ONNX Runtime's own format, made by the command."""
    out = tmp_path_factory.mktemp("exports") / "int8"
    assert main(["export", "--model", str(source_path), "--out", str(out), "--ort", "--chunk-ms", "320"]) == 0
    return out


@pytest.fixture
def edge_model(fp32: Path) -> EdgeModel:
    """Freshly opened: no graph is loaded yet."""
    return EdgeModel(fp32)

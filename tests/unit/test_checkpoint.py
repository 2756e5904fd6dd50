"""One-file models: what is saved comes back, and anything else is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from asr_exit.checkpoint import Model, load, save_model
from asr_exit.errors import CheckpointError
from asr_exit.recognizer import Recognizer
from tests.conftest import babble


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    calibration, provenance = {"posterior": {"thresholds": [0.9] * 6}}, {"seed": 7, "commit": "abc"}
    state = model.encoder.state_dict()
    save_model(path, model.config, state, model.tokenizer, calibration, provenance, dtype=torch.float32)
    return path


def altered(path: Path, **changes: str | None) -> Path:
    """A copy with other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value in changes.items():
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value
    copy = path.with_name("altered.safetensors")
    save_file(tensors, copy, metadata=metadata)
    return copy


def test_round_trip(model: Model, saved: Path) -> None:
    again = load(saved)
    assert again.config == model.config
    assert again.tokenizer.pieces == model.tokenizer.pieces
    assert again.calibration["posterior"]["thresholds"] == [0.9] * 6
    assert again.provenance == {"seed": 7, "commit": "abc"}
    samples = babble(2.0)
    for ours, theirs in zip(
        Recognizer(again).log_posteriors(samples, 640), Recognizer(model).log_posteriors(samples, 640), strict=True
    ):
        assert np.abs(ours - theirs).max() == 0.0


def test_half_precision_halves_the_file_and_keeps_feature_statistics(model: Model, saved: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save_model(half, model.config, model.encoder.state_dict(), model.tokenizer)
    assert half.stat().st_size < 0.6 * saved.stat().st_size
    assert torch.equal(load(half).encoder.feature_std, model.encoder.feature_std)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("content", [b"", b"just text, no model", b"\x00" * 4096, b"\xff" * 16])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(path)


def test_a_truncated_model_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        load(saved)


def test_a_missing_model_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        load(tmp_path / "nowhere.safetensors")


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not written by asr-exit"):
        load(path)


def test_damaged_parts_are_named(model: Model, saved: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        load(altered(saved, config=None))
    with pytest.raises(CheckpointError, match="num_layer"):
        load(altered(saved, config=json.dumps({"num_layer": 12})))
    with pytest.raises(CheckpointError, match="damaged"):
        load(altered(saved, config=json.dumps(model.config.to_dict() | {"d_model": 64})))
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(altered(saved, tokenizer="AAAA"))

"""Gates trained with the encoder, from the run to a calibrated model that leaves by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asr_exit.calibration.calibrate import calibrate
from asr_exit.calibration.workers import Recording, Workers
from asr_exit.checkpoint import load, save_model
from asr_exit.errors import ConfigError
from asr_exit.joint_gates import KEY, gates_of, without_gates
from asr_exit.policy import JointGate, parse_policy
from asr_exit.recognizer import Recognizer
from asr_exit.schedule import Stage, TrainConfig
from asr_exit.stream import Fill, StreamOptions
from asr_exit.train import Trainer
from recipes.librispeech import average, bundle
from tests.recipes.sine import SENTENCES, speak
from tests.recipes.test_tiny import state_of
from tests.recipes.worker import short_config

UPDATES = 4


def gated_config(**changes: object) -> TrainConfig:
    stages = (Stage(1.0, 2, 6.0, 10.0, True, 3e-3),)
    chunks = ((4, 1.0), (8, 1.0))
    values: dict[str, object] = {"gate_weight": 0.5, "hours": 10.0, "stages": stages, "chunk_weights": chunks}
    return short_config(evaluate_utterances=1, random_depth_probability=0.2, **(values | changes))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gated")
    Trainer(gated_config(), data, out, max_updates=UPDATES).run()
    return out


def test_resumed_equals_uninterrupted_to_the_last_bit(run: Path, data: Path, tmp_path: Path) -> None:
    Trainer(gated_config(), data, tmp_path, max_updates=UPDATES // 2).run()
    again = Trainer(gated_config(), data, tmp_path, max_updates=UPDATES)
    again.resume()
    again.run()
    (tensors, progress), (expected_tensors, expected_progress) = map(state_of, (tmp_path, run))
    torch.testing.assert_close(tensors, expected_tensors, rtol=0, atol=0)
    assert progress == expected_progress
    gates, expected = (torch.load(folder / "state.pt", weights_only=True)["gates"] for folder in (tmp_path, run))
    torch.testing.assert_close(gates, expected, rtol=0, atol=0)
    assert (gates["averaged_weight"] != 0).sum() >= 8  # they have learned
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert any(0 < line.get("gates_spend", 0) < 1 for line in lines)


def test_without_the_switch_nothing_changes(data: Path, tmp_path: Path) -> None:
    plain = Trainer(gated_config(gate_weight=0.0), data, tmp_path / "a")
    gated = Trainer(gated_config(), data, tmp_path / "b")
    torch.testing.assert_close(plain.model.state_dict(), gated.model.state_dict(), rtol=0, atol=0)
    plain.save()
    state = torch.load(tmp_path / "a" / "state.pt", weights_only=True)
    assert set(state) == {"config", "model", "ema", "optimizer", "progress"}
    assert set(state["ema"]) == set(state["model"])
    assert len(state["optimizer"]["adamw"]["param_groups"]) == 2


def test_bundled_gates_are_calibrated_and_serve(run: Path, speech: Path, tmp_path: Path) -> None:
    model = bundle.bundle(run, tmp_path / "gated.safetensors", {"joint-gate": {"thresholds": [0.9]}})
    _, rows = without_gates(load_file(run / "ema.safetensors"))
    assert rows is not None
    assert "thresholds" not in model.calibration["joint-gate"]  # they were another model's
    torch.testing.assert_close(gates_of(model.calibration), rows)
    recordings = [Recording(path, "ten men") for path in sorted(speech.rglob("*.flac"))[:2]]
    found = calibrate(Workers(model), recordings, name="sine", chunks_ms=[640], criteria=["joint-gate"], target=0.9)
    assert found["joint-gate"]["weights"] == model.calibration["joint-gate"]["weights"]
    save_model(tmp_path / "c.safetensors", model.config, model.encoder.state_dict(), model.tokenizer, found)
    calibrated = load(tmp_path / "c.safetensors")
    policy = parse_policy("joint-gate", exit_layers=(2, 4), calibration=calibrated.calibration)
    assert isinstance(policy, JointGate)
    shallow, deep = (
        Recognizer(calibrated, StreamOptions(policy=policy.at(share), fill=Fill.PROPAGATE)).transcribe(
            speak(SENTENCES[0])
        )
        for share in (0.0, 1.0)
    )
    assert shallow.encoder_macs < deep.encoder_macs
    kept = calibrate(Workers(calibrated), recordings, name="sine", chunks_ms=[640], criteria=["entropy"])
    torch.testing.assert_close(gates_of(kept), rows)
    assert set(kept["joint-gate"]) == {"weights", "features"}
    with pytest.raises(ConfigError, match="no calibrated thresholds for 'joint-gate'"):
        parse_policy("joint-gate", exit_layers=(2, 4), calibration=kept)


def test_gates_are_found_in_the_state_and_averaged(run: Path, tmp_path: Path) -> None:
    rows = load_file(run / "ema.safetensors")[KEY]
    assert bundle.read_run(run, run / "state.pt").gates is not None
    mean = average.average([run, run / "state.pt"], tmp_path / "mean.safetensors")
    torch.testing.assert_close(gates_of(mean.calibration), rows)
    again = average.average([tmp_path / "mean.safetensors", run], tmp_path / "again.safetensors")
    torch.testing.assert_close(gates_of(again.calibration), rows)

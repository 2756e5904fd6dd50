"""A run folder to a calibrated one-file model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asr_exit.checkpoint import Model, load
from asr_exit.errors import CheckpointError
from asr_exit.policy import parse_policy
from asr_exit.recognizer import Recognizer
from asr_exit.stream import StreamOptions
from recipes.librispeech import bundle, calibrate
from tests.recipes.sine import SENTENCES, speak


@pytest.fixture(scope="module")
def model_file(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    bundle.main(["--run", str(tiny_run), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def model(model_file: Path) -> Model:
    return load(model_file)


def test_bundle_holds_the_averaged_weights_and_where_they_come_from(model: Model, tiny_run: Path) -> None:
    for name, value in load_file(tiny_run / "ema.safetensors").items():
        torch.testing.assert_close(model.encoder.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    assert model.provenance["config"] == "tiny"
    assert model.provenance["data_hours"]["train"] == {"sine": pytest.approx(0.005, abs=0.001)}
    assert model.provenance["hours_seen"] > 0.5
    assert str(tiny_run.parent) not in json.dumps(model.provenance)
    transcript = Recognizer(model).transcribe(speak(SENTENCES[3], 3))
    assert transcript.text == SENTENCES[3]


def test_no_absolute_path_survives() -> None:
    dirty = {
        "command": "python train.py --data /home/me/data --out=/tmp/run1/ --see https://example.org/a/b",
        "files": ["asr_exit/train.py", "~/notes/x.txt", "a / b", "1/2"],
        "seed": 3,
    }
    assert bundle.without_paths(dirty) == {
        "command": "python train.py --data data --out=run1 --see https://example.org/a/b",
        "files": ["asr_exit/train.py", "x.txt", "a / b", "1/2"],
        "seed": 3,
    }


def test_calibration_of_another_model_can_be_carried_over(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"posterior": {"thresholds": [0.8]}}))
    out = tmp_path / "m.safetensors"
    bundle.main(["--run", str(tiny_run), "--out", str(out), "--calibration", str(tmp_path / "c.json")])
    assert load(out).calibration == {"posterior": {"thresholds": [0.8]}}


def test_unfinished_or_mismatched_runs_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(SystemExit, match=r"bundle: .*ema\.safetensors"):
        bundle.main(["--run", str(tmp_path), "--out", str(out)])
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = json.loads((run / "config.json").read_text())
    config["model"]["ff_dim"] = 64
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="not fit"):
        bundle.main(["--run", str(run), "--out", str(out)])
    (run / "ema.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit, match="not fit"):
        bundle.main(["--run", str(run), "--out", str(out)])
    assert not out.exists()


def test_calibrated_model_loads_and_its_policies_run(model_file: Path, speech: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibrated.safetensors"
    sources = ["--librispeech", str(speech), "--subset", "sine", "--chunk-ms", "640"]
    calibrate.main(["--model", str(model_file), *sources, "--target", "0.8", "--out", str(out)])
    model = load(out)
    assert (model.calibration["chunk_ms"], model.calibration["fill"]) == (640, "propagate")
    assert model.calibration["data"].startswith("sine, 8 utterances")
    for criterion in ("auto", "posterior", "entropy", "gate"):
        policy = parse_policy(criterion, exit_layers=model.config.exit_layers, calibration=model.calibration)
        assert policy.needs_evidence
        assert Recognizer(model, StreamOptions(policy=policy)).transcribe(speak(SENTENCES[0])).text


def test_sources_and_targets_are_checked(model_file: Path, speech: Path, tmp_path: Path) -> None:
    common = ["--model", str(model_file), "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit, match="either --librispeech"):
        calibrate.main(common)
    with pytest.raises(SystemExit, match="target"):
        calibrate.main([*common, "--librispeech", str(speech), "--subset", "sine", "--target", "1.5"])


def test_a_run_without_exported_weights_is_bundled_from_its_state(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "ema.safetensors").unlink()
    bare = bundle.bundle(run, tmp_path / "bare.safetensors")
    exported = bundle.bundle(tiny_run, tmp_path / "exported.safetensors")
    torch.testing.assert_close(bare.encoder.state_dict(), exported.encoder.state_dict(), rtol=0, atol=0)
    (run / "state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks ema\.safetensors"):
        bundle.bundle(run, tmp_path / "none.safetensors")

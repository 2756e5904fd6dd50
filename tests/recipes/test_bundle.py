"""A run folder to a calibrated one-file model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from asr_exit.checkpoint import Model, load
from asr_exit.errors import CheckpointError
from asr_exit.policy import parse_policy
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Fill, StreamOptions
from recipes.librispeech import bundle, calibrate
from recipes.librispeech.corpora import Corpus, read_librispeech
from recipes.librispeech.observe import edit_distance, observe, stream_outcome
from recipes.librispeech.thresholds import Row, choose, equal_risk, exits_of
from tests.recipes.sine import SENTENCES, speak


@pytest.fixture(scope="module")
def model_file(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    bundle.main(["--run", str(tiny_run), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def model(model_file: Path) -> Model:
    return load(model_file)


@pytest.fixture(scope="module")
def corpus(speech: Path) -> Corpus:
    return read_librispeech(speech / "sine")


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
    sources = ["--librispeech", str(speech), "--subset", "sine"]
    calibrate.main(["--model", str(model_file), *sources, "--target", "0.8", "--out", str(out)])
    model = load(out)
    assert (model.calibration["chunk_ms"], model.calibration["fill"]) == (640, "propagate")
    assert model.calibration["data"].startswith("sine, 8 utterances")
    for criterion in ("posterior", "entropy"):
        stored = model.calibration[criterion]
        costs = [row["macs_fraction"] for row in stored["table"]]
        assert costs == sorted(costs)
        assert stored["wer_measured"] <= 0.2
        policy = parse_policy(criterion, exit_layers=model.config.exit_layers, calibration=model.calibration)
        assert policy.needs_evidence
        assert Recognizer(model, StreamOptions(policy=policy)).transcribe(speak(SENTENCES[0])).text


def test_simulation_equals_the_engine_where_nothing_is_skipped(model: Model, corpus: Corpus) -> None:
    observations = observe(model, corpus.utterances, 640)
    deepest = np.full(len(observations.full_macs), model.config.num_exits - 1)
    assert observations.outcome(deepest) == stream_outcome(model, corpus.utterances, StreamOptions())


def test_simulated_cost_equals_the_engine(model: Model, corpus: Corpus) -> None:
    policy = parse_policy("posterior:0", exit_layers=model.config.exit_layers)
    observations = observe(model, corpus.utterances, 640)
    simulated, _ = observations.outcome(exits_of(observations.confidence["posterior"], [0.0]))
    measured, _ = stream_outcome(model, corpus.utterances, StreamOptions(policy=policy, fill=Fill.PROPAGATE))
    assert simulated == pytest.approx(measured)
    assert simulated < 0.8


def test_sources_and_targets_are_checked(model_file: Path, speech: Path, tmp_path: Path) -> None:
    common = ["--model", str(model_file), "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit, match="either --librispeech"):
        calibrate.main(common)
    with pytest.raises(SystemExit, match="target"):
        calibrate.main([*common, "--librispeech", str(speech), "--subset", "sine", "--target", "1.5"])
    assert len(calibrate.read_corpus(speech, "sine", None, 3).utterances) == 3


def test_equal_risk_by_hand() -> None:
    confidence = np.array([[0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.9, 0.4], [1.0, 1.0, 1.0, 1.0]])
    edits = np.array([[0, 0, 3, 0], [0, 0, 0, 2], [0, 0, 0, 0]])
    thresholds = equal_risk(confidence, edits, 0.5)
    assert thresholds == (0.8, 0.9)  # a mean of 1 after three, of 0.75 after four: two leave; then one of the two left
    assert exits_of(confidence, thresholds).tolist() == [0, 0, 1, 2]
    assert equal_risk(confidence, edits + 1, 0.5) == (np.inf, np.inf)
    assert exits_of(confidence, (np.inf, np.inf)).tolist() == [2, 2, 2, 2]


def test_choice_of_a_row() -> None:
    rows = [Row(0.4, 0.30, (0.5,)), Row(0.7, 0.204, (0.8,)), Row(0.9, 0.201, (0.9,)), Row(1.0, 0.2, (np.inf,))]
    assert choose(rows, 0.2, None, 0.02, 0.6) == rows[1]
    assert choose(rows, 0.2, 0.45, 0.02, 0.6) == rows[0]
    assert choose(rows, 0.1, None, 0.02, 0.6) == rows[1]  # none is good enough: the one nearest to 0.6
    assert choose(rows[3:], 0.2, None, 0.02, 0.6) == rows[3]
    assert rows[3].stored() == {"macs_fraction": 1.0, "wer": 0.2, "thresholds": [None]}
    assert Row(0.5, 0.2, (-0.25,)).stored()["thresholds"] == [0.25]


def test_edit_distance_by_hand() -> None:
    assert edit_distance([], [1, 2]) == 2
    assert edit_distance([1, 2, 3], [1, 3]) == 1
    assert edit_distance([1, 2, 3, 4], [2, 3, 5, 4]) == 2


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

"""Training that starts from a model file: it knows what the model knew, and says where it came from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from asr_exit.checkpoint import load, save_model
from asr_exit.encoder import Encoder
from asr_exit.tokenizer import Tokenizer
from asr_exit.train import Trainer
from recipes.librispeech import bundle, train
from recipes.librispeech.configs import tiny


@pytest.fixture(scope="module")
def model_file(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "model.safetensors"
    bundle.main(["--run", str(tiny_run), "--out", str(path)])
    return path


def arguments(data: Path, out: Path, hours: float) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--config", "tiny", "--hours", str(hours), "--threads", "1"]


def first_exit_errors(run: Path) -> float:
    """Word error rate of the first exit at the end of the run."""
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "done"
    return float(last["wer"][0])


def test_a_run_starts_from_a_model_and_keeps_its_origin(data: Path, model_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main([*arguments(data, run, 0.02), "--start-from", str(model_file)])
    origin = json.loads((run / "provenance.json").read_text())["started_from"]
    assert origin == json.loads(json.dumps(dict(load(model_file).provenance)))
    assert origin["config"] == "tiny"
    train.main([*arguments(data, run, 0.03), "--resume"])
    made = json.loads((run / "provenance.json").read_text())
    assert made["started_from"] == origin
    assert len(made["sittings"]) == 2
    train.main(arguments(data, tmp_path / "fresh", 0.02))
    assert "started_from" not in json.loads((tmp_path / "fresh" / "provenance.json").read_text())
    assert first_exit_errors(run) < 0.5 < first_exit_errors(tmp_path / "fresh")


def test_idle_units_are_renewed_if_the_configuration_says_so(data: Path, model_file: Path, tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(tiny(), renew_below=100.0), data, tmp_path)
    trainer.start_from(load(model_file).encoder)
    units = 2 * tiny().model.num_layers * tiny().model.ff_dim
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"event": "renewed", "feed_forward_units": units}
    outputs = [value for name, value in trainer.ema.items() if name.endswith("down.weight")]
    assert len(outputs) == 2 * tiny().model.num_layers
    assert all((value == 0).all() for value in outputs)


def test_a_dedicated_model_starts_from_a_joint_one(data: Path, model_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main([*arguments(data, run, 0.02), "--start-from", str(model_file), "--dedicated", "2"])
    config = json.loads((run / "config.json").read_text())
    assert (config["model"]["num_layers"], config["exit_weights"]) == (2, [1.0])
    assert first_exit_errors(run) < 0.5
    with pytest.raises(SystemExit, match=r"layers \(2, 4\), not 3"):
        train.main([*arguments(data, tmp_path / "none", 0.02), "--dedicated", "3"])
    assert not (tmp_path / "none").exists()


def test_deeper_segments_learn_on_a_front_that_stays_as_it_is(data: Path, model_file: Path, tmp_path: Path) -> None:
    front = tmp_path / "front.safetensors"
    train.main([*arguments(data, tmp_path / "two", 0.01), "--dedicated", "2"])
    bundle.main(["--run", str(tmp_path / "two"), "--out", str(front)])
    config = {**tiny().to_dict(), "frozen_segments": 1, "minutes": None, "hours": 0.02}
    config["stages"] = [{**config["stages"][-1], "segments": 2, "until": 1.0}]
    config.update(random_depth_probability=0.5, shallow_probability=0.5)
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = ["--data", str(data), "--config-file", str(tmp_path / "config.json"), "--threads", "1"]
    run = tmp_path / "run"
    train.main([*given, "--out", str(run), "--start-from", str(model_file), "--front-from", str(front)])
    bundle.main(["--run", str(run), "--out", str(tmp_path / "model.safetensors")])
    made, below, above = (load(path) for path in (tmp_path / "model.safetensors", front, model_file))
    assert json.loads((run / "provenance.json").read_text())["front_from"]["config"] == "tiny"
    features, lengths = torch.randn(2, 160, 80), torch.tensor([160, 120])
    with torch.inference_mode():
        ours, first, before = (m.encoder(features, lengths, chunk_frames=8).logits for m in (made, below, above))
    assert torch.equal(ours[0], first[0])
    assert not torch.allclose(ours[0], before[0], atol=0.1)
    source = above.encoder.state_dict()
    learnt = {name for name, value in made.encoder.state_dict().items() if not torch.equal(value, source[name])}
    assert any(name.startswith("segments.1.layers") for name in learnt)
    assert "segments.0.feedback.weight" in learnt
    with pytest.raises(SystemExit, match="--front-from needs --start-from"):
        train.main([*given, "--out", str(tmp_path / "none"), "--front-from", str(front)])
    with pytest.raises(SystemExit, match="random weights fixed"):
        train.main([*given, "--out", str(tmp_path / "none")])
    train.main([*given, "--out", str(tmp_path / "alone"), "--dedicated", "2", "--hours", "0.001"])
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["frozen_segments"] == 0


def test_another_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    config, other = tiny().model, Tokenizer.train(["something else entirely", "other words give other pieces"], 40)
    save_model(tmp_path / "other.safetensors", config, Encoder(config).state_dict(), other)
    with pytest.raises(SystemExit, match="--tokenizer-of"):
        train.main([*arguments(data, tmp_path / "run", 0.02), "--start-from", str(tmp_path / "other.safetensors")])
    assert not (tmp_path / "run").exists()

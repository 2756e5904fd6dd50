"""Calibrating on the command line, and the depth study, on seconds of generated audio with the small random model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_exit.calibration.observe import Observation
from asr_exit.calibration.replay import Replay
from asr_exit.checkpoint import Model, load, save_model
from asr_exit.metrics import WordErrors
from asr_exit.policies.learned import FEATURES
from asr_exit.policy import CRITERIA
from service.bench import fills, oracle
from service.bench.paired import Point, difference, errors_at, hull, worst_window
from service.cli.main import main
from tests.conftest import babble


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    lines = ["path\ttext"]
    for index, seconds in enumerate((2.3, 1.5)):
        soundfile.write(folder / f"{index}.wav", babble(seconds, seed=index), 16_000)
        lines.append(f"{index}.wav\tsome words")
    path = folder / "manifest.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def calibrated(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with made-up tables."""
    rows = [
        {"macs_fraction": 0.3, "thresholds": [0.0] * 5},
        {"macs_fraction": 0.6, "thresholds": [0.4] * 5},
        {"macs_fraction": 1.0, "thresholds": [None] * 5},
    ]
    low = [rows[0] | {"thresholds": [1.0] * 5}, *rows[1:]]
    weights = {"weights": [[0.0] * (len(FEATURES) + 1)] * 5, "features": list(FEATURES)}
    calibration: dict = {"chunk_ms": 640.0, "default": "posterior"}
    for label, kind in CRITERIA.items():
        calibration[label] = {"thresholds": [0.4] * 5, "table": low if kind.low_is_sure else rows} | weights
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    save_model(path, model.config, model.encoder.state_dict(), model.tokenizer, calibration)
    return path


def test_calibrate_writes_a_model_that_auto_uses(
    manifest: Path, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ["--manifest", str(manifest), "--model", str(model_path), "--out", str(out)]
    assert main(["calibrate", *arguments, "--chunk-ms", "640", "--criteria", "posterior,entropy"]) == 0
    assert "(default)" in capsys.readouterr().out
    calibration = load(out).calibration
    assert calibration["default"] in ("posterior", "entropy")
    assert calibration["data"].endswith("2 utterances, 0.00 h")
    assert main(["calibrate", *arguments, "--chunk-ms", "x"]) == 1
    assert main(["calibrate", *arguments, "--criteria", "guess"]) == 1
    assert "criteria are" in capsys.readouterr().err


def test_depth_study(manifest: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    noise = tmp_path / "noise"
    noise.mkdir()
    soundfile.write(noise / "hum.wav", babble(1.0, seed=8), 16_000)
    arguments = ["--manifest", str(manifest), "--model", str(calibrated), "--points", "1", "--noise", str(noise)]
    arguments += ["--criteria", "posterior,entropy", "--out", str(tmp_path / "out"), "--plot", "--json"]
    status = main(["bench", "depth", *arguments])
    values = json.loads(capsys.readouterr().out)
    assert status == (0 if values["holds"] else 1)
    assert [row["name"] for row in values["static"]] == ["exit:2", "exit:4", "exit:6", "exit:8", "exit:10", "full"]
    assert values["static"][-1]["macs_fraction"] == 1
    assert list(values["criteria"]) == ["posterior", "entropy"]
    assert [row["snr_db"] for row in values["snr"]["rows"]] == [None, 20, 10, 5, 0]
    assert [row["asked"] for row in values["budgets"]["rows"]] == [0.3, 0.5, 0.7, 0.9]
    assert "entropy_minus_posterior" in values["comparisons"]
    page = (tmp_path / "out" / "depth.md").read_text()
    assert "oracle (no more errors)" in page
    assert json.loads((tmp_path / "out" / "depth.json").read_text()) == values
    assert (tmp_path / "out" / "depth.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--criteria", "gate"], "no cost table for gate"),
        (["--plot"], "--plot needs --out"),
        (["--points", "0"], "--points"),
    ],
)
def test_depth_refuses_nonsense(
    manifest: Path, model_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "depth", "--manifest", str(manifest), "--model", str(model_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_fills(manifest: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fills", "--manifest", str(manifest), "--model", str(calibrated), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["full depth"]["macs_fraction"] == 1
    assert all(0 < row["macs_fraction"] <= 1.5 for row in rows.values())
    assert rows["catch_up, default policy"]["macs_fraction"] >= 1  # what waited is run in the end
    assert rows["feed-forward skip, default policy"]["macs_fraction"] <= 1
    # the engine fills only where a later chunk looks
    assert (
        1 >= rows["perfect fill, default policy"]["macs_fraction"] >= rows["propagate, default policy"]["macs_fraction"]
    )


def test_decide(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "decide", "--model", str(calibrated), "--batch", "2", "--turns", "2", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert [row["criterion"] for row in values["rows"]] == list(CRITERIA)
    assert [row["criterion"] for row in values["rows"] if row["judged"]] == ["posterior"]
    assert all(row["share"] > 0 for row in values["rows"])


def test_the_masked_pass_equals_the_encoder_where_nothing_is_skipped(model: Model) -> None:
    import torch

    from asr_exit.features import log_mel

    features = torch.from_numpy(log_mel(babble(3.0), model.config.features))[None]
    output = model.encoder(features, torch.tensor([features.shape[1]]), chunk_frames=8)
    never = lambda k, logits, before, after: torch.zeros(logits.shape[1], dtype=torch.bool)  # noqa: E731
    for skipped in fills.Skipped:
        with torch.inference_mode():
            labels, macs = fills.masked_forward(model, features, 8, never, skipped)
        assert labels.tolist() == output.logits[-1][0].argmax(dim=-1).tolist()
        assert macs == sum(model.macs.segment(k, len(labels), True) for k in range(6)) + model.macs.stem(len(labels))


def test_the_masked_pass_equals_propagation_in_the_encoder(model: Model) -> None:
    import torch

    from asr_exit.features import log_mel

    features = torch.from_numpy(log_mel(babble(3.84), model.config.features))[None]
    depth = torch.tensor([[1, 6, 3, 2, 6, 4]])
    output = model.encoder(features, torch.tensor([features.shape[1]]), chunk_frames=8, chunk_depth=depth)
    assert output.mixed_logits is not None
    frames = depth[0].repeat_interleave(8)
    with torch.inference_mode():
        labels, macs = fills.masked_forward(
            model, features, 8, lambda k, logits, before, after: frames <= k + 1, fills.Skipped.PROPAGATED
        )
    assert labels.tolist() == output.mixed_logits[0].argmax(dim=-1).tolist()
    assert macs < model.macs.full(len(labels))


def test_a_perfect_fill_reads_every_exit_at_full_depth(model: Model) -> None:
    import torch

    from asr_exit.features import log_mel

    features = torch.from_numpy(log_mel(babble(3.84), model.config.features))[None]
    frames = torch.tensor([1, 6, 3, 2, 6, 4]).repeat_interleave(8)
    leave = lambda k, logits, before, after: frames <= k + 1  # noqa: E731
    output = model.encoder(features, torch.tensor([features.shape[1]]), chunk_frames=8)
    wanted = torch.stack([logits[0].argmax(dim=-1) for logits in output.logits])[frames - 1, torch.arange(len(frames))]
    with torch.inference_mode():
        labels, macs = fills.masked_forward(model, features, 8, leave, fills.Skipped.WHOLE)
        _, propagated = fills.masked_forward(model, features, 8, leave, fills.Skipped.PROPAGATED)
    assert labels.tolist() == wanted.tolist()
    assert macs == propagated


def point(name: str, cost: float, errors: list[int]) -> Point:
    full = 1000
    replays = [
        Replay(errors=WordErrors(10, e, 0, 0), macs=round(cost * full), full_macs=full, exits=[1]) for e in errors
    ]
    return Point.of(name, replays)


def test_mixes_of_equal_cost_and_the_hull() -> None:
    a, b, c, d = point("a", 0.2, [6, 6]), point("b", 0.4, [5, 5]), point("c", 0.6, [1, 3]), point("d", 1.0, [2, 2])
    assert [p.name for p in hull([d, c, b, a])] == ["a", "c"]  # b lies above the line, d is dearer than c and no better
    assert errors_at([a, c], 0.4).tolist() == pytest.approx([3.5, 4.5])
    assert errors_at([a, c], 0.1).tolist() == [6, 6]
    assert errors_at([a, c], 0.9).tolist() == [1, 3]


def test_paired_differences() -> None:
    rng = np.random.default_rng(0)
    words, base = np.full(400, 10.0), rng.integers(0, 5, 400).astype(float)
    better = difference(base + 1, base, words)
    assert better.sure
    assert better.wer_difference == pytest.approx(0.1)
    assert (better.low, better.high) == pytest.approx((0.1, 0.1))
    noise = difference(base + rng.normal(0, 1, 400), base, words)
    assert noise.low < 0 < noise.high


def test_the_worst_window() -> None:
    spent = [50] * 60 + [100] * 30 + [50] * 60
    item = Replay(chunk_seconds=[1.0] * 150, chunk_macs=spent, full_macs=15_000)
    assert worst_window([item], 0.5) == pytest.approx(0.5)
    assert worst_window([item], 0.75) == pytest.approx(0.25)
    assert worst_window([Replay(chunk_seconds=[1.0] * 5, chunk_macs=[9] * 5, full_macs=100)], 0.5) == 0


def test_oracles_by_hand(model: Model) -> None:
    tokenizer = model.tokenizer
    words = [tokenizer.encode(word) for word in ("dog", "box")]
    size = max(map(len, words)) * 2
    blank = [0] * size

    def spelled(ids: list[int]) -> list[int]:
        return [x for i in ids for x in (i, 0)] + [0] * (size - 2 * len(ids))

    shallow = np.array(spelled(words[0]) + blank)
    middle = np.array(spelled(words[0]) + spelled(words[1]))
    deep = np.array(blank + spelled(words[1]))
    edits = np.array([[len(words[0]), len(words[1])], [len(words[0]), 0], [0, 0]])
    item = Observation(np.stack([shallow, middle, deep]), (), (size, size), 1.0, edits, edits * 0, 1, 2)
    assert oracle.same_text(item) == (2, 1)
    assert oracle.no_more_errors(item, tokenizer, "dog box") == (0, 0)  # "dog" alone has one error, as full depth

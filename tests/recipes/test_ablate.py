"""Variants are trained once, scored alike, and compared by hand-checkable numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from asr_exit.checkpoint import load
from asr_exit.schedule import TrainConfig
from asr_exit.validation import Decoded
from recipes.librispeech import ablate, bundle
from recipes.librispeech.configs import tiny
from recipes.librispeech.variants import dedicated, going_on, variants


@pytest.mark.parametrize("layers", [4, 12])
def test_rows_that_go_on_differ_in_one_method(layers: int) -> None:
    rows = going_on(8.0, layers)
    base = {**rows["everything"].to_dict(), "name": ""}
    assert len({json.dumps({**config.to_dict(), "name": ""}) for config in rows.values()}) == len(rows)
    for name, config in rows.items():
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        changed = [key for key, value in config.to_dict().items() if key != "name" and value != base[key]]
        # a stage of its own for the heads comes with its own weight of the loss
        several = name in ("plain", "with distillation into heads at the end") or name.startswith("dedicated")
        assert len(changed) <= 1 or several, (name, changed)


def test_rows_that_go_on_keep_the_heads_of_the_model() -> None:
    rows = going_on(8.0, 12, (384, 0, 0, 0, 0, 0))
    assert rows["everything"].model.head_hidden == (384, 0, 0, 0, 0, 0)
    assert rows["dedicated 2 layers"].model.head_hidden == (384,)
    assert going_on(8.0, 4, (384, 0, 0, 0, 0, 0))["everything"].model.head_hidden == (384, 0)


@pytest.mark.parametrize("layers", [4, 12])
def test_every_variant_is_a_valid_configuration_that_survives_json(layers: int) -> None:
    rows = variants(30.0, layers)
    assert rows["plain"].model.num_layers == layers
    assert next(iter(rows)) == "plain"
    assert len({json.dumps({**config.to_dict(), "name": ""}) for config in rows.values()}) == len(rows)
    for name, config in rows.items():
        assert config.name == name
        assert config.hours == 30.0
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert dedicated(rows["local"], 6).model.exit_layers == (6,)


def test_compare_by_hand() -> None:
    def decoded(*texts: str) -> list[Decoded]:
        return [Decoded("u1", "a b c d", (texts[0],)), Decoded("u2", "e f g h", (texts[1],))]

    results = {"base": decoded("a b x x", "e f x x"), "ours": decoded("a b c x", "e f g x")}
    rows = ablate.compare(results, {"base": (2,), "ours": (2,)})
    assert rows[0] == {"variant": "base", "wer": {2: 50.0}, "reduction": {}}
    assert rows[1]["wer"] == {2: 25.0}
    assert rows[1]["reduction"][2] == [50.0, 50.0, 50.0]  # both utterances lose half of their errors
    assert "| ours | 25.0 (+50: +50 to +50) |" in ablate.markdown(rows, [2], 1.0)


def test_variants_are_trained_once_and_tabled(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = dataclasses.replace(tiny(), hours=0.01)
    rows = {"plain": base, "dedicated, 4 layers": dedicated(base, 4)}
    monkeypatch.setattr(ablate, "variants", lambda hours, layers: rows)
    arguments = ["--data", str(data), "--out", str(tmp_path), "--hours", "0.01", "--threads", "1"]
    ablate.main(arguments)
    assert "| dedicated, 4 layers |  |" in capsys.readouterr().out  # it has no exit after layer 2
    table = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["variant"] for row in table["rows"]] == list(rows)
    made = (tmp_path / "plain" / "state.pt").stat().st_mtime_ns
    ablate.main([*arguments, "--only", "plain"])
    assert (tmp_path / "plain" / "state.pt").stat().st_mtime_ns == made
    with pytest.raises(SystemExit, match="unknown variants"):
        ablate.main([*arguments, "--only", "nothing"])


def test_rows_that_the_data_cannot_make_are_left_out(data: Path, tmp_path: Path) -> None:
    rows = {**variants(30.0, 4), **going_on(8.0, 4)}
    left_out = {name for name, config in rows.items() if ablate.lacking(name, config, data)}
    ours = {"noise", "reverberation", "synthetic speech", "spliced speech", "diphone speech", "phones at exit 4"}
    added = {"reverberation", "spliced speech", "phones at exit 4"}
    with_or_without = {f"without {name}" for name in ours - added} | {f"with {name}" for name in added}
    with pytest.raises(SystemExit, match="no row is left"):
        ablate.main(["--data", str(data), "--out", str(tmp_path), "--hours", "30", "--layers", "4", "--only", "noise"])
    assert left_out == ours | with_or_without | {
        "local with CR-CTC and spliced speech",
        "local with diphone speech",
    }
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.json").write_text(json.dumps({"corpus": "synthetic"}))
    (tmp_path / "data.json").write_text(json.dumps({"room_envelopes": [[1.0]]}))
    assert not ablate.lacking("with reverberation", rows["with reverberation"], tmp_path)
    assert not ablate.lacking("synthetic speech", rows["synthetic speech"], tmp_path)


def test_rows_go_on_from_a_model(
    data: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.safetensors"
    bundle.main(["--run", str(tiny_run), "--out", str(model)])
    stages = (dataclasses.replace(tiny().stages[-1], learning_rate=1e-5),)
    row = dataclasses.replace(tiny(), hours=0.005, stages=stages)
    monkeypatch.setattr(ablate, "going_on", lambda hours, layers, head_hidden: {"everything": row})
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--hours", "0.005", "--layers", "4"]
    arguments += ["--threads", "1", "--start-from", str(model)]
    ablate.main(arguments)
    table = json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]
    assert [item["variant"] for item in table] == ["everything", "the model as it was"]
    for item in table:
        assert item["wer"]["4"] < 20.0  # from random weights so short a run writes nothing
    made = json.loads((tmp_path / "out" / "everything" / "provenance.json").read_text())
    assert made["started_from"]["config"] == load(model).provenance["config"]
    monkeypatch.setattr(ablate, "decode_exits", None)  # texts are there
    monkeypatch.setattr(ablate.subprocess, "run", None)
    ablate.main(arguments)
    assert "| the model as it was |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no feature shards"):
        ablate.main([*arguments, "--score", str(tmp_path)])

"""The mean of several models: weights, provenance, and what must not be mixed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asr_exit.checkpoint import load, save_model
from asr_exit.warm_start import in_shape_of
from recipes.librispeech import average, bundle
from tests.conftest import random_model


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """The trained run, with a second copy of its weights that are all 1 larger but for the feature statistics."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    state = load_file(copy / "ema.safetensors")
    moved = {name: value if name.startswith("feature_") else value + 1 for name, value in state.items()}
    save_file(moved, copy / "ema-later.safetensors")
    return copy


def test_mean_of_a_run_a_copy_a_state_and_a_model_file(run: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.safetensors"
    bundle.main(["--run", str(run), "--out", str(made)])
    state = torch.load(run / "state.pt", weights_only=True)["ema"]
    once, later = load_file(run / "ema.safetensors"), load_file(run / "ema-later.safetensors")
    sources = [run, run / "ema-later.safetensors", run / "state.pt", made]
    out = tmp_path / "out" / "mean.safetensors"
    average.main([*map(str, sources), "--weights", "1,2,1,4", "--out", str(out)])
    model = load(out)
    for name, value in model.encoder.state_dict().items():
        want = (once[name] + 2 * later[name] + state[name] + 4 * load(made).encoder.state_dict()[name]) / 8
        torch.testing.assert_close(value, want, rtol=1e-3, atol=1e-3)
    parts = model.provenance["averaged"]
    assert [(part["source"], part["weight"]) for part in parts] == [
        ("run", 1.0),
        ("ema-later.safetensors", 2.0),
        ("state.pt", 1.0),
        ("made.safetensors", 4.0),
    ]
    assert model.provenance["config"] == parts[0]["config"] == "tiny"
    assert str(tmp_path) not in json.dumps(model.provenance)
    assert model.calibration == {}


def test_equal_models_give_the_model_itself(tmp_path: Path) -> None:
    model = random_model()
    for name in ("a", "b"):
        save_model(tmp_path / name, model.config, model.encoder.state_dict(), model.tokenizer, {"posterior": {}})
    average.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "mean")])
    mean = load(tmp_path / "mean")
    for name, value in load(tmp_path / "a").encoder.state_dict().items():
        assert torch.equal(value, mean.encoder.state_dict()[name])


def test_a_linear_head_is_averaged_with_a_hidden_layer_that_began_as_it(tmp_path: Path) -> None:
    before = random_model(d_model=32, num_heads=2)
    config = replace(before.config, head_hidden=(64, *[0] * (before.config.num_exits - 1)))
    after = in_shape_of(config, before.encoder)
    save_model(tmp_path / "before", before.config, before.encoder.state_dict(), before.tokenizer)
    save_model(tmp_path / "after", config, after.state_dict(), before.tokenizer)
    sources = [str(tmp_path / name) for name in ("before", "after")]
    average.main([*sources, "--out", str(tmp_path / "mean")])  # of two that say the same
    mean = load(tmp_path / "mean")
    assert mean.config.head_hidden == config.head_hidden
    for name, value in load(tmp_path / "after").encoder.state_dict().items():
        torch.testing.assert_close(mean.encoder.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    with pytest.raises(SystemExit, match="another shape"):  # a hidden layer does not become linear
        average.main([*reversed(sources), "--out", str(tmp_path / "no")])


def test_what_does_not_belong_together_is_refused(run: Path, tmp_path: Path) -> None:
    model, other, wider = random_model(), random_model(1), random_model(2, d_model=48)
    paths = {}
    for name, item in (("a", model), ("wider", wider)):
        paths[name] = tmp_path / f"{name}.safetensors"
        save_model(paths[name], item.config, item.encoder.state_dict(), item.tokenizer)
    changed = other.encoder.state_dict() | {"feature_mean": torch.zeros(80)}
    paths["features"] = tmp_path / "features.safetensors"
    save_model(paths["features"], model.config, changed, model.tokenizer)
    tokenizer = type(model.tokenizer).train(["other words altogether", "zebra quick jumps pack vex"] * 3, 48)
    paths["tokenizer"] = tmp_path / "tokenizer.safetensors"
    save_model(paths["tokenizer"], model.config, model.encoder.state_dict(), tokenizer)
    (run / "cut.pt").write_bytes((run / "state.pt").read_bytes()[:1000])
    out = tmp_path / "mean.safetensors"
    for sources, message in (
        ([paths["a"]], "at least two"),
        ([paths["a"], paths["wider"]], "another shape"),
        ([paths["a"], paths["tokenizer"]], "another tokenizer"),
        ([paths["a"], paths["features"]], "other feature statistics"),
        ([paths["a"], tmp_path / "none.safetensors"], "no model file at"),
        ([run, run / "cut.pt"], "does not fit"),
        ([run, run / "none.pt"], "lacks none.pt"),
        ([paths["a"], paths["a"], "--weights", "1"], "2 positive numbers"),
        ([paths["a"], paths["a"], "--weights", "1,-1"], "2 positive numbers"),
        ([paths["a"], paths["a"], "--weights", "1,x"], "must be numbers"),
    ):
        with pytest.raises(SystemExit, match=f"average: .*{message}"):
            average.main([*map(str, sources), "--out", str(out)])
    assert not out.exists()

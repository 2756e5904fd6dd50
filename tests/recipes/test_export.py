"""From a model file, or a run folder, to a model for devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asr_exit.checkpoint import save_model
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Fill, StreamOptions
from recipes.librispeech import export
from tests.conftest import babble, random_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.timeout(400)  # the exporter traces for half a minute, on a busy machine for several
def test_a_model_file_becomes_one_that_runs_on_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from asr_exit.edge import EdgeRecognizer

    model = random_model(3, num_layers=2, exit_every=1)
    path, out = tmp_path / "small.safetensors", tmp_path / "edge"
    save_model(path, model.config, model.encoder.state_dict(), model.tokenizer, dtype=torch.float32)
    export.main(["--model", str(path), "--out", str(out), "--precision", "fp32"])
    assert "edge: fp32" in capsys.readouterr().out
    samples = babble(2.0)
    options = StreamOptions(fill=Fill.PROPAGATE)
    assert EdgeRecognizer(out, options).transcribe(samples).text == Recognizer(model, options).transcribe(samples).text


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    for arguments, message in (
        (["--run", str(tmp_path)], "export: .*lacks"),
        (["--model", str(tmp_path / "none.safetensors")], "export: no model file"),
        (["--model", "x", "--subset", "dev-clean"], "belong together"),
    ):
        with pytest.raises(SystemExit, match=message):
            export.main([*arguments, "--out", str(tmp_path / "edge")])
    assert not (tmp_path / "edge").exists()

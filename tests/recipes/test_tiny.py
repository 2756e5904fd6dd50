"""Training from end to end: it learns, a killed run goes on as if nothing had happened, two processes equal one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asr_exit.data import Batch, BatchStream, Position
from asr_exit.errors import CheckpointError, ConfigError
from asr_exit.objective import Draw
from asr_exit.parallel import Group
from asr_exit.train import Trainer
from recipes.librispeech.configs import CONFIGS, tiny
from tests.recipes.worker import GROUP_UPDATES, group_config, short_config

ROOT = Path(__file__).parents[2]


def state_of(run: Path) -> tuple[dict[str, dict], dict[str, object]]:
    """Every tensor that a run needs to go on, and where it stands (without the time that it took)."""
    state = torch.load(run / "state.pt", weights_only=True)
    state["progress"].pop("wall_seconds")
    return {"model": state["model"], "ema": state["ema"], "moments": state["optimizer"]["adamw"]["state"]}, state[
        "progress"
    ]


def test_overfits_to_no_errors_at_every_exit(tiny_run: Path) -> None:
    lines = [json.loads(line) for line in (tiny_run / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "done"
    assert lines[-1]["wer"] == [0.0, 0.0]
    made = json.loads((tiny_run / "provenance.json").read_text())
    assert made["hours_seen"] == pytest.approx(0.9, abs=0.02)
    assert made["sittings"][0]["torch"] == torch.__version__


def test_killed_while_saving_and_resumed_equals_uninterrupted_to_the_last_bit(data: Path, tmp_path: Path) -> None:
    whole = Trainer(short_config(), data, tmp_path / "whole")
    whole.run()
    dead = subprocess.run([sys.executable, "-m", "tests.recipes.worker", "killed", data, tmp_path / "killed"], cwd=ROOT)
    assert dead.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / ".state.pt.tmp").read_bytes() == b"half a checkpoint"
    before = state_of(tmp_path / "killed")[1]["updates"]
    assert before == 4 < whole.progress.updates
    again = Trainer(short_config(), data, tmp_path / "killed")
    again.resume()
    assert again.progress.updates == before
    again.run()
    assert again.progress.stage == 1  # it has grown on the way
    (tensors, progress), (expected_tensors, expected_progress) = map(
        state_of, (tmp_path / "killed", tmp_path / "whole")
    )
    torch.testing.assert_close(tensors, expected_tensors, rtol=0, atol=0)
    assert progress == expected_progress


def test_resume_of_another_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    Trainer(short_config(), data, tmp_path, max_updates=1).run()
    with pytest.raises(CheckpointError, match="weight_decay"):
        Trainer(short_config(weight_decay=0.5), data, tmp_path).resume()
    Trainer(short_config(hours=5.0), data, tmp_path).resume()  # the length may change


class WorkOfTwo(Trainer):
    """One process that averages, in each update, the batches that two processes would take one each."""

    def run_all(self) -> None:
        plan, features_per_label = self.config.plan(self.config.stages[0]), self.config.model.features_per_label
        other = BatchStream(
            self.store,
            plan,
            self.mean,
            features_per_label=features_per_label,
            seed=self.config.seed,
            start=Position(),
            augment=self.augment,
            rank=1,
            world=2,
        )
        with other as batches:
            self.others = iter(batches)
            self.run()

    def _loss(self, batch: Batch, drawn: Draw) -> tuple[Tensor, Tensor]:
        both = [Trainer._loss(self, item, drawn) for item in (batch, next(self.others)[0])]
        return (both[0][0] + both[1][0]) / 2, (both[0][1] + both[1][1]) / 2


class AloneForTwo(Group):
    """Takes the first of every two batches and talks to nobody."""

    def reduce_gradients(self, parameters: object, extras: object) -> list[float]:
        return [2.0 * value for value in extras]  # type: ignore[attr-defined]

    def gather(self, item: object) -> list[object]:
        return [item]


def test_two_processes_equal_one(data: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "tests.recipes.worker", "group", data, tmp_path / "two"]
    done = subprocess.run([*launcher, *worker], cwd=ROOT, check=False, timeout=100, capture_output=True, text=True)
    # seen once: a thread of torch's own aborts a process that has finished
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
    assert sorted(path.name for path in (tmp_path / "two").glob("agreed-*")) == ["agreed-0", "agreed-1"]
    one = WorkOfTwo(group_config(), data, tmp_path / "one", group=AloneForTwo(0, 2), max_updates=GROUP_UPDATES)
    one.run_all()
    (two, _), (alone, _) = map(state_of, (tmp_path / "two", tmp_path / "one"))
    for part in ("model", "ema"):
        torch.testing.assert_close(two[part], alone[part], rtol=0, atol=1e-5)
    # Each process did half of Muon's matrices (worker.py compares the weights); the state holds all, 8 in each layer.
    muon = torch.load(tmp_path / "two" / "muon" / "state.pt", weights_only=True)
    assert sorted(muon["optimizer"]["momentum"]) == list(range(4 * 8))


def test_data_that_does_not_fit_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="40 pieces"):
        Trainer(CONFIGS["mini5"](), data, tmp_path)
    with pytest.raises(ConfigError, match="no finished data"):
        Trainer(tiny(), tmp_path, tmp_path / "run")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_configurations_survive_their_own_json(name: str) -> None:
    config = CONFIGS[name]()
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config

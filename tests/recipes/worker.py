"""Training in processes of their own, for tests that kill them or need two.

python -m tests.recipes.worker killed DATA OUT      dies by SIGKILL in the middle of writing its fifth checkpoint
torchrun ... -m tests.recipes.worker group DATA OUT     a few updates in every process of the group
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

import torch

from asr_exit.parallel import Group
from asr_exit.schedule import Stage, TrainConfig
from asr_exit.train import Trainer
from recipes.librispeech.configs import tiny

GROUP_UPDATES = 5


def short_config(**changes: object) -> TrainConfig:
    """About 20 small updates: one segment, then both, with random depth, masks and several chunk sizes."""
    stages = (Stage(0.4, 1, 6.0, 10.0, False, 4e-3), Stage(1.0, 2, 8.0, 10.0, True, 3e-3))
    base = dataclasses.replace(
        tiny(),
        hours=100 / 3600,
        stages=stages,
        random_depth_probability=0.4,
        checkpoint_seconds=0.0,
        warmup_updates=4,
        stage_warmup_updates=3,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def group_config() -> TrainConfig:
    """One segment pair from the start, so that every parameter has a gradient in every update."""
    return short_config(
        hours=10.0, stages=(Stage(1.0, 2, 6.0, 10.0, True, 3e-3),), random_depth_probability=0.0, gate_weight=0.3
    )


def killed(data: Path, out: Path) -> None:
    """Train; die in the middle of a checkpoint."""
    save, calls = torch.save, 0

    def deadly(state: Any, file: IO[bytes]) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = deadly
    Trainer(short_config(), data, out).run()


def group(data: Path, out: Path) -> None:
    """Train in the processes that torchrun started."""
    processes = Group.from_environment()
    Trainer(group_config(), data, out, group=processes, max_updates=GROUP_UPDATES).run()
    config = dataclasses.replace(group_config(), optimizer="muon")
    shared = Trainer(config, data, out / "muon", group=processes, max_updates=2)
    shared.run()
    sums = [float(p.detach().double().sum()) for p in shared.model.parameters()]
    assert processes.gather(sums) == [sums, sums], "the processes have different weights"
    (out / f"agreed-{processes.rank}").touch()
    processes.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"killed": killed, "group": group}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))

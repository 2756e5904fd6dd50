"""Where a training run reports: log.jsonl always, TensorBoard where it is installed, a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any


class Reporter:
    """One run's reports. Inactive (in all processes but the first) it does nothing."""

    def __init__(self, folder: Path, active: bool = True) -> None:
        self._folder, self._active = folder, active
        self._board: Any = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Reporter:
        if not self._active:
            return self
        # both are conveniences: a machine that only trains need not have them
        with contextlib.suppress(ImportError):
            self._board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(self._folder / "board"))
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                self._open_bar()
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.stop()

    def _open_bar(self) -> None:
        progress, console = importlib.import_module("rich.progress"), importlib.import_module("rich.console")
        columns = (
            progress.TextColumn("{task.fields[hours]:.1f} h seen"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[rate]:.0f} audio s/s"),
            progress.TextColumn("exits {task.fields[losses]}"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = progress.Progress(*columns, console=console.Console(stderr=True))
        self._task = self._bar.add_task("train", total=1.0, hours=0.0, rate=0.0, losses="")
        self._bar.start()

    def line(self, **values: Any) -> None:
        """Append one record to log.jsonl, print it, and chart its numbers against `updates`."""
        if not self._active:
            return
        text = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()})
        with (self._folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        if self._bar is None:
            print(text, flush=True)
        elif "event" in values:
            self._bar.console.print(text, highlight=False)
        if self._board is not None:
            self._chart(values)

    def _chart(self, values: dict[str, Any]) -> None:
        step = values.get("updates")
        for name, value in values.items():
            if isinstance(value, (int, float)) and name != "updates":
                self._board.add_scalar(name, value, step)
            elif isinstance(value, list) and all(isinstance(item, (int, float)) for item in value):
                for index, item in enumerate(value):
                    self._board.add_scalar(f"{name}/exit_{index + 1}", item, step)

    def advance(self, share: float, hours: float, rate: float, losses: list[float]) -> None:
        """Move the progress bar to `share` (0..1) of the run; `rate` in audio seconds per second."""
        if self._bar is not None:
            shown = " ".join(f"{loss:.2f}" for loss in losses)
            self._bar.update(self._task, completed=min(1.0, share), hours=hours, rate=rate, losses=shown)

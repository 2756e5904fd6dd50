"""The same function over many recordings, in this process or in several that each hold the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np

from asr_exit.audio import load_audio
from asr_exit.checkpoint import Model
from asr_exit.errors import ConfigError

P = ParamSpec("P")
Item = TypeVar("Item")
R = TypeVar("R")

_KEPT_RECORDINGS = 800  # decoded audio that a process keeps: about 0.5 MB each for 8 s
_model: Model | None = None


class Utterance(Protocol):
    """A recording and what is said in it."""

    @property
    def path(self) -> Path: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Recording:
    """A picklable `Utterance`; `text` is normalised."""

    path: Path
    text: str


@lru_cache(maxsize=_KEPT_RECORDINGS)
def samples_of(path: Path) -> np.ndarray:
    """Audio of a file at the model's rate, (N,) float32, kept for the next time. Raises AudioError."""
    return load_audio(path)


class Workers:
    """A pool of processes that share nothing but the model; with one process everything runs here.

    Use as a context manager. Functions and what they get must be picklable; each sees a share of the items, spread
    evenly, and returns one result per item.
    """

    def __init__(self, model: Model, processes: int = 1) -> None:
        """Raises ConfigError for less than one process."""
        if processes < 1:
            raise ConfigError(f"processes={processes} must be at least 1")
        self.model, self.processes = model, processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.processes > 1:
            self._pool = ProcessPoolExecutor(self.processes, get_context("spawn"), _start, (self.model,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(
        self,
        function: Callable[Concatenate[Model, Sequence[Item], P], list[R]],
        items: Sequence[Item],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[R]:
        """`function(model, share of items, ...)` in every process; the results in the order of `items`."""
        if self._pool is None or len(items) < 2:
            return function(self.model, items, *args, **kwargs)
        shares = [items[start :: self.processes] for start in range(self.processes)]
        futures = [self._pool.submit(_call, function, share, args, kwargs) for share in shares if share]
        results: list[Any] = [None] * len(items)
        for start, future in enumerate(futures):
            results[start :: self.processes] = future.result()
        return results


def _start(model: Model) -> None:
    global _model
    import torch

    torch.set_num_threads(1)
    model.encoder.eval().requires_grad_(False)
    _model = model


def _call(function: Callable[..., Any], share: Sequence[Any], args: Any, kwargs: Any) -> Any:
    return function(_model, share, *args, **kwargs)

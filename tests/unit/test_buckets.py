"""Batches padded to few sizes, and the graphs that such batches are for, as far as both can be checked on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from asr_exit import torch_backend
from asr_exit.buckets import CPU_BUCKETS, BatchBuckets
from asr_exit.checkpoint import Model
from asr_exit.cuda_graphs import Outputs
from asr_exit.engine import Engine
from asr_exit.errors import ConfigError
from asr_exit.policy import ExitPolicy, Posterior, RandomDepth, Similarity
from asr_exit.stream import Fill, StreamOptions
from service.bench.streams import Streamed, stream_all
from tests.conftest import babble

TOLERANCE = 1e-4
RECORDINGS = [babble(0.8 + 0.25 * seed, seed) for seed in range(3)]  # the last chunks are of different lengths
SYNCHRONISING = ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def make(model: Model, slots: int = 3, *sizes: int, **options: Any) -> Engine:
    """An engine whose batches are padded to `sizes`; none = no padding."""
    buckets = BatchBuckets(sizes) if sizes else None
    return Engine(model, slots=slots, backend=model.backend(slots, "cpu", buckets=buckets, **options))


def heard(engine: Engine, policy: ExitPolicy, fill: Fill) -> list[Streamed]:
    done = stream_all(engine, RECORDINGS, lambda place: StreamOptions((320, 640, 640)[place], policy=policy, fill=fill))
    return sorted(done, key=lambda streamed: streamed.index)


def assert_same(ours: Sequence[Streamed], theirs: Sequence[Streamed], tolerance: float = TOLERANCE) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.exits == other.exits
        assert one.text == other.text
        for mine, yours in zip(one.scores, other.scores, strict=True):
            assert np.abs(mine.max_log_prob - yours.max_log_prob).max() < tolerance


def states(engine: Engine, slots: list[int]) -> list[Tensor]:
    """Copies of all that these slots hold."""
    pool = engine.backend.pool
    layers = [cache for segment in pool.segments for cache in segment.layers]
    held = [tensor for cache in layers for tensor in (cache.keys, cache.values, cache.conv)]
    return [tensor[slots].clone() for tensor in (*held, *pool.tails)]


@pytest.mark.parametrize(("streams", "size"), [(1, 1), (3, 4), (4, 4), (9, 16), (17, 32), (33, 48)])
def test_a_batch_gets_the_smallest_size_that_holds_it(streams: int, size: int) -> None:
    assert BatchBuckets((1, 4, 16)).size(streams) == size


@pytest.mark.parametrize("longest", range(1, 17))
def test_batches_of_short_chunks_have_as_many_frames_as_some_size(longest: int) -> None:
    for streams in range(1, 130):
        rows, frames = CPU_BUCKETS.shape(streams, longest, 16)
        assert streams <= rows
        assert longest <= frames < 2 * longest
        assert rows * frames % 8 == 0
        assert rows * frames // 8 in CPU_BUCKETS.sizes
        assert rows * frames <= 1.25 * 8 * -(-streams * frames // 8)


@pytest.mark.parametrize("sizes", [(), (0, 1), (4, 2), (2, 2), (1, 2.5), ("1",)], ids=str)
def test_sizes_that_make_no_sense_are_refused(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="rising"):
        BatchBuckets(sizes)


@pytest.mark.parametrize(
    ("policy", "fill"),
    [(RandomDepth(1), Fill.CATCH_UP), (Posterior(0.3), Fill.PROPAGATE), (Similarity(0.6), Fill.HOLE)],
    ids=["catch_up", "propagate", "hole"],
)
def test_padding_changes_no_answer(model: Model, policy: ExitPolicy, fill: Fill) -> None:
    plain = heard(make(model), policy, fill)
    assert len({exit_index for streamed in plain for exit_index in streamed.exits}) > 1
    assert_same(heard(make(model, 3, 5, 8), policy, fill), plain)


def test_padding_touches_no_other_stream(model: Model) -> None:
    engines = make(model, 6), make(model, 6, 4)
    for engine in engines:
        streams = [engine.open() for _ in range(5)]  # and a free slot
        for seed, stream in enumerate(streams):
            engine.push(stream, babble(1.3, seed))
            engine.finish(stream)
        engine.step()
        others = [slot for slot in range(6) if slot not in [stream.slot for stream in streams[:3]]]
        before = states(engine, others)
        engine.step(streams[:3])
        for was, now in zip(before, states(engine, others), strict=True):
            assert torch.equal(was.nan_to_num(7.0), now.nan_to_num(7.0))
    plain, padded = (states(engine, [stream.slot for stream in streams[:3]]) for engine in engines)
    for ours, theirs in zip(padded, plain, strict=True):
        assert (ours - theirs).abs().max() < TOLERANCE


class Operations(TorchFunctionMode):
    """Writes down what is asked of torch, and on what shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [size for arg in args if isinstance(arg, Tensor) for size in arg.shape]
        self.seen.append((getattr(func, "__name__", str(func)), shapes))
        return func(*args, **(kwargs or {}))


class EmulatedCapture:
    """In place of `CudaCapture`: a replay computes anew from where the graph reads, into where the graph writes.

    Graphs share memory, so each replay ruins what the others left. Work that reads a value on the host, or whose
    operations or shapes depend on values, could not be captured: that fails here, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.outputs: list[Outputs] = []

    def __call__(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        captured, outputs = self._watch(work)
        self.outputs.append(outputs)
        watched = []

        def replay() -> None:
            if watched:
                fresh = work()
            else:
                operations, fresh = self._watch(work)
                assert operations == captured
                watched.append(True)
            for others in self.outputs:
                for tensor in others:
                    tensor.fill_(torch.nan)
            for mine, new in zip(outputs, fresh, strict=True):
                mine.copy_(new)

        return replay, outputs

    @staticmethod
    def _watch(work: Callable[[], Outputs]) -> tuple[list[tuple[str, list[int]]], Outputs]:
        with Operations() as operations:
            outputs = work()
        names = {name for name, _ in operations.seen}
        assert {"index_copy_", "index_select", "scaled_dot_product_attention"} <= names
        assert not names & {*SYNCHRONISING, "masked_select", "from_numpy", "tensor", "pin_memory"}
        return operations.seen, outputs


@pytest.fixture
def _like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches that tensors of a GPU take."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))


@pytest.mark.usefixtures("_like_a_gpu")
def test_replayed_segments_answer_like_plain_ones(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = heard(make(model), RandomDepth(1), Fill.CATCH_UP)
    monkeypatch.setattr(torch_backend, "CudaCapture", EmulatedCapture)
    assert_same(heard(make(model, 3, 1, 2, 4, cuda_graphs=True), RandomDepth(1), Fill.CATCH_UP), plain)


@pytest.mark.usefixtures("_like_a_gpu")
def test_an_exit_is_read_in_one_transfer_and_nothing_else_waits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = make(model, 3, 4), Counter[str]()
    score = torch_backend.score

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return method(*args, **kwargs)

        return call

    monkeypatch.setattr(torch_backend, "score", counted("score", score))
    for name in SYNCHRONISING:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    heard(engine, Posterior(1.0), Fill.PROPAGATE)  # never confident: all exits are judged
    read = calls.pop("score")
    assert read >= 6 * 3
    assert calls == {"cpu": read, "numpy": read}

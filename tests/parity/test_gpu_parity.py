"""The engine on a CUDA device gives what it gives on the CPU, with graphs and without, and waits once per exit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from asr_exit.engine import Engine
from asr_exit.policy import Posterior, RandomDepth
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Fill, StreamOptions
from tests.conftest import babble, random_model
from tests.unit.test_buckets import assert_same, heard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_cuda_engine_equals_the_cpu_engine() -> None:
    samples = babble(6.0, 1)
    on_cpu = Recognizer(random_model(), StreamOptions()).transcribe(samples)
    model = random_model()
    on_gpu = Recognizer(model, StreamOptions(), device="cuda")
    assert on_gpu.transcribe(samples).text == on_cpu.text
    reference = Recognizer(random_model()).log_posteriors(samples, 640)
    for ours, theirs in zip(on_gpu.log_posteriors(samples, 640), reference, strict=True):
        assert np.abs(ours - theirs).max() < 1e-3  # TF32 is off by default; other kernels, other rounding


@pytest.mark.parametrize("fill", list(Fill))
def test_batches_padded_on_a_gpu_answer_like_the_cpu(fill: Fill) -> None:
    on_cpu = heard(Engine(random_model(), slots=3), RandomDepth(1), fill)
    assert_same(heard(Engine(random_model(), slots=3, device="cuda"), RandomDepth(1), fill), on_cpu, 1e-3)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
@pytest.mark.parametrize("fill", list(Fill))
def test_graphs_answer_like_plain_segments(precision: str, tolerance: float, fill: Fill) -> None:
    model = random_model().in_precision(precision)
    plain = heard(Engine(model, slots=3, device="cuda"), RandomDepth(1), fill)
    engine = Engine(model, slots=3, backend=model.backend(3, "cuda", cuda_graphs=True))
    for _ in range(2):  # capturing on the way, then only replaying
        assert_same(heard(engine, RandomDepth(1), fill), plain, tolerance)


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["plain", "graphs"])
def test_a_step_waits_for_the_gpu_once_per_exit(cuda_graphs: bool) -> None:
    model = random_model()
    engine = Engine(model, slots=3, backend=model.backend(3, "cuda", cuda_graphs=cuda_graphs))
    for seed in range(3):
        engine.push(engine.open(StreamOptions(policy=Posterior(1.0), fill=Fill.PROPAGATE)), babble(2.0, seed))
    engine.step()  # captures, and makes what is made once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            (deepest,) = {result.exit_layer for result in engine.step().results}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(item.message) for item in seen if "called a synchronizing" in str(item.message)]
    assert deepest == model.config.exit_layers[-1]
    assert len(waits) == model.config.num_exits, waits

"""The engine on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asr_exit.recognizer import Recognizer
from asr_exit.stream import StreamOptions
from tests.conftest import babble, random_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_engine_equals_the_cpu_engine() -> None:
    samples = babble(6.0, 1)
    on_cpu = Recognizer(random_model(), StreamOptions()).transcribe(samples)
    model = random_model()
    on_gpu = Recognizer(model, StreamOptions(), device="cuda")
    assert on_gpu.transcribe(samples).text == on_cpu.text
    reference = Recognizer(random_model()).log_posteriors(samples, 640)
    for ours, theirs in zip(on_gpu.log_posteriors(samples, 640), reference, strict=True):
        assert np.abs(ours - theirs).max() < 1e-3  # TF32 is off by default; other kernels, other rounding

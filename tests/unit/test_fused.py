"""Kernels between matrix products: as exact as torch in bf16, each stream for itself, whatever its neighbours are."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asr_exit.attention import rotary, rotate
from asr_exit.cache import CachePool, as_bits
from asr_exit.checkpoint import Model
from asr_exit.encoder import Encoder
from asr_exit.engine import Engine
from asr_exit.evidence import ExitScores, score
from asr_exit.fused import can_fuse, fuse, measured
from asr_exit.packing import can_pack
from asr_exit.policies.parse import parse_policy
from asr_exit.policy import RandomDepth
from asr_exit.stream import Fill, StreamOptions
from asr_exit.torch_backend import TorchBackend
from tests.conftest import babble, random_model

numba = pytest.importorskip("numba", reason="numba is not installed: there are no kernels to test")
front_kernels, kernels, score_kernels, machine_code = (
    pytest.importorskip(f"asr_exit.{name}") for name in ("front_kernels", "kernels", "score_kernels", "machine_code")
)

CHUNK = 8
JUDGING = ("posterior:0.9", "similarity:0.95", "entropy:0.2")


class Run:
    """Segments of an encoder over chunks of several streams, as a backend runs them."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype, *, fused: bool, slots: int = 6) -> None:
        self.encoder, self.dtype = deepcopy(encoder).to(dtype), dtype
        if fused:
            fuse(self.encoder)
        tails = encoder.subsampling.tail_shapes()
        self.pool = CachePool(encoder.config, slots, tails, torch.device("cpu"), dtype, keys_by_lane=fused)
        self.slots = np.array([self.pool.acquire() for _ in range(slots - 1)])

    @torch.inference_mode()
    def chunk(
        self, states: Tensor, frames: list[int], rows: int | None = None, depth: int | None = None
    ) -> list[Tensor]:
        """Logits of each exit, (B, T, V), for (B, T, D) `states` of the first streams; deeper segments are filled."""
        config, count = self.encoder.config, len(frames)
        rows, lengths, slots = rows or count, np.array(frames), self.slots[:count]
        batch = torch.zeros(rows, max(frames), config.d_model, dtype=self.dtype)
        batch[:count] = states[:, : max(frames)]
        logits = []
        for index, segment in enumerate(self.encoder.segments):
            if depth is not None and index >= depth:
                skipped = torch.cat([batch[row, :length] for row, length in enumerate(frames)])
                context, layers, last = self.pool.begin_filling(index, slots, lengths, rows, len(skipped))
                segment.propagate(skipped[None], context, layers, skipped[torch.from_numpy(last)])
                continue
            context, places, _ = self.pool.begin(index, slots, lengths, CHUNK, (rows, max(frames)))
            batch, scores = segment(batch, context, self.pool.views(index, places))
            logits.append(scores[:count].float())
        return logits


def chunks_of(model: Model, streams: int, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(streams, CHUNK, model.config.d_model, generator=generator) for _ in range(count)]


def test_no_further_from_fp32_than_torch_in_bf16() -> None:
    """Twelve chunks, so that the ring wraps; some short, some left early and filled, with padding rows."""
    model = random_model(d_model=64, num_heads=2)
    runs = {
        "exact": Run(model.encoder, torch.float32, fused=False),
        "plain": Run(model.encoder, torch.bfloat16, fused=False),
        "fused": Run(model.encoder, torch.bfloat16, fused=True),
    }
    worst = {"plain": 0.0, "fused": 0.0}
    mean = {"plain": [], "fused": []}
    for number, states in enumerate(chunks_of(model, 4, 12)):
        frames = [8, 3, 8, 1] if number == 11 else [8, 8, 8, 8]
        depth = 3 if number in (4, 9) else None
        rounded = states.bfloat16().float()
        said = {name: run.chunk(rounded, frames, rows=6, depth=depth) for name, run in runs.items()}
        for index, exact in enumerate(said["exact"]):
            for name in worst:
                for row, length in enumerate(frames):
                    errors = (said[name][index] - exact)[row, :length].abs()
                    worst[name] = max(worst[name], errors.max().item())
                    mean[name].append(errors.mean().item())
    assert worst["plain"] > 0
    assert worst["fused"] < 1.3 * worst["plain"]
    assert np.mean(mean["fused"]) < 1.1 * np.mean(mean["plain"])


@pytest.mark.parametrize("poison", [None, float("nan")])
def test_neighbours_change_no_bit(poison: float | None) -> None:
    model = random_model()
    alone, together = (Run(model.encoder, torch.bfloat16, fused=True) for _ in range(2))
    for number, states in enumerate(chunks_of(model, 3, 4)):
        frames = [8, 8, 8] if number < 3 else [5, 8, 2]
        if poison is not None:
            states[1, 2, 0] = poison
        mixed = together.chunk(states, frames, rows=5)
        single = alone.chunk(states[:1], frames[:1])
        for here, there in zip(mixed, single, strict=True):
            assert torch.equal(here[:1, : frames[0]], there[:, : frames[0]])
            assert torch.isfinite(here[0, : frames[0]]).all()
            if poison is not None:
                assert torch.isnan(here[1, 2]).any()


def test_the_spare_slot_gets_the_padding_and_no_stream_does() -> None:
    model = random_model()
    run = Run(model.encoder, torch.bfloat16, fused=True)
    states = chunks_of(model, 2, 1)[0]
    before = [
        cache.clone() for layer in run.pool.segments[0].layers for cache in (layer.keys, layer.values, layer.conv)
    ]
    run.chunk(states, [8, 8], rows=5)
    after = [cache for layer in run.pool.segments[0].layers for cache in (layer.keys, layer.values, layer.conv)]
    others = run.slots[2:]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[others], new[others])
        assert not torch.equal(old[run.slots[:2]], new[run.slots[:2]])


def test_norms_are_those_of_torch() -> None:
    x, branch = torch.randn(9, 48).bfloat16(), torch.randn(9, 48).bfloat16()
    gamma, beta = torch.randn(48), torch.randn(48)
    exact = torch.nn.functional.layer_norm(x.float(), (48,), gamma, beta)
    out = torch.empty_like(x)
    kernels.norm(as_bits(x), gamma.numpy(), beta.numpy(), as_bits(out))
    torch.testing.assert_close(out.float(), exact, rtol=2**-8, atol=1e-5)
    whole = x.float() + 0.5 * branch.float()
    total = torch.empty_like(x)
    kernels.add_norm(
        as_bits(x), as_bits(branch), np.float32(0.5), gamma.numpy(), beta.numpy(), as_bits(total), as_bits(out)
    )
    assert torch.equal(total, whole.bfloat16())
    torch.testing.assert_close(
        out.float(), torch.nn.functional.layer_norm(whole, (48,), gamma, beta), rtol=2**-8, atol=1e-5
    )
    whole = x.float() + branch.float()
    kernels.add_rms_norm(as_bits(x), as_bits(branch), np.float32(1.5), as_bits(x))  # in place
    torch.testing.assert_close(
        x.float(), 1.5 * torch.nn.functional.rms_norm(whole, (48,), eps=1e-6), rtol=2**-8, atol=1e-5
    )


@pytest.mark.parametrize("window", [16, 64, 80, 160])
@pytest.mark.parametrize("frames", [1, 3, 8, 9])
def test_attention_is_that_of_torch(window: int, frames: int) -> None:
    torch.manual_seed(window + frames)
    streams, heads, head_dim = 3, 2, 32
    width = heads * head_dim
    projected = torch.randn(streams * frames, 3 * width).bfloat16()
    keys = torch.zeros(streams + 1, heads, head_dim, window).bfloat16()
    values = torch.zeros(streams + 1, window, heads, head_dim).bfloat16()
    cells = np.concatenate([slot * window + (window - 2 + np.arange(frames)) % window for slot in range(streams)])
    cos, sin = (x[:, :, 0] for x in rotary(torch.arange(streams * frames)[None], head_dim, torch.bfloat16))
    mask = torch.full((streams, window), -30_000.0).bfloat16()
    mask.view(-1)[torch.from_numpy(cells)] = 0.0
    out = torch.empty(streams * frames, width).bfloat16()
    shared = as_bits(cos[0]), as_bits(sin[0]), as_bits(keys), as_bits(values)
    kernels.store(as_bits(projected), cells, *shared)
    kernels.attend(as_bits(projected), np.arange(streams), as_bits(mask), *shared, as_bits(out))
    q, k, v = projected.view(streams, frames, 3, heads, head_dim).float().unbind(2)
    angles = (x.view(streams, frames, 1, -1).float() for x in (cos, sin))
    cosines, sines = angles
    q, k = rotate(q, cosines, sines), rotate(k, cosines, sines).bfloat16().float()
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    exact = exact.transpose(1, 2).reshape(streams * frames, width)
    assert (out.float() - exact).abs().max() < 2e-2
    stored = keys.permute(0, 3, 1, 2).reshape(-1, heads, head_dim)[torch.from_numpy(cells)]
    assert torch.equal(stored, k.reshape(-1, heads, head_dim).bfloat16())


def both_scores(
    logits: Tensor, before: Tensor, after: Tensor, previous: list[ExitScores | None]
) -> tuple[list[ExitScores], list[ExitScores]]:
    """What torch makes of them, and the kernels."""
    plain = score(logits, before, after, previous, want_log_probs=False)
    return plain, score(logits, before, after, previous, want_log_probs=False, measure=measured)


@pytest.mark.parametrize("vocab", [5, 256, 1000])
@pytest.mark.parametrize("scale", [0.1, 4.0, 60.0])
def test_exits_say_what_they_say_with_torch(vocab: int, scale: float) -> None:
    torch.manual_seed(vocab)
    logits, before = (torch.randn(7, 8, vocab) * scale).bfloat16(), torch.randn(7, 8, 40).bfloat16()
    logits[0, 0] = 0.0  # all are equal
    logits[1, :, vocab // 2 :] = logits[1, :, : vocab - vocab // 2].clone()  # there are two largest
    after = (before.float() + torch.randn(7, 8, 40)).bfloat16()
    previous: list[ExitScores | None] = [None] * 7
    for _ in range(2):
        plain, fused = both_scores(logits, before, after, previous)
        for one, other in zip(plain, fused, strict=True):
            assert np.array_equal(one.ids, other.ids)
            assert one.text == other.text
            assert np.abs(one.max_log_prob - other.max_log_prob).max() < 5e-5
            assert np.abs(one.evidence.numbers - other.evidence.numbers).max() < 5e-5
        previous = [*fused]
    unjudged = score(logits, None, after, previous, want_log_probs=False, want_evidence=False, measure=measured)
    assert all(np.array_equal(one.max_log_prob, other.max_log_prob) for one, other in zip(unjudged, fused, strict=True))


def test_what_is_not_a_number_stays_with_its_frame() -> None:
    logits, states = torch.randn(3, 8, 256).bfloat16(), torch.randn(3, 8, 40).bfloat16()
    clean, _ = both_scores(logits, states, states, [None] * 3)
    for poison in (torch.nan, -torch.nan, torch.inf):
        logits[1, 2, 7] = poison
        _, fused = both_scores(logits, states, states, [None] * 3)
        assert np.isnan(fused[1].max_log_prob).tolist() == [frame == 2 for frame in range(8)]
        for row in (0, 2):
            assert np.abs(fused[row].max_log_prob - clean[row].max_log_prob).max() < 5e-5


def test_hidden_keys_count_for_nothing_however_large() -> None:
    heads, head_dim, window = 1, 16, 32
    projected = torch.ones(1, 3 * head_dim).bfloat16()
    keys = torch.full((2, heads, head_dim, window), 40.0).bfloat16()
    values = torch.full((2, window, heads, head_dim), 1e30).bfloat16()
    mask = torch.full((1, window), -30_000.0).bfloat16()
    mask[0, 5] = 0.0
    cos, sin = torch.ones(1, 8).bfloat16(), torch.zeros(1, 8).bfloat16()
    out = torch.empty(1, head_dim).bfloat16()
    shared = as_bits(cos), as_bits(sin), as_bits(keys), as_bits(values)
    kernels.store(as_bits(projected), np.array([5]), *shared)
    kernels.attend(as_bits(projected), np.array([0]), as_bits(mask), *shared, as_bits(out))
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.skipif(not can_pack(), reason="this processor does not multiply bf16: nothing is fused")
def test_a_bf16_engine_on_a_cpu_is_fused_and_others_are_not(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def is_fused(precision: str) -> bool:
        backend = Engine(model.in_precision(precision), slots=1).backend
        assert isinstance(backend, TorchBackend)
        return "forward" in vars(backend.encoder.segments[0])

    assert is_fused("bf16")
    assert not is_fused("fp32")
    cpu = torch.device("cpu")
    assert not can_fuse(model.config, torch.bfloat16, torch.device("cuda"))
    narrow = random_model(d_model=32, num_heads=4).config  # 8 numbers a head are no vector
    assert not can_fuse(narrow, torch.bfloat16, cpu)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert not is_fused("bf16")

    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 2.4 or less")

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert not is_fused("bf16")
    assert "without compiled kernels" in caplog.text


@pytest.mark.skipif(not can_pack(), reason="this processor does not multiply bf16: nothing is fused")
def test_without_numba_every_chunk_is_heard_as_deep(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(engine: Engine) -> list[int]:
        stream = engine.open(StreamOptions(fill=Fill.PROPAGATE))
        engine.push(stream, babble(2.0))
        engine.finish(stream)
        found: list[int] = []
        while step := engine.step().results:
            found += [result.exit_layer for result in step]
        return found

    with_kernels = layers(Engine(model.in_precision("bf16"), slots=1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert layers(Engine(model.in_precision("bf16"), slots=1)) == with_kernels == [12] * 4


def test_gates_and_offline_passes_stay_with_torch() -> None:
    model = random_model()
    fused = deepcopy(model.encoder).bfloat16()
    plain = deepcopy(fused)
    fuse(fused)
    features, lengths = torch.randn(2, 256, 80), torch.tensor([256, 200])
    depth = torch.tensor([[1, 3, 6, 2], [6, 1, 2, 6]])
    for settings in ({}, {"chunk_depth": depth}):
        with torch.inference_mode():
            ours = fused(features, lengths, chunk_frames=CHUNK, **settings)
            theirs = plain(features, lengths, chunk_frames=CHUNK, **settings)
        if settings:
            assert torch.equal(ours.mixed_logits, theirs.mixed_logits)
        else:
            assert torch.equal(ours.logits[-1], theirs.logits[-1])


@pytest.mark.parametrize("halo", [0, 1, 5])
def test_skipped_frames_leave_the_very_state_that_convolved_ones_do(halo: int) -> None:
    rng, width, streams = np.random.default_rng(halo), 32, 6

    def random(*shape: int) -> np.ndarray:
        return as_bits(torch.from_numpy(rng.normal(size=shape)).bfloat16())

    frames, slots = np.array([8, 5, 4, 1, 8, 8]), np.array([3, 0, 5, 1, 2, 7])  # the last row is padding
    expanded, before = random(streams * CHUNK, 2 * width), random(8, halo, width)
    convolved, kept = before.copy(), before.copy()
    weights = (np.ones((n, width), np.float32).squeeze() for n in (1, 1, 1))
    taps = np.ones((2 * halo + 1, width), np.float32)
    kernels.convolve(expanded, slots, frames, convolved, taps, *weights, np.empty((streams * CHUNK, width), np.uint16))
    kernels.keep(expanded, slots, frames, kept)
    assert np.array_equal(kept, convolved)
    assert np.array_equal(kept[7], before[7])
    assert halo == 0 or not np.array_equal(kept, before)
    ends = np.minimum(frames, max(1, halo))  # the same of the last frames of each row alone, as `propagate` has them
    longest = int(ends.max())
    places = np.minimum((frames - ends)[:, None] + np.arange(longest), CHUNK - 1) + CHUNK * np.arange(streams)[:, None]
    kernels.keep(np.ascontiguousarray(expanded[places.ravel()]), slots, ends, before)
    assert np.array_equal(before, convolved)


@pytest.mark.skipif(not can_pack(), reason="this processor does not multiply bf16: nothing is fused")
def test_subsampling_is_that_of_torch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of different lengths, the last ones with a part of a frame; fewer streams than rows of a batch."""
    reduced = model.in_precision("bf16")
    fused = reduced.backend(12, "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plain = reduced.backend(12, "cpu")
    rng = np.random.default_rng(0)
    slots = [np.array([backend.acquire() for _ in range(9)]) for backend in (fused, plain)]  # 9 of 10 rows
    for lengths in ([64] * 9, [64, 16, 64, 24, 64, 64, 8, 64, 64], [61, 64, 3, 64, 17, 64, 64, 64, 64]):
        features = [rng.normal(8.0, 3.0, (length, 80)).astype(np.float32) for length in lengths]
        frames = np.array([-(-length // 8) for length in lengths])
        ours, theirs = (
            backend.subsample(places, features, frames, CHUNK)
            for backend, places in zip((fused, plain), slots, strict=True)
        )
        for mine, other, count in zip(ours, theirs, frames, strict=True):
            assert mine.shape == other.shape == (count, model.config.d_model)
            assert (mine - other).abs().max() < 2**-6 * other.abs().max()
        for mine, other in zip(fused.pool.tails, plain.pool.tails, strict=True):
            mine, other = mine[slots[0]], other[slots[1]]
            assert (mine - other).abs().max() <= 2**-6 * other.abs().max()


def test_kernels_are_compiled_where_nothing_can_be_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**options: Any) -> Any:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(machine_code, "numba", SimpleNamespace(njit=read_only))

    def double(x: np.ndarray) -> None:
        for i in range(len(x)):
            x[i] *= 2

    numbers = np.arange(3.0)
    machine_code.compiled(double)(numbers)
    assert numbers.tolist() == [0.0, 2.0, 4.0]
    assert double.__qualname__ != "double"  # what is kept elsewhere says which pieces it was made of


@pytest.mark.skipif(not can_pack(), reason="this processor does not multiply bf16: nothing is fused")
def test_warming_up_compiles_all_that_streams_ever_use(model: Model) -> None:
    """Otherwise a stream would wait for seconds: kernels are compiled for each kind of array they meet."""

    def variants() -> dict[str, int]:
        found = {**vars(kernels), **vars(front_kernels), **vars(score_kernels)}
        return {name: len(kernel.signatures) for name, kernel in found.items() if hasattr(kernel, "signatures")}

    backend = model.in_precision("bf16").backend(6, "cpu")
    backend.warm_up(CHUNK, 6)
    before = variants()
    wanted = {"attend", "convolve", "first_stage", "windows", "store", "keep", "norm", "posteriors", "likeness"}
    assert wanted <= {name for name, n in before.items() if n}
    engine = Engine(model.in_precision("bf16"), slots=6, backend=backend)
    layers = model.config.exit_layers
    policies = [
        RandomDepth(0),
        RandomDepth(1),
        RandomDepth(2),
        *(parse_policy(name, exit_layers=layers) for name in JUDGING),
    ]
    streams = [
        engine.open(StreamOptions(policy=policy, fill=fill)) for policy, fill in zip(policies, [*Fill] * 2, strict=True)
    ]
    for segment in backend.pool.segments:  # some have been here for hours
        segment.clock[:2] = 8 * 4000
    streams[0].next_frame = streams[1].next_frame = 8 * 4000
    for seed, stream in enumerate(streams):
        engine.push(stream, babble(2.0 + seed / 7, seed))
        engine.finish(stream)
    results = 0
    while step := engine.step().results:
        results += len(step)
    assert results >= 4 * len(streams)
    assert variants() == before

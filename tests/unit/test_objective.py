"""What an update draws and minimises."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from asr_exit.config import ModelConfig
from asr_exit.data import Batch
from asr_exit.encoder import Encoder
from asr_exit.errors import ConfigError
from asr_exit.joint_gates import JointGates
from asr_exit.loss import consistency_loss, distillation_losses, exit_losses
from asr_exit.objective import Draw, draw, objective
from asr_exit.schedule import Stage, TrainConfig

MODEL = ModelConfig(vocab_size=11, d_model=32, ff_dim=48, num_heads=2, num_layers=6, subsampling_channels=4)
STAGE = Stage(1.0, 3, 10.0, 10.0, True, 1e-3)
CONFIG = TrainConfig(name="t", model=MODEL, stages=(STAGE,), hours=1.0, bf16=False, random_depth_probability=0.0)
PLAIN = Draw(8, None, 3, False, 5)


def a_batch(views: int = 1) -> Batch:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(2, 320, 80)).astype(np.float32)).repeat(views, 1, 1)
    lengths, targets = torch.tensor([320, 250] * views), torch.tensor([1, 2, 3, 4, 5] * views)
    texts, ids = ("a", "b") * views, ("u", "v") * views
    return Batch(features, lengths, targets, torch.tensor([3, 2] * views), 5.7 * views, texts, ids, views)


@pytest.fixture(scope="module")
def model() -> Encoder:
    torch.manual_seed(0)
    return Encoder(MODEL)


def run(
    model: Encoder, batch: Batch, drawn: Draw = PLAIN, gates: JointGates | None = None, **changes: object
) -> tuple[float, list[float]]:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    loss, losses = objective(model, batch, config, drawn, torch.device("cpu"), gates=gates)
    return loss.item(), losses.tolist()


def test_draws_repeat_and_follow_the_weights() -> None:
    config = dataclasses.replace(
        CONFIG,
        chunk_weights=((4, 3.0), (0, 1.0)),
        left_weights=((16, 1.0), (64, 1.0)),
        shallow_probability=0.5,
        random_depth_probability=0.5,
    )
    draws = [draw(config, STAGE, update) for update in range(400)]
    assert draws == [draw(config, STAGE, update) for update in range(400)]
    chunks = Counter(item.chunk_frames for item in draws)
    assert set(chunks) == {4, None}
    assert 0.65 < chunks[4] / 400 < 0.85
    assert {item.left_frames for item in draws} == {16, 64}
    depths = Counter(item.segments for item in draws)
    assert set(depths) == {1, 2, 3}
    assert 0.4 < depths[3] / 400 < 0.6
    mixed = [item for item in draws if item.mixed_depth]
    assert mixed
    assert all(item.segments == 3 and item.chunk_frames == 4 for item in mixed)


def test_plain_objective_is_the_mean_over_exits(model: Encoder) -> None:
    loss, losses = run(model, a_batch())
    assert len(losses) == 3
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)


def test_exit_weights_are_normalised_over_the_exits_that_ran(model: Encoder) -> None:
    loss, losses = run(model, a_batch(), exit_weights=(1.0, 2.0, 5.0))
    assert loss == pytest.approx(np.average(losses, weights=(1, 2, 5)), rel=1e-6)
    shallow, two = run(model, a_batch(), dataclasses.replace(PLAIN, segments=2), exit_weights=(1.0, 2.0, 5.0))
    assert shallow == pytest.approx(np.average(two, weights=(1, 2)), rel=1e-6)


def test_mixed_depth_gives_one_loss(model: Encoder) -> None:
    loss, losses = run(model, a_batch(), dataclasses.replace(PLAIN, mixed_depth=True))
    assert losses == [pytest.approx(loss)]
    hole, _ = run(model, a_batch(), dataclasses.replace(PLAIN, mixed_depth=True), random_depth_fill="hole")
    assert hole != pytest.approx(loss, rel=1e-6)


def test_mixed_depth_with_catch_up_reads_full_depth_states(model: Encoder) -> None:
    features, lengths = torch.randn(1, 256, 80, generator=torch.Generator().manual_seed(3)), torch.tensor([256])
    depth = torch.tensor([[2, 1, 3, 1]])
    full = model(features, lengths, chunk_frames=8).logits
    mixed = model(features, lengths, chunk_frames=8, chunk_depth=depth, fill="catch_up").mixed_logits
    assert mixed is not None
    for chunk, segments in enumerate(depth[0].tolist()):
        rows = slice(8 * chunk, 8 * chunk + 8)
        assert float((mixed[0, rows] - full[segments - 1][0, rows]).abs().max().detach()) < 1e-6
    propagated = model(features, lengths, chunk_frames=8, chunk_depth=depth).mixed_logits
    apart = (mixed[0, 16:24] - propagated[0, 16:24]).abs().max()  # the only deep chunk, after skipped ones
    assert float(apart.detach()) > 1e-4


def test_left_context_reaches_the_model(model: Encoder) -> None:
    assert run(model, a_batch(), dataclasses.replace(PLAIN, left_frames=0))[0] != pytest.approx(
        run(model, a_batch())[0], rel=1e-6
    )


def test_consistency_is_zero_for_equal_views_and_counts_for_others(model: Encoder) -> None:
    equal = a_batch(views=2)
    plain, _ = run(model, equal)
    assert run(model, equal, consistency_weight=0.2)[0] == pytest.approx(plain, abs=1e-6)
    noise = torch.randn(4, 320, 80, generator=torch.Generator().manual_seed(1))
    other = dataclasses.replace(equal, features=equal.features + noise)
    assert run(model, other, consistency_weight=0.2)[0] > run(model, other)[0] + 1e-5


def test_consistency_by_hand() -> None:
    # one frame, two labels: p = (1/2, 1/2), q = (3/4, 1/4); both directions are teachers with a weight of one half
    logits = torch.log(torch.tensor([[[0.5, 0.5]], [[0.75, 0.25]]]))
    forward = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    backward = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    value = consistency_loss([logits], torch.tensor([1, 1]), torch.tensor([2, 2]))
    assert value.tolist() == [pytest.approx((forward + backward) / 2 / 2)]


def test_distillation_moves_only_the_students() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(3)]
    distilled = distillation_losses(logits, torch.tensor([5, 3]), torch.tensor([2, 1]))
    assert distilled.shape == (2,)
    distilled.sum().backward()
    assert logits[0].grad is not None
    assert logits[2].grad is not None
    assert (logits[2].grad == 0).all()  # the teacher is held fixed
    assert (logits[0].grad[0] != 0).any()
    assert (logits[0].grad[1, 3:] == 0).all()  # padding teaches nothing
    same = distillation_losses([logits[2], logits[2]], torch.tensor([5, 3]), torch.tensor([2, 1]))
    assert float(same.abs().max().detach()) < 1e-6


def test_distillation_is_added(model: Encoder) -> None:
    assert run(model, a_batch(), distillation_weight=1.0)[0] > run(model, a_batch())[0] + 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_weights": (1.0,)}, "exit_weights"),
        ({"left_weights": ((9999, 1.0),)}, "left contexts"),
        ({"random_depth_fill": "skip"}, "random_depth_fill"),
        ({"accumulate": 0}, "accumulate"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"head_hidden": (24, 8, 0)}, {"conv_lookahead": False}])
def test_model_options_stream_as_they_train(changes: dict[str, object]) -> None:
    """Training-time kernels and inference-time kernels agree, and no frame of a causal model sees the next one."""
    config = dataclasses.replace(MODEL, **changes)  # type: ignore[arg-type]
    torch.manual_seed(1)
    encoder = Encoder(config).eval()
    features, lengths = torch.randn(1, 256, 80), torch.tensor([256])
    trained = encoder(features, lengths, chunk_frames=8).logits
    with torch.inference_mode():
        served = encoder(features, lengths, chunk_frames=8).logits
    for ours, theirs in zip(trained, served, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-5)
    losses = exit_losses(trained, torch.tensor([32]), torch.tensor([1, 2]), torch.tensor([2]))
    assert torch.isfinite(losses).all()


def test_causal_convolution_sees_no_later_frame() -> None:
    config = dataclasses.replace(MODEL, conv_lookahead=False)
    torch.manual_seed(1)
    conv = Encoder(config).segments[0].layers[0].conv
    x = torch.randn(1, 8, 32)
    changed = x.clone()
    changed[:, 5:] += 1.0
    with torch.inference_mode():
        before, after = conv(x, None, 8), conv(changed, None, 8)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3


def test_frozen_segments_stay_and_every_batch_has_something_to_learn() -> None:
    config = dataclasses.replace(
        CONFIG, frozen_segments=2, shallow_probability=0.9, random_depth_probability=0.9, exit_weights=(5.0, 5.0, 1.0)
    )
    assert {draw(config, STAGE, update).segments for update in range(100)} == {3}
    encoder = Encoder(MODEL)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(config.learns(STAGE, name))
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"segments"}
    assert {name for name in trained if name.startswith(("segments.0.", "segments.1."))} == {
        "segments.1.feedback.weight",
        "segments.1.feedback.bias",
    }
    features = torch.randn(1, 64, 80)
    short = Batch(features, torch.tensor([64]), torch.tensor([1, 2]), torch.tensor([2]), 0.64, ("a",), ("u",), 1)
    for seed in range(12):  # one chunk, which mixed depth would let leave at a frozen exit two times of three
        loss, _ = objective(encoder, short, config, Draw(8, None, 3, True, seed), torch.device("cpu"))
        assert loss.requires_grad
    loss, losses = objective(encoder, a_batch(), config, PLAIN, torch.device("cpu"))
    assert loss.item() == pytest.approx(losses[-1].item())
    with pytest.raises(ConfigError, match="frozen_segments must leave a segment"):
        dataclasses.replace(CONFIG, frozen_segments=3)

"""Starting from another model: what is copied computes the same, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from asr_exit.config import ModelConfig
from asr_exit.encoder import Encoder
from asr_exit.errors import ConfigError
from asr_exit.tokenizer import BLANK_ID
from asr_exit.warm_start import renew_idle, warm_start

SMALL = ModelConfig(
    vocab_size=24, d_model=32, ff_dim=64, num_heads=2, num_layers=8, subsampling=4, subsampling_channels=4
)
WITH_GAIN = replace(SMALL, handover_gain=True)


def random_encoder(config: ModelConfig, seed: int) -> Encoder:
    """Every weight drawn, those included that start at zero or one."""
    torch.manual_seed(seed)
    encoder = Encoder(config).eval()
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            weight.add_(0.1 * torch.randn_like(weight))
            if name.endswith("gain"):
                weight.uniform_(0.3, 3.0)
    return encoder


@torch.no_grad()
def logits(encoder: Encoder, segments: int) -> list[torch.Tensor]:
    features = torch.randn(2, 96, SMALL.features.num_mels, generator=torch.Generator().manual_seed(9))
    lengths = torch.tensor([96, 80])
    return encoder(features, lengths, chunk_frames=4, num_segments=segments).logits


@pytest.mark.parametrize(
    ("source", "ours", "segments"),
    [
        (WITH_GAIN, replace(SMALL, num_layers=12), 4),  # folded; our model goes deeper
        (WITH_GAIN, replace(SMALL, num_layers=4), 2),  # folded; our last segment has no feedback
        (WITH_GAIN, replace(WITH_GAIN, num_layers=12), 3),  # gains stay gains
        (SMALL, SMALL, 4),
        (SMALL, replace(SMALL, head_hidden=(64, 0, 72, 0)), 4),  # linear heads as hidden layers
        (SMALL, replace(SMALL, head_hidden=(80,), num_layers=2), 1),
    ],
)
def test_copied_segments_say_the_same(source: ModelConfig, ours: ModelConfig, segments: int) -> None:
    theirs, encoder = random_encoder(source, 0), random_encoder(ours, 1)
    fresh = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert not torch.allclose(logits(encoder, 1)[0], logits(theirs, 1)[0], atol=0.1)
    warm_start(encoder, theirs, segments)
    for at, expected in zip(logits(encoder, segments), logits(theirs, segments), strict=True):
        torch.testing.assert_close(at, expected, atol=1e-4, rtol=0)
    deeper = [name for name in fresh if name.startswith("segments.") and int(name.split(".")[1]) >= segments]
    for name in deeper:
        torch.testing.assert_close(encoder.state_dict()[name], fresh[name], atol=0, rtol=0)


def test_gains_matter_and_are_really_folded() -> None:
    theirs, encoder = random_encoder(WITH_GAIN, 0), random_encoder(SMALL, 1)
    warm_start(encoder, theirs, 4)
    for segment in theirs.segments[:-1]:
        assert segment.gain is not None
        segment.gain.data.fill_(1.0)
    assert not torch.allclose(logits(encoder, 2)[1], logits(theirs, 2)[1], atol=1e-2)


def test_all_but_heads_of_another_size_is_copied() -> None:
    theirs, encoder = random_encoder(replace(SMALL, head_hidden=(8, 0, 0, 0)), 0), random_encoder(SMALL, 1)
    fresh = {name: value.clone() for name, value in encoder.state_dict().items()}
    warm_start(encoder, theirs, 4)
    source = theirs.state_dict()
    for name, value in encoder.state_dict().items():
        expected = fresh[name] if name.startswith(("segments.0.head.", "feature_")) else source[name]
        torch.testing.assert_close(value, expected, atol=0, rtol=0)


def test_without_feedback_and_with_causal_convolutions_the_first_exit_stays() -> None:
    ours = replace(SMALL, self_conditioning=False, conv_lookahead=False)
    theirs, encoder = random_encoder(SMALL, 0), random_encoder(ours, 1)
    warm_start(encoder, theirs, 4)
    source = theirs.state_dict()
    for name, value in encoder.state_dict().items():
        if not name.startswith("feature_"):
            torch.testing.assert_close(value, source[name], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("source", "ours", "segments", "message"),
    [
        (replace(SMALL, d_model=16), SMALL, 1, "another architecture"),
        (replace(SMALL, vocab_size=30), SMALL, 1, "another architecture"),
        (replace(SMALL, exit_every=4), SMALL, 1, "another architecture"),
        (replace(SMALL, num_layers=4), SMALL, 3, "runs 3 segments, the model to start from has 2"),
        (SMALL, WITH_GAIN, 2, "set handover_gain to false"),
    ],
)
def test_what_does_not_fit_is_refused(source: ModelConfig, ours: ModelConfig, segments: int, message: str) -> None:
    encoder = Encoder(ours)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        warm_start(encoder, Encoder(source), segments)
    torch.testing.assert_close(encoder.state_dict(), before, atol=0, rtol=0)


def test_further_labels_begin_as_blanks() -> None:
    theirs, encoder = random_encoder(SMALL, 0), random_encoder(replace(SMALL, labels_per_frame=2), 1)
    warm_start(encoder, theirs, 4)
    for ours, expected in zip(logits(encoder, 4), logits(theirs, 4), strict=True):
        torch.testing.assert_close(ours[:, ::2], expected, atol=1e-5, rtol=0)
        assert (ours[:, 1::2].softmax(dim=-1)[..., BLANK_ID] > 0.99).all()


@torch.no_grad()
def test_a_chunk_of_several_labels_a_frame_leaves_with_its_own_exit() -> None:
    encoder = random_encoder(replace(SMALL, labels_per_frame=2), 2)
    features, lengths = torch.randn(1, 96, SMALL.features.num_mels), torch.tensor([90])
    depth = torch.tensor([[1, 4, 2, 3, 4, 1]])
    deepest = encoder(features, lengths, chunk_frames=4, chunk_depth=depth, fill="catch_up")
    whole = encoder(features, lengths, chunk_frames=4)
    assert deepest.lengths.tolist() == whole.lengths.tolist() == [2 * 23]
    assert deepest.mixed_logits is not None
    for chunk, exit_index in enumerate((depth[0] - 1).tolist()):
        span = slice(8 * chunk, 8 * chunk + 8)
        torch.testing.assert_close(deepest.mixed_logits[:, span], whole.logits[exit_index][:, span], atol=1e-5, rtol=0)


def test_labels_stand_for_whole_feature_frames() -> None:
    with pytest.raises(ConfigError, match="labels_per_frame must divide"):
        replace(SMALL, labels_per_frame=3)
    assert replace(SMALL, labels_per_frame=2).label_ms == SMALL.frame_ms / 2


def test_idle_units_begin_anew_and_the_function_stays() -> None:
    encoder = random_encoder(SMALL, 0)
    shut, half_shut = encoder.segments[2].layers[1].ff_out, encoder.segments[1].layers[0].ff_in
    with torch.no_grad():
        shut.norm.weight.mul_(1e-5)  # with a bias of its norm, the units are still not zero
        half_shut.up.weight[:10] *= 1e-5
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    expected = logits(encoder, 4)
    assert renew_idle(encoder, 1e-3) == 64 + 10
    for at, same in zip(logits(encoder, 4), expected, strict=True):
        torch.testing.assert_close(at, same, atol=1e-3, rtol=0)
    after = encoder.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parts = ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias")
    halves = ("segments.2.layers.1.ff_out", "segments.1.layers.0.ff_in")
    assert changed == {f"{half}.{part}" for half in halves for part in parts}
    assert (shut.down.weight == 0).all()
    assert (shut.up.weight.norm(dim=1) - 1).abs().max() < 0.6  # each unit sees something of its own
    assert (half_shut.down.weight[:, :10] == 0).all()
    torch.testing.assert_close(half_shut.down.weight[:, 10:], before[f"{halves[1]}.down.weight"][:, 10:])
    assert renew_idle(encoder, 1e-3) == 0
    features = torch.randn(1, 96, SMALL.features.num_mels, generator=torch.Generator().manual_seed(9))
    encoder(features, torch.tensor([96]), chunk_frames=4).logits[-1].square().sum().backward()
    assert shut.down.weight.grad is not None
    assert torch.linalg.matrix_rank(shut.down.weight.grad) > 16  # they can learn different things

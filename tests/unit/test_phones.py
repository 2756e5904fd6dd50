"""Phones as a second task: targets, loss, and what of it reaches the encoder."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from asr_exit.encoder import Encoder
from asr_exit.errors import ConfigError
from asr_exit.objective import Draw, objective
from asr_exit.phones import LABELS_PER_FRAME, LEXICON, PhoneExit, read_lexicon
from tests.unit.test_objective import CONFIG, MODEL, PLAIN, a_batch

LEXICON_OF_TWO = {"a": ("@",), "b": ("b", "i:")}


def test_targets_need_every_word() -> None:
    phones = PhoneExit(8, LEXICON_OF_TWO)
    assert phones.targets("a b a") == (1, 2, 3, 1)
    assert phones.targets("a c") == ()
    with pytest.raises(ConfigError, match="no phone"):
        PhoneExit(8, {"a": ()})


def test_a_run_with_it_begins_as_without() -> None:
    before = torch.random.get_rng_state()
    phones = PhoneExit(8, LEXICON_OF_TWO)
    assert torch.equal(before, torch.random.get_rng_state())
    logits = phones(torch.randn(2, 5, 8))
    assert logits.shape == (2, LABELS_PER_FRAME * 5, 4)
    assert (logits == 0).all()


def test_loss_by_hand_and_per_phone() -> None:
    # uniform over 3 phones and the blank; one frame is two labels: "a" fits them in 3 ways of 4 ** 2 paths
    phones = PhoneExit(8, LEXICON_OF_TWO)
    state, lengths = torch.randn(2, 2, 8), torch.tensor([1, 1])
    assert float(phones.loss(state, lengths, ["a", "c"]).detach()) == pytest.approx(-math.log(3 / 16), rel=1e-5)
    assert phones.last == pytest.approx(-math.log(3 / 16), rel=1e-5)
    both = float(phones.loss(state, lengths, ["a", "b"]).detach())  # "b" fits in one way
    assert both == pytest.approx((-math.log(3 / 16) - math.log(1 / 16)) / 3, rel=1e-5)
    nothing = phones.loss(state, lengths, ["c", "c"])
    nothing.backward()
    assert float(nothing.detach()) == 0.0
    assert phones.head.out.weight.grad is not None
    assert (phones.head.out.weight.grad == 0).all()


@pytest.fixture(scope="module")
def model() -> Encoder:
    torch.manual_seed(0)
    return Encoder(MODEL)


def loss_of(model: Encoder, phones: PhoneExit | None, drawn: Draw = PLAIN, segment: int = 2) -> torch.Tensor:
    config = dataclasses.replace(CONFIG, phone_weight=0.5, phone_segment=segment)
    return objective(model, a_batch(), config, drawn, torch.device("cpu"), phones=phones)[0]


def test_objective_adds_its_share_where_the_segment_runs(model: Encoder) -> None:
    phones = PhoneExit(MODEL.d_model, LEXICON_OF_TWO)
    plain = float(loss_of(model, None).detach())
    with_phones = float(loss_of(model, phones).detach())
    assert with_phones == pytest.approx(plain + 0.5 * phones.last, rel=1e-6)
    for drawn in (dataclasses.replace(PLAIN, segments=1), dataclasses.replace(PLAIN, mixed_depth=True)):
        assert torch.equal(loss_of(model, phones, drawn), loss_of(model, None, drawn))


def test_its_gradient_ends_at_the_segment_it_reads(model: Encoder) -> None:
    phones = PhoneExit(MODEL.d_model, LEXICON_OF_TWO)
    torch.nn.init.normal_(phones.head.out.weight, generator=torch.Generator().manual_seed(0))
    grads = []
    for part in (None, phones):
        model.zero_grad()
        loss_of(model, part).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    moved = {name for name in grads[0] if not torch.equal(grads[0][name], grads[1][name])}
    assert any(name.startswith("segments.1.") for name in moved)
    assert any(name.startswith("subsampling.") for name in moved)
    assert not any(name.startswith("segments.2.") for name in moved)


def test_lexicon_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipes\.librispeech\.lexicon"):
        read_lexicon(tmp_path)
    for wrong in ("[1]", "{", '{"a": 1}'):
        (tmp_path / LEXICON).write_text(wrong)
        with pytest.raises(ConfigError, match="no lexicon"):
            read_lexicon(tmp_path)
    (tmp_path / LEXICON).write_text(json.dumps({"b": "b i:"}))
    assert read_lexicon(tmp_path) == {"b": ("b", "i:")}


@pytest.mark.parametrize("change", [{"phone_weight": -0.1}, {"phone_weight": 0.5, "phone_segment": 4}])
def test_settings_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="phone_"):
        dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]

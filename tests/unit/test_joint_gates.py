"""Gates trained with the encoder: they see what serving sees, learn what helps, and cost what they are told."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from asr_exit.calibration.calibrate import calibrate
from asr_exit.calibration.workers import Workers
from asr_exit.checkpoint import Model
from asr_exit.encoder import Encoder
from asr_exit.errors import ConfigError
from asr_exit.evidence import ExitScores, score
from asr_exit.joint_gates import (
    KEY,
    JointGates,
    chunk_features,
    exit_log_probabilities,
    gates_of,
    with_gates,
    without_gates,
)
from asr_exit.loss import ctc_loss
from asr_exit.optimizer import Optimizers
from asr_exit.policies.learned import FEATURES, features
from asr_exit.policy import JointGate, parse_policy
from tests.unit.test_objective import CONFIG, MODEL, PLAIN, a_batch, run

FRAMES = 4  # of a chunk


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(MODEL)


def random_pass(scale: float) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """Log-posteriors (3, 2, 18, 11) and states (2, 18, 8) of utterances of 18 and 7 frames, many frames blank."""
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(3, 2, 18, 11, generator=generator)
    logits[..., 0] += scale
    logits[:, 0, 4:8, 0] += 60.0  # a chunk that every exit calls blank beyond doubt
    logits[2, :, 8:] = logits[1, :, 8:]  # texts that agree
    states = torch.randn(4, 2, 18, 8, generator=generator)
    return logits.log_softmax(dim=-1), [(states[k], states[k + 1]) for k in range(3)], torch.tensor([18, 7])


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_features_in_training_equal_those_of_serving(scale: float) -> None:
    log_probs, states, lengths = random_pass(scale)
    ours = chunk_features(log_probs, states, lengths, FRAMES)
    assert ours.shape == (3, 2, 5, len(FEATURES))
    compared = 0
    for row, length in enumerate(lengths.tolist()):
        for chunk, start in enumerate(range(0, length, FRAMES)):
            span = slice(start, min(start + FRAMES, length))
            previous: list[ExitScores | None] = [None]
            for k, (before, after) in enumerate(states):
                said = (log_probs[k, row : row + 1, span], before[row : row + 1, span], after[row : row + 1, span])
                found = score(*said, previous, want_log_probs=False)
                expected = features([found[0].evidence])[0]
                np.testing.assert_allclose(ours[k, row, chunk].numpy(), expected, rtol=0, atol=1e-5)
                previous, compared = list(found), compared + 1
    assert compared == 3 * (5 + 2)
    agreement = ours[..., FEATURES.index("agreement")]
    assert set(agreement[1:, 0].flatten().tolist()) == {0.0, 1.0}


def test_probabilities_of_leaving_by_hand() -> None:
    deeper = torch.tensor([[0.25], [0.8]]).logit()
    assert exit_log_probabilities(deeper).exp()[:, 0].tolist() == pytest.approx([0.75, 0.05, 0.2])


def test_gates_begin_with_every_exit_alike(encoder: Encoder) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    gates = JointGates(encoder)
    assert torch.equal(before, torch.random.get_rng_state())  # so that a run with gates draws what one without draws
    found = exit_log_probabilities(gates(torch.randn(2, 1, 1, len(FEATURES)))).exp()
    torch.testing.assert_close(found.flatten(), torch.full((3,), 1 / 3))


def a_loss(gates: JointGates, logits: Tensor, states: list[tuple[Tensor, Tensor]], price: float) -> Tensor:
    targets, target_lengths = torch.tensor([1, 2, 3, 4]), torch.tensor([3, 1])
    lengths = torch.tensor([18, 7])
    return gates.loss(list(logits), states, lengths, targets, target_lengths, chunk_frames=FRAMES, price=price)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_gates_that_have_decided_give_the_loss_and_cost_of_that_exit(encoder: Encoder, taken: int) -> None:
    logits, states, lengths = random_pass(1.0)
    gates = JointGates(encoder)
    with torch.no_grad():
        gates.bias.copy_(torch.tensor([-40.0 if k == taken else 40.0 for k in range(2)]))
    price = 0.7
    plain = ctc_loss(logits[taken], lengths, torch.tensor([1, 2, 3, 4]), torch.tensor([3, 1]))
    loss = a_loss(gates, logits, states, price)
    assert float(loss.detach()) == pytest.approx(float(plain + price * gates.costs[taken]), rel=1e-5)
    assert float(gates.spent) == pytest.approx(float(gates.costs[taken]))
    assert gates.costs[2] == 1


def test_the_price_moves_the_gates_and_not_the_encoder(encoder: Encoder) -> None:
    logits, states, _ = random_pass(1.0)
    gates = JointGates(encoder)
    torch.nn.init.constant_(gates.weight, 0.01)
    hidden = [(before.requires_grad_(), after.requires_grad_()) for before, after in states]

    def gradients(price: float) -> tuple[Tensor, Tensor]:
        said = logits.clone().requires_grad_()
        return torch.autograd.grad(a_loss(gates, said, hidden, price), (said, gates.weight))

    (free, free_gates), (dear, dear_gates) = gradients(0.0), gradients(5.0)
    assert (free.abs().sum(dim=(1, 2, 3)) > 0).all()  # every exit learns
    assert torch.equal(free, dear)
    assert not torch.allclose(free_gates, dear_gates)
    assert (free[:, 1, 7:] == 0).all()  # padding does not count
    assert all(x.grad is None for pair in hidden for x in pair)


def test_the_loss_bounds_the_expected_loss_of_drawn_exits(encoder: Encoder) -> None:
    """Over all 3 ** 5 ways in which the chunks of an utterance may leave."""
    log_probs, states, _ = random_pass(1.0)
    log_probs, lengths, targets = log_probs[:, :1], torch.tensor([18]), (torch.tensor([1, 2, 3]), torch.tensor([3]))
    hidden = [(before[:1], after[:1]) for before, after in states]
    gates = JointGates(encoder)

    def losses(slope: float) -> tuple[float, float]:
        torch.nn.init.constant_(gates.weight, slope)
        bound = gates.loss(list(log_probs), hidden, lengths, *targets, chunk_frames=FRAMES, price=0.0)
        seen = chunk_features(log_probs[:-1], hidden[:-1], lengths, FRAMES)
        share = exit_log_probabilities(gates(seen)).exp()[:, 0]
        ways = torch.cartesian_prod(*[torch.arange(3)] * 5)
        drawn = ways.repeat_interleave(FRAMES, dim=1)[:, :18]
        mixed = log_probs[drawn, 0, torch.arange(18)]
        each = [float(ctc_loss(item[None], lengths, *targets)) for item in mixed]
        weight = share[ways, torch.arange(5)].prod(dim=1)
        return bound.item(), float(weight.detach() @ torch.tensor(each))

    for slope, gap in ((0.0, 0.1), (0.01, 0.01), (-0.01, 0.01)):
        bound, expected = losses(slope)
        assert bound > expected + gap
    bound, expected = losses(30.0)  # the gates have decided
    assert bound == pytest.approx(expected, rel=1e-5)


def test_gradient_of_the_gates_is_that_of_the_loss(encoder: Encoder) -> None:
    logits, states, _ = random_pass(1.0)
    gates = JointGates(encoder)

    def at(bias: float) -> Tensor:
        torch.nn.init.constant_(gates.bias, bias)
        return a_loss(gates, logits, states, 0.7)

    expected = (at(0.051) - at(0.049)).item() / 0.002
    at(0.05).backward()
    assert gates.bias.grad is not None
    assert gates.bias.grad.sum().item() == pytest.approx(expected, rel=0.01)


def easy_and_hard() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Exit 0 is sure and right in even chunks, unsure in odd ones; exit 1 is always right. (2, 1, 32, 11)"""
    truth = torch.zeros(32, dtype=torch.long)
    truth[1::4] = torch.arange(8) % 5 + 1
    deep = 6.0 * torch.nn.functional.one_hot(truth, 11).float()
    shallow = deep * ((torch.arange(32) // FRAMES) % 2 == 0)[:, None] + 0.1 * torch.randn(32, 11)
    states = torch.randn(3, 1, 32, 8)
    return torch.stack((shallow, deep))[:, None], [(states[k], states[k + 1]) for k in range(2)]


def trained_gates(price: float) -> tuple[JointGates, Tensor]:
    """Gates alone, on `easy_and_hard`; and P(go deeper) of the eight chunks."""
    torch.manual_seed(1)
    logits, states = easy_and_hard()
    gates = JointGates(Encoder(dataclasses.replace(MODEL, num_layers=4)))
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.03)
    lengths, targets = torch.tensor([32]), (torch.arange(8) % 5) + 1
    for _ in range(15):
        optimizer.zero_grad()
        loss = gates.loss(list(logits), states, lengths, targets, torch.tensor([8]), chunk_frames=FRAMES, price=price)
        loss.backward()
        optimizer.step()
    seen = chunk_features(logits[:1].log_softmax(dim=-1), states[:1], lengths, FRAMES)
    return gates, gates(seen).sigmoid()[0, 0].detach()


def test_gates_learn_where_deeper_helps_and_spend_less_the_more_it_costs() -> None:
    trained = [trained_gates(price) for price in (0.0, 3.0, 60.0)]
    deeper = trained[1][1]
    assert (deeper[1::2] > 0.8).all()
    assert (deeper[::2] < 0.2).all()
    spent = [float(gates.spent) for gates, _ in trained]
    assert spent[0] > spent[1] + 0.05 > spent[2] + 0.1


def test_exported_rows_answer_as_the_gates_do(encoder: Encoder) -> None:
    log_probs, states, lengths = random_pass(1.0)
    gates = JointGates(encoder)
    torch.manual_seed(2)
    with torch.no_grad():
        gates.weight.normal_(std=0.1)
        gates.bias.normal_(std=0.1)
    gates.average(0.0)  # no memory: the average is the gates themselves
    _, rows = without_gates({"x": torch.zeros(1), **gates.exported()})
    assert rows is not None
    stored = with_gates({"by_chunk_ms": {"320": {JointGate.label: {"thresholds": [0.1]}}}}, rows)
    assert list(stored["by_chunk_ms"]["320"][JointGate.label]) == ["weights", "features"]
    torch.testing.assert_close(gates_of(stored), rows)
    policy = parse_policy("joint-gate:0.5", exit_layers=(2, 4, 6), calibration=stored)
    assert isinstance(policy, JointGate)
    deeper = gates(chunk_features(log_probs[:2], states[:2], lengths, FRAMES)).sigmoid()
    said = score(log_probs[0, :1, :FRAMES], states[0][0][:1, :FRAMES], states[0][1][:1, :FRAMES], [None], False)
    assert policy.measure(0, said[0].evidence) == pytest.approx(deeper[0, 0, 0].item(), abs=1e-4)
    assert with_gates({"a": 1}, None) == {"a": 1}
    assert gates_of({"a": 1}) is None


def test_the_moving_average_follows(encoder: Encoder) -> None:
    gates = JointGates(encoder)
    start = gates.exported()[KEY]
    with torch.no_grad():
        gates.weight.fill_(1.0)
    end = gates.exported()[KEY]
    gates.average(0.75)
    assert torch.equal(end, start)  # only `average` moves it
    assert gates.averaged_weight.unique().tolist() == [0.25]
    assert not torch.equal(gates.exported()[KEY], start)


def test_the_loss_is_added_to_batches_that_run_all_exits_in_chunks(encoder: Encoder) -> None:
    gates = JointGates(encoder)

    def added(**changes: object) -> float:
        drawn = dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]
        with_them, _ = run(encoder, a_batch(), drawn, gates, gate_weight=0.5, gate_price=0.0)
        return with_them - run(encoder, a_batch(), drawn)[0]

    assert added() > 1e-3
    assert added(segments=2) == added(chunk_frames=None) == added(mixed_depth=True) == 0.0


def test_the_optimiser_trains_them_without_decay(encoder: Encoder) -> None:
    gates = JointGates(encoder)
    groups = Optimizers(encoder, "muon", 0.1, aside=gates.parameters()).all[0].param_groups
    assert groups[-1]["weight_decay"] == 0
    assert set(map(id, groups[-1]["params"])) == {id(gates.weight), id(gates.bias)}
    assert len(Optimizers(encoder, "adamw", 0.1).all[0].param_groups) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_weight": -1.0}, "gate_weight"),
        ({"gate_price": -0.1}, "gate_price"),
        ({"gate_weight": 0.1, "model": dataclasses.replace(MODEL, num_layers=2)}, "two exits"),
    ],
    ids=["weight", "price", "one exit"],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, stages=(dataclasses.replace(CONFIG.stages[0], segments=1),), **changes)  # type: ignore[arg-type]


def test_a_model_without_gates_is_not_calibrated_for_them(model: Model) -> None:
    with pytest.raises(ConfigError, match="gate_weight"):
        calibrate(Workers(model), [], name="x", criteria=["joint-gate"])

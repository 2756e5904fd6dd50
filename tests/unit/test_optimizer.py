"""The optimisers of a training run."""

import copy
from typing import Any

import pytest
import torch

from asr_exit import muon
from asr_exit.config import ModelConfig
from asr_exit.encoder import Encoder
from asr_exit.errors import ConfigError
from asr_exit.optimizer import OPTIMIZERS, Optimizers
from asr_exit.parallel import Group
from asr_exit.schedule import TrainConfig


def small() -> Encoder:
    torch.manual_seed(0)
    return Encoder(ModelConfig(vocab_size=20, d_model=16, ff_dim=32, num_heads=2, num_layers=4, subsampling_channels=4))


def step(model: Encoder, optimizers: Optimizers, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizers.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    model = small()
    optimizers = Optimizers(model, name, 0.1)
    held = [id(p) for o in optimizers.all for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert (len(optimizers.all) == 2) == (name == "muon")
    optimizers.learning_rate = 0.5
    assert {group["lr"] for o in optimizers.all for group in o.param_groups} == {0.5}
    assert optimizers.learning_rate == 0.5


def test_muon_turns_a_matrix_by_an_orthogonal_step_of_adams_size() -> None:
    """All singular values of the step are near one another, and its root mean square is 0.2 of the learning rate."""
    model = small()
    optimizers = Optimizers(model, "muon", 0.0)
    optimizers.learning_rate = 0.01
    weight = model.segments[0].layers[0].ff_in.up.weight
    head = model.segments[0].head.out.weight
    before, head_before = weight.detach().clone(), head.detach().clone()
    step(model, optimizers, 1)
    moved = (weight - before).detach()
    singular = torch.linalg.svdvals(moved)
    assert singular.max() < 2.0 * singular.min()
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)
    assert (head - head_before).abs().max().item() == pytest.approx(0.01, rel=0.01)  # AdamW's first step is a sign


def test_muon_is_torchs_own_where_that_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "computes_in_bf16", lambda device: True)
    torch.manual_seed(1)
    start = torch.randn(24, 16)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        muon.Muon([ours], lr=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        gradient = torch.randn(24, 16)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (ours - start).abs().max().item()
    assert (ours - theirs).abs().max().item() < 0.02 * moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_orthogonalising_is_the_same_in_either_precision(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    matrix = torch.randn(shape)
    found, exact = muon.orthogonalised(matrix, dtype), muon.orthogonalised(matrix.double(), torch.float64)
    assert found.shape == shape
    assert (found - exact).abs().max().item() < (0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("shape", [(48, 192), (192, 48)])
def test_the_short_way_by_the_gram_matrix_is_the_iteration(shape: tuple[int, int]) -> None:
    """Singular values from 1 to 1e-6 of the largest, as gradients have them."""
    torch.manual_seed(3)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = left @ torch.diag(torch.logspace(0, -6, 48, dtype=torch.float64)) @ right
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    assert (muon.orthogonalised(matrix, torch.float64) - x).abs().max().item() < 1e-9
    assert (muon.orthogonalised(matrix.float(), torch.float32) - x).abs().max().item() < 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on_to_the_last_bit(name: str) -> None:
    model, other = small(), small()
    optimizers, resumed = Optimizers(model, name, 0.1), Optimizers(other, name, 0.1)
    step(model, optimizers, 1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for trained, optimizer in ((model, optimizers), (other, resumed)):
        step(trained, optimizer, 2)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class OneOfTwo(Group):
    """A process of two that hears nothing from the other."""

    def exchange(self, shares: object) -> None:
        pass

    def gather(self, item: Any) -> list[Any]:
        return [item]


def test_two_processes_share_the_work_of_one() -> None:
    """Exactly one of them steps a matrix, as it would be alone; and a state is that of any number of processes."""
    alone, halves = small(), [small(), small()]
    whole = Optimizers(alone, "muon", 0.1)
    parts = [Optimizers(model, "muon", 0.1, OneOfTwo(rank, 2)) for rank, model in enumerate(halves)]
    start = [matrix.detach().clone() for matrix in whole.matrices]
    for model, optimizers in ((alone, whole), *zip(halves, parts, strict=True)):
        step(model, optimizers, 1)
    for index, (before, after) in enumerate(zip(start, whole.matrices, strict=True)):
        theirs = [part.matrices[index] for part in parts]
        assert sorted(torch.equal(matrix, after) for matrix in theirs) == [False, True]
        assert sorted(torch.equal(matrix, before) for matrix in theirs) == [False, True]
    momentum = [part.state_dict()["momentum"] for part in parts]
    merged, expected = momentum[0] | momentum[1], whole.state_dict()["momentum"]
    assert sorted(merged) == sorted(expected) == list(range(len(start)))
    assert len(momentum[0]) + len(momentum[1]) == len(start)
    assert all(torch.equal(merged[index], expected[index]) for index in expected)


def test_other_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="adamw or muon"):
        TrainConfig(name="x", hours=1.0, optimizer="sgd")

"""Exit policies and how they are named."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest

from asr_exit.errors import ConfigError
from asr_exit.policy import Entropy, Evidence, ExitPolicy, Fixed, Full, Posterior, RandomDepth, Reason, parse_policy

LAYERS = (2, 4, 6, 8, 10, 12)
CALIBRATION: dict[str, Any] = {
    "posterior": {"thresholds": [0.97, 0.95, 0.9, None, 0.85]},
    "entropy": {"thresholds": 0.1},
}


def evidence(posterior: float = 0.5, entropy: float = 0.5) -> Evidence:
    return Evidence(max_posterior=posterior, max_posterior_all=0.0, entropy=entropy, entropy_all=1.0, blank_mass=0.0)


def parse(spec: str, calibration: dict[str, Any] | None = None) -> ExitPolicy:
    return parse_policy(spec, exit_layers=LAYERS, calibration=calibration)


def test_full_and_fixed_never_stop_and_set_the_ceiling() -> None:
    for policy, deepest in ((Full(), 5), (Fixed(4), 1), (Fixed(12), 5), (Fixed(6, exit_every=3), 1)):
        assert policy.deepest(6) == policy.max_exit(6, 3) == deepest
        assert not policy.needs_evidence
        assert not any(policy.stop(index, evidence(1.0, 0.0)) for index in range(6))


@pytest.mark.parametrize(("layer", "every"), [(3, 2), (0, 2), (-2, 2), (4, 0)])
def test_fixed_refuses_layers_without_exit(layer: int, every: int) -> None:
    with pytest.raises(ConfigError, match=f"layer {layer}"):
        Fixed(layer, every)


def test_fixed_refuses_a_shallower_model() -> None:
    with pytest.raises(ConfigError, match="last one is after 8"):
        Fixed(12).deepest(4)


def test_posterior_stops_at_its_threshold_and_entropy_below_it() -> None:
    posterior, entropy = Posterior(0.9), Entropy(0.2)
    assert [posterior.stop(0, evidence(posterior=p)) for p in (0.89, 0.9, 0.95)] == [False, True, True]
    assert [entropy.stop(0, evidence(entropy=h)) for h in (0.21, 0.2, 0.0)] == [False, True, True]
    assert posterior.needs_evidence
    assert entropy.needs_evidence
    assert posterior.max_exit(6) == entropy.deepest(6) == 5


def test_thresholds_per_exit() -> None:
    policy = Posterior((0.9, None, 0.7))
    assert [policy.stop(index, evidence(posterior=0.8)) for index in range(4)] == [False, False, True, False]
    assert not policy.stop(1, evidence(posterior=1.0))  # None: never here
    assert policy.deepest(3) == 2
    assert policy.deepest(4) == 3  # the last exit needs no threshold
    for exits in (2, 5, 6):
        with pytest.raises(ConfigError, match="has 3 thresholds"):
            policy.deepest(exits)


@pytest.mark.parametrize("policy", [Posterior(0.0), Entropy(1.0)])
def test_missing_or_broken_evidence_goes_deeper(policy: Posterior | Entropy) -> None:
    assert policy.stop(0, evidence(0.5, 0.5))
    assert not policy.stop(0, evidence(math.nan, math.nan))
    assert not policy.stop(0, None)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None])
@pytest.mark.parametrize("kind", [Posterior, Entropy])
def test_thresholds_outside_0_to_1_are_refused(kind: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        kind(value)
    if value is not None:
        with pytest.raises(ConfigError, match="from 0 to 1"):
            kind((0.5, value))


def test_random_depth_is_uniform_independent_and_repeatable() -> None:
    depths = [RandomDepth(7).max_exit(6, chunk) for chunk in range(6000)]
    counts = Counter(depths)
    assert sorted(counts) == [0, 1, 2, 3, 4, 5]
    assert max(abs(count - 1000) for count in counts.values()) < 120  # 4 standard deviations
    pairs = Counter(itertools.pairwise(depths))
    assert max(abs(count - 6000 / 36) for count in pairs.values()) < 60
    assert depths == [RandomDepth(7).max_exit(6, chunk) for chunk in range(6000)]
    other = [RandomDepth(8).max_exit(6, chunk) for chunk in range(6000)]
    for shifted in (depths, depths[1:]):  # neither equal to another seed's draws nor a shift of them
        assert abs(sum(a == b for a, b in zip(shifted, other, strict=False)) - 1000) < 120
    assert RandomDepth(7).deepest(6) == 5
    assert not RandomDepth(7).needs_evidence


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("full", Full()),
        (" Full ", Full()),
        ("exit:4", Fixed(4)),
        ("fixed:12", Fixed(12)),
        ("posterior:0.9", Posterior(0.9)),
        ("posterior:1", Posterior(1.0)),
        ("entropy:0.2", Entropy(0.2)),
        ("posterior:0.9/0.8/-/0.7/0.6", Posterior((0.9, 0.8, None, 0.7, 0.6))),
        ("posterior", Posterior((0.97, 0.95, 0.9, None, 0.85))),
        ("entropy", Entropy(0.1)),
        ("random", RandomDepth(0)),
        ("random:7", RandomDepth(7)),
    ],
)
def test_parse(spec: str, policy: ExitPolicy) -> None:
    assert parse(spec, CALIBRATION) == policy


@pytest.mark.parametrize("spec", ["full", "exit:6", "posterior:0.9", "entropy:0.25", "random:3"])
def test_names_parse_back(spec: str) -> None:
    assert parse(spec).name == spec


def test_calibrated_policies_carry_the_bare_name() -> None:
    assert parse("posterior", CALIBRATION).name == "posterior"


def test_exits_of_other_models() -> None:
    policy = parse_policy("exit:9", exit_layers=(3, 6, 9))
    assert policy.deepest(3) == 2
    with pytest.raises(ConfigError, match="3/6/9"):
        parse_policy("exit:4", exit_layers=(3, 6, 9))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("posteriour:0.9", "did you mean 'posterior'"),
        ("fulll", "did you mean 'full'"),
        ("xyzzy", "Known: auto, full, exit:LAYER"),
        ("", "unknown policy"),
        ("full:3", "takes no argument"),
        ("exit", "exit:2/4/6/8/10/12"),
        ("exit:5", "exit:2/4/6/8/10/12"),
        ("exit:-2", "exit layer"),
        ("fixed:14", "exit layer"),
        ("exit:", "nothing follows"),
        ("posterior:high", "numbers from 0 to 1"),
        ("posterior:1.5", "from 0 to 1"),
        ("posterior:nan", "from 0 to 1"),
        ("posterior:0.9/0.8", "has 2 thresholds"),
        ("posterior:-", "from 0 to 1|thresholds"),
        ("random:x", "whole number"),
        ("posterior", "no calibrated thresholds"),
    ],
)
def test_bad_specs_say_what_to_change(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(spec)


@pytest.mark.parametrize("stored", [{}, {"thresholds": []}, {"thresholds": ["x"]}, {"thresholds": [0.5]}, 0.5, None])
def test_broken_calibration_is_refused(stored: Any) -> None:
    if stored == {"thresholds": [0.5]}:  # one number for all exits
        assert parse("posterior", {"posterior": stored}) == Posterior(0.5)
        return
    with pytest.raises(ConfigError, match="calibrat"):
        parse("posterior", {"posterior": stored})


def test_reasons_are_lower_case_words() -> None:
    assert [str(reason) for reason in Reason] == ["confident", "budget", "load", "full", "final"]


def test_auto_is_posterior_where_the_model_is_calibrated_and_full_depth_elsewhere() -> None:
    layers = (2, 4, 6)
    assert parse_policy("auto", exit_layers=layers) == Full()
    calibrated = parse_policy("auto", exit_layers=layers, calibration={"posterior": {"thresholds": [0.9, 0.8, None]}})
    assert calibrated == Posterior((0.9, 0.8, None))
    with pytest.raises(ConfigError, match="posterior"):
        parse_policy("auto:0.9", exit_layers=layers)

"""What the page 06_advantages should not have to show: golden numbers of both presets, properties, bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from emo_r3.advantages import advantage_parts, group_advantages, group_scale, informative_groups

# Worked out by hand for rewards 1.0, .15, .95, .8: mean .725, squared distances .4625 in all.
DISTANCES = (0.275, -0.575, 0.225, 0.075)
GOLDEN = {
    ("population", 0.0): [d / (0.4625 / 4) ** 0.5 for d in DISTANCES],
    ("sample", 0.0): [d / (0.4625 / 3) ** 0.5 for d in DISTANCES],
    ("sample", 1e-6): [d / ((0.4625 / 3) ** 0.5 + 1e-6) for d in DISTANCES],
    ("population", 0.1): [d / ((0.4625 / 4) ** 0.5 + 0.1) for d in DISTANCES],
}


@pytest.mark.parametrize("std, eps", GOLDEN)
def test_golden_values(std, eps):
    rewards = torch.tensor([[1.0, 0.15, 0.95, 0.8]], dtype=torch.float64)
    got = group_advantages(rewards, std=std, eps=eps)
    assert torch.allclose(got[0], torch.tensor(GOLDEN[std, eps], dtype=torch.float64), atol=1e-12, rtol=0)


def test_golden_values_tell_the_presets_apart():
    """The test above could not pass with std or eps mixed up: the golden rows differ by far more than its tolerance."""
    rows = [torch.tensor(row, dtype=torch.float64) for row in GOLDEN.values()]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert (a - b).abs().max() > 1e-7


def test_defaults_are_the_papers():
    rewards = torch.tensor([[1.0, 0.15, 0.95, 0.8], [0.1, 0.1, 0.9, 0.1]])
    assert torch.equal(group_advantages(rewards), group_advantages(rewards, std="population", eps=0.0))
    assert torch.allclose(group_advantages(rewards).square().mean(1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("std, eps", [("population", 0.0), ("sample", 0.0), ("sample", 1e-6), ("population", 1e-6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.15, 1 / 3, 0.8, 0.85, 0.95, 1.1, -7.3, 1e6])
def test_equal_rewards_give_exact_zeros(std, eps, dtype, value):
    for G in range(2, 33):
        got = group_advantages(torch.full((2, G), value, dtype=dtype), std=std, eps=eps)
        assert torch.equal(got, torch.zeros(2, G, dtype=dtype))


def test_equal_rewards_would_not_give_zeros_by_themselves():
    """The naive formula does fail on what the test above feeds it, so that test has something to find."""
    rewards = torch.full((1, 8), 0.8)
    naive = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    assert naive.abs().max() > 0.01


def test_rewards_equal_but_for_rounding_give_zeros():
    rewards = torch.tensor([[(0.1 + 0.2) + 0.3, 0.1 + (0.2 + 0.3)]], dtype=torch.float64)
    assert rewards[0, 0] != rewards[0, 1]
    assert torch.equal(group_advantages(rewards), torch.zeros(1, 2, dtype=torch.float64))
    assert not informative_groups(rewards).any()
    assert informative_groups(torch.tensor([[0.6, 0.6001]])).all()  # a small difference that is no rounding


def test_one_dead_group_leaves_its_neighbours_alone():
    alive = torch.tensor([[1.0, 0.15, 0.95, 0.8]])
    mixed = torch.cat([alive, torch.full((1, 4), 0.9), alive])
    got = group_advantages(mixed)
    assert torch.equal(got[0], group_advantages(alive)[0]) and torch.equal(got[2], got[0])
    assert torch.equal(got[1], torch.zeros(4))
    assert informative_groups(mixed).tolist() == [True, False, True]


def test_groups_are_rows_not_columns():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # by columns everything would be equal
    assert torch.equal(group_advantages(rewards), torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


# Rewards as they come: multiples of a hundredth, any group size. Adjacent ones differ by far more than rounding.
groups = st.integers(2, 16).flatmap(
    lambda g: st.lists(st.lists(st.integers(-200, 200), min_size=g, max_size=g), min_size=1, max_size=5)
).map(lambda rows: torch.tensor(rows, dtype=torch.float64) / 100)


@settings(max_examples=200, deadline=None)
@given(groups, st.sampled_from(["population", "sample"]))
def test_against_numpy(rewards, std):
    r = rewards.numpy()
    sigma = r.std(1, ddof=int(std == "sample"), keepdims=True)
    alive = np.ptp(r, axis=1) > 0
    expected = np.where(alive[:, None], (r - r.mean(1, keepdims=True)) / np.where(alive[:, None], sigma, 1.0), 0.0)
    np.testing.assert_allclose(group_advantages(rewards, std=std).numpy(), expected, atol=1e-9)
    assert (informative_groups(rewards).numpy() == alive).all()


@settings(max_examples=100, deadline=None)
@given(groups, st.floats(0.1, 100), st.floats(-5, 5))
def test_shift_and_scale_do_not_matter(rewards, factor, shift):
    assert torch.allclose(group_advantages(rewards * factor + shift), group_advantages(rewards), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(groups, st.randoms())
def test_permuting_siblings_permutes_advantages(rewards, rng):
    order = list(range(rewards.shape[1]))
    rng.shuffle(order)
    assert torch.allclose(group_advantages(rewards[:, order]), group_advantages(rewards)[:, order], atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(groups, st.sampled_from([("population", 0.0), ("sample", 1e-6)]), st.integers(0, 2**31))
def test_parts_sum_to_the_advantage(rewards, preset, seed):
    std, eps = preset
    torch.manual_seed(seed)
    cut = torch.rand_like(rewards)
    parts = {"a": rewards * cut, "b": rewards * (1 - cut)}
    got = advantage_parts(parts, std=std, eps=eps)
    assert list(got) == ["a", "b"]
    total = parts["a"] + parts["b"]
    assert torch.allclose(got["a"] + got["b"], group_advantages(total, std=std, eps=eps), atol=1e-7)


def test_a_part_is_scaled_by_the_overall_reward_not_by_itself():
    parts = {"big": torch.tensor([[0.8, 0.0]]), "small": torch.tensor([[0.0, 0.1]])}
    got = advantage_parts(parts)  # overall: .8, .1, so std .35 and advantages +1, -1
    assert torch.allclose(got["big"], torch.tensor([[0.4, -0.4]]) / 0.35)
    assert torch.allclose(got["small"], torch.tensor([[-0.05, 0.05]]) / 0.35)


def test_parts_that_cancel_are_silent():
    parts = {"a": torch.tensor([[0.1, 0.0]]), "b": torch.tensor([[0.0, 0.1]])}
    assert all(torch.equal(part, torch.zeros(1, 2)) for part in advantage_parts(parts).values())


def test_integer_and_half_rewards_become_float32():
    for dtype in (torch.int64, torch.bool, torch.float16, torch.bfloat16):
        got = group_advantages(torch.tensor([[1, 0]]).to(dtype))
        assert got.dtype == torch.float32 and torch.equal(got, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("rewards, error, words", [
    ([[1.0, 0.0]], TypeError, ["rewards", "list", "Tensor"]),
    (torch.tensor([1.0, 0.0]), ValueError, ["rewards", "(2,)", "(B, G)"]),
    (torch.zeros(0, 4), ValueError, ["(0, 4)", "B >= 1"]),
    (torch.zeros(2, 2, 2), ValueError, ["(2, 2, 2)", "(B, G)"]),
    (torch.tensor([[1.0], [0.0]]), ValueError, ["G = 1", "G >= 2"]),
    (torch.tensor([[1.0, 0.0], [0.5, float("nan")]]), ValueError, ["rewards[1, 1]", "nan", "finite"]),
    (torch.tensor([[float("inf"), 0.0]]), ValueError, ["rewards[0, 0]", "inf", "finite"]),
])
@pytest.mark.parametrize("function", [group_advantages, informative_groups, group_scale, lambda r: advantage_parts({"x": r})])
def test_bad_rewards_are_named(function, rewards, error, words):
    with pytest.raises(error) as caught:
        function(rewards)
    for word in words:
        assert word.replace("rewards", "") in str(caught.value)


@pytest.mark.parametrize("kwargs, words", [
    ({"std": "popluation"}, ["std", "popluation", "'population'", "'sample'"]),
    ({"std": None}, ["std", "None"]),
    ({"eps": -1e-6}, ["eps", "-1e-06", ">= 0"]),
    ({"eps": float("nan")}, ["eps", "nan"]),
])
def test_bad_options_are_named(kwargs, words):
    with pytest.raises(ValueError) as caught:
        group_advantages(torch.tensor([[1.0, 0.0]]), **kwargs)
    for word in words:
        assert word in str(caught.value)


def test_bad_parts_are_named():
    with pytest.raises(ValueError, match="at least one component"):
        advantage_parts({})
    with pytest.raises(ValueError, match=r"parts\['format'\].*\(1, 3\).*\(1, 4\)"):
        advantage_parts({"accuracy": torch.ones(1, 4), "format": torch.ones(1, 3)})

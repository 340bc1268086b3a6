"""The named losses, the correction for another sampler and GDPO: by hand, and against TRL 1.16's own code on the same tensors."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_loss import RATIOS, RECIPE, batch, gap, trl_loss, value_and_grad  # noqa: F401 (trl_loss is a fixture)

from emo_r3.advantages import batch_normalize, gdpo_advantages, gdpo_sums, group_advantages
from emo_r3.config import LOSS_TYPES
from emo_r3.loss import cispo_loss, grpo_loss, loss_normalizer, sampler_correction, token_weights

NAMES = list(LOSS_TYPES)
T_MAX = 9
INERT = [0.0, 1e30, math.nan, math.inf, -math.inf]


def options_of(name, **others):
    "The options of `grpo_loss` for a named loss, what the name fixes coming last, as a configuration merges them."
    return others | {"max_tokens": T_MAX} | LOSS_TYPES[name]


def named(name, *data, **others):
    return value_and_grad(*data, **options_of(name, **others))


def trl_options(name, **others):
    "The same for TRL: GSPO is its `grpo` with a sequence ratio, and CISPO's bound is the weight itself. It reads a delta under `cispo` too, and does nothing with it."
    if name == "gspo": return others | {"loss_type": "grpo", "ratio": "sequence", "max_tokens": T_MAX}
    if name == "cispo": others = others | {"epsilon_high": 1 + others.get("epsilon_high", 0.2)}
    return others | {"loss_type": name, "max_tokens": T_MAX}


def importance_weights(mask, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return (0.4 + 2 * torch.rand(mask.shape, generator=gen, dtype=torch.float64)).to(dtype)


# --- the names --------------------------------------------------------------------------------------------------------------------

def test_names_and_what_they_fix():
    assert NAMES == ["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo"]
    known = set(inspect.signature(grpo_loss).parameters)
    assert all(set(fixed) <= known for fixed in LOSS_TYPES.values())
    assert LOSS_TYPES["dapo"] == LOSS_TYPES["bnpo"]


@pytest.mark.parametrize("name", NAMES)
def test_golden_names(name):
    """Two completions of three tokens and one, ratios 2, 1, 1/2 and 3, advantages 1 and -1, clipped at .2 and .3, T_max = 9."""
    old = torch.full((2, 3), 0.25, dtype=torch.float64).log()
    new = old + torch.tensor([[2, 1, 0.5], [3, 1, 1]], dtype=torch.float64).log()
    A, mask = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([[1, 1, 1], [1, 0, 0]])
    clipped = (-1.3 - 1 - 0.5, 3.0)  # the sums of both completions' token losses
    open_ = ((0, -1, -0.5), 3.0)  # what is left of their slopes
    values = {"grpo": (clipped[0] / 3 + clipped[1]) / 2, "dapo": sum(clipped) / 4, "bnpo": sum(clipped) / 4, "dr_grpo": sum(clipped) / (2 * 9),
              "gspo": (-1 + 3) / 2,  # the geometric mean of 2, 1 and 1/2 is 1
              "cispo": (-1.3 * math.log(0.5) - math.log(0.25) - 0.5 * math.log(0.125) + 1.3 * math.log(0.75)) / 4}
    slopes = {"grpo": [x / 6 for x in open_[0]] + [3 / 2], "dapo": [x / 4 for x in open_[0]] + [3 / 4], "dr_grpo": [x / 18 for x in open_[0]] + [3 / 18],
              "gspo": [-1 / 6] * 3 + [3 / 2], "cispo": [-1.3 / 4, -1 / 4, -0.5 / 4, 1.3 / 4]}
    slopes["bnpo"] = slopes["dapo"]
    loss, grad = named(name, new, old, None, A, mask, epsilon_high=0.3)
    assert loss.item() == pytest.approx(values[name], abs=1e-12)
    assert grad[mask.bool()].tolist() == pytest.approx(slopes[name], abs=1e-12)


@pytest.mark.parametrize("ratio", RATIOS)
def test_cispo_s_gradient_is_that_of_a_fixed_weight(ratio):
    """Differentiating the value would be wrong (the weight is a number), so the gradient is compared with the formula."""
    new, old, ref, A, mask = batch(seed=4)
    _, grad = value_and_grad(new, old, None, A, mask, clip="cispo", epsilon_high=0.3, ratio=ratio)
    log_r = new - old
    if ratio == "sequence": log_r = ((log_r * mask).sum(1) / mask.sum(1))[:, None].expand_as(new)
    expected = -log_r.exp().clamp(max=1.3) * A[:, None] * token_weights(mask)
    assert torch.allclose(grad, expected, atol=1e-12) and (log_r[mask] > math.log(1.3)).any()
    assert (grad[mask] != 0).all()  # nobody is left out


def test_cispo_has_no_use_for_epsilon_low():
    data = batch()
    a, b = (named("cispo", *data, epsilon_low=e, epsilon_high=0.3) for e in (0.0, 0.9))
    assert gap(a, b) == 0


def test_cispo_value_is_a_plain_product():
    r, A, logp = torch.tensor([[0.5, 1.0, 7.0]]), torch.tensor([[-2.0]]), torch.tensor([[-1.0, -2.0, -3.0]])
    assert cispo_loss(r, A, logp, epsilon_high=1.0).tolist() == [[-1.0, -4.0, -12.0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_of_an_update_add_up_under_every_name(name, size):
    """bnpo included: cut into micro-batches it is the same loss here, where TRL's is another."""
    data = batch(N=8)
    options = options_of(name, epsilon_high=0.3, beta=0.05)
    whole = value_and_grad(*data, **options)
    importance = importance_weights(data[4])
    corrected = value_and_grad(*data, importance=importance, **options)
    count = loss_normalizer(data[4], options["average"])
    for expected, extra in ((whole, lambda rows: {}), (corrected, lambda rows: {"importance": importance[rows]})):
        pieces = [value_and_grad(*(x[rows] for x in data), normalizer=count, **extra(rows), **options) for rows in torch.arange(8).split(size)]
        assert gap((sum(p[0] for p in pieces), torch.cat([p[1] for p in pieces])), expected) < 1e-12


@pytest.mark.parametrize("garbage", INERT)
@pytest.mark.parametrize("name", NAMES)
def test_padding_is_inert_under_every_name(name, garbage):
    new, old, ref, A, mask = batch()
    importance, options = importance_weights(mask), options_of(name, epsilon_high=0.3, beta=0.05)
    clean = value_and_grad(new, old, ref, A, mask, importance=importance, **options)
    dirty = [x.masked_fill(~mask, garbage) for x in (new, old, ref, importance)]
    loss, grad = value_and_grad(*dirty[:3], A, mask, importance=dirty[3], **options)
    assert torch.equal(loss, clean[0]) and torch.equal(grad, clean[1]) and not grad[~mask].any()


@pytest.mark.parametrize("ratio", RATIOS)
def test_cispo_counts_the_weights_that_it_cuts(ratio):
    new, old, ref, A, mask = batch()
    metrics = grpo_loss(new, old, A, mask, clip="cispo", epsilon_high=0.3, ratio=ratio)[1]
    assert list(metrics) == ["cispo_clip_ratio"]
    r = (new - old).exp() if ratio == "token" else ((new - old) * mask).sum(1, keepdim=True).div(mask.sum(1, keepdim=True)).exp().expand_as(new)
    assert metrics["cispo_clip_ratio"].item() == pytest.approx(((r > 1.3) & (A > 0)[:, None] & mask).sum().item() / mask.sum().item(), abs=1e-9)


def test_cispo_is_finite_for_huge_ratios():
    old = torch.full((2, 2), -250.0)
    for jump in (200.0, -200.0):
        loss, grad = named("cispo", old + jump, old, old, torch.tensor([1.0, -1.0]), torch.ones(2, 2))
        assert loss.isfinite() and grad.isfinite().all()


# --- importance -------------------------------------------------------------------------------------------------------------------

def test_importance_multiplies_the_policy_loss_and_not_the_kl():
    new, old, ref, A, mask = batch()
    w = importance_weights(mask)
    both, policy, divergence = (value_and_grad(new, old, ref, a, mask, importance=w, beta=b) for a, b in ((A, 0.3), (A, 0.0), (torch.zeros_like(A), 0.3)))
    assert gap(both, (policy[0] + divergence[0], policy[1] + divergence[1])) < 1e-12
    assert gap(divergence, value_and_grad(new, old, ref, torch.zeros_like(A), mask, beta=0.3)) == 0  # the KL's part never saw the weights
    x = old.clone()
    _, grad = value_and_grad(x, old, None, A, mask, importance=w)
    assert torch.allclose(grad, -w * A[:, None] * mask / mask.sum(), atol=1e-12)


def test_importance_of_one_changes_nothing_and_gets_no_gradient():
    new, old, ref, A, mask = batch()
    for name in NAMES:
        assert gap(named(name, new, old, ref, A, mask, importance=torch.ones_like(new)), named(name, new, old, ref, A, mask)) == 0
    w, x = importance_weights(mask).requires_grad_(), new.clone().requires_grad_()
    loss, metrics = grpo_loss(x, old, A, mask, importance=w)
    loss.backward()
    assert w.grad is None and x.grad is not None
    assert metrics["sampling/importance_sampling_ratio/mean"].item() == pytest.approx(w[mask].mean().item(), abs=1e-9)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_importance_on_a_token_is_not_hidden(broken):
    new, old, _, A, mask = batch()
    w = torch.ones_like(new)
    w[0, 0] = broken
    assert grpo_loss(new, old, A, mask, importance=w)[0].isnan()


@pytest.mark.parametrize("changes, words", [
    ({"clip": "gspo"}, ["clip", "gspo", "ppo, cispo"]),
    ({"clip": "cispo", "delta": 3.0}, ["delta", "3.0", "cispo", "None"]),
    ({"importance": torch.ones(8)}, ["importance", "(8,)", "(8, 7)"]),
    ({"importance": torch.ones(8, 1)}, ["importance", "(8, 1)", "(8, 7)"]),
])
def test_bad_options_are_named(changes, words):
    new, old, ref, A, mask = batch()
    with pytest.raises(ValueError) as e: grpo_loss(new, old, A, mask, **changes)
    assert all(word in str(e.value) for word in words)


# --- the correction for another sampler -------------------------------------------------------------------------------------------

def sampled_elsewhere(N=8, T=7, seed=0):
    "The trainer's scores, the sampler's, and the mask; differences from a whisper to a factor of e^3 either way."
    new, old, ref, A, mask = batch(N, T, seed)
    sampler = old + 0.3 * torch.randn(N, T, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    sampler[0, 0], sampler[1, 0] = old[0, 0] - 3, old[1, 0] + 3
    return old, sampler, mask


def test_correction_by_hand():
    old, sampler = torch.tensor([[0.5, 0.4, 0.9]]).log(), torch.tensor([[0.2, 0.5, 0.1]]).log()
    mask = torch.tensor([[1, 1, 0]])
    assert sampler_correction(old, sampler, mask, 3.0)[0].tolist() == pytest.approx([2.5, 0.8, 0])
    assert sampler_correction(old, sampler, mask, 2.0)[0].tolist() == pytest.approx([2.0, 0.8, 0])
    assert sampler_correction(old, sampler, mask, 3.0, "sequence")[0].tolist() == pytest.approx([2.0, 2.0, 0])
    assert sampler_correction(old, sampler, mask, 1.5, "sequence")[0].tolist() == pytest.approx([1.5, 1.5, 0])


def test_correction_makes_expectations_right_where_nothing_is_cut():
    """Over an enumerated vocabulary: the weighted mean under the sampler is the mean under the trainer's policy; cut, it is not."""
    gen = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, generator=gen, dtype=torch.float64).log_softmax(0) for _ in range(2))
    value = torch.randn(6, generator=gen, dtype=torch.float64)
    mean = lambda cap: (q.exp() * sampler_correction(p[:, None], q[:, None], torch.ones(6, 1), cap)[:, 0] * value).sum()
    assert mean(1e6).item() == pytest.approx((p.exp() * value).sum().item(), abs=1e-12)
    assert abs(mean(1.0) - (p.exp() * value).sum()) > 1e-2


@pytest.mark.parametrize("garbage", INERT)
@pytest.mark.parametrize("level", RATIOS)
def test_correction_s_padding_is_inert(level, garbage):
    old, sampler, mask = sampled_elsewhere()
    clean = sampler_correction(old, sampler, mask, 2.0, level)
    assert torch.equal(sampler_correction(old.masked_fill(~mask, garbage), sampler.masked_fill(~mask, garbage), mask, 2.0, level), clean)
    assert not clean[~mask].any() and (clean[mask] > 0).all() and clean.max() <= 2.0


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", RATIOS)
def test_a_broken_score_on_a_token_makes_the_loss_nan(level, broken, which):
    """Cut at the cap, a sampler that calls its own token impossible would otherwise pass for a large but good weight."""
    old, sampler, mask = sampled_elsewhere()
    scores = [old.clone(), sampler.clone()]
    scores[which][0, 0] = broken
    assert grpo_loss(old, old, torch.ones(8), mask, importance=sampler_correction(*scores, mask, 2.0, level))[0].isnan()


def test_correction_is_detached_wide_and_bounded_for_huge_differences():
    old = torch.full((1, 2), -1.0, dtype=torch.bfloat16, requires_grad=True)
    got = sampler_correction(old, torch.full((1, 2), -300.0, dtype=torch.bfloat16), torch.ones(1, 2), 2.0)
    assert got.tolist() == [[2.0, 2.0]] and got.dtype == torch.float32 and not got.requires_grad


@pytest.mark.parametrize("changes, words", [
    ({"cap": 0.0}, ["cap", "0.0"]), ({"cap": math.nan}, ["cap", "nan"]), ({"cap": math.inf}, ["cap", "inf"]), ({"level": "tokens"}, ["level", "tokens", "token, sequence"]),
    ({"old_logps": torch.zeros(8)}, ["old_logps", "(8,)", "(N, T)"]), ({"sampler_logps": torch.zeros(8, 1)}, ["sampler_logps", "(8, 1)", "(8, 7)", "old_logps"]),
    ({"mask": torch.ones(8, 1)}, ["mask", "(8, 1)"]), ({"mask": torch.full((8, 7), 2)}, ["mask", "0 and 1"]),
])
def test_correction_s_bad_arguments_are_named(changes, words):
    old, sampler, mask = sampled_elsewhere()
    with pytest.raises(ValueError) as e: sampler_correction(**dict(old_logps=old, sampler_logps=sampler, mask=mask, cap=2.0) | changes)
    assert all(word in str(e.value) for word in words)


# --- GDPO -------------------------------------------------------------------------------------------------------------------------

def rewards_of(B=5, G=4, seed=0):
    "Rewards of three kinds: right or wrong, one of five steps, any number; one group has an equal first part, one nothing but equal parts."
    gen = torch.Generator().manual_seed(seed)
    parts = {"accuracy": torch.randint(2, (B, G), generator=gen).double(), "graded": torch.randint(5, (B, G), generator=gen) / 4.0, "length": torch.randn(B, G, generator=gen, dtype=torch.float64)}
    parts["accuracy"][1] = 1.0
    for part in parts.values(): part[2] = 0.8
    return parts, {"accuracy": 0.8, "graded": 0.3, "length": -0.05}


def test_gdpo_by_hand():
    """One part ahead and two parts ahead: sums -1, 1 and -2, 2, over a root mean square of sqrt 2.5."""
    a, b = torch.tensor([[0.0, 1], [0, 1]]), torch.tensor([[0.0, 0], [0, 1]])
    assert gdpo_sums({"a": a, "b": b}, {"a": 1, "b": 1}).tolist() == [[-1, 1], [-2, 2]]
    assert torch.allclose(gdpo_advantages({"a": a, "b": b}, {"a": 1, "b": 1}), torch.tensor([[-1, 1], [-2, 2]]) / 2.5**0.5)
    assert torch.allclose(gdpo_advantages({"a": a, "b": b}, {"a": 1, "b": 1}, std="sample"),  # halves of root 2: sums of .7071 and 1.4142, whose squares add up to 5
                          torch.tensor([[-1, 1], [-2, 2]]) / (10 / 3) ** 0.5)
    assert torch.equal(group_advantages(a + b), torch.tensor([[-1.0, 1], [-1, 1]]))  # what the sum makes of them


def test_a_single_part_is_the_group_s_advantage_over_the_batch():
    rewards = rewards_of()[0]["length"][[0, 1, 3, 4]]
    assert torch.allclose(gdpo_advantages({"r": rewards}, {"r": 0.1}), group_advantages(rewards), atol=1e-9)  # every group has mean 0 and std 1 already


def test_gdpo_does_not_see_the_scale_of_a_reward_and_grpo_does():
    parts, weights = rewards_of()
    louder = parts | {"graded": 100 * parts["graded"] + 7}
    assert torch.allclose(gdpo_advantages(parts, weights), gdpo_advantages(louder, weights), atol=1e-9)
    total = lambda p: group_advantages(sum(weights[k] * p[k] for k in p))
    assert (total(parts) - total(louder)).abs().max() > 0.1


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 16), st.integers(1, 4), st.integers(0, 2**31), st.floats(0.01, 10))
def test_parts_that_cancel_are_exactly_silent(G, B, seed, weight):
    """A rest of rounding would be divided by its own spread and become a full advantage."""
    right = torch.randint(2, (B, G), generator=torch.Generator().manual_seed(seed)).float()
    parts, weights = {"a": right, "b": 1 - right, "c": 0.1 * right, "d": 0.1 * (1 - right)}, {"a": weight, "b": weight, "c": 0.3, "d": 0.3}
    assert not gdpo_sums(parts, weights).any() and not gdpo_advantages(parts, weights).any()


@pytest.mark.parametrize("std, eps", [("population", 0.0), ("sample", 1e-4), ("sample", 1e-6)])
def test_equal_groups_and_a_silent_batch_are_exact_zeros(std, eps):
    parts, weights = rewards_of()
    assert not gdpo_sums(parts, weights, std, eps)[2].any()
    assert gdpo_advantages(parts, weights, std, eps)[2].abs().max() < 1e-9  # the batch's mean is zero but for rounding
    silent = {name: torch.full((3, 4), 0.8) for name in parts}
    assert not gdpo_advantages(silent, weights, std, eps).any()


@pytest.mark.parametrize("std, eps", [("population", 0.0), ("sample", 1e-4)])
def test_ranks_that_know_everyone_s_sums_agree_with_one(std, eps):
    parts, weights = rewards_of()
    whole = gdpo_advantages(parts, weights, std, eps)
    sums = [gdpo_sums({k: p[rows] for k, p in parts.items()}, weights, std, eps) for rows in (slice(0, 2), slice(2, 5))]
    got = torch.cat([batch_normalize(s, torch.cat([x.flatten() for x in sums]), std, eps) for s in sums])
    assert torch.allclose(got, whole, atol=1e-12)
    alone = torch.cat([batch_normalize(s, None, std, eps) for s in sums])
    assert (alone - whole).abs().max() > 1e-2  # each on its own is another batch


def test_batch_normalize_by_hand():
    assert torch.allclose(batch_normalize(torch.tensor([[1.0, 3.0], [5.0, 7.0]])), torch.tensor([[-3.0, -1.0], [1.0, 3.0]]) / 5**0.5)
    assert batch_normalize(torch.tensor([3.0]), everyone=torch.tensor([1.0, 3.0])).tolist() == [1.0]
    assert not batch_normalize(torch.full((2, 3), 0.1)).any()


@pytest.mark.parametrize("call, words", [
    (lambda p, w: gdpo_advantages({}, {}), ["parts", "at least one"]),
    (lambda p, w: gdpo_advantages(p, {"accuracy": 1.0}), ["weights", "'accuracy'", "'graded'", "'length'"]),
    (lambda p, w: gdpo_advantages(p, w | {"lenght": 1.0}), ["weights", "'lenght'", "'length'"]),
    (lambda p, w: gdpo_advantages(p, w | {"length": math.nan}), ["weights['length']", "nan"]),
    (lambda p, w: gdpo_advantages(p | {"length": torch.zeros(5, 3)}, w), ["parts['length']", "(5, 3)", "(5, 4)"]),
    (lambda p, w: gdpo_advantages(p | {"length": torch.full((5, 4), math.nan)}, w), ["parts['length'][0, 0]", "nan"]),
    (lambda p, w: gdpo_advantages(p, w, std="popluation"), ["std", "popluation"]),
    (lambda p, w: gdpo_advantages(p, w, eps=-1.0), ["eps", "-1.0"]),
    (lambda p, w: batch_normalize(torch.tensor([[1.0]])), ["values", "G = 1"]),
    (lambda p, w: batch_normalize(torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, math.inf])), ["everyone[0, 1]", "inf"]),
])
def test_gdpo_names_bad_arguments(call, words):
    with pytest.raises(ValueError) as e: call(*rewards_of())
    assert all(word in str(e.value) for word in words)


def test_batch_normalize_wants_a_tensor():
    with pytest.raises(TypeError, match="values: got a list"): batch_normalize([1.0, 2.0])


# --- the peer: TRL 1.16's GRPOTrainer on the same tensors -------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"epsilon_high": 0.3}, {"beta": 0.04}, {"beta": 0.05, "epsilon_low": 0.1, "epsilon_high": 0.6}], ids=["plain", "high", "beta", "all"])
@pytest.mark.parametrize("corrected", [False, True], ids=["same-sampler", "corrected"])
@pytest.mark.parametrize("name", NAMES)
def test_trl_agrees_on_every_name(trl_loss, name, corrected, options, dtype):
    for seed in range(3):
        data = batch(seed=seed, dtype=dtype)
        extra = {"importance": importance_weights(data[4], seed, dtype)} if corrected else {}
        ours, theirs = named(name, *data, **options, **extra), trl_loss(*data, **trl_options(name, **options, **extra))
        assert gap(ours, theirs) < 1e-6 and theirs[1].abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_trl_disagrees_with_every_other_name(trl_loss, name):
    """The names are not interchangeable, dapo and bnpo apart, so the test above tells them from each other."""
    data = batch()
    theirs = trl_loss(*data, **trl_options(name, **{"epsilon_high": 0.3}))
    others = [other for other in NAMES if LOSS_TYPES[other] != LOSS_TYPES[name]]
    assert len(others) >= 4 and all(gap(named(other, *data, epsilon_high=0.3), theirs) > 1e-3 for other in others)


def weights_on_the_kl_too(new, old, ref, A, mask, importance, beta, **options):
    policy = value_and_grad(new, old, ref, A, mask, importance=importance, **options)
    x = new.clone().requires_grad_()
    loss = (beta * importance * ((ref - x).exp() - (ref - x) - 1) * mask).sum() / mask.sum()
    loss.backward()
    return policy[0] + loss.detach(), policy[1] + x.grad


BROKEN = {
    "weights forgotten": lambda *data, importance, **options: value_and_grad(*data, **options),
    "weights upside down": lambda *data, importance, **options: value_and_grad(*data, importance=1 / importance, **options),
    "weights on the KL too": weights_on_the_kl_too,
    "the bound without its 1": lambda *data, epsilon_high, **options: value_and_grad(*data, epsilon_high=0.0, **options),
    "through the ratio": lambda *data, clip, **options: value_and_grad(*data, **options),
    "averaged per completion": lambda *data, **options: value_and_grad(*data, average="sequence", **options),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_trl_disagrees_with_broken_variants(trl_loss, mistake):
    data = batch()
    w = importance_weights(data[4])
    theirs = trl_loss(*data, importance=w, **trl_options("cispo", epsilon_high=0.3, beta=0.3))
    options = dict(clip="cispo", epsilon_high=0.3, beta=0.3, importance=w)
    assert gap(value_and_grad(*data, **options), theirs) < 1e-9
    assert gap(BROKEN[mistake](*data, **options), theirs) > 1e-3


def test_cispo_s_bound_is_trl_s_plus_one(trl_loss):
    """At the recommended 5.0 of TRL's ScaleRL setting: ours is 4.0, and taking the number over as it is gives another loss."""
    old = torch.full((1, 2), -3.0, dtype=torch.float64)
    data = (old + torch.tensor([[5.5, 1.0]], dtype=torch.float64).log(), old, old, torch.tensor([1.0], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))
    theirs = trl_loss(*data, loss_type="cispo", epsilon_high=5.0)
    assert gap(named("cispo", *data, epsilon_high=4.0), theirs) < 1e-12 and gap(named("cispo", *data, epsilon_high=5.0), theirs) > 0.1


def test_trl_counts_the_same_cut_weights(trl_loss):
    data = batch()
    theirs = trl_loss(*data, **trl_options("cispo", epsilon_high=0.3))[2]
    ours = grpo_loss(data[0], data[1], data[3], data[4], **options_of("cispo", epsilon_high=0.3))[1]
    assert 0 < theirs["cispo_clip_ratio"] == pytest.approx(ours["cispo_clip_ratio"].item(), abs=1e-6)


def test_bnpo_parts_from_trl_s_only_where_a_batch_is_cut(trl_loss):
    """TRL's bnpo divides each micro-batch by its own tokens: the mean of the own means, where ours and dapo stay what they were."""
    data = batch(N=8)
    cut = [[x[rows] for x in data] for rows in torch.arange(8).split(2)]
    assert len({part[4].sum().item() for part in cut}) > 1
    whole, bnpo = named("bnpo", *data), [trl_loss(*part, **trl_options("bnpo"), accumulation=4) for part in cut]
    dapo = [trl_loss(*part, **trl_options("dapo"), num_items=data[4].sum().double(), accumulation=4) for part in cut]
    joined = lambda pieces: (sum(p[0] for p in pieces), torch.cat([p[1] for p in pieces]))
    assert gap(whole, joined(dapo)) < 1e-12 and gap(whole, joined(bnpo)) > 1e-3
    assert gap(named("bnpo", *data), trl_loss(*data, **trl_options("bnpo"))) < 1e-12


@pytest.fixture(scope="module")
def trl_experience():
    """TRL's own scoring of sampled completions, run on a bare object: rewards (N, K) or log-probabilities go in, advantages and importance weights come out."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="the peer comparison needs `pip install emo_r3[peer]` (trl 1.16)")
    from collections import defaultdict
    from types import SimpleNamespace

    def run(rewards, weights=None, G=4, aggregation="normalize_then_sum", old=None, sampler=None, mask=None, mode="token_truncate", cap=None):
        N = len(rewards)
        lengths = [1] * N if mask is None else mask.sum(1).tolist()
        listed = None if sampler is None else [row[:n].tolist() for row, n in zip(sampler, lengths)]
        peer = SimpleNamespace(
            accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, process_index=0), model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
            args=SimpleNamespace(per_device_train_batch_size=N, gradient_checkpointing_kwargs=None, steps_per_generation=1, gradient_accumulation_steps=1),
            _generate=lambda prompts: ([[0]] * N, [[1] * n for n in lengths], None, [""] * N, listed, {}, None, None), _calculate_rewards=lambda *args: rewards,
            _get_per_token_logps_and_entropies=lambda *args, **kwargs: (old, None, None), environment_factories=None, environments=None, tools=[], pad_to_multiple_of=None,
            _tokenizer=SimpleNamespace(pad_token_id=0), mask_truncated_completions=False, use_vllm=old is not None, num_iterations=1, beta=0.0, num_generations=G,
            vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=None, vllm_importance_sampling_clip_max=cap,
            multi_objective_aggregation=aggregation, scale_rewards="group", reward_weights=torch.ones(rewards.shape[1]) if weights is None else weights,
            reward_funcs=[None] * rewards.shape[1], reward_func_names=[str(k) for k in range(rewards.shape[1])], _metrics={"train": defaultdict(list)},
            _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)}, _pending_extra_logs={}, _pending_metrics={}, log_multimodal=False,
        )
        out = trainer.GRPOTrainer._generate_and_score_completions(peer, [{"prompt": "?"}] * N)
        return out["advantages"], out.get("importance_sampling_ratio")

    return run


@pytest.mark.parametrize("G", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trl_s_gdpo_is_ours(trl_experience, dtype, G):
    for seed in range(3):
        parts, weights = rewards_of(B=5, G=G, seed=seed)
        parts = {name: part.to(dtype) for name, part in parts.items()}
        theirs, _ = trl_experience(torch.stack([p.flatten() for p in parts.values()], 1), torch.tensor(list(weights.values()), dtype=dtype), G)
        ours = gdpo_advantages(parts, weights, std="sample", eps=1e-4)
        tolerance = 1e-6 if dtype == torch.float64 else 2e-3  # TRL's equal group is not exactly zero: in single precision its rest of rounding is 6e-8 / 1e-4
        assert (ours.flatten() - theirs).abs().max() < tolerance and theirs.abs().max() > 0.5


def test_trl_disagrees_with_a_broken_gdpo(trl_experience):
    parts, weights = rewards_of()
    theirs, _ = trl_experience(torch.stack([p.flatten() for p in parts.values()], 1), torch.tensor(list(weights.values()), dtype=torch.float64))
    away = lambda mine: (mine.flatten() - theirs).abs().max().item()
    assert away(gdpo_advantages(parts, weights, "sample", 1e-4)) < 1e-6  # TRL's n / (n - 1) is a float32, whatever the rewards are
    assert away(gdpo_advantages(parts, weights, "population", 1e-4)) > 1e-5  # a common factor, but for eps
    assert away(gdpo_advantages(parts, dict.fromkeys(weights, 1.0), "sample", 1e-4)) > 0.1
    assert away(gdpo_sums(parts, weights, "sample", 1e-4)) > 0.1
    assert away(group_advantages(sum(weights[k] * p for k, p in parts.items()), "sample", 1e-4)) > 0.1


def test_trl_s_sum_is_our_group_advantage(trl_experience):
    """The same peer under its other aggregation: what this book calls `group_advantages`."""
    parts, weights = rewards_of()
    theirs, _ = trl_experience(torch.stack([p.flatten() for p in parts.values()], 1), torch.tensor(list(weights.values()), dtype=torch.float64), aggregation="sum_then_normalize")
    assert (group_advantages(sum(weights[k] * p for k, p in parts.items()), "sample", 1e-4).flatten() - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("cap", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("level", RATIOS)
def test_trl_s_importance_weights_are_ours(trl_experience, trl_loss, level, cap):
    old, sampler, mask = (x if x.dtype == torch.bool else x.float() for x in sampled_elsewhere())
    mask[:, 0] = True
    _, theirs = trl_experience(torch.zeros(8, 1), old=old, sampler=sampler, mask=mask, mode=f"{level}_truncate", cap=cap)
    ours = sampler_correction(old, sampler, mask, cap, level)
    assert (ours - theirs.expand_as(ours))[mask].abs().max() < 1e-5 and ours.max() == cap and ours[mask].min() < 0.9 * min(cap, 1.0)
    A = batch()[3].float()
    new = batch()[0].float()
    assert gap(value_and_grad(new, old, None, A, mask, importance=ours), trl_loss(new, old, None, A, mask, loss_type="dapo", importance=theirs)) < 1e-6


def test_trl_s_importance_weights_tell_levels_and_directions_apart(trl_experience):
    old, sampler, mask = (x if x.dtype == torch.bool else x.float() for x in sampled_elsewhere())
    _, theirs = trl_experience(torch.zeros(8, 1), old=old, sampler=sampler, mask=mask, cap=2.0)
    away = lambda mine: (mine - theirs)[mask].abs().max()
    assert away(sampler_correction(old, sampler, mask, 2.0)) < 1e-5
    assert away(sampler_correction(old, sampler, mask, 2.0, "sequence")) > 0.1 and away(sampler_correction(sampler, old, mask, 2.0)) > 0.1 and away(sampler_correction(old, sampler, mask, 3.0)) > 0.1

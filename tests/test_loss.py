"""What the page 07_loss should not have to show: golden numbers, enumeration, bad input, pieces of a batch, memory."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from emo_r3.loss import clipped_loss, grpo_loss, kl_estimate, loss_normalizer, policy_ratio, token_logps, token_weights

AVERAGES = ["token", "sequence", "constant"]
RATIOS = ["token", "sequence"]
RECIPE = dict(epsilon_low=0.2, epsilon_high=0.3, delta=3.0, beta=0.05)


def batch(N=8, T=7, seed=0, dtype=torch.float64, spread=0.4):
    """Ragged completions with every kind of token in them: logps, old_logps, ref_logps, advantages, mask."""
    gen = torch.Generator().manual_seed(seed)
    old = -torch.rand(N, T, generator=gen, dtype=torch.float64) * 3 - 0.1
    new = old + spread * torch.randn(N, T, generator=gen, dtype=torch.float64)
    new[0, 0], new[1, 0] = old[0, 0] + 1.6, old[1, 0] + 1.6  # ratios near 5, one for either sign of the advantage
    ref = old + 0.3 * torch.randn(N, T, generator=gen, dtype=torch.float64)
    advantages = torch.randn(N, generator=gen, dtype=torch.float64)
    advantages[0], advantages[1] = 1.1, -1.3
    mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=gen)
    mask[0], mask[2] = True, torch.arange(T) < 2
    assert len(set(mask.sum(1).tolist())) > 2  # the batch is ragged, or the averages could not be told apart
    return tuple(x.to(dtype) for x in (new, old, ref, advantages)) + (mask,)


def value_and_grad(new, old, ref, advantages, mask, **options):
    x = new.clone().requires_grad_()
    loss, _ = grpo_loss(x, old, advantages, mask, ref_logps=ref, **options)
    loss.backward()
    return loss.detach(), x.grad


# --- by hand ------------------------------------------------------------------------------------------------------------------

# ratio, advantage -> loss and d loss / d log-probability (= ratio * d loss / d ratio) with low .2, high .3, delta 3
GOLDEN_TOKENS = [
    (1.0, 2.0, -2.0, -2.0),
    (1.2, 1.0, -1.2, -1.2),
    (1.5, 1.0, -1.3, 0.0),    # high clip
    (0.5, 1.0, -0.5, -0.5),   # wrong way: open
    (1.0, -2.0, 2.0, 2.0),
    (0.5, -1.0, 0.8, 0.0),    # low clip
    (2.0, -1.0, 2.0, 2.0),    # wrong way: open
    (5.0, -1.0, 3.0, 0.0),    # dual clip
    (5.0, 1.0, -1.3, 0.0),    # dual clip is not for positive advantages
    (2.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("r, A, loss, slope", GOLDEN_TOKENS)
def test_golden_token(r, A, loss, slope):
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    new = (old + math.log(r)).requires_grad_()
    got, _ = grpo_loss(new, old, torch.tensor([A], dtype=torch.float64), torch.ones(1, 1), epsilon_low=0.2, epsilon_high=0.3, delta=3.0)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12) and new.grad.item() == pytest.approx(slope, abs=1e-12)


def test_without_delta_the_wrong_way_is_open():
    old = torch.tensor([[-3.0]], dtype=torch.float64)
    new = (old + math.log(5)).requires_grad_()
    got, metrics = grpo_loss(new, old, torch.tensor([-1.0], dtype=torch.float64), torch.ones(1, 1))
    got.backward()
    assert got.item() == pytest.approx(5) and new.grad.item() == pytest.approx(5) and "clip_ratio/dual_mean" not in metrics


def test_golden_sequence_ratio():
    """Ratios 2 and .5 have geometric mean 1; 2 and 1 have sqrt 2, which is clipped at 1.3 where the advantage is positive."""
    old = torch.full((3, 2), -2.0, dtype=torch.float64)
    new = (old + torch.tensor([[2, 0.5], [2, 1], [2, 1]], dtype=torch.float64).log()).requires_grad_()
    A = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    loss, _ = grpo_loss(new, old, A, torch.ones(3, 2), ratio="sequence", average="sequence", epsilon_high=0.3)
    loss.backward()
    assert loss.item() == pytest.approx((-1 - 1.3 + math.sqrt(2)) / 3, abs=1e-12)
    expected = torch.tensor([[-1, -1], [0, 0], [math.sqrt(2), math.sqrt(2)]], dtype=torch.float64) / 2 / 3
    assert torch.allclose(new.grad, expected, atol=1e-12)


def test_sequence_ratio_counts_only_its_tokens():
    old = torch.zeros(1, 3, dtype=torch.float64)
    new = torch.tensor([[0.3, 0.1, 99.0]], dtype=torch.float64)
    got = policy_ratio(new, old, torch.tensor([[True, True, False]]), "sequence")
    assert got.item() == pytest.approx(math.exp(0.2))


def test_golden_averages():
    """Losses 1 and 4 a token (ratio 1, advantages -1 and -4), lengths 3 and 1."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    A, mask = torch.tensor([-1.0, -4.0], dtype=torch.float64), torch.tensor([[1, 1, 1], [1, 0, 0]])
    losses = {a: grpo_loss(x, x, A, mask, average=a, max_tokens=10)[0].item() for a in AVERAGES}
    assert losses == pytest.approx({"token": 7 / 4, "sequence": 5 / 2, "constant": 7 / 20})


def test_golden_kl_enters_with_the_weight_of_its_token():
    x, A, mask = torch.full((2, 3), -1.0, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), torch.tensor([[1, 1, 1], [1, 0, 0]])
    ref = x + math.log(2)  # k3 = 2 - log 2 - 1
    k3 = 1 - math.log(2)
    losses = {a: grpo_loss(x, x, A, mask, ref_logps=ref, beta=0.5, average=a, max_tokens=10)[0].item() for a in AVERAGES}
    assert losses == pytest.approx({"token": 0.5 * k3, "sequence": 0.5 * k3, "constant": 0.5 * k3 * 4 / 20})


def test_loss_is_zero_on_policy_and_its_gradient_is_not():
    _, old, _, _, mask = batch()
    A = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    loss, grad = value_and_grad(old, old, None, A, mask, average="sequence")
    assert loss.abs() < 1e-12
    assert torch.allclose(grad, -A[:, None] * token_weights(mask, "sequence"), atol=1e-12) and grad.abs().max() > 0.01


def test_old_logps_may_be_the_same_tensor():
    _, old, _, A, mask = batch()
    x = old.clone().requires_grad_()
    grpo_loss(x, x, A, mask)[0].backward()
    assert torch.equal(x.grad, value_and_grad(old, old, None, A, mask)[1]) and x.grad.abs().max() > 0


def test_only_the_policy_gets_a_gradient():
    tensors = [x.clone().requires_grad_() for x in batch()[:4]]
    grpo_loss(tensors[0], tensors[1], tensors[3], batch()[4], ref_logps=tensors[2], **RECIPE)[0].backward()
    assert [x.grad is not None for x in tensors] == [True, False, False, False]


# --- gradients by finite differences --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_finite_differences(ratio, average, kl):
    new, old, ref, A, mask = batch(T=5, seed=3)
    f = lambda x: grpo_loss(x, old, A, mask, ref_logps=ref, ratio=ratio, average=average, max_tokens=9, kl=kl, **RECIPE)[0]
    assert torch.autograd.gradcheck(f, new.clone().requires_grad_())


# --- dual clip ------------------------------------------------------------------------------------------------------------------

@settings(max_examples=300, deadline=None)
@given(st.floats(0.01, 20), st.floats(-3, 3), st.floats(0, 0.9), st.floats(0, 0.9), st.one_of(st.none(), st.floats(1.01, 10)))
def test_clip_against_scalar_arithmetic(r, A, low, high, delta):
    l1, l2 = -r * A, -min(max(r, 1 - low), 1 + high) * A
    expected = max(l1, l2)
    if delta is not None and A < 0:
        expected = min(expected, -delta * A)
    got = clipped_loss(torch.tensor([[r]], dtype=torch.float64), torch.tensor([[A]], dtype=torch.float64), low, high, delta)
    assert got.item() == pytest.approx(expected, abs=1e-12)


# --- KL -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("V", [2, 5, 50])
@pytest.mark.parametrize("seed", range(3))
def test_kl_against_the_exact_one_on_an_enumerated_vocabulary(V, seed):
    gen = torch.Generator().manual_seed(seed)
    z = (0.5 * torch.randn(V, generator=gen, dtype=torch.float64)).requires_grad_()
    ref = (0.5 * torch.randn(V, generator=gen, dtype=torch.float64)).log_softmax(0)
    logp = z.log_softmax(0)
    forward, backward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    estimate = {k: (logp.detach().exp() * kl_estimate(logp, ref, k)).sum() for k in ("k1", "k2", "k3")}
    grad = lambda loss: torch.autograd.grad(loss, z, retain_graph=True)[0]
    close = lambda a, b: torch.allclose(a, b, atol=1e-10, rtol=0)
    assert kl_estimate(logp, ref, "k3").max() < 10  # no clamp in play
    assert close(estimate["k1"], forward) and close(estimate["k3"], forward) and not close(estimate["k2"], forward)
    assert close(grad(estimate["k1"]), torch.zeros(V, dtype=torch.float64))
    assert close(grad(estimate["k2"]), grad(forward))
    assert close(grad(estimate["k3"]), grad(backward)) and not close(grad(estimate["k3"]), grad(forward))


def test_kl_clamps_are_k3s_alone():
    logps, ref = torch.tensor([0.0, 0.0, -30.0, 0.0]), torch.tensor([-30.0, -15.0, 0.0, 0.0])  # d = 30, 15, -30, 0
    assert kl_estimate(logps, ref, "k1").tolist() == [30, 15, -30, 0]
    assert kl_estimate(logps, ref, "k2").tolist() == [450, 112.5, 450, 0]
    assert kl_estimate(logps, ref, "k3").tolist() == [10, 10, 10, 0]
    wide = kl_estimate(logps.double(), ref.double(), "k3", value_clamp=math.inf)
    assert wide.tolist() == pytest.approx([19, 14, math.exp(20) - 21, 0], abs=1e-6)  # the log-ratio stops at 20
    free = kl_estimate(logps.double(), ref.double(), "k3", log_ratio_clamp=math.inf, value_clamp=math.inf)
    assert free.tolist() == pytest.approx([29, 14, math.exp(30) - 31, 0], abs=1e-6, rel=1e-12)


def test_k3_has_no_gradient_beyond_its_clamp():
    x = torch.tensor([-2.60, -2.62], requires_grad=True)  # e^2.6 - 3.6 = 9.86; e^2.62 - 3.62 = 10.12
    kl_estimate(x, torch.zeros(2)).sum().backward()
    assert x.grad[0] < -12 and x.grad[1] == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-40, 0, width=32), min_size=1, max_size=8), st.lists(st.floats(-40, 0, width=32), min_size=8, max_size=8))
def test_k2_and_k3_are_never_negative(logps, ref):
    logps, ref = torch.tensor(logps), torch.tensor(ref[: len(logps)])
    for kind in ("k2", "k3"):
        got = kl_estimate(logps, ref, kind)
        assert (got >= 0).all() and got.isfinite().all()


def test_kl_keeps_its_digits_near_the_reference():
    d = 1e-3
    got = kl_estimate(torch.tensor([-1.0 + d]), torch.tensor([-1.0])).item()
    real_d = (torch.tensor(-1.0 + d) - torch.tensor(-1.0)).double().item()
    assert got == pytest.approx(real_d**2 / 2 - real_d**3 / 6, rel=2e-4)


def test_kl_metric_is_there_whenever_a_reference_is_and_only_then():
    new, old, ref, A, mask = batch()
    free, with_ref = grpo_loss(new, old, A, mask)[1], grpo_loss(new, old, A, mask, ref_logps=ref)
    assert "kl" not in free and with_ref[0] == grpo_loss(new, old, A, mask)[0]
    assert with_ref[1]["kl"].item() == pytest.approx(kl_estimate(new, ref)[mask].mean().item(), rel=1e-12)


# --- pieces of a batch ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_micro_batches_sum_to_the_whole(ratio, average, size):
    new, old, ref, A, mask = batch(N=8)
    options = dict(ratio=ratio, average=average, max_tokens=9, **RECIPE)
    whole_loss, whole_grad = value_and_grad(new, old, ref, A, mask, **options)
    whole_metrics = grpo_loss(new, old, A, mask, ref_logps=ref, **options)[1]
    count = sum(loss_normalizer(m, average) for m in mask.split(size))
    x, losses, metrics = new.clone().requires_grad_(), 0.0, dict.fromkeys(whole_metrics, 0.0)
    for rows in torch.arange(8).split(size):
        loss, part = grpo_loss(x[rows], old[rows], A[rows], mask[rows], ref_logps=ref[rows], normalizer=count, **options)
        loss.backward()
        losses += loss.detach()
        metrics = {name: metrics[name] + part[name] for name in metrics}
    assert (losses - whole_loss).abs() < 1e-10 and (x.grad - whole_grad).abs().max() < 1e-10
    assert all(abs(metrics[name] - whole_metrics[name]) < 1e-10 for name in metrics)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_pieces_that_each_divide_by_their_own_count_do_not(average):
    """The test above could fail: without a common normalizer ragged pieces give another gradient."""
    new, old, ref, A, mask = batch(N=8)
    _, whole = value_and_grad(new, old, ref, A, mask, average=average, **RECIPE)
    rows = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6, 7])]
    x = new.clone().requires_grad_()
    sum(grpo_loss(x[r], old[r], A[r], mask[r], ref_logps=ref[r], average=average, **RECIPE)[0] / len(rows) for r in rows).backward()
    assert (x.grad - whole).abs().max() > 1e-3


def test_normalizer_may_be_a_number_or_a_tensor():
    new, old, _, A, mask = batch()
    losses = [grpo_loss(new, old, A, mask, normalizer=n)[0].item() for n in (40, 40.0, torch.tensor(40), torch.tensor(40.0))]
    assert len(set(losses)) == 1


def test_an_empty_piece_contributes_zero():
    new, old, ref, A, mask = batch()
    loss, grad = value_and_grad(new, old, ref, A, torch.zeros_like(mask), normalizer=10, **RECIPE)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


# --- metrics ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("average", AVERAGES)
def test_metrics_are_detached_means(average, ratio):
    new, old, ref, A, mask = batch()
    x = new.clone().requires_grad_()
    _, metrics = grpo_loss(x, old, A, mask, ref_logps=ref, average=average, max_tokens=1000, ratio=ratio, **RECIPE)
    assert set(metrics) == {"kl"} | {f"clip_ratio/{n}_mean" for n in ("low", "high", "region", "dual")}
    assert all(m.shape == () and not m.requires_grad for m in metrics.values())
    r = (new - old).exp()
    if ratio == "sequence":
        r = ((new - old) * mask).sum(1, keepdim=True).div(mask.sum(1, keepdim=True)).exp().expand_as(new)
    held = {"low": (r < 0.8) & (A < 0)[:, None], "high": (r > 1.3) & (A > 0)[:, None], "dual": (r > 3) & (A < 0)[:, None]}
    for name, h in held.items():
        per_row = (h & mask).sum(1) / mask.sum(1)
        expected = (h & mask).sum() / mask.sum() if average == "token" else per_row.mean()
        assert metrics[f"clip_ratio/{name}_mean"].item() == pytest.approx(expected.item(), abs=1e-6)
    region = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
    assert metrics["clip_ratio/region_mean"].item() == pytest.approx(region.item(), abs=1e-12)
    if ratio == "token":
        assert min(metrics[f"clip_ratio/{n}_mean"] for n in held) > 0  # the batch has a token of every kind


# --- padding and broken numbers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("garbage", [0.0, -1e9, 1e30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("average", AVERAGES)
def test_padding_is_inert_to_the_bit(average, ratio, garbage):
    new, old, ref, A, mask = batch()
    assert not mask.all()
    options = dict(average=average, ratio=ratio, max_tokens=9, **RECIPE)
    clean_loss, clean_grad = value_and_grad(new, old, ref, A, mask, **options)
    dirty = [x.masked_fill(~mask, garbage) for x in (new, old, ref)]
    loss, grad = value_and_grad(*dirty, A, mask, **options)
    assert torch.equal(loss, clean_loss) and torch.equal(grad, clean_grad)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask])) and (grad[mask] != 0).any()


def test_the_last_token_of_every_completion_counts():
    """The end-of-sequence token is the last one the mask holds; moving its log-probability moves the loss."""
    new, old, ref, A, mask = batch()
    grad = value_and_grad(old, old, ref, A, mask)[1]
    last = mask.sum(1) - 1
    assert (grad[torch.arange(8), last] != 0).all() and torch.allclose(grad[torch.arange(8), last], -A / mask.sum())


def test_one_token_completions_train():
    old = torch.full((2, 1), -1.0, dtype=torch.float64)
    _, grad = value_and_grad(old, old, None, torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(2, 1))
    assert grad.flatten().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_broken_number_on_a_token_is_not_hidden(which, broken):
    tensors = [x.clone() for x in batch()[:3]]
    tensors[which][0, 0] = broken
    loss, _ = grpo_loss(tensors[0], tensors[1], batch()[3], batch()[4], ref_logps=tensors[2], **RECIPE)
    assert loss.isnan()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("jump", [200.0, -200.0])
@pytest.mark.parametrize("A", [1.0, -1.0])
def test_huge_ratios_have_finite_loss_and_gradient(A, jump, ratio):
    """exp(200) overflows float32; unclamped, the branch that the clip discards would still make the gradient NaN."""
    old = torch.full((1, 2), -250.0)
    loss, grad = value_and_grad(old + jump, old, old, torch.tensor([A]), torch.ones(1, 2), ratio=ratio, **RECIPE)
    assert loss.isfinite() and grad.isfinite().all()


def test_half_precision_comes_out_wide():
    new, old, ref, A, mask = batch(dtype=torch.bfloat16)
    loss, metrics = grpo_loss(new, old, A, mask, ref_logps=ref, **RECIPE)
    wide, _ = grpo_loss(new.float(), old.float(), A.float(), mask, ref_logps=ref.float(), **RECIPE)
    assert loss.dtype == torch.float32 and torch.equal(loss, wide)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_mask_of_any_type(dtype):
    new, old, ref, A, mask = batch()
    assert torch.equal(grpo_loss(new, old, A, mask.to(dtype))[0], grpo_loss(new, old, A, mask)[0])


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(8)), st.sampled_from(RATIOS), st.sampled_from(AVERAGES))
def test_order_of_completions_does_not_matter(order, ratio, average):
    new, old, ref, A, mask = batch()
    options = dict(ratio=ratio, average=average, max_tokens=9, **RECIPE)
    loss, grad = value_and_grad(new, old, ref, A, mask, **options)
    loss2, grad2 = value_and_grad(new[order], old[order], ref[order], A[order], mask[order], **options)
    assert torch.allclose(loss, loss2, atol=1e-12) and torch.allclose(grad[order], grad2, atol=1e-12)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("average", AVERAGES)
def test_extra_padding_columns_change_nothing(average, ratio):
    new, old, ref, A, mask = batch()
    pad = lambda x: torch.nn.functional.pad(x, (0, 3))
    options = dict(ratio=ratio, average=average, max_tokens=9, **RECIPE)
    loss, grad = value_and_grad(new, old, ref, A, mask, **options)
    loss2, grad2 = value_and_grad(pad(new), pad(old), pad(ref), A, pad(mask), **options)
    assert torch.allclose(loss, loss2, atol=1e-14) and torch.allclose(pad(grad), grad2, atol=1e-14)


# --- bad arguments --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    ({"logps": torch.zeros(8)}, ["logps", "(8,)", "(N, T)"]),
    ({"logps": torch.zeros(8, 7, dtype=torch.int64)}, ["logps", "int64", "floating point"]),
    ({"old_logps": torch.zeros(8, 6)}, ["old_logps", "(8, 6)", "(8, 7)"]),
    ({"old_logps": torch.zeros(1, 7)}, ["old_logps", "(1, 7)"]),
    ({"ref_logps": torch.zeros(8, 1)}, ["ref_logps", "(8, 1)"]),
    ({"mask": torch.ones(8)}, ["mask", "(8,)"]),
    ({"mask": torch.full((8, 7), 0.5)}, ["mask", "0 and 1"]),
    ({"mask": torch.full((8, 7), 2)}, ["mask", "0 and 1"]),
    ({"mask": torch.zeros(8, 7)}, ["mask", "no completion token"]),
    ({"advantages": torch.zeros(8, 7)}, ["advantages", "(8, 7)", "(8,)"]),
    ({"advantages": torch.zeros(4)}, ["advantages", "(4,)"]),
    ({"beta": 0.1, "ref_logps": None}, ["ref_logps", "0.1"]),
    ({"beta": -0.1}, ["beta", "-0.1"]),
    ({"beta": math.nan}, ["beta", "nan"]),
    ({"epsilon_low": -0.1}, ["epsilon_low", "-0.1"]),
    ({"epsilon_low": 1.1}, ["epsilon_low", "1.1"]),
    ({"epsilon_high": -0.1}, ["epsilon_high", "-0.1"]),
    ({"delta": 1.0}, ["delta", "1.0", "> 1"]),
    ({"ratio": "gspo"}, ["ratio", "gspo", "token, sequence"]),
    ({"average": "mean"}, ["average", "mean", "constant"]),
    ({"average": "constant"}, ["max_tokens", "None"]),
    ({"average": "constant", "max_tokens": 0}, ["max_tokens", "0"]),
    ({"kl": "k4"}, ["kl", "k4", "k1, k2, k3"]),
    ({"normalizer": 0}, ["normalizer", "0"]),
    ({"normalizer": -3.0}, ["normalizer", "-3.0"]),
    ({"normalizer": torch.tensor(math.nan)}, ["normalizer", "nan"]),
])
def test_bad_arguments_are_named(changes, words):
    new, old, ref, A, mask = batch()
    call = dict(logps=new, old_logps=old, advantages=A, mask=mask, ref_logps=ref) | changes
    with pytest.raises(ValueError) as caught:
        grpo_loss(call.pop("logps"), call.pop("old_logps"), call.pop("advantages"), call.pop("mask"), **call)
    for word in words:
        assert word in str(caught.value)


def test_kl_estimate_and_loss_normalizer_name_bad_arguments():
    with pytest.raises(ValueError, match=r"ref_logps.*\(2,\).*\(3,\)"):
        kl_estimate(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="kind.*'low_var_kl'.*k3"):
        kl_estimate(torch.zeros(3), torch.zeros(3), "low_var_kl")
    with pytest.raises(ValueError, match="average.*'batch'"):
        loss_normalizer(torch.ones(2, 2), "batch")


# --- token_logps ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_token_logps_against_log_softmax(temperature, dtype, tol):
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 9, 11)).to(dtype).requires_grad_()
    ids = torch.randint(11, (3, 9))
    upstream = torch.randn(3, 9, dtype=torch.promote_types(dtype, torch.float32))
    got = token_logps(logits, ids, temperature)
    grad = torch.autograd.grad((got * upstream).sum(), logits)[0]
    wide = logits.detach().to(upstream.dtype).requires_grad_()
    expected = torch.log_softmax(wide / temperature, -1).gather(-1, ids[..., None])[..., 0]
    expected_grad = torch.autograd.grad((expected * upstream).sum(), wide)[0]
    assert got.dtype == upstream.dtype and grad.dtype == dtype
    assert torch.allclose(got, expected, atol=10 * tol, rtol=0)
    assert torch.allclose(grad, expected_grad.to(dtype), atol=10 * tol, rtol=2e-2 if dtype == torch.bfloat16 else 0)


def test_token_logps_sees_the_temperature():
    logits, ids = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3, dtype=torch.int64)
    assert (token_logps(logits, ids, 0.7) - token_logps(logits, ids)).abs().max() > 0.05


def test_token_logps_of_shifted_views():
    """Callers slice logits[:, P-1:-1]; a view that is not contiguous must give the same as its copy."""
    whole = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ids = torch.tensor([[0, 1, 2], [4, 3, 2]])
    view = whole[:, 2:-1]
    assert not view.is_contiguous()
    assert torch.equal(token_logps(view, ids), token_logps(view.contiguous(), ids))
    token_logps(view, ids).sum().backward()
    assert torch.equal(whole.grad[:, [0, 1, 5]], torch.zeros(2, 3, 5)) and (whole.grad[:, 2:5] != 0).all()


def test_token_logps_are_exact_for_large_logits():
    logits = torch.tensor([[[1e4, 1e4, -1e4]]], requires_grad=True)
    got = token_logps(logits, torch.tensor([[0]]))
    got.sum().backward()
    assert got.item() == pytest.approx(-math.log(2), abs=1e-3) and logits.grad.isfinite().all()


class LargestResult(TorchDispatchMode):
    """Records the most elements any single operation newly made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and "empty_like" not in str(func):
            self.elements = max(self.elements, out.numel())
        return out


def test_token_logps_make_no_second_copy_of_the_logits():
    N, T, V = 1, 5, 2**23  # 42 million logits; slices hold at most 16.8 million
    logits = torch.zeros(1, 1, V, dtype=torch.bfloat16).expand(N, T, V).requires_grad_()  # shared storage: the test itself stays small
    with torch.no_grad(), LargestResult() as mine:
        token_logps(logits, torch.zeros(N, T, dtype=torch.int64))
    assert 0 < mine.elements <= 2**24
    with torch.no_grad(), LargestResult() as naive:
        logits[:, :3].float().log_softmax(-1)
    assert naive.elements > 2**24  # the measure does see a large tensor


def test_token_logps_slices_join_seamlessly():
    """More than one slice, the last one short: values and gradients as if in one."""
    N, T, V = 1, 3, 2**23
    base = torch.randn(N, T, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    logits = torch.full((N, T, V), -1e4)
    logits[..., :8] = base
    ids = torch.tensor([[0, 3, 6]])
    logits.requires_grad_()
    got = token_logps(logits, ids)
    got.sum().backward()
    small = base.clone().requires_grad_()
    expected = token_logps(small, ids)
    expected.sum().backward()
    assert torch.allclose(got, expected, atol=1e-5) and torch.allclose(logits.grad[..., :8], small.grad, atol=1e-5)
    assert logits.grad[..., 8:].abs().max() == 0


@pytest.mark.parametrize("logits, ids, temperature, words", [
    (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), 1.0, ["(2, 3)", "(N, T, V)"]),
    (torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64), 1.0, ["(2, 4)", "(N, T)"]),
    (torch.zeros(2, 3, 5), torch.full((2, 3), -100), 1.0, ["-100", "0 to 4"]),
    (torch.zeros(2, 3, 5), torch.full((2, 3), 5), 1.0, ["5", "0 to 4"]),
    (torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), 0.0, ["temperature", "0.0"]),
    (torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), -1.0, ["temperature", "-1.0"]),
    (torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), math.nan, ["temperature", "nan"]),
    (torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), math.inf, ["temperature", "inf"]),
])
def test_token_logps_name_bad_arguments(logits, ids, temperature, words):
    with pytest.raises(ValueError) as caught:
        token_logps(logits, ids, temperature)
    for word in words:
        assert word in str(caught.value)


# --- the peer: TRL 1.16's GRPOTrainer on the same tensors ---------------------------------------------------------------------------------

LOSS_TYPE = {"token": ["bnpo", "dapo"], "sequence": ["grpo"], "constant": ["dr_grpo"]}
TRL_CASES = [(loss_type, average) for average, types in LOSS_TYPE.items() for loss_type in types]


@pytest.fixture(scope="module")
def trl_loss():
    """TRL's own `_compute_loss`, run on a bare object that has just the attributes it reads; any other attribute would raise."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="the peer comparison needs `pip install emo_r3[peer]` (trl 1.16)")
    from collections import defaultdict
    from types import SimpleNamespace

    def run(new, old, ref, advantages, mask, *, loss_type, ratio="token", beta=0.0, epsilon_low=0.2, epsilon_high=0.2, delta=None,
            max_tokens=None, num_items=None, accumulation=1, importance=None):
        x = new.clone().requires_grad_()
        accelerator = SimpleNamespace(num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t, sync_gradients=True)
        peer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *args, **kwargs: (x, torch.zeros_like(new), None),
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
            use_vllm=importance is not None, vllm_importance_sampling_correction=True,
            importance_sampling_level=ratio, loss_type=loss_type, beta=beta, epsilon_low=epsilon_low, epsilon_high=epsilon_high,
            max_completion_length=max_tokens, current_gradient_accumulation_steps=accumulation, accelerator=accelerator,
            args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=accumulation),
            model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        )
        ids, weights = torch.zeros_like(mask, dtype=torch.int64), mask.to(new.dtype)
        inputs = dict(prompt_ids=ids[:, :1], prompt_mask=ids[:, :1] + 1, completion_ids=ids, completion_mask=weights, advantages=advantages,
                      old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=weights.sum() if num_items is None else num_items, importance_sampling_ratio=importance)
        loss = trainer.GRPOTrainer._compute_loss(peer, None, inputs)
        loss.backward()
        return loss.detach(), x.grad, {name: values[-1] for name, values in peer._metrics["train"].items()}

    return run


def gap(ours, theirs):
    """The largest difference of two (loss, gradient) pairs."""
    return max((ours[0] - theirs[0]).abs().item(), (ours[1] - theirs[1]).abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [
    {}, {"epsilon_low": 0.2, "epsilon_high": 0.3}, {"beta": 0.04}, {"delta": 3.0, "epsilon_high": 0.28}, {"delta": 1.3, "epsilon_high": 0.3}, RECIPE,
], ids=["plain", "two-sided", "beta", "delta", "delta-at-the-bound", "all"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("loss_type, average", TRL_CASES)
def test_trl_agrees(trl_loss, loss_type, average, ratio, options, dtype):
    for seed in range(3):
        new, old, ref, A, mask = batch(seed=seed, dtype=dtype)
        assert kl_estimate(new, ref)[mask].max() < 10  # inside the clamps, where the two losses are meant to be one
        ours = value_and_grad(new, old, ref, A, mask, ratio=ratio, average=average, max_tokens=9, **options)
        theirs = trl_loss(new, old, ref, A, mask, loss_type=loss_type, ratio=ratio, max_tokens=9, **options)
        assert gap(ours, theirs) < 1e-6
        assert theirs[1].abs().max() > 1e-3  # there was a gradient to agree on


def broken_unmasked_sequence(new, old, *rest, **options):
    "The sequence ratio averaged over the padded length."
    ref, A, mask = rest
    x = new.clone().requires_grad_()
    s = ((x - old) * mask).mean(1, keepdim=True).exp()
    loss = (clipped_loss(s, A[:, None], 0.2, 0.3, 3.0).expand_as(x) * token_weights(mask)).sum() + 0.05 * (kl_estimate(x, ref) * token_weights(mask)).sum()
    loss.backward()
    return loss.detach(), x.grad


BROKEN = {
    "ratio not taken": lambda n, o, *rest, **k: value_and_grad(n, n, *rest, **k),
    "ratio upside down": lambda n, o, r, A, m, **k: value_and_grad(2 * o - n, o, r, A, m, **k),
    "advantage's sign": lambda n, o, r, A, m, **k: value_and_grad(n, o, r, -A, m, **k),
    "last token lost": lambda n, o, r, A, m, **k: value_and_grad(n, o, r, A, m & m.roll(-1, 1), normalizer=m.sum(), **k),
    "padding trained on": lambda n, o, r, A, m, **k: value_and_grad(n, o, r, A, torch.ones_like(m), **k),
    "no dual clip": lambda *x, **k: value_and_grad(*x, **(k | {"delta": None})),
    "one clip range": lambda *x, **k: value_and_grad(*x, **(k | {"epsilon_high": 0.2})),
    "no KL": lambda *x, **k: value_and_grad(*x, **(k | {"beta": 0.0})),
    "k1 for k3": lambda *x, **k: value_and_grad(*x, **(k | {"kl": "k1"})),
    "k2 for k3": lambda *x, **k: value_and_grad(*x, **(k | {"kl": "k2"})),
    "KL upside down": lambda n, o, r, A, m, **k: value_and_grad(n, o, 2 * n - r, A, m, **k),
    "per sequence for per token": lambda *x, **k: value_and_grad(*x, **(k | {"average": "sequence"})),
    "constant for per token": lambda *x, **k: value_and_grad(*x, **(k | {"average": "constant", "max_tokens": 9})),
    "sequence ratio for token ratio": lambda *x, **k: value_and_grad(*x, **(k | {"ratio": "sequence"})),
    "ratio over the padded length": broken_unmasked_sequence,
}


@pytest.mark.parametrize("name", BROKEN)
def test_trl_disagrees_with_a_broken_loss(trl_loss, name):
    """Each mistake moves value or gradient by over 1000 times the bound of `test_trl_agrees`, so that test would notice it."""
    data = batch()
    ratio = "sequence" if name == "ratio over the padded length" else "token"
    theirs = trl_loss(*data, loss_type="bnpo", ratio=ratio, **RECIPE)
    assert gap(value_and_grad(*data, ratio=ratio, **RECIPE), theirs) < 1e-9
    assert gap(BROKEN[name](*data, **RECIPE), theirs) > 1e-3


@pytest.mark.parametrize("A", [1.0, -1.0])
def test_trl_parts_from_dual_clip_only_below_the_trusted_range(trl_loss, A):
    """delta = 1.1 under a trusted range up to 1.3, at a ratio of 1.2: the page says where the two part, and this is there."""
    old = torch.full((1, 1), -1.0, dtype=torch.float64)
    data = (old + math.log(1.2), old, old, torch.tensor([A], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool))
    parted = dict(epsilon_high=0.3, delta=1.1)
    assert gap(value_and_grad(*data, **parted), trl_loss(*data, loss_type="bnpo", **parted)) > 0.05
    assert gap(value_and_grad(*data, epsilon_high=0.3, delta=1.3), trl_loss(*data, loss_type="bnpo", epsilon_high=0.3, delta=1.3)) < 1e-12


def test_trl_micro_batches_are_ours(trl_loss):
    """dapo's accumulation: each micro-batch is divided by the token count of all of them."""
    new, old, ref, A, mask = batch()
    for rows in torch.arange(8).split(2):
        part = (new[rows], old[rows], ref[rows], A[rows], mask[rows])
        theirs = trl_loss(*part, loss_type="dapo", num_items=mask.sum().double(), accumulation=4, **RECIPE)
        assert gap(value_and_grad(*part, normalizer=mask.sum(), **RECIPE), theirs) < 1e-12


@pytest.mark.parametrize("ratio, loss_type, average", [("token", "bnpo", "token"), ("sequence", "grpo", "sequence")])
def test_trl_metrics_are_ours(trl_loss, ratio, loss_type, average):
    new, old, ref, A, mask = batch()
    metrics = grpo_loss(new, old, A, mask, ref_logps=ref, ratio=ratio, average=average, **RECIPE)[1]
    theirs = trl_loss(new, old, ref, A, mask, loss_type=loss_type, ratio=ratio, **RECIPE)[2]
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean") + (("kl",) if average == "token" else ()):
        assert metrics[name].item() == pytest.approx(theirs[name], abs=1e-6)

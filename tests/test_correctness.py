"""Known bugs of public GRPO code for vision-language models, each shown to be absent: one test a row of a list of twenty. Every check is also run on a variant broken on purpose, kept here as a small function, and must notice it.

Left for several processes or another engine: row 10 (ranks with different token counts), row 17 (ranks that sample the same completions), and of row 11 what is vLLM's (here: a sampler in the same process that holds older weights).
"""
import copy
import hashlib
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from policies import Groups, answers, double_throughout, far, gradient, groups, logps_by_hand, plain_logps, policy, processor

import emo_r3.groups
import emo_r3.sampling
import emo_r3.train
from emo_r3.advantages import group_advantages
from emo_r3.data import EMOSET8
from emo_r3.groups import PictureFeatures, checkpointed, group_logps
from emo_r3.loss import grpo_loss, kl_estimate, loss_normalizer
from emo_r3.parsing import parse_set
from emo_r3.policy import add_lora, as_reference, banned_tokens, completion_logps, encode_prompts, load_policy, load_processor, reference
from emo_r3.prompts import consistency_messages, set_messages
from emo_r3.rewards import RewardWeights, consistency_reward, coherence_reward, parse_coherence, parse_consistency, reward_completion
from emo_r3.sampling import PolicyJudge, PolicySampler, next_token_logps
from emo_r3.scenes import make_scenes
from emo_r3.config import make_config
from emo_r3.train import Trainer, collect, train_step, update

BOUND = 1e-5  # nats; a clean re-score is off by about 1e-6, each mistake by 1e-2 and more
FORMS = {"packed": lambda model, g, temperature=1.0: group_logps(model, *g.shared, temperature), "plain": plain_logps}


@pytest.fixture(scope="module")
def full(): return policy()


@pytest.fixture(scope="module")
def g(): return groups()


@pytest.fixture(scope="module")
def asked(): return [set_messages(x.question, x.image.resize(s)) for x, s in zip(make_scenes("in_domain", "train", 4), [(96, 96), (160, 96), (72, 144), (96, 96)])]


@pytest.fixture(scope="module")
def rollouts(full, asked): return PolicySampler(full, processor()).sample(asked, 4, 64, temperature=0.7, seed=1)


def fails(check, *args):
    "Whether a check notices what it is given."
    with pytest.raises(AssertionError): check(*args)
    return True


@contextmanager
def replaced(owner, name, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try: yield
    finally: setattr(owner, name, original)


def rescored(model, r, temperature, form="packed"):
    index = torch.arange(len(r.texts))
    with torch.no_grad(): return group_logps(model, *r.packed(index), temperature) if form == "packed" else completion_logps(model, *r.rows(index), temperature) * r.completion_mask


# --- 1: completions re-encoded from their text ----------------------------------------------------------------------------------------------

def reencoded(r):
    "What a trainer has that keeps texts: other ids, where several spell the same text."
    ids, mask = answers(*(t + "<|im_end|>" for t in r.texts))
    return replace(r, completion_ids=ids, completion_mask=mask)


def test_row_01_trained_ids_are_the_sampled_ids(full, asked):
    hot = PolicySampler(full, processor()).sample(asked, 4, 32, temperature=3.0, seed=0)
    assert [processor().tokenizer.decode(i[m.bool()], skip_special_tokens=True) for i, m in zip(hot.completion_ids, hot.completion_mask)] == list(hot.texts)
    def check(r):
        index = torch.arange(16)
        for _, _, ids, mask in (r.packed(index), (None, *r.rows(index))):
            assert torch.equal(mask.sum(1), hot.lengths) and torch.equal(ids * mask, (hot.completion_ids * hot.completion_mask)[:, :ids.shape[1]])
        for form in FORMS: assert (rescored(full, r, 3.0, form).sum(1) - hot.logps.sum(1)).abs().max() < 1e-3
    check(hot)
    assert fails(check, reencoded(hot))


# --- 2: the end token lost, padding trained on ----------------------------------------------------------------------------------------------

def without_padding_ids(r, pad): return replace(r, completion_mask=(r.completion_ids != pad).long())


def with_padding(r, pad): return replace(r, completion_mask=torch.ones_like(r.completion_mask))


@pytest.mark.parametrize("form", FORMS)
def test_row_02_the_end_is_scored_and_what_follows_is_inert(full, asked, form):
    own = load_processor()
    own.tokenizer.pad_token = own.tokenizer.eos_token  # the trap: both have one id
    end = own.tokenizer.eos_token_id
    r = PolicySampler(full, own).sample(asked[:3], 3, 48, temperature=1.0, seed=1)
    assert own.tokenizer.pad_token_id == end == r.prompts.pad_token_id and r.ended.sum() > 4 and len(set(r.lengths.tolist())) > 1
    A = torch.linspace(-1, 1, 9)
    def teach(r, ids):
        g = Groups(r.prompts, torch.arange(9) // 3, ids, r.completion_mask)
        logps = FORMS[form](full, g)
        logps.retain_grad()
        full.zero_grad()
        grpo_loss(logps, logps.detach(), A, r.completion_mask)[0].backward()
        return logps.grad, torch.cat([p.grad.flatten() for p in full.parameters()])
    def check(r):
        first_end = (r.completion_ids == end).long().argmax(1)[r.ended]
        pushed, before = teach(r, r.completion_ids)
        at_end = pushed[r.ended].gather(1, first_end[:, None])[:, 0]
        assert (at_end[A[r.ended] != 0] != 0).all()
        behind = torch.arange(r.completion_ids.shape[1]) > torch.where(r.ended, (r.completion_ids == end).long().argmax(1), 10**6)[:, None]
        assert behind.any() and torch.equal(teach(r, r.completion_ids.masked_fill(behind, 300))[1], before)
    check(r)
    assert fails(check, without_padding_ids(r, end)) and fails(check, with_padding(r, end))


# --- 3: the temperature ignored -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMS)
def test_row_03_the_scorer_has_the_sampler_s_temperature(full, rollouts, form):
    assert len(set(rollouts.lengths.tolist())) > 2 and len({p.grid for p in rollouts.prompts.pictures}) == 3
    def check(temperature): assert (rescored(full, rollouts, temperature, form) - rollouts.logps).abs().max() < BOUND
    check(0.7)
    assert fails(check, 1.0)


def trained_on_a_nucleus(model, prompts, shared):
    "Completions of a sampler that cuts to the nucleus of one half, for the log-probabilities that a trainer would use."
    ids, _ = PolicySampler(model, processor(), shared_prefix=shared).draw(prompts, 8, 1, 4.0, 3, top_p=0.5)
    return ids[:, 0]


def test_row_03_nothing_is_trained_that_was_cut_by_top_p(full, asked):
    "Sampling for training knows no top-p, and its configuration neither: the cut distribution is not the loss's, so tokens come twice as often as the loss believes."
    with pytest.raises(TypeError, match="top_p"): PolicySampler(full, processor()).sample(asked, 2, 4, 1.0, seed=1, top_p=0.9)
    with pytest.raises(ValueError, match="top_p"): make_config({"top_p": 0.9})
    prompts = encode_prompts(processor(), asked)
    p = (next_token_logps(full, prompts) / 4.0).softmax(-1).repeat_interleave(8, 0)  # (32, V)
    def check(ids):  # uniform on 0 to 1 if each token was drawn from p: half of them in the likelier half
        rank = torch.stack([q[q > q[i]].sum() for q, i in zip(p, ids)])  # the probability of all that is likelier
        assert 0.2 < (rank < 0.5).float().mean() < 0.8
    for shared in (True, False):
        check(PolicySampler(full, processor(), shared_prefix=shared).draw(prompts, 8, 1, 4.0, 3)[0][:, 0])
        assert fails(check, trained_on_a_nucleus(full, prompts, shared))


# --- 4: the first token dropped -------------------------------------------------------------------------------------------------------------

def first_dropped(model, g): return torch.cat([torch.zeros(len(g.ids), 1, requires_grad=True), FORMS["plain"](model, g)[:, 1:]], 1)


def test_row_04_the_first_token_counts(full, g):
    "Completions of one token, and the first of longer ones: its term is what the prompt alone predicts, and it moves the loss."
    with torch.no_grad(): predicted = next_token_logps(full, g.prompts)[g.prompt_of].gather(1, g.ids[:, :1])[:, 0]
    one = Groups(g.prompts, g.prompt_of, g.ids[:, :1], torch.ones(9, 1, dtype=torch.long))
    def check(score):
        assert (score(full, g)[:, 0] - predicted).abs().max() < 1e-4
        for case in (g, one):
            logps = score(full, case)
            old = logps.detach()
            loss = lambda x: grpo_loss(x, old, torch.ones(9), case.mask)[0]
            assert (torch.autograd.grad(loss(logps), logps, retain_graph=True)[0][:, 0] != 0).all() and loss(old + 0.1 * (torch.arange(old.shape[1]) == 0)) != loss(old)
            full.zero_grad()
            logps[:, 0].sum().backward()
            assert full.lm_head.weight.grad.norm() > 1e-3
    for form in FORMS.values(): check(form)
    assert fails(check, first_dropped)


# --- 5: pictures paired with the wrong prompt -----------------------------------------------------------------------------------------------

def swapped(prompts): return replace(prompts, picture_of=tuple({0: 1, 1: 0}.get(p, p) for p in prompts.picture_of))


def test_row_05_every_group_keeps_its_picture():
    "Permuting groups permutes log-probabilities, and each group's own gradient: in any order, and alone, it is the same."
    model, scenes = policy(dtype="float64"), make_scenes("in_domain", "train", 3)
    prompts = encode_prompts(processor(), [set_messages(x.question, x.image.resize(s)) for x, s in zip(scenes, [(96, 96), (96, 96), (160, 96)])])
    assert prompts.pictures[0].grid == prompts.pictures[1].grid  # the two could be exchanged and nothing would complain
    ids, mask = answers("A ghost.", "fear", "A key.", "awe", "Positive.", "Yes")
    def per_group(prompts, order):
        "For each group, in the order in which they were first: its log-probabilities and what it alone teaches, computed among the others."
        rows = torch.cat([torch.arange(2 * k, 2 * k + 2) for k in order])
        g = Groups(prompts.take(order), torch.arange(len(order)).repeat_interleave(2), ids[rows], mask[rows])
        out = {}
        for form in FORMS.values():
            logps = form(model, g)
            for i, k in enumerate(order):
                model.zero_grad()
                logps[2 * i: 2 * i + 2].sum().backward(retain_graph=True)
                out.setdefault(k, []).append((logps[2 * i: 2 * i + 2].detach(), torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])))
        return out
    with double_throughout():
        alone = {k: per_group(prompts, [k])[k] for k in range(3)}
        def check(prompts, order):
            among = per_group(prompts, order)
            for k in order:
                for (a, x), (b, y) in zip(among[k], alone[k]): assert (a - b).abs().max() < 1e-10 and far(x, y) < 1e-9
        check(prompts, [2, 0, 1])
        assert fails(check, swapped(prompts), [0, 1])


# --- 6, 7: positions ------------------------------------------------------------------------------------------------------------------------

def rows_without_types(g): return {k: torch.zeros_like(v) if k == "mm_token_type_ids" else v for k, v in g.repeated[0].items()}


def rows_with_types_missing(g): return {k: v for k, v in g.repeated[0].items() if k != "mm_token_type_ids"}


def test_row_06_picture_types_reach_the_positions(full, g):
    "Against positions counted by hand: transformers falls back to plain 1-D positions in silence."
    inputs = g.prompts.padded()
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 3 and len({tuple(t) for t in inputs["image_grid_thw"].tolist()}) == 3  # ragged, mixed sizes
    with torch.no_grad(): by_hand = logps_by_hand(full, g)
    def check(rows):
        with torch.no_grad(): assert (completion_logps(full, rows, g.ids, g.mask) * g.mask - by_hand).abs().max() < BOUND
    check(g.repeated[0])
    assert fails(check, rows_without_types(g))
    with pytest.raises(KeyError, match="mm_token_type_ids"): completion_logps(full, rows_with_types_missing(g), g.ids, g.mask)  # missing is not silent here
    short = g.repeated[0] | {"mm_token_type_ids": g.repeated[0]["mm_token_type_ids"][:, 1:]}
    with pytest.raises((RuntimeError, IndexError)): completion_logps(full, short, g.ids, g.mask)


def not_restarted(batch): return replace(batch, position_ids=torch.cat([batch.position_ids[:, : int(batch.completion_slots[0, 0])], (batch.next_position[0] + torch.arange(int((batch.completion_slots >= 0).sum()))).expand(3, -1)], 1))


def in_one_dimension(batch): return replace(batch, position_ids=torch.cat([torch.arange(int(n)) for n in (batch.prompt_slots >= 0).sum(1)] + [batch.position_ids[0, int(batch.completion_slots[0, 0]):]]).expand(3, -1))


def test_row_07_positions_in_a_packed_row_go_on_from_the_prompt(full, g):
    with torch.no_grad(): by_hand = logps_by_hand(full, g)
    original = emo_r3.groups.pack_groups
    def check(change):
        with replaced(emo_r3.groups, "pack_groups", lambda *args: change(original(*args))), torch.no_grad(): assert (group_logps(full, *g.shared) - by_hand).abs().max() < BOUND
    check(lambda batch: batch)
    assert fails(check, not_restarted) and fails(check, in_one_dimension)


# --- 8: a sampled image token ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shared_prefix", [True, False])
def test_row_08_image_tokens_are_never_sampled(full, asked, shared_prefix):
    tokens = torch.tensor(banned_tokens(full))
    assert {full.config.image_token_id, full.config.video_token_id, full.config.vision_start_token_id, full.config.vision_end_token_id} == set(tokens.tolist())
    hook = full.lm_head.register_forward_hook(lambda m, i, out: out.index_fill(-1, tokens, 50.0))  # a policy that wants them
    def check(names):
        with replaced(emo_r3.sampling, "banned_tokens", names):
            r = PolicySampler(full, processor(), shared_prefix=shared_prefix).sample(asked[:2], 2, 3, seed=0)
        assert not torch.isin(r.completion_ids, tokens).any()
    try:
        check(banned_tokens)
        assert fails(check, lambda model: [7])
    finally: hook.remove()


# --- 9: a normaliser that depends on the cut ------------------------------------------------------------------------------------------------

SMALL = make_config(dict(policy="embedded", train_size=4, prompts_per_step=4, prompts_per_update=4, num_generations=4, max_completion_tokens=40, learning_rate=1e-3, precision="fp32", min_pixels=None, max_pixels=None, trackers=()))


@pytest.fixture(scope="module")
def scenes(): return make_scenes("in_domain", "train", 4, seed=3)


def normalised_by_piece(*args, **k): return grpo_loss(*args, **k | {"normalizer": None})


def dead_groups_forgotten(mask, average): return loss_normalizer(mask[:-3], average)


@pytest.fixture(scope="module")
def nine(scenes):
    "A trainer in double precision, nine ragged completions of three pictures, and the log-probabilities of an older policy; the last group is dead."
    trainer = Trainer(replace(SMALL, method="set", num_generations=3, beta=0.0, max_grad_norm=1e9), policy(dtype="float64"), processor())
    with double_throughout(): made = collect(trainer, scenes[:3], 5, {})
    T, gen = made.rollouts.completion_mask.shape[1], torch.Generator().manual_seed(1)
    mask = (torch.arange(T) < torch.tensor([40, 3, 17, 1, 28, 9, 5, 40, 2])[:, None]).long() * made.rollouts.completion_mask
    made = replace(made, rollouts=replace(made.rollouts, completion_mask=mask), advantages=torch.randn(3, 3, generator=gen) * (torch.arange(3) < 2)[:, None])
    trainer.optimizer.step = lambda: None
    return trainer, made, made.rollouts.logps.double() - 0.1 * torch.rand(mask.shape, generator=gen)


@pytest.mark.parametrize("average, cuts", [("token", None), pytest.param("sequence", slice(1, 4), marks=pytest.mark.slow), pytest.param("constant", slice(4, 6), marks=pytest.mark.slow)])
def test_row_09_no_cut_changes_the_gradient(nine, average, cuts):
    "Micro-batches of one, of some and of all completions, packed and plain, against one loss over everything."
    trainer, made, old = nine
    config = replace(trainer.config, average=average)
    longest = int(made.rollouts.prompts.lengths.max())
    cuts = [(1, True), (longest + 25, True), (longest + 50, True), (10**6, True), (1, False), (2 * longest + 45, False), (10**6, False)][cuts or slice(None)]
    sizes = {c: [len(p) for p in emo_r3.train.pieces(made.rollouts, torch.arange(3), replace(config, tokens_per_forward=c[0], shared_prefix=c[1]))] for c in cuts}
    assert all(sum(s) == 9 for s in sizes.values()) and all(s == [1] * 9 for c, s in sizes.items() if c[0] == 1) and len(set(map(tuple, sizes.values()))) > 1  # the dead group is skipped where there is no KL penalty
    def taught(tokens, shared):
        trainer.config = replace(config, tokens_per_forward=tokens, shared_prefix=shared)
        update(trainer, made, torch.arange(3), old, None)
        return torch.cat([p.grad.flatten() for p in trainer.policy.parameters()])
    with double_throughout():
        trainer.policy.zero_grad()
        _, ids, mask = made.rollouts.rows(torch.arange(9))
        logps = completion_logps(trainer.policy, *made.rollouts.rows(torch.arange(9)))
        grpo_loss(logps, old[:, :ids.shape[1]], made.advantages.flatten(), mask, epsilon_low=0.2, epsilon_high=0.3, delta=3.0, average=average, max_tokens=40)[0].backward()
        whole = torch.cat([p.grad.flatten() for p in trainer.policy.parameters()])
        def check():
            for c in cuts: assert far(taught(*c), whole) < 1e-10, c
        check()
        with replaced(emo_r3.train, "grpo_loss", normalised_by_piece): assert fails(check)
        with replaced(emo_r3.train, "loss_normalizer", dead_groups_forgotten): assert fails(check)


# --- 11: stale weights (in one process) -----------------------------------------------------------------------------------------------------

def older_copy(model):
    stale = copy.deepcopy(model)
    with torch.no_grad():
        for p in stale.parameters(): p.mul_(1.01)
    return stale


def test_row_11_a_sampler_with_other_weights_is_noticed(scenes):
    "Every step reports what the sampler said about its tokens against what the policy says of them."
    def check(sampled_from):
        trainer = Trainer(replace(SMALL, method="set"), model := policy(), processor(), sampler=PolicySampler(sampled_from(model), processor()))
        assert train_step(trainer, scenes, seed=3)[1]["sampling/sampling_logp_difference/max"] < BOUND
    check(lambda model: model)
    assert fails(check, older_copy)


# --- 12: the standard deviation -------------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 0], [0.3, 0.3, 0.3, 0.3], [0.1, 0.1, 0.1, 0.1 + 1e-9]])
GOLDEN = {"paper": [[1, -1, -1, 1], [1 / math.sqrt(3)] * 3 + [-math.sqrt(3)], [0] * 4, [0] * 4],
          "released": [[math.sqrt(3) / 2 * s / (1 + 1e-6 * math.sqrt(3)) for s in (1, -1, -1, 1)], [0.25 / 0.500001] * 3 + [-0.75 / 0.500001], [0] * 4, [0] * 4]}


def always_sample(rewards, std, eps): return group_advantages(rewards, "sample", eps)


def always_population(rewards, std, eps): return group_advantages(rewards, "population", eps)


def no_care_for_zero(rewards, std, eps): return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=int(std == "sample"), keepdim=True) + eps)


def large_epsilon(rewards, std, eps): return group_advantages(rewards, std, 1e-4)


def test_row_12_advantages_have_their_golden_values():
    def check(advantages, preset):
        w = RewardWeights.preset(preset)
        out = advantages(REWARDS, w.std, w.eps)
        torch.testing.assert_close(out.double(), torch.tensor(GOLDEN[preset], dtype=torch.float64), atol=2e-6, rtol=0)
        assert (out[2:] == 0).all()
    for preset in GOLDEN: check(group_advantages, preset)
    assert fails(check, always_sample, "paper") and fails(check, always_population, "released") and fails(check, no_care_for_zero, "paper")
    assert all(fails(check, large_epsilon, preset) for preset in GOLDEN)


# --- 13: the KL estimator -------------------------------------------------------------------------------------------------------------------

def reversed_k3(logps, ref, kind): return kl_estimate(ref, logps, kind) if kind == "k3" else kl_estimate(logps, ref, kind)


def signless_k1(logps, ref, kind): return kl_estimate(logps, ref, kind).abs() if kind == "k1" else kl_estimate(logps, ref, kind)


def doubled_k2(logps, ref, kind): return kl_estimate(logps, ref, kind) * (2 if kind == "k2" else 1)


def test_row_13_kl_against_the_exact_one_on_an_enumerated_vocabulary():
    "Expectations over all six tokens: k1 and k3 have the exact value; k2 has the exact gradient, k3 that of the divergence the other way, k1 none."
    gen = torch.Generator().manual_seed(0)
    z = torch.randn(6, generator=gen, dtype=torch.float64).requires_grad_()
    ref = torch.randn(6, generator=gen, dtype=torch.float64).log_softmax(0)
    def check(estimate):
        logp = z.log_softmax(0)
        slope = lambda x: torch.autograd.grad(x, z, retain_graph=True)[0]
        to_ref, from_ref = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
        mean = {k: (logp.detach().exp() * estimate(logp, ref, k)).sum() for k in ("k1", "k2", "k3")}
        assert (mean["k1"] - to_ref).abs() < 1e-12 and (mean["k3"] - to_ref).abs() < 1e-12
        for kind, exact in (("k1", torch.zeros(6)), ("k2", slope(to_ref)), ("k3", slope(from_ref))): assert (slope(mean[kind]) - exact).abs().max() < 1e-12
    check(kl_estimate)
    assert fails(check, reversed_k3) and fails(check, signless_k1) and fails(check, doubled_k2)


# --- 14: ratios and clips -------------------------------------------------------------------------------------------------------------------

OLD = torch.full((4, 2), -2.0, dtype=torch.float64)
RATIOS = torch.tensor([[1.5, 1.0], [0.5, 2.0], [5.0, 1.0], [2.0, 0.5]], dtype=torch.float64)
A = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
SLOPES = {"token": [[0, -1], [0, 2], [0, 1], [0, -0.5]],  # clipped at 1.3; below 0.8 with a negative advantage; dual clip at 3; clipped at 1.3, open below
          "sequence": [[-math.sqrt(1.5)] * 2, [1, 1], [math.sqrt(5)] * 2, [-1, -1]]}  # geometric means 1.22, 1, 2.24, 1


def no_dual_clip(*args, **k): return grpo_loss(*args, **k | {"delta": None})


def one_clip_range(*args, **k): return grpo_loss(*args, **k | {"epsilon_high": 0.2})


def always_token(*args, **k): return grpo_loss(*args, **k | {"ratio": "token"})


def wide_clip(*args, **k): return grpo_loss(*args, **k | {"epsilon_low": 0.6})


def test_row_14_token_and_sequence_ratios_have_their_golden_gradients():
    def check(loss, ratio):
        new = (OLD + RATIOS.log()).requires_grad_()
        loss(new, OLD, A, torch.ones(4, 2), epsilon_low=0.2, epsilon_high=0.3, delta=3.0, ratio=ratio, average="token")[0].backward()
        assert (new.grad * 8 - torch.tensor(SLOPES[ratio], dtype=torch.float64)).abs().max() < 1e-12  # eight tokens
    for ratio in SLOPES: check(grpo_loss, ratio)
    assert fails(check, no_dual_clip, "token") and fails(check, one_clip_range, "sequence") and fails(check, always_token, "sequence") and fails(check, wide_clip, "token")


# --- 15: dropout ----------------------------------------------------------------------------------------------------------------------------

def in_training_mode(model): return model.train()


@pytest.mark.parametrize("form", FORMS)
def test_row_15_two_passes_are_identical_with_dropout_in_the_adapter(g, form):
    model = add_lora(load_policy(), rank=4, alpha=8.0, dropout=0.5)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n: p.add_(0.05)
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 for m in model.modules())
    def check(model):
        a = FORMS[form](model, g)
        assert torch.equal(a, FORMS[form](model, g))
        with checkpointed(model): once, again = (gradient(model, FORMS[form](model, g), g.mask) for _ in range(2))
        assert torch.equal(once, again)
    check(model)
    assert fails(check, in_training_mode(model))


# --- 16: the reference ----------------------------------------------------------------------------------------------------------------------

def digest(model): return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for n, p in model.named_parameters() if "lora_" not in n)).hexdigest()


def drifting(model): return model


@contextmanager
def adapter_left_on(model): yield model


def a_step(model, g, rate=0.05):
    model.zero_grad()
    (group_logps(model, *g.shared) * torch.linspace(-1, 1, 9)[:, None]).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None: p -= rate * p.grad / (p.grad.norm() + 1e-8)


def kl_of(model, off, g):
    with torch.no_grad():
        logps = group_logps(model, *g.shared)
        with off as frozen: ref = group_logps(frozen, *g.shared)
        return grpo_loss(logps, logps, torch.ones(9), g.mask, ref_logps=ref)[1]["kl"].item()


def test_row_16_the_reference_of_a_full_policy_stays(g):
    def check(make):
        model = policy()
        frozen = make(model)
        before = digest(frozen)
        assert kl_of(model, as_reference(frozen), g) == 0
        for _ in range(2): a_step(model, g)
        assert digest(frozen) == before != digest(model) and kl_of(model, as_reference(frozen), g) > 0
    check(reference)
    assert fails(check, drifting)


def test_row_16_the_reference_of_an_adapter_is_its_base(g):
    with torch.no_grad(): base = group_logps(load_policy(), *g.shared)
    def check(off):
        model = add_lora(load_policy(), rank=4, alpha=8.0)
        before = digest(model)
        assert reference(model) is model and kl_of(model, off(model), g) == 0
        for _ in range(2):
            a_step(model, g)
            with off(model) as frozen, torch.no_grad(): assert torch.equal(group_logps(frozen, *g.shared), base)
        assert kl_of(model, off(model), g) > 0 and digest(model) == before
    check(as_reference)
    assert fails(check, adapter_left_on)


@pytest.mark.parametrize("rank", [0, 4])
def test_row_16_a_run_is_on_its_reference_before_the_first_update_and_leaves_it(scenes, g, rank):
    def check(off):
        model = add_lora(load_policy(), rank=rank, alpha=8.0) if rank else policy()
        trainer = Trainer(replace(SMALL, method="set"), model, processor())
        with off(trainer.reference) as frozen, torch.no_grad(): before = group_logps(frozen, *g.shared)
        first, second = (train_step(trainer, scenes, seed=s)[1]["kl"] for s in (1, 2))
        with off(trainer.reference) as frozen, torch.no_grad(): assert torch.equal(group_logps(frozen, *g.shared), before)
        assert first == 0 < second and not torch.equal(group_logps(trainer.policy, *g.shared), before)
    check(as_reference)
    if rank: assert fails(check, adapter_left_on)
    else:
        with replaced(emo_r3.train, "reference", drifting): assert fails(check, as_reference)


# --- 18: siblings that leak -----------------------------------------------------------------------------------------------------------------

class Leaky(emo_r3.groups.PackedAttention):
    "Plain causal attention over the whole row."
    def attend(self, module, q, k, v, scaling): return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)


class HalfLeaky(emo_r3.groups.PackedAttention):
    "The completions of a group see one another's columns, as if they were one."
    def attend(self, module, q, k, v, scaling):
        S = q.shape[2]
        owner = torch.empty(S, dtype=torch.long)
        for i, slots in enumerate(self.prompt_slots): owner[slots[self.prompt_real[i]]] = i
        for i, slots in enumerate(self.completion_slots): owner[slots[self.completion_real[i]]] = self.prompt_of[i]
        mask = (owner[:, None] == owner) & torch.ones(S, S).tril().bool()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2)


def test_row_18_siblings_do_not_leak(full, g):
    def check(attention):
        with replaced(emo_r3.groups, "PackedAttention", attention), torch.no_grad():
            before = group_logps(full, *g.shared)
            for j in range(9):
                ids = g.ids.clone()
                ids[j, 0] = 700
                others = torch.arange(9) != j
                assert torch.equal(group_logps(full, g.prompts, g.prompt_of, ids, g.mask)[others], before[others])
    check(emo_r3.groups.PackedAttention)
    assert fails(check, Leaky) and fails(check, HalfLeaky)


# --- 19: reflection's own model -------------------------------------------------------------------------------------------------------------

def judge_of_a_copy(model): return PolicyJudge(copy.deepcopy(model), processor())


def judge_with_old_pictures(model):
    "Its features were made before the vision tower moved, and nobody cleared them."
    return PolicyJudge(model, processor(), features=PictureFeatures(model))


class TeachingJudge(PolicyJudge):
    "Scores by a pass with gradient, and sends it back."
    def score(self, messages, answers):
        out = super().score(messages, answers)
        s = self.sampler
        with torch.enable_grad(): completion_logps(s.model, encode_prompts(s.processor, messages).padded(), torch.full((len(messages), 1), 300), torch.ones(len(messages), 1)).sum().backward()
        return out


def test_row_19_reflection_judges_with_the_weights_of_the_step_and_never_trains():
    x = make_scenes("in_domain", "train", 1)[0]
    questions = [consistency_messages(x.image, t) for t in ("A ghost stands out.", "A spider.")]
    def check(make):
        model = policy()
        judge = make(model)
        judge.score(questions, [["Yes", "No"]] * 2)
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            for p in model.model.visual.merger.parameters(): p.mul_(1.05)  # an update
        now, fresh = (j.score(questions, [["Yes", "No"]] * 2) for j in (judge, PolicyJudge(model, processor(), shared_prefix=False)))
        assert (torch.tensor(now) - torch.tensor(fresh)).abs().max() < 1e-4
    check(lambda model: PolicyJudge(model, processor()))
    assert fails(check, judge_of_a_copy) and fails(check, judge_with_old_pictures) and fails(check, lambda model: TeachingJudge(model, processor()))


def never_forgets(trainer): trainer.learned = lambda: None


def judges_by_a_copy(trainer): trainer.judge = PolicyJudge(copy.deepcopy(trainer.policy), processor())


def nothing_broken(trainer): pass


def test_row_19_every_step_of_a_run_judges_with_the_weights_that_sampled(scenes):
    "What its judge says is what a fresh judge of the present weights says, in the step after an update too; sampling saw the same weights, and nothing is taught between the two."
    def check(broken):
        trainer, seen, gaps, taught = Trainer(replace(SMALL, num_generations=2), policy(), processor()), [], [], []
        broken(trainer)
        sample, score = trainer.sampler.sample, trainer.judge.score
        def sampled(*args): seen.append(digest(trainer.policy)); return sample(*args)
        def scored(questions, answers):
            seen.append(digest(trainer.policy))
            came = score(questions, answers)
            fresh = PolicyJudge(trainer.policy, processor(), shared_prefix=False).score(questions, answers)
            gaps.append(max(abs(a - b) for x, y in zip(came, fresh) for a, b in zip(x, y)))
            taught.append(any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.policy.parameters()))
            return came
        trainer.sampler.sample, trainer.judge.score = sampled, scored
        for seed in (5, 6):
            experience = collect(trainer, scenes[:2], seed, {})
            assert any(v.asked for v in experience.verdicts) and max(gaps) < 1e-3 and not any(taught)
            update(trainer, experience, torch.arange(2), None, experience.rollouts.logps)
            trainer.optimizer.zero_grad(set_to_none=True)
        assert len(seen) == 6 and len(set(seen[:3])) == 1 == len(set(seen[3:])) and seen[0] != seen[3]
    check(nothing_broken)
    assert fails(check, never_forgets) and fails(check, judges_by_a_copy)


# --- 20: hacks of a lenient grader ----------------------------------------------------------------------------------------------------------

def written(step1, box): return f"<step1>{step1}</step1><step2>A viewer would shiver.</step2><step3>Negative, high arousal.</step3>\\boxed{{{box}}}"


def worth(text, yes_no, felt, preset):
    w = RewardWeights.preset(preset)
    verdicts = dict(consistency=consistency_reward(parse_consistency(yes_no, w), w), coherence=coherence_reward(parse_coherence(felt, EMOSET8, w), "fear", w))
    return reward_completion(parse_set(text), "fear", EMOSET8, w, **verdicts).overall


PROBES = {  # text, the judge's two written answers -> reward under `paper`, under `released` (where reflection pays the sum, and "yes" anywhere)
    "honest": (written("A ghost.", "fear"), "Yes", "fear", 1.0, 1.1),
    "every label listed": (written("A ghost.", ", ".join(EMOSET8)), "Yes", "fear", 0.2, 0.3),
    "empty box": (written("A ghost.", ""), "Yes", "fear", None, None),
    "yes yes no": (written("A spider.", "fear"), "yes yes no", "fear", 0.95, 1.1),
    "label copied into step 1": (written("This picture evokes fear.", "fear"), "No", "fear", 0.95, 1.0),
}


def lenient(text, yes_no, felt, preset):
    "The label anywhere, and a yes anywhere."
    return 0.8 * ("fear" in text.lower()) + 0.1 + 0.05 * ("yes" in yes_no.lower()) + 0.05 * ("fear" in felt.lower())


def test_row_20_each_hack_earns_what_the_rules_say():
    def check(grade):
        for name, (text, yes_no, felt, paper, released) in PROBES.items():
            for preset, due in (("paper", paper), ("released", released)):
                if due is not None: assert grade(text, yes_no, felt, preset) == pytest.approx(due, abs=1e-9), (name, preset)
                assert name == "honest" or preset == "released" or grade(text, yes_no, felt, preset) < grade(*PROBES["honest"][:3], preset)
        assert parse_set(PROBES["empty box"][0]).answer in ("", None)
    check(worth)
    assert fails(check, lenient)


# --- the peer: TRL 1.16's GRPOTrainer with the embedded policy ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trl_on(tmp_path_factory):
    "TRL's own trainer around a policy, and what its methods take. The temperature is low enough that image tokens, which only we exclude, have no weight."
    pytest.importorskip("trl.trainer.grpo_trainer", reason="the peer comparison needs `pip install emo_r3[peer]` (trl 1.16)")
    import datasets
    from trl import GRPOConfig, GRPOTrainer
    def build(model, g, **options):
        args = GRPOConfig(output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=len(g.ids), num_generations=3, max_completion_length=g.ids.shape[1], temperature=0.7, use_cpu=True, bf16=False,
                          gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False, epsilon=0.2, epsilon_high=0.3, delta=3.0, beta=0.04, use_bias_correction_kl=False, **options)  # TRL multiplies the KL term by the ratio otherwise
        data = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "Which?"}]]})
        trainer = GRPOTrainer(model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args, train_dataset=data, processing_class=processor())
        rows = g.repeated[0]
        pictures = {"pixel_values": rows["pixel_values"], "image_grid_thw": rows["image_grid_thw"], "num_images": [int(g.prompts.picture_of[k] is not None) for k in g.prompt_of.tolist()],
                    "mm_token_type_ids": torch.cat([rows["mm_token_type_ids"], torch.zeros_like(g.ids)], 1)}
        return trainer, dict(prompt_ids=rows["input_ids"], prompt_mask=rows["attention_mask"], completion_ids=g.ids, completion_mask=g.mask), pictures
    return build


@pytest.mark.parametrize("form", FORMS)
def test_trl_gives_the_same_log_probabilities(trl_on, g, form):
    model = policy()
    trainer, rows, pictures = trl_on(model, g)
    inputs, mask = (torch.cat([rows[f"prompt_{n}"], rows[f"completion_{n}"]], 1) for n in ("ids", "mask"))
    with torch.no_grad(): theirs, entropy, _ = trainer._get_per_token_logps_and_entropies(model, inputs, mask, g.ids.shape[1], compute_entropy=True, **pictures)
    def check(temperature):
        with torch.no_grad(): assert ((FORMS[form](model, g, temperature) - theirs) * g.mask).abs().max() < BOUND
    check(0.7)
    assert fails(check, 1.0)
    with torch.no_grad(): ours = completion_logps(model, *g.repeated, 0.7, with_entropy=True)[1]
    assert ((ours - entropy) * g.mask).abs().max() < 1e-3


@pytest.mark.parametrize("loss_type, average, ratio", [("dapo", "token", "token"), ("grpo", "sequence", "token"), pytest.param("dr_grpo", "constant", "token", marks=pytest.mark.slow), ("grpo", "sequence", "sequence")])
def test_trl_teaches_the_same(trl_on, g, loss_type, average, ratio):
    "One update on the same completions and advantages, the policy a little away from where it sampled and from its reference."
    model, gen = policy(), torch.Generator().manual_seed(0)
    advantages = torch.cat([group_advantages(torch.randn(1, n, generator=gen)).flatten() if n > 1 else torch.tensor([0.7]) for n in g.prompt_of.bincount().tolist()])
    with torch.no_grad(): now = group_logps(model, *g.shared, 0.7)
    old, ref = ((now + s * torch.randn(now.shape, generator=gen)) * g.mask for s in (0.3, 0.2))
    trainer, rows, pictures = trl_on(model, g, loss_type=loss_type, importance_sampling_level=ratio)
    trainer.current_gradient_accumulation_steps = 1
    flat = lambda: torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    theirs = trainer._compute_loss(model, rows | pictures | dict(advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=g.mask.sum()))
    theirs.backward()
    slope = flat()
    def check(form, options):
        model.zero_grad(set_to_none=True)
        loss, _ = grpo_loss(FORMS[form](model, g, 0.7), old, advantages, g.mask, ref_logps=ref, **dict(beta=0.04, epsilon_low=0.2, epsilon_high=0.3, delta=3.0, average=average, ratio=ratio, max_tokens=g.ids.shape[1]) | options)
        loss.backward()
        assert (loss - theirs).abs() < BOUND and far(flat(), slope) < 1e-5
    for form in FORMS: check(form, {})
    for broken in ({"beta": 0.0}, {"kl": "k2"}, {"average": "token" if average != "token" else "sequence"}): assert fails(check, "packed", broken)
    assert slope.norm() > 1e-2

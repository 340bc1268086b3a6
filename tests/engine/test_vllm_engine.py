"""The vLLM sampler against vLLM's real engine, on the CPU, driving the embedded policy: `make test-vllm`."""
import copy
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[1]))
from policies import policy as policy_of  # noqa: E402

from emo_r3.data import EMOSET8  # noqa: E402
from emo_r3.groups import group_logps  # noqa: E402
from emo_r3.policy import banned_tokens, completion_logps, encode_prompts, load_policy, load_processor, unwrapped  # noqa: E402
from emo_r3.prompts import coherence_messages, consistency_messages, set_messages  # noqa: E402
from emo_r3.sampling import PolicyJudge, PolicySampler  # noqa: E402
from emo_r3.scenes import make_scenes  # noqa: E402
from emo_r3.vllm_sampler import PromptMismatch, StaleWeights, VLLMSampler  # noqa: E402

pytestmark = pytest.mark.vllm
SIZES = [(96, 96), (160, 96), (60, 150), (97, 101)]
BOUND = 1e-5


@pytest.fixture(scope="module")
def processor(): return load_processor(max_pixels=2 * 9216)


@pytest.fixture(scope="module")
def asked(): return [set_messages(x.question, x.image.resize(s)) for x, s in zip(make_scenes("in_domain", "train", 4), SIZES)]


@pytest.fixture(scope="module", params=["full", "lora", "merged", "four_bit"])
def sampler(request, processor):
    kind = request.param
    made = VLLMSampler(policy_of("lora" if kind == "merged" else kind), processor, {"lora": "merged"} if kind == "merged" else {})
    made.kind = kind
    yield made
    made.close()


def gap(rollouts, scored): return ((scored - rollouts.logps).abs() * rollouts.completion_mask).max().item()


@torch.no_grad()
def change(policy, size=0.01, seed=0):
    "Moves what learns, as an update would."
    gen = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        if p.requires_grad: p.add_(size * torch.randn(p.shape, generator=gen))


def test_log_probabilities_agree_with_transformers_on_pictures_of_mixed_sizes(sampler, asked):
    r = sampler.sample(asked, 4, 48, 0.7, seed=3)
    assert len({p.grid for p in r.prompts.pictures}) >= 3 and len(set(r.lengths.tolist())) > 2
    rows, ids, mask = r.rows(torch.arange(16))
    with torch.no_grad():
        assert gap(r, completion_logps(sampler.policy, rows, ids, mask, 0.7)) < BOUND
        assert gap(r, group_logps(sampler.policy, *r.packed(torch.arange(16)), 0.7)) < BOUND
        assert gap(r, completion_logps(sampler.policy, rows, ids, mask, 1.0)) > 1e-2  # a forgotten temperature would be seen
    assert sampler.gap < 1e-4


def test_greedy_completions_are_the_policy_s(sampler, asked):
    ours, theirs = sampler.sample(asked, 2, 48, 0.0), PolicySampler(sampler.policy, sampler.processor).sample(asked, 2, 48, 0.0)
    assert ours.texts == theirs.texts and torch.equal(ours.ended, theirs.ended)
    assert torch.equal(ours.completion_ids * ours.completion_mask, theirs.completion_ids * theirs.completion_mask)


def test_new_weights_take_effect_at_once(sampler, asked):
    old = sampler.sample(asked, 2, 32, 0.7, seed=5)
    change(sampler.policy)
    sampler.learned()
    new = sampler.sample(asked, 2, 32, 0.7, seed=5)
    with torch.no_grad(): now = [completion_logps(sampler.policy, *r.rows(torch.arange(8)), 0.7) for r in (old, new)]
    assert gap(old, now[0]) > 1e-2  # the policy is another
    assert gap(new, now[1]) < BOUND  # and the engine is with it


def test_old_weights_are_refused(sampler, asked, monkeypatch):
    sampler.sample(asked[:1], 1, 4, 0.7, seed=5)
    change(sampler.policy, seed=1)
    sampler.learned()
    with monkeypatch.context() as m:
        m.setattr(sampler.engine, "take", lambda policy: None)  # the transfer is forgotten
        with pytest.raises(StaleWeights, match="by the policy, .* by the engine"): sampler.sample(asked[:1], 1, 4, 0.7, seed=5)
        assert sampler.stale and sampler.depth == 0
    sampler.sample(asked[:1], 1, 4, 0.7, seed=5)  # with it all is well


def test_caches_of_the_old_policy_are_forgotten(sampler, asked):
    "Without a reset the prompt's keys and values, and the pictures' features, would be yesterday's."
    if sampler.kind != "full": pytest.skip("one kind of transfer is enough")
    sampler.sample(asked, 1, 2, 0.7, seed=1)
    change(sampler.policy, 0.02, seed=2)
    sampler.learned()
    real = sampler.engine.llm
    kept = {"reset_prefix_cache": real.reset_prefix_cache, "reset_mm_cache": real.reset_mm_cache}
    r = sampler.sample(asked, 2, 16, 0.7, seed=1)
    with torch.no_grad(): assert gap(r, completion_logps(sampler.policy, *r.rows(torch.arange(8)), 0.7)) < BOUND
    assert all(callable(f) for f in kept.values())


def test_one_seed_one_draw_and_nothing_beside_it_matters(sampler, asked):
    draw = lambda asked, seed: sampler.sample(asked, 3, 24, 1.0, seed=seed)
    one, again, other = draw(asked, 11), draw(asked, 11), draw(asked, 12)
    assert torch.equal(one.completion_ids, again.completion_ids) and not torch.equal(one.completion_ids[:, :8], other.completion_ids[:, :8])
    assert draw(asked[:1], 11).texts == one.texts[:3]  # the first prompt's draw does not depend on the others
    same = sampler.sample([asked[0]] * 3, 4, 24, 1.5, seed=11)
    assert len(set(same.texts)) > 6  # nor do equal prompts draw alike


def test_a_picture_s_tokens_are_never_drawn(sampler, asked):
    hot = sampler.sample(asked, 8, 48, 5.0, seed=0)
    assert hot.lengths.sum() > 1000 and not set(hot.completion_ids[hot.completion_mask.bool()].tolist()) & set(banned_tokens(unwrapped(sampler.policy)))


def questions():
    xs = make_scenes("in_domain", "train", 3, seed=4)
    return [consistency_messages(x.image, f"A {x.objects[0]} stands out.") for x in xs] + [coherence_messages(f"A {x.objects[0]} stands out.", "A viewer would smile.", EMOSET8) for x in xs]


def test_reflection_in_the_same_window_agrees_with_the_policy_s_own(sampler, asked):
    asks, answers = questions(), [("Yes", "No")] * 3 + [EMOSET8.labels] * 3
    judge = PolicyJudge(sampler.policy, sampler.processor)
    with sampler.awake():
        before = sampler.syncs
        sampler.sample(asked, 1, 8, 1.0, seed=0)
        ours, written = sampler.score(asks, answers), sampler.generate(asks)
        assert sampler.syncs == before  # one transfer for all
    theirs = judge.score(asks, answers)
    assert max(abs(a - b) for x, y in zip(ours, theirs) for a, b in zip(x, y)) < BOUND * 5  # a label is a sum over its tokens
    assert written == judge.generate(asks)


def test_whole_labels_are_scored_where_they_share_first_tokens(sampler):
    answers = [("a ghost", "a ghost stands", "a key", "ghost")] * 6
    encode = sampler.processor.tokenizer.encode
    assert len({encode(a)[0] for a in answers[0]}) < 4 and max(len(encode(a)) for a in answers[0]) > 2
    ours, theirs = sampler.score(questions(), answers), PolicyJudge(sampler.policy, sampler.processor).score(questions(), answers)
    assert max(abs(a - b) for x, y in zip(ours, theirs) for a, b in zip(x, y)) < BOUND * 5


def test_a_picture_that_the_engine_cuts_otherwise_is_refused(sampler, asked, monkeypatch):
    monkeypatch.setattr(sampler, "processor", load_processor(max_pixels=8 * 9216))  # not what the engine was started with
    large = [set_messages("Which?", make_scenes("in_domain", "train", 1)[0].image.resize((240, 240)))]
    with pytest.raises(PromptMismatch, match=r"prompt 0 \(240 x 240 pixels.*\): the engine made \d+ picture tokens of it, the policy's processor 100"): sampler.sample(large, 1, 4, 1.0, seed=0)


def test_random_states_and_threads_stay_as_they_were(sampler, asked):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(2)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    sampler.learned()
    with torch.autocast("cpu", torch.bfloat16, enabled=False): sampler.sample(asked, 2, 8, 1.0, seed=3)
    assert (random.random(), np.random.rand()) == expected[:2] and torch.equal(torch.rand(2), expected[2])


def test_too_long_a_prompt_is_refused(sampler, asked):
    with pytest.raises(ValueError, match="allowed: 4096 together"): sampler.sample(asked, 1, 4096, 1.0, seed=0)

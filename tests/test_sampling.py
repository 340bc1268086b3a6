"""What is sampled is what is scored: ids, log-probabilities, ends, seeds; and a judge that answers as its model does."""
import pytest
import torch

from emo_r3.data import EMOSET8
from emo_r3.policy import banned_tokens, completion_logps, encode_messages, load_policy, load_processor
from emo_r3.prompts import coherence_messages, consistency_messages, set_messages
from emo_r3.sampling import PolicyJudge, PolicySampler, mask_after_end
from emo_r3.scenes import make_scenes

SIZES = [(96, 96), (160, 96), (72, 144), (96, 96)]


@pytest.fixture(scope="module")
def policy(): return load_policy()


@pytest.fixture(scope="module")
def processor(): return load_processor()


@pytest.fixture(scope="module")
def asked(): return [set_messages(x.question, x.image.resize(s)) for x, s in zip(make_scenes("in_domain", "train", 4), SIZES)]


@pytest.fixture(scope="module")
def rollouts(policy, processor, asked): return PolicySampler(policy, processor, batch_size=6).sample(asked, 4, 64, temperature=0.7, seed=1)


def gap(rollouts, scored): return ((scored - rollouts.logps).abs() * rollouts.completion_mask).max().item()


def test_sampler_and_scorer_agree_on_ragged_mixed_batches(policy, rollouts):
    rows, ids, mask = rollouts.rows(torch.arange(16))
    assert len(set(rollouts.lengths.tolist())) > 2  # ragged, so padding is at stake
    with torch.no_grad():
        assert gap(rollouts, completion_logps(policy, rows, ids, mask, 0.7)) < 1e-5
        assert gap(rollouts, completion_logps(policy, rows, ids, mask, 1.0)) > 1e-2  # a forgotten temperature
        assert gap(rollouts, completion_logps(policy, rows, ids.roll(1, 1), mask, 0.7)) > 1  # an off-by-one
        wrong, _, _ = rollouts.rows(torch.arange(16).roll(4))
        assert gap(rollouts, completion_logps(policy, wrong, ids, mask, 0.7)) > 1e-2  # another group's pictures
        unmasked = {**rows, "attention_mask": torch.ones_like(rows["attention_mask"])}
        assert gap(rollouts, completion_logps(policy, unmasked, ids, mask, 0.7)) > 1e-3  # attended padding


def test_rows_pair_every_completion_with_its_own_prompt(rollouts, processor, asked):
    rows, ids, mask = rollouts.rows(torch.tensor([0, 5, 15]))
    prompts = encode_messages(processor, asked)
    assert torch.equal(rows["input_ids"], prompts["input_ids"][[0, 1, 3]])
    assert rows["image_grid_thw"].tolist() == prompts["image_grid_thw"][[0, 1, 3]].tolist()
    assert torch.equal(ids, rollouts.completion_ids[[0, 5, 15], :ids.shape[1]]) and int(mask.sum()) == int(rollouts.lengths[[0, 5, 15]].sum())


def test_sampled_ids_are_kept_even_where_text_would_encode_otherwise(processor, policy, asked):
    "A hot policy writes odd token sequences: decoding and encoding again gives other ids, so a trainer must not do that."
    hot = PolicySampler(policy, processor).sample(asked, 4, 48, temperature=3.0, seed=0)
    again = [processor.tokenizer.encode(t, add_special_tokens=False) for t in hot.texts]
    kept = [row[m.bool()].tolist() for row, m in zip(hot.completion_ids, hot.completion_mask)]
    assert any(a != k[:len(a)] for a, k in zip(again, kept))
    rows = hot.rows(torch.arange(16))
    with torch.no_grad(): assert gap(hot, completion_logps(policy, *rows, 3.0)) < 2e-5


def test_image_tokens_are_never_sampled(policy, processor, asked):
    image = policy.config.image_token_id
    hook = policy.lm_head.register_forward_hook(lambda m, i, out: out.index_fill(-1, torch.tensor(banned_tokens(policy)), 50.0))
    try: drawn = PolicySampler(policy, processor).sample(asked, 2, 24, temperature=1.0, seed=0)
    finally: hook.remove()
    assert not torch.isin(drawn.completion_ids, torch.tensor(banned_tokens(policy))).any() and image in banned_tokens(policy)
    plain = policy.generate(**encode_messages(processor, asked), max_new_tokens=1, do_sample=False)
    assert plain.shape[1] == encode_messages(processor, asked)["input_ids"].shape[1] + 1


def test_seed_repeats_a_draw_and_leaves_the_global_state_alone(policy, processor, asked, rollouts):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    again = PolicySampler(policy, processor, batch_size=6).sample(asked, 4, 64, temperature=0.7, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(again.completion_ids, rollouts.completion_ids) and torch.equal(again.logps, rollouts.logps)
    other = PolicySampler(policy, processor, batch_size=6).sample(asked, 4, 64, temperature=0.7, seed=2)
    assert other.texts != rollouts.texts
    groups = [set(rollouts.texts[i * 4: i * 4 + 4]) for i in range(4)]
    assert max(map(len, groups)) > 1  # a group's completions differ


def test_greedy_is_transformers_greedy(policy, processor, asked):
    ours = PolicySampler(policy, processor).sample(asked, 1, 64, temperature=0)
    prompts = encode_messages(processor, asked)
    theirs = policy.generate(**prompts, max_new_tokens=64, do_sample=False, suppress_tokens=banned_tokens(policy))[:, prompts["input_ids"].shape[1]:]
    assert list(ours.texts) == processor.tokenizer.batch_decode(theirs, skip_special_tokens=True)


def test_end_token_is_scored_and_limit_is_noticed(rollouts, policy, processor, asked):
    end = processor.tokenizer.eos_token_id
    for row, mask, ended in zip(rollouts.completion_ids, rollouts.completion_mask, rollouts.ended):
        tokens = row[mask.bool()].tolist()
        assert (tokens[-1] == end) == bool(ended) and end not in tokens[:-1]
    short = PolicySampler(policy, processor).sample(asked, 2, 5, seed=0)
    assert short.lengths.tolist() == [5] * 8 and not short.ended.any()
    assert rollouts.logps[rollouts.completion_mask == 0].abs().sum() == 0


def test_mask_keeps_the_end_token_where_padding_has_the_same_id():
    assert mask_after_end(torch.tensor([[4, 2, 2], [2, 2, 2], [4, 5, 6]]), [2]).tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert mask_after_end(torch.tensor([[4, 3, 2]]), [2, 3]).tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("settings, says", [((1, 0), "max_new_tokens = 0"), ((0, 5), "num_generations = 0"), ((1, 5, -0.1), "temperature = -0.1"), ((1, 5, float("nan")), "temperature = nan")])
def test_settings_that_cannot_be_sampled_with(policy, processor, asked, settings, says):
    with pytest.raises(ValueError, match=says): PolicySampler(policy, processor).sample(asked, *settings)


def test_judge_scores_as_a_single_forward_pass_does(policy, processor):
    x = make_scenes("in_domain", "test", 1)[0]
    questions = [consistency_messages(x.image, "A ghost stands out."), coherence_messages("A ghost.", "A viewer would relax and breathe out.", EMOSET8)]
    judged = PolicyJudge(policy, processor, batch_size=2).score(questions, [["Yes", "No"], list(EMOSET8.labels)])
    for question, options, values in zip(questions, [["Yes", "No"], EMOSET8.labels], judged):
        inputs = encode_messages(processor, [question])
        with torch.no_grad(): logits = policy(**inputs).logits[0, -1]
        logits[banned_tokens(policy)] = float("-inf")
        ids = [processor.tokenizer.convert_tokens_to_ids(o) for o in options]
        torch.testing.assert_close(torch.tensor(values), logits.log_softmax(-1)[ids], atol=1e-4, rtol=0)


def test_judge_scores_long_answers_whole_and_each_question_its_own(policy, processor):
    question = coherence_messages("A ghost.", "A viewer would relax and breathe out.", EMOSET8)
    long = "not really one of them"
    judge = PolicyJudge(policy, processor)
    (a, b), (c,) = judge.score([question, question], [["fear", long], [long]])
    ids = torch.tensor([processor.tokenizer.encode(long)])
    with torch.no_grad(): expected = completion_logps(policy, encode_messages(processor, [question]), ids, torch.ones_like(ids)).sum().item()
    assert b == pytest.approx(expected, abs=1e-4) and c == pytest.approx(expected, abs=1e-4) and a == pytest.approx(judge.score([question], [["fear"]])[0][0], abs=1e-4)
    assert ids.shape[1] > 3
    with pytest.raises(ValueError, match="an answer is empty"): judge.score([question], [["fear", ""]])


def test_judge_writes_without_gradient_and_leaves_the_weights_alone(policy, processor):
    x = make_scenes("in_domain", "test", 1)[0]
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    with torch.enable_grad():
        answers = PolicyJudge(policy, processor).generate([consistency_messages(x.image, "A ghost.")] * 3)
        PolicyJudge(policy, processor).score([consistency_messages(x.image, "A ghost.")], [["Yes", "No"]])
    assert len(answers) == 3 and len(set(answers)) == 1
    assert all(p.grad is None for p in policy.parameters()) and all(torch.equal(before[k], v) for k, v in policy.state_dict().items())
    assert PolicyJudge(policy, processor).score([], []) == [] == PolicyJudge(policy, processor).generate([])

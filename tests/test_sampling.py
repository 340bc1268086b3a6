"""What is sampled is what is scored: ids, log-probabilities, ends, seeds; and a judge that answers as its model does."""
import pytest
import torch

from policies import pictures_read
from policies import policy as policy_of

from emo_r3.data import EMOSET8
from emo_r3.groups import PictureFeatures, group_logps
from emo_r3.policy import banned_tokens, completion_logps, encode_prompts, load_policy, load_processor, unwrapped
from emo_r3.prompts import coherence_messages, consistency_messages, set_messages
from emo_r3.sampling import PolicyJudge, PolicySampler, mask_after_end, next_token_logps, plain_next_token_logps, prefill, share_beginnings
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
        assert gap(rollouts, group_logps(policy, *rollouts.packed(torch.arange(16)), 0.7)) < 1e-5


def test_rows_pair_every_completion_with_its_own_prompt(rollouts, processor, asked):
    rows, ids, mask = rollouts.rows(torch.tensor([0, 5, 15]))
    prompts = encode_prompts(processor, asked).padded()
    assert torch.equal(rows["input_ids"], prompts["input_ids"][[0, 1, 3]])
    assert rows["image_grid_thw"].tolist() == prompts["image_grid_thw"][[0, 1, 3]].tolist()
    assert torch.equal(ids, rollouts.completion_ids[[0, 5, 15], :ids.shape[1]]) and int(mask.sum()) == int(rollouts.lengths[[0, 5, 15]].sum())
    some, of, packed_ids, packed_mask = rollouts.packed(torch.tensor([15, 0, 5, 4]))
    assert of.tolist() == [2, 0, 1, 1] and all(torch.equal(a, rollouts.prompts.ids[b]) for a, b in zip(some.ids, (0, 1, 3)))
    assert torch.equal(packed_ids, rollouts.completion_ids[[15, 0, 5, 4], :packed_ids.shape[1]]) and int(packed_mask.sum()) == int(rollouts.lengths[[15, 0, 5, 4]].sum())


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
    try: drawn = [PolicySampler(policy, processor, shared_prefix=shared).sample(asked, 2, 24, temperature=1.0, seed=0) for shared in (True, False)]
    finally: hook.remove()
    assert not any(torch.isin(d.completion_ids, torch.tensor(banned_tokens(policy))).any() for d in drawn) and image in banned_tokens(policy)


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


# --- the quick way draws what `generate` draws --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def adapted(): return policy_of("lora")


@pytest.fixture(scope="module")
def ragged(processor, asked):
    "Four prompts with pictures of three sizes, and one without in between."
    return encode_prompts(processor, [*asked[:2], coherence_messages("A ghost stands out.", "A viewer would shiver and hide.", EMOSET8), *asked[2:]])


def both_ways(model, processor, prompts, G, T, temperature, seed, top_p=1.0, features=None):
    draw = lambda shared: PolicySampler(model, processor, shared_prefix=shared, features=features).draw(prompts, G, T, temperature, seed, top_p)
    return draw(True), draw(False)


def same(quick, plain, ends):
    "Whether ids are equal, and log-probabilities within 1e-5 up to each end; and how many different lengths there are."
    mask = mask_after_end(quick[0], ends)
    return torch.equal(quick[0], plain[0]) and ((quick[1] - plain[1]).abs() * mask).max().item() < 1e-5, len(set(mask.sum(1).tolist()))


@pytest.mark.parametrize("G, temperature, seed, top_p", [(1, 1.0, 1, 1.0), (4, 1.0, 2, 1.0), (4, 0.7, 3, 1.0), (3, 2.5, 4, 1.0), (2, 0.0, 5, 1.0), (4, 2.5, 6, 0.9), (2, 4.0, 7, 0.5)])
def test_the_same_seed_draws_the_same_tokens_either_way(policy, processor, ragged, G, temperature, seed, top_p):
    quick, plain = both_ways(policy, processor, ragged, G, 48, temperature, seed, top_p)
    agree, lengths = same(quick, plain, [processor.tokenizer.eos_token_id])
    assert agree and quick[0].shape[0] == 5 * G and (lengths > 2 or G == 1)  # rows end at different steps
    if temperature > 2: assert not torch.equal(PolicySampler(policy, processor).draw(ragged, G, 8, temperature, seed + 100)[0], quick[0][:, :8])


@pytest.mark.parametrize("temperature, seed", [(2.0, 1), (0.0, 3)])
def test_an_adapter_draws_the_same_either_way_too(adapted, processor, ragged, policy, temperature, seed):
    quick, plain = both_ways(adapted, processor, ragged, 3, 44, temperature, seed)
    assert same(quick, plain, [processor.tokenizer.eos_token_id])[0]
    base = PolicySampler(policy, processor).draw(ragged, 3, 1, temperature, seed)[1]
    assert (quick[1][:, :1] - base).abs().max() > 1e-4  # the adapter does something


def test_four_bits_draw_the_same_either_way(processor, ragged):
    quick, plain = both_ways(policy_of("four_bit"), processor, ragged, 2, 24, 1.0, 1)
    assert same(quick, plain, [processor.tokenizer.eos_token_id])[0]


def test_without_a_seed_torch_s_own_state_decides_either_way(policy, processor, ragged):
    drawn = []
    for shared in (True, False):
        torch.manual_seed(11)
        drawn += [PolicySampler(policy, processor, shared_prefix=shared).draw(ragged, 2, 12, 1.0, None)[0], torch.rand(2)]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])


def test_batches_of_whole_groups_are_the_same_draw_either_way(policy, processor, asked):
    quick, plain = (PolicySampler(policy, processor, batch_size=b, shared_prefix=s).sample(asked, 4, 40, 1.0, seed=9) for b, s in ((9, True), (8, False)))
    assert torch.equal(quick.completion_ids, plain.completion_ids) and (quick.logps - plain.logps).abs().max() < 1e-5 and quick.texts == plain.texts and torch.equal(quick.ended, plain.ended)


def test_finished_rows_leave(policy, processor, ragged):
    "The text model sees the prompts once, and then at each step the rows that are still being written, and no other."
    seen = []
    hook = policy.model.language_model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True)
    try: ids, _ = PolicySampler(policy, processor).draw(ragged, 4, 64, 1.0, 2)
    finally: hook.remove()
    lengths = mask_after_end(ids, [processor.tokenizer.eos_token_id]).sum(1)
    assert seen[0] == (1, int(ragged.lengths.sum()))
    assert seen[1:] == [(int((lengths > t).sum()), 1) for t in range(1, ids.shape[1])] and len({n for n, _ in seen[1:]}) > 4


def test_a_batch_that_ends_at_once_ends(policy, processor, ragged):
    end = processor.tokenizer.eos_token_id
    hook = policy.lm_head.register_forward_hook(lambda m, i, out: out.index_fill(-1, torch.tensor([end]), 80.0))
    try: (ids, logps), plain = both_ways(policy, processor, ragged, 2, 9, 1.0, 1)
    finally: hook.remove()
    assert ids.tolist() == [[end]] * 10 == plain[0].tolist() and logps.abs().max() < 1e-5


def test_prefill_remembers_each_prompt_as_if_it_were_alone(policy, ragged):
    with torch.no_grad(): together, alone = prefill(policy, ragged), [prefill(policy, ragged.take([i])) for i in range(5)]
    for i, one in enumerate(alone):
        n = len(ragged.ids[i])
        assert together.real[i].tolist() == [True] * n + [False] * (together.real.shape[1] - n) and together.next_position[i] == one.next_position[0]
        for a, b in zip(together.keys + together.values, one.keys + one.values): torch.testing.assert_close(a[i, :, :n], b[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(together.hidden[i], one.hidden[0], atol=1e-4, rtol=1e-5)


def test_pictures_are_read_once_for_sampling_and_judging(policy, processor, asked):
    features = PictureFeatures(policy)
    sampler, judge = PolicySampler(policy, processor, batch_size=4, features=features), PolicyJudge(policy, processor, features=features)
    questions = [consistency_messages(m[0]["content"][0]["image"], f"A {thing}.") for m in asked for thing in ("ghost", "spider", "key")]
    alone = PolicyJudge(policy, processor).score(questions, [["Yes", "No"]] * 12)
    with pictures_read(policy) as seen:
        drawn = sampler.sample(asked, 4, 24, 1.0, seed=1)
        assert len(seen) == len(drawn.prompts.pictures) == 4
        scored = judge.score(questions, [["Yes", "No"]] * 12)
        judge.score(questions[:2], [["Yes", "not really one of them"]] * 2)
        judge.generate(questions[:2])
        with torch.no_grad(): group_logps(policy, *drawn.packed(torch.arange(16)), features=features)
    assert len(seen) == 4
    torch.testing.assert_close(torch.tensor(scored), torch.tensor(alone), atol=1e-4, rtol=0)
    with pictures_read(policy) as seen: PolicySampler(policy, processor, shared_prefix=False).sample(asked, 4, 2, 1.0, seed=1)
    assert len(seen) == 16  # the plain way reads a picture for every completion


# --- ends, limits, settings -----------------------------------------------------------------------------------------------------------------

def test_greedy_is_transformers_greedy(policy, processor, asked):
    ours = PolicySampler(policy, processor).sample(asked, 1, 64, temperature=0)
    prompts = encode_prompts(processor, asked).padded()
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
        inputs = encode_prompts(processor, [question]).padded()
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
    with torch.no_grad(): expected = completion_logps(policy, encode_prompts(processor, [question]).padded(), ids, torch.ones_like(ids)).sum().item()
    assert b == pytest.approx(expected, abs=1e-4) and c == pytest.approx(expected, abs=1e-4) and a == pytest.approx(judge.score([question], [["fear"]])[0][0], abs=1e-4)
    assert ids.shape[1] > 3
    with pytest.raises(ValueError, match="an answer is empty"): judge.score([question], [["fear", ""]])


@pytest.fixture(scope="module")
def questions(asked):
    "Of two pictures three consistency questions each, and four coherence questions; ragged, and some equal."
    pictures = [m[0]["content"][0]["image"] for m in asked[:2]]
    about = [consistency_messages(p, t) for p in pictures for t in ("A ghost stands out.", "A spider stands out, next to a chair.", "A key.")]
    return [*about[:4], coherence_messages("A ghost.", "Fear.", EMOSET8), about[4], coherence_messages("A ghost and a key.", "A viewer would shiver.", EMOSET8), about[5], coherence_messages("A", "B", EMOSET8), coherence_messages("A", "B", EMOSET8)]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("options", [["Yes", "No"], ["Yes", "not really one of them", "f e a r"]], ids=["one token", "several tokens"])
@pytest.mark.parametrize("max_tokens", [16384, 150])
def test_judge_scores_the_same_either_way(policy, adapted, processor, questions, kind, options, max_tokens):
    model = {"full": policy, "lora": adapted}[kind]
    quick, plain = (torch.tensor(PolicyJudge(model, processor, shared_prefix=s, max_tokens=max_tokens).score(questions, [options] * 10)) for s in (True, False))
    assert (quick - plain).abs().max() < 1e-4 and quick.std(0).min() > 1e-2 and quick.shape == (10, len(options))  # the questions differ


def test_judge_takes_different_answers_to_different_questions(policy, processor, questions):
    options = [["Yes", "No"] if i % 2 else ["fear", "awe", "quite another thing"] for i in range(10)]
    quick, plain = (PolicyJudge(policy, processor, shared_prefix=s).score(questions, options) for s in (True, False))
    for a, b in zip(quick, plain): assert a == pytest.approx(b, abs=1e-4)
    assert [len(r) for r in quick] == [len(o) for o in options]


def text_first(image, text, picture_last=False):
    "A question whose text stands before the picture, as a template of one's own may have it."
    return [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image", "image": image}, *([] if picture_last else [{"type": "text", "text": "Is this true? Yes or No."}])]}]


def test_judge_scores_questions_whose_text_stands_before_the_picture(policy, processor, asked, questions):
    pictures = [m[0]["content"][0]["image"] for m in asked[:2]]
    mixed = [text_first(pictures[0], "A ghost."), text_first(pictures[0], "A spider and a chair."), text_first(pictures[1], "A ghost."), text_first(pictures[1], "A ghost.", picture_last=True), *questions[:2], questions[4]]
    prompts = encode_prompts(processor, mixed)
    heads, head_of, tails, mask = share_beginnings(prompts)
    for i, k in enumerate(head_of.tolist()):
        assert torch.equal(torch.cat([heads.ids[k], tails[i][mask[i].bool()]]), prompts.ids[i]) and heads.picture_of[k] == prompts.picture_of[i]
        assert processor.image_token_id not in tails[i]  # a picture is read with its beginning, never in what follows
    for options in (["Yes", "No"], ["Yes", "not really one of them"]):
        quick, plain = (torch.tensor(PolicyJudge(policy, processor, shared_prefix=s).score(mixed, [options] * 7)) for s in (True, False))
        assert (quick - plain).abs().max() < 1e-4
    assert quick[0, 0] != quick[1, 0]


def test_questions_that_begin_alike_are_begun_once(policy, processor, questions):
    prompts, tokens = encode_prompts(processor, questions), []
    hook = policy.model.language_model.register_forward_pre_hook(lambda m, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True)
    try:
        with pictures_read(policy) as seen: quick = next_token_logps(policy, prompts)
        heads, _, _, mask = share_beginnings(prompts)
        assert len(seen) == 2 and tokens == [int(heads.lengths.sum() + mask.sum())] and tokens[0] < 0.7 * prompts.lengths.sum()
        with pictures_read(policy) as seen: plain = plain_next_token_logps(policy, prompts, batch_size=4)
        assert len(seen) == 6
    finally: hook.remove()
    finite = ~quick.isinf()
    assert (quick - plain)[finite].abs().max() < 1e-4 and torch.equal(finite, ~plain.isinf()) and torch.equal(quick[8], quick[9])


def test_judge_writes_the_same_either_way(policy, processor, questions):
    quick, plain = (PolicyJudge(policy, processor, max_new_tokens=24, batch_size=3, shared_prefix=s).generate(questions) for s in (True, False))
    assert quick == plain and len(set(quick)) > 1
    written = []
    for shared in (True, False):
        torch.manual_seed(5)
        written.append(PolicyJudge(policy, processor, temperature=3.0, top_p=0.95, max_new_tokens=24, shared_prefix=shared).generate(questions))
    assert written[0] == written[1] != quick


def test_judge_writes_without_gradient_and_leaves_the_weights_alone(policy, processor):
    x = make_scenes("in_domain", "test", 1)[0]
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    with torch.enable_grad():
        answers = PolicyJudge(policy, processor).generate([consistency_messages(x.image, "A ghost.")] * 3)
        PolicyJudge(policy, processor).score([consistency_messages(x.image, "A ghost.")], [["Yes", "No"]])
    assert len(answers) == 3 and len(set(answers)) == 1
    assert all(p.grad is None for p in policy.parameters()) and all(torch.equal(before[k], v) for k, v in policy.state_dict().items())
    assert PolicyJudge(policy, processor).score([], []) == [] == PolicyJudge(policy, processor).generate([])

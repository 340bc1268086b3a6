"""One row a group says and teaches exactly what one row a completion does: every kind of policy, ragged and mixed, whole or in parts; and nothing leaks."""
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import (KINDS, Groups, answers, double_throughout, far, gradient, groups, logps_by_hand, pictures_read, plain_logps, policy, positions_by_hand, processor, weights)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import emo_r3.groups
from emo_r3.cost import cut_groups
from emo_r3.groups import PictureFeatures, checkpointed, encode_pictures, forward_packed, group_logps, pack_groups, predicting_slots
from emo_r3.policy import completion_logps, encode_prompts, has_adapter, load_policy, logits_to_logps, save_policy, unwrapped
from emo_r3.prompts import set_messages
from emo_r3.sampling import PolicySampler
from emo_r3.scenes import make_scenes


@pytest.fixture(scope="module")
def g(): return groups()


@pytest.fixture(scope="module")
def full(): return policy()


@pytest.fixture(scope="module")
def double(): return policy(dtype="float64")


# --- the same numbers as the repeated form --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_packed_says_and_teaches_what_repeated_does(kind, g):
    model = policy(kind)
    packed, repeated = group_logps(model, *g.shared, 2.0), plain_logps(model, g, 2.0)
    assert (packed - repeated).abs().max() < 1e-5 and (packed[g.mask == 0] == 0).all()
    ours, theirs = gradient(model, packed, g.mask), gradient(model, repeated, g.mask)
    assert far(ours, theirs) < 1e-5 and theirs.norm() > 0.1
    assert has_adapter(model) == (kind != "full")
    if has_adapter(model):  # the adapter takes part, and it alone learns
        with torch.no_grad(), model.disable_adapter(): assert (group_logps(model, *g.shared, 2.0) - packed).abs().max() > 1e-2
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, _ in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_in_double_precision_they_are_one(kind, g):
    model = policy(kind, dtype="float64")
    if kind == "lora":
        for name, p in model.named_parameters(): p.data = p.data.double()
    with double_throughout():
        packed, repeated = group_logps(model, *g.shared), plain_logps(model, g)
        assert packed.dtype == torch.float64 and (packed - repeated).abs().max() < 1e-11
        ours, theirs = gradient(model, packed, g.mask), gradient(model, repeated, g.mask)
        assert far(ours, theirs) < 1e-10
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradient(model, group_logps(model, *g.shared), g.mask)
        for name, p in model.named_parameters():  # one by one too, so that a large one hides no small one
            if name in grads: assert (p.grad - grads[name]).norm() < 1e-9 * (grads[name].norm() + 1e-6), name
        # the check is sharp: completions behind the wrong prompts teach otherwise
        wrong = Groups(g.prompts, g.prompt_of.roll(1), g.ids, g.mask)
        assert far(gradient(model, group_logps(model, *wrong.shared), g.mask), theirs) > 1e-3


def test_entropies_agree_and_carry_no_gradient(full, g):
    (a, e), (b, f) = group_logps(full, *g.shared, 0.7, with_entropy=True), completion_logps(full, *g.repeated, 0.7, with_entropy=True)
    assert ((e - f) * g.mask).abs().max() < 1e-4 and not e.requires_grad and a.requires_grad and e[g.mask.bool()].max() > 0.1


def test_any_order_of_completions_and_any_share_of_them(full, g):
    with torch.no_grad():
        whole = group_logps(full, *g.shared)
        order = torch.tensor([7, 2, 4, 0, 8, 3, 1, 6, 5])  # groups interleaved
        torch.testing.assert_close(group_logps(full, g.prompts, g.prompt_of[order], g.ids[order], g.mask[order]), whole[order], atol=1e-5, rtol=0)
        one = group_logps(full, g.prompts.take([2]), torch.tensor([0]), g.ids[4:5, :7], g.mask[4:5, :7])  # G = 1
        torch.testing.assert_close(one, whole[4:5, :7], atol=1e-5, rtol=0)
        first = group_logps(full, g.prompts, g.prompt_of, g.ids[:, :1], torch.ones(9, 1, dtype=torch.long))  # completions of one token
        torch.testing.assert_close(first, whole[:, :1], atol=1e-5, rtol=0)
        idle = group_logps(full, g.prompts, torch.tensor([0]), g.ids[:1], g.mask[:1])  # four prompts without completions
        torch.testing.assert_close(idle, whole[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_works_only_for_the_states_that_are_read(kind, g):
    model = policy(kind)
    batch = pack_groups(model, *g.shared)
    features = [f.detach() for f in encode_pictures(model, g.prompts.pictures)]
    wanted = predicting_slots(batch)[batch.completion_slots >= 0]
    tail, rows = unwrapped(model).model.language_model.layers[-1].mlp.down_proj, []
    watch = tail.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].numel() // inputs[0].shape[-1]))
    with torch.no_grad():
        whole = forward_packed(model, batch, g.prompts, features)[wanted]
        few = forward_packed(model, batch, g.prompts, features, wanted=wanted)
        again = forward_packed(model, batch, g.prompts, features)[wanted]
    learning = forward_packed(model, batch, g.prompts, features, wanted=wanted)  # with gradient every token goes all the way
    watch.remove()
    S, n = len(batch.input_ids), len(wanted.unique())
    assert rows == [S, n, S, S] and n < S / 2
    assert (few - whole).abs().max() < 2e-5 * whole.abs().max() and torch.equal(again, whole) and (learning - whole).abs().max() < 2e-5 * whole.abs().max()
    with torch.no_grad(), emo_r3.groups.last_layer_at(unwrapped(model).model.language_model, wanted.unique() - 1, S):  # the wrong tokens: seen
        assert (forward_packed(model, batch, g.prompts, features)[wanted] - whole).abs().max() > 1e-2 * whole.abs().max()


def test_completions_without_a_prompt_are_refused(full, g):
    for prompt_of in (g.prompt_of[:4], g.prompt_of + 1, g.prompt_of - 1):
        with pytest.raises(ValueError, match="allowed: for each of 9 completions a prompt from 0 to 4"): group_logps(full, g.prompts, prompt_of, g.ids, g.mask)


# --- independent answers --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["full", "lora"])
def test_each_completion_alone_by_hand(kind, g):
    model = policy(kind)
    with torch.no_grad(): assert (group_logps(model, *g.shared, 2.0) - logps_by_hand(model, g, 2.0)).abs().max() < 1e-5


def owners(g):
    "Prompt and completion (-1: the prompt itself) of every token of the packed row."
    prompt = [k for k, ids in enumerate(g.prompts.ids) for _ in ids] + [k for k, n in zip(g.prompt_of.tolist(), g.mask.sum(1).tolist()) for _ in range(n)]
    return torch.tensor(prompt), torch.tensor([-1] * int(g.prompts.lengths.sum()) + [i for i, n in enumerate(g.mask.sum(1).tolist()) for _ in range(n)])


def test_a_dense_mask_through_transformers_own_attention(g):
    model = load_policy()  # has never seen ours
    prompt, completion = owners(g)
    S = len(prompt)
    mask = (prompt[:, None] == prompt) & ((completion == -1) | (completion[:, None] == completion)) & torch.ones(S, S).tril().bool()
    batch, base = pack_groups(model, *g.shared), model.model.language_model
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch.input_ids).masked_scatter((batch.input_ids == g.prompts.image_token_id)[:, None], torch.cat([encode_pictures(model, g.prompts.pictures)[p] for p in (0, 1, 2, 0)]))
        assert base.config._attn_implementation == "sdpa"
        run = lambda m: base(inputs_embeds=embeds[None], position_ids=batch.position_ids[:, None], attention_mask={"full_attention": m[None, None]}).last_hidden_state[0]
        theirs, leaky = run(mask), run((prompt[:, None] == prompt) & torch.ones(S, S).tril().bool())
        ours = forward_packed(model, batch, g.prompts, encode_pictures(model, g.prompts.pictures))
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()
    assert (ours - leaky).abs().max() > 1e-2 * theirs.abs().max()


def test_positions_against_a_table_made_by_hand(full, g):
    batch = pack_groups(full, *g.shared)
    at, following = 0, []
    for ids, shown in zip(g.prompts.ids, g.prompts.picture_of):
        grid = (0, 0) if shown is None else tuple(s // 2 for s in g.prompts.pictures[shown].grid[1:])
        table, end = positions_by_hand(ids, g.prompts.image_token_id, *grid)
        assert batch.position_ids[:, at: at + len(ids)].T.tolist() == [list(t) for t in table]
        following.append(end); at += len(ids)
    assert batch.next_position.tolist() == following
    for i, slots in enumerate(batch.completion_slots):
        n = int(g.mask[i].sum())
        assert slots[:n].tolist() == list(range(at, at + n)) and (slots[n:] == -1).all()
        assert batch.position_ids[:, slots[:n]].tolist() == [list(range(following[g.prompt_of[i]], following[g.prompt_of[i]] + n))] * 3  # each goes on from its prompt
        assert batch.input_ids[slots[:n]].tolist() == g.ids[i, :n].tolist()
        at += n
    assert at == len(batch.input_ids)
    # and in plain numbers: two rows of four image tokens, behind which text counts on from the larger edge
    wide = encode_prompts(processor(), [set_messages("Which?", make_scenes("in_domain", "train", 1)[0].image.resize((96, 48)))])
    begin = int((wide.ids[0] == wide.image_token_id).nonzero()[0])
    table = pack_groups(full, wide, torch.tensor([0]), *answers("fear")).position_ids[:, begin - 1:].T.tolist()
    b = begin
    assert table[:10] == [[b - 1] * 3, [b, b, b], [b, b, b + 1], [b, b, b + 2], [b, b, b + 3], [b, b + 1, b], [b, b + 1, b + 1], [b, b + 1, b + 2], [b, b + 1, b + 3], [b + 4] * 3]
    assert table[-1] == [b + 4 + len(wide.ids[0]) - begin - 8] * 3


def test_predicting_states_stand_one_to_the_left(full, g):
    batch = pack_groups(full, *g.shared)
    ends = g.prompts.lengths.cumsum(0) - 1
    for i, slots in enumerate(predicting_slots(batch)):
        own = batch.completion_slots[i]
        assert slots[: int(g.mask[i].sum())].tolist() == [int(ends[g.prompt_of[i]]), *own[own >= 0][:-1].tolist()]


def cached_logps(model, g, temperature=1.0):
    "A third form: the prefix as a differentiable cache of keys and values, repeated for its completions; as many completions for each prompt."
    G, prompts = len(g.ids) // len(g.prompts), g.prompts.padded()
    model.model.rope_deltas = None
    prefix = model(**prompts, logits_to_keep=1, use_cache=True)
    prefix.past_key_values.batch_repeat_interleave(G)
    seen = prompts["attention_mask"].repeat_interleave(G, 0)
    start = (prompts["attention_mask"].sum(1, keepdim=True) + prefix.rope_deltas).repeat_interleave(G, 0)
    positions = (start + torch.arange(g.ids.shape[1])).expand(3, -1, -1)
    rest = model(input_ids=g.ids, attention_mask=torch.cat([seen, g.mask], 1), position_ids=positions, past_key_values=prefix.past_key_values, use_cache=True)
    return logits_to_logps(model, torch.cat([prefix.logits.repeat_interleave(G, 0), rest.logits[:, :-1]], 1), g.ids, temperature) * g.mask


def test_a_third_form_agrees(double, g):
    even = Groups(g.prompts.take([0, 2, 3, 4]), torch.arange(4).repeat_interleave(2), g.ids[:8], g.mask[:8])
    with double_throughout():
        packed, cached = group_logps(double, *even.shared), cached_logps(double, even)
        assert (packed - cached).abs().max() < 1e-11
        assert far(gradient(double, packed, even.mask), gradient(double, cached, even.mask)) < 1e-10


# --- nothing leaks --------------------------------------------------------------------------------------------------------------------

def test_a_changed_completion_changes_no_other_to_the_bit(full, g):
    with torch.no_grad():
        before = group_logps(full, *g.shared)
        for j in range(9):
            ids = g.ids.clone()
            ids[j, 0] = 700 if ids[j, 0] != 700 else 701
            after = group_logps(full, g.prompts, g.prompt_of, ids, g.mask)
            others = torch.arange(9) != j
            assert torch.equal(after[others], before[others]) and not torch.equal(after[j], before[j])


def test_a_changed_prompt_changes_no_other_group_to_the_bit(full, g):
    other = encode_prompts(processor(), [set_messages("?", make_scenes("faces", "train", 1)[0].image.resize((160, 96)))]).pictures[0]
    assert other.grid == g.prompts.pictures[1].grid
    text = g.prompts.ids[0].clone(); text[-4] = 700
    for changed, touched in ((dict(pictures=(g.prompts.pictures[0], other, g.prompts.pictures[2])), [4, 5]), (dict(ids=(text, *g.prompts.ids[1:])), [0, 1, 2])):
        with torch.no_grad(): before, after = (group_logps(full, p, g.prompt_of, g.ids, g.mask) for p in (g.prompts, type(g.prompts)(**(vars(g.prompts) | changed))))
        rest = [i for i in range(9) if i not in touched]
        assert torch.equal(after[rest], before[rest]) and all(not torch.equal(after[i], before[i]) for i in touched)


def test_no_gradient_crosses_from_one_sibling_to_another(full, g):
    noted = []
    hook = full.get_input_embeddings().register_forward_hook(lambda m, i, out: (out.retain_grad(), noted.append(out))[0])
    try: logps = group_logps(full, *g.shared)
    finally: hook.remove()
    prompt, completion = owners(g)
    for i in (1, 2, 5, 8):
        full.zero_grad()
        noted[0].grad = None
        logps[i].sum().backward(retain_graph=True)
        reached = noted[0].grad.abs().sum(1) > 0
        assert not reached[(prompt != g.prompt_of[i]) | ((completion != -1) & (completion != i))].any()
        assert reached[(prompt == g.prompt_of[i]) & (completion == -1) & (torch.cat(g.prompts.ids + (torch.zeros(int(g.mask.sum()), dtype=torch.long),)) != g.prompts.image_token_id)].all()  # its own prompt's words are


# --- pictures -------------------------------------------------------------------------------------------------------------------------

def test_the_vision_tower_runs_once_a_picture_and_learns_the_same(double, g):
    with double_throughout():
        with pictures_read(double) as packed: ours = gradient(double, group_logps(double, *g.shared), g.mask)
        vision = torch.cat([p.grad.flatten() for p in double.model.visual.parameters()])
        with pictures_read(double) as repeated: theirs = gradient(double, plain_logps(double, g), g.mask)
        assert len(packed) == 3 and len(repeated) == 8 and far(ours, theirs) < 1e-10
        assert far(vision, torch.cat([p.grad.flatten() for p in double.model.visual.parameters()])) < 1e-10 and vision.norm() > 1e-2


def test_remembered_pictures_say_the_same_and_are_read_once(full, g):
    remembered = PictureFeatures(full)
    with torch.no_grad(), pictures_read(full) as seen:
        before = group_logps(full, *g.shared)
        assert len(seen) == 3
        for _ in range(3): torch.testing.assert_close(group_logps(full, *g.shared, features=remembered), before, atol=1e-5, rtol=0)
        assert len(seen) == 6 and len(remembered.kept) == 3
        group_logps(full, g.prompts.take([4, 0]), torch.tensor([0, 1]), g.ids[:2], g.mask[:2], features=remembered)
        again = encode_prompts(processor(), [set_messages("Another question.", g.prompts.pictures[1].image.copy())])
        assert remembered(again.pictures)[0] is remembered.kept[again.pictures[0].key] and len(seen) == 6  # by content, not by object
        remembered(g.prompts.pictures[:1] * 3)
        assert len(seen) == 6
        remembered.clear()
        remembered(g.prompts.pictures)
        assert len(seen) == 9
    logps = group_logps(full, *g.shared, features=remembered)
    gradient(full, logps, g.mask)
    assert all(p.grad is None for p in full.model.visual.parameters()) and full.lm_head.weight.grad is not None


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first(full, g):
    pictures = g.prompts.pictures
    tokens, kept = [p.tokens for p in pictures], lambda: [next(i for i, p in enumerate(pictures) if p.key == key) for key in small.kept]
    assert tokens == [16, 15, 12]
    small = PictureFeatures(full, max_tokens=28)
    with pictures_read(full) as seen:
        assert [len(f) for f in small(pictures)] == tokens and kept() == [1, 2]  # all come, even if they cannot all be kept
        small(pictures[:1])
        assert kept() == [2, 0] and len(seen) == 4
        small(pictures[2:])
        assert kept() == [0, 2] and len(seen) == 4  # used again, so it is no longer the oldest
        small(pictures[1:2])
        assert kept() == [2, 1] and len(seen) == 5
    tiny = PictureFeatures(full, max_tokens=1)
    assert len(tiny(pictures[:1])[0]) == tokens[0] and len(tiny.kept) == 1


def test_stale_features_would_be_seen(g):
    model = policy()
    remembered = PictureFeatures(model)
    with torch.no_grad():
        group_logps(model, *g.shared, features=remembered)
        for p in model.model.visual.merger.parameters(): p.mul_(1.05)
        fresh = group_logps(model, *g.shared)
        stale = (group_logps(model, *g.shared, features=remembered) - fresh).abs().max()
        remembered.clear()
        assert stale > 1e-3 and (group_logps(model, *g.shared, features=remembered) - fresh).abs().max() < 1e-5


# --- cutting --------------------------------------------------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.integers(1, 50), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=1, max_size=6), st.integers(1, 200))
def test_every_completion_stands_in_one_row_and_rows_keep_the_budget(sizes, budget):
    prompts, completions = [p for p, _ in sizes], [n for _, group in sizes for n in group]
    prompt_of = [k for k, (_, group) in enumerate(sizes) for _ in group]
    rows = list(cut_groups(prompts, completions, prompt_of, budget))
    assert [i for row in rows for i in row] == list(range(len(completions))) and all(rows)  # each once, in order
    size = lambda row: sum(completions[i] for i in row) + sum(prompts[k] for k in {prompt_of[i] for i in row})
    assert all(size(row) <= budget or len(row) == 1 for row in rows)
    assert all(size([*a, b[0]]) > budget for a, b in zip(rows, rows[1:]))  # no row ends early


@settings(max_examples=5)
@given(st.integers(1, 700))
def test_parts_add_up_to_the_whole(budget):
    g, model = groups(), DOUBLE[0] if DOUBLE else DOUBLE.append(policy(dtype="float64")) or DOUBLE[0]
    w = weights(g.mask)
    with double_throughout():
        if len(DOUBLE) == 1: DOUBLE.append(gradient(model, group_logps(model, *g.shared), g.mask))
        model.zero_grad()
        rows = list(cut_groups(g.prompts.lengths.tolist(), g.mask.sum(1).tolist(), g.prompt_of.tolist(), budget))
        for row in rows:
            kept, of = g.prompt_of[row].unique(return_inverse=True)
            (group_logps(model, g.prompts.take(kept), of, g.ids[row], g.mask[row]) * w[row]).sum().backward()
        assert far(torch.cat([p.grad.flatten() for p in model.parameters()]), DOUBLE[1]) < 1e-10


DOUBLE = []  # the policy and its whole gradient, made once for all budgets


def test_a_long_group_is_split_and_its_parts_keep_the_prompt(full, g):
    rows = list(cut_groups(g.prompts.lengths.tolist(), g.mask.sum(1).tolist(), g.prompt_of.tolist(), int(g.prompts.lengths[0]) + 8))
    assert rows[:2] == [[0, 1], [2]] or rows[0] == [0]  # the first group does not fit whole
    with torch.no_grad():
        whole = group_logps(full, *g.shared)
        for row in rows:
            kept, of = g.prompt_of[row].unique(return_inverse=True)
            assert (group_logps(full, g.prompts.take(kept), of, g.ids[row], g.mask[row]) - whole[row]).abs().max() < 1e-5


def test_a_head_in_chunks_is_the_same_head(double, g, monkeypatch):
    with double_throughout():
        (a, e), ours = group_logps(double, *g.shared, 0.7, with_entropy=True), gradient(double, group_logps(double, *g.shared, 0.7), g.mask)
        widths = []
        original = emo_r3.groups.logits_to_logps
        monkeypatch.setattr(emo_r3.groups, "logits_to_logps", lambda model, logits, *rest: (widths.append(logits.shape[1]), original(model, logits, *rest))[1])
        monkeypatch.setattr(emo_r3.groups, "LOGITS_AT_ONCE", 7 * 1216 + 5)
        (b, f), theirs = group_logps(double, *g.shared, 0.7, with_entropy=True), gradient(double, group_logps(double, *g.shared, 0.7), g.mask)
    n = int(g.mask.sum())
    assert max(widths) == 7 and widths[: n // 7 + 1] == [7] * (n // 7) + [n % 7]
    assert (a - b).abs().max() < 1e-12 and (e - f).abs().max() < 1e-12 and far(theirs, ours) < 1e-12


# --- checkpoints, and the model afterwards --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_teach_the_same(kind, g):
    model, runs = policy(kind), []
    plain = gradient(model, group_logps(model, *g.shared), g.mask)
    hook = unwrapped(model).model.language_model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        with checkpointed(model):
            packed = gradient(model, group_logps(model, *g.shared), g.mask)
            assert len(runs) == 2  # forward, and again in the backward pass
            repeated = gradient(model, plain_logps(model, g), g.mask)
        runs.clear()
        with checkpointed(model, on=False): gradient(model, group_logps(model, *g.shared), g.mask)
        assert len(runs) == 1 and not any(m.training for m in model.modules())
    finally: hook.remove()
    assert far(packed, plain) < 1e-6 and far(repeated, plain) < 1e-5


def test_sampling_after_a_checkpointed_update_is_as_before(full, g):
    draw = lambda shared: PolicySampler(full, processor(), shared_prefix=shared).draw(g.prompts, 2, 8, 1.0, 0)[0]
    before = draw(True)
    with pytest.raises(RuntimeError, match="interrupted"), checkpointed(full):
        group_logps(full, *g.shared).sum().backward()
        raise RuntimeError("interrupted")
    assert torch.equal(draw(True), before) and torch.equal(draw(False), before)


def test_the_model_works_by_transformers_own_forward_as_before(g, tmp_path):
    model = load_policy()
    rows = g.prompts.take([0, 1, 2]).padded()
    options = dict(max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        before, wrote = model(**rows).logits, model.generate(**rows, **options)
        group_logps(model, *g.shared)
        PolicySampler(model, processor()).draw(g.prompts, 2, 6, 1.0, 0)
        model.model.rope_deltas = None
        assert torch.equal(model(**rows).logits, before) and torch.equal(model.generate(**rows, **options), wrote)
    saved = save_policy(model, processor(), tmp_path / "p")
    assert "emo_r3" not in (saved / "config.json").read_text()  # nobody else knows our attention
    with torch.no_grad(): assert torch.equal(load_policy(saved)(**rows).logits, before)


def test_a_page_run_in_the_same_process_changes_nothing(full, g):
    "`nbdev_test` runs several pages in one process; page 09 then registers attention and masks of its own under the same name."
    model, prompts = full, g.prompts
    before = group_logps(model, *g.shared), PolicySampler(model, processor()).draw(prompts, 2, 8, 1.0, 0)
    found = importlib.util.find_spec("emo_r3.groups")
    page = importlib.util.module_from_spec(found)
    page.__package__ = "emo_r3"
    try:
        found.loader.exec_module(page)
        assert ALL_ATTENTION_FUNCTIONS[emo_r3.groups.SHARED] is page.shared_attention is not emo_r3.groups.shared_attention
        assert torch.equal(group_logps(model, *g.shared), before[0])
        for now, then in zip(PolicySampler(model, processor()).draw(prompts, 2, 8, 1.0, 0), before[1], strict=True): assert torch.equal(now, then)
    finally: ALL_ATTENTION_FUNCTIONS.register(emo_r3.groups.SHARED, emo_r3.groups.shared_attention)

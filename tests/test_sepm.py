"""SEPM: its thresholds by hand, its attention against transformers' own, its shortened rows against masked whole ones, its routes enumerated, on Qwen2.5-VL and on LLaVA."""
import math
from dataclasses import replace
from statistics import pvariance, variance

import llavas
import pytest
import torch
from policies import policy as embedded, positions_by_hand
from transformers import AutoModelForImageTextToText

from emo_r3 import sepm
from emo_r3.cli import WITHOUT_TRAINING
from emo_r3.data import EMOSET8, EMOTION6, WEBEMO7, EmotionExample, LabelSet
from emo_r3.evaluate import compare, evaluate, read_predictions, report_table, write_predictions
from emo_r3.policy import EMBEDDED_POLICY, encode_prompts, load_policy, load_processor
from emo_r3.prompts import direct_messages
from emo_r3.sampling import PolicySampler, answer_rows
from emo_r3.scenes import make_scenes
from emo_r3.sepm import (SEPM_CODE, SEPM_METHODS, SEPM_PAPER, SEPMSettings, kept_tokens, label_messages, labels_of, last_layer_noted, least_gap, look, phrase_slots, polarity_messages, rows_without,
                         sepm_answers, sepm_report, settled_polarity, token_positions)

SIZES = [(96, 96), (160, 96), (60, 150)]  # three shapes of grids


@pytest.fixture(scope="module")
def pictures(): return [x.image.resize(s) for x, s in zip(make_scenes("in_domain", "test", 3), SIZES)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory): return {"qwen": EMBEDDED_POLICY, "llava": llavas.folder(tmp_path_factory.mktemp("llava"))}


@pytest.fixture(scope="module", params=["qwen", "llava"])
def pair(request, folders): return load_policy(folders[request.param]), load_processor(folders[request.param])


@pytest.fixture(scope="module")
def qwen(): return load_policy(), load_processor()


# ---- numbers

def test_thresholds_are_those_that_are_published():
    assert round(SEPM_PAPER.threshold, 3) == 0.632 and round(SEPM_CODE.threshold, 3) == 0.447
    assert (SEPM_PAPER.drop, SEPM_CODE.drop) == (0.2, 0.1)
    assert SEPM_PAPER.threshold == pytest.approx(math.sqrt(0.4)) and SEPM_CODE.threshold == pytest.approx(math.sqrt(0.2))


@pytest.mark.parametrize("sample, spread", [(False, pvariance), (True, variance)])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.2])
def test_a_gap_is_sure_where_the_variance_reaches_alpha(sample, spread, alpha):
    threshold, near = least_gap(alpha, sample), 0
    for i in range(101):
        for j in range(101 - i):
            a, b = i / 100, j / 100
            if abs(spread([a, b]) - alpha) < 1e-9: near += 1; continue
            assert (settled_polarity(a, b, threshold) is not None) == (spread([a, b]) > alpha), (a, b)
    assert near < 200


@pytest.mark.parametrize("alpha, sample", [(-0.1, False), (0.26, False), (0.51, True), (float("nan"), False)])
def test_an_alpha_out_of_reach_is_refused(alpha, sample):
    with pytest.raises(ValueError, match=f"alpha = {alpha}; allowed: 0 to {0.5 if sample else 0.25}"): least_gap(alpha, sample)


@pytest.mark.parametrize("a, b, paper, code", [(0.9, 0.1, "positive", "positive"), (0.1, 0.9, "negative", "negative"), (0.75, 0.25, None, "positive"), (0.25, 0.75, None, "negative"),
                                               (0.7, 0.3, None, None), (0.5, 0.5, None, None), (0.6, 0.0, None, "positive"), (0.0, 0.633, "negative", "negative"), (0.004, 0.0, None, None)])
def test_what_stage_1_settles(a, b, paper, code):
    assert (settled_polarity(a, b, SEPM_PAPER.threshold), settled_polarity(a, b, SEPM_CODE.threshold)) == (paper, code)


def test_a_gap_on_the_threshold_is_sure(): assert settled_polarity(0.75, 0.25, 0.5) == "positive" and settled_polarity(0.25, 0.75, 0.5) == "negative"


@pytest.mark.parametrize("attention, drop, kept", [
    ([5, 1, 4, 2, 3], 0.2, [1, 0, 1, 1, 1]), ([5, 1, 4, 2, 3], 0.4, [1, 0, 1, 0, 1]), ([5, 1, 4, 2, 3], 0.1, [1] * 5),  # a half token is none
    ([1, 1, 1, 1], 0.5, [0, 0, 1, 1]), ([5, 1, 4, 2, 3], 0.0, [1] * 5), ([3, 2, 1], 0.99, [1, 0, 0]), ([2.0, 1.0], 0.5, [1, 0])])
def test_the_least_seen_tokens_go(attention, drop, kept): assert kept_tokens(torch.tensor(attention, dtype=torch.float), drop).long().tolist() == kept


@pytest.mark.parametrize("n, drop, gone", [(576, 0.2, 115), (576, 0.1, 57), (20, 0.1, 2), (10, 0.2, 2), (30, 0.1, 3), (15, 0.2, 3), (70, 0.1, 7), (100, 0.29, 29)])
def test_a_share_is_not_lost_to_rounding(n, drop, gone): assert int((~kept_tokens(torch.rand(n), drop)).sum()) == gone


# ---- settings and questions

def test_names_are_those_of_the_command(): assert tuple(SEPM_METHODS) == WITHOUT_TRAINING and all(s.name == name for name, s in SEPM_METHODS.items())


@pytest.mark.parametrize("field, value", [("threshold", -0.1), ("threshold", 1.1), ("threshold", float("nan")), ("drop", -0.1), ("drop", 1.0), ("drop", float("nan")), ("phrase", "look well"), ("phrase", "")])
def test_settings_that_cannot_work_name_their_field(field, value):
    with pytest.raises(ValueError, match=f"^{field} = "): replace(SEPM_PAPER, **{field: value})


@pytest.mark.parametrize("label_set, positive", [(EMOSET8, {"amusement", "awe", "contentment", "excitement"}), (EMOTION6, {"joy", "surprise"}), (WEBEMO7, {"love", "joy", "surprise"})])
def test_halves_are_apart_and_whole_together(label_set, positive):
    halves = [labels_of(label_set, p) for p in ("positive", "negative")]
    assert set(halves[0]) == positive and set(halves[1]) == set(label_set) - positive and labels_of(label_set, None) is label_set
    assert all(a.aliases == {w: l for w, l in label_set.aliases.items() if l in a.labels} for a in halves)


def test_a_label_set_without_polarity_is_refused(qwen, pictures):
    plain = LabelSet("plain", ("calm", "storm"))
    with pytest.raises(ValueError, match="label set plain: polarity is unknown"): sepm_report(*qwen, [EmotionExample(pictures[0], "Which?", "calm", plain)])
    sunny = LabelSet("sunny", ("calm", "joy"), polarity={"calm": "positive", "joy": "positive"})
    with pytest.raises(ValueError, match="label set sunny: none of its labels is negative"): sepm_answers(*qwen, pictures[:1], sunny)


def test_what_cannot_be_evaluated_is_named(qwen):
    xs = make_scenes("in_domain", "test", 1)
    for examples, more, says in ((xs + make_scenes("faces", "test", 1), {}, "mixed"), ([], {}, "there are none"), (xs, {"mode": "loose"}, "mode"), (xs, {"batch_size": 0}, "batch_size"), (xs, {"max_new_tokens": 0}, "max_new_tokens")):
        with pytest.raises(ValueError, match=says): sepm_report(*qwen, examples, **more)


def test_options_that_begin_alike_are_refused(qwen, pictures):
    with pytest.raises(ValueError, match="options = .*differ in their first token"): look(*qwen, pictures[:1], replace(SEPM_PAPER, options=("positive", "positively")))
    with pytest.raises(ValueError, match="options"): look(*qwen, pictures[:1], replace(SEPM_PAPER, options=("", "B")))


# ---- the phrase

@pytest.mark.parametrize("focus, phrase", [("Please focus on emotion.", "focus on emotion"), ("Bitte, 感情に focus on emotion — 注目!", "focus on emotion"), ("感情に注目", "感情"), ("focus on emotion. focus on emotion.", "focus on emotion")])
def test_the_phrase_is_where_its_letters_are(pair, pictures, focus, phrase):
    _, processor = pair
    asked = polarity_messages(pictures[0], replace(SEPM_PAPER, focus=focus, phrase=phrase))
    prompts = encode_prompts(processor, [asked])
    slots = phrase_slots(processor, asked, prompts.ids[0], prompts.pictures[0], phrase)
    said = processor.tokenizer.decode(prompts.ids[0][slots])
    assert slots == list(range(slots[0], slots[-1] + 1)) and phrase in said and len(said.strip()) <= len(phrase) + 1
    assert phrase not in processor.tokenizer.decode(prompts.ids[0][slots[1:]]) and phrase not in processor.tokenizer.decode(prompts.ids[0][slots[:-1]])
    assert phrase not in processor.tokenizer.decode(prompts.ids[0][: slots[0]])  # the first of two


def test_a_phrase_that_is_not_asked_is_refused(pair, pictures):
    _, processor = pair
    asked = polarity_messages(pictures[0], SEPM_PAPER)
    prompts = encode_prompts(processor, [asked])
    with pytest.raises(ValueError, match="phrase 'calm seas': not in the prompt"): phrase_slots(processor, asked, prompts.ids[0], prompts.pictures[0], "calm seas")


# ---- stage 1

def eager(folder): return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype="float32").eval()


@pytest.mark.parametrize("kind", ["qwen", "llava"])
def test_attention_is_transformers_own(kind, folders, pictures):
    model, processor = load_policy(folders[kind]), load_processor(folders[kind])
    asked = [polarity_messages(p, SEPM_PAPER) for p in pictures]
    prompts, peer = encode_prompts(processor, asked), eager(folders[kind])
    seen = look(model, processor, pictures, SEPM_PAPER)  # one ragged batch
    options = [processor.tokenizer.encode(o, add_special_tokens=False)[0] for o in ("A", "B")]
    for i, m in enumerate(asked):
        alone = prompts.take([i])
        with torch.no_grad(): out = peer(**alone.padded(), output_attentions=True)
        text = processor.tokenizer.decode(alone.ids[0])
        slots = phrase_slots(processor, m, alone.ids[0], alone.pictures[0], "focus on emotion")
        expected = out.attentions[-1][0].mean(0)[slots].mean(0)[alone.ids[0] == prompts.image_token_id]  # heads, then words
        assert "focus on emotion" in text and expected.std() > 1e-4
        torch.testing.assert_close(seen[i][2], expected, atol=1e-6, rtol=1e-4)
        assert torch.equal(kept_tokens(seen[i][2], 0.2), kept_tokens(expected, 0.2))
        p = out.logits[0, -1].softmax(-1)[options]
        torch.testing.assert_close(torch.tensor(seen[i][:2]), p, atol=1e-6, rtol=1e-2)  # the sampler forbids a few tokens, which takes next to nothing away


def test_looking_leaves_the_model_as_it_was(pair, pictures):
    model, processor = pair
    before = model.model.language_model.config._attn_implementation
    look(model, processor, pictures, SEPM_PAPER)
    with pytest.raises(ZeroDivisionError), last_layer_noted(model, [[1]], [2]): 1 / 0
    layer = model.model.language_model.layers[-1].self_attn
    assert model.model.language_model.config._attn_implementation == before and "noted" not in layer.__dict__


# ---- stage 2

def asked_and_kept(processor, pictures, drop=0.2, seed=0):
    prompts = encode_prompts(processor, [label_messages(p, EMOSET8, s, SEPM_PAPER) for p, s in zip(pictures, (None, "positive", "negative"))])
    gen = torch.Generator().manual_seed(seed)
    return prompts, [kept_tokens(torch.rand(prompts.pictures[p].tokens, generator=gen), drop) for p in prompts.picture_of]


def test_without_dropping_it_is_the_ordinary_forward(pair, pictures):
    model, processor = pair
    prompts, kept = asked_and_kept(processor, pictures, drop=0.0)
    rows, whole = rows_without(model, prompts, kept), prompts.padded()
    assert all(k.all() for k in kept) and torch.equal(rows["attention_mask"], whole["attention_mask"])
    with torch.no_grad(): torch.testing.assert_close(model(**rows).logits[:, -1], model(**whole).logits[:, -1], atol=1e-5, rtol=0)
    sampler = PolicySampler(model, processor, shared_prefix=False)
    chats = [label_messages(p, EMOSET8, s, SEPM_PAPER) for p, s in zip(pictures, (None, "positive", "negative"))]
    assert answer_rows(model, processor, rows, 12)[0] == sampler.sample(chats, 1, 12, 0.0).texts


def test_tokens_that_stay_stand_where_they_stood(qwen, pictures):
    model, processor = qwen
    prompts, kept = asked_and_kept(processor, pictures)
    whole = prompts.padded()
    theirs, _ = model.model.get_rope_index(whole["input_ids"], mm_token_type_ids=whole["mm_token_type_ids"], image_grid_thw=whole["image_grid_thw"], attention_mask=whole["attention_mask"])
    rows = rows_without(model, prompts, kept)
    for i, (ids, keep) in enumerate(zip(prompts.ids, kept)):
        by_hand = torch.tensor(positions_by_hand(ids, prompts.image_token_id, *prompts.pictures[i].shape)[0]).T  # (3, P)
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[(ids == prompts.image_token_id).nonzero()[:, 0][~keep]] = False
        n = int(stays.sum())
        assert torch.equal(token_positions(model, ids, prompts.pictures[i]), by_hand) and torch.equal(theirs[:, i, -len(ids):], by_hand)
        assert n == len(ids) - int((~keep).sum()) == int(rows["attention_mask"][i].sum()) and torch.equal(rows["position_ids"][:, i, -n:], by_hand[:, stays])
    assert len({p.shape for p in prompts.pictures}) == 3 and len(set(rows["attention_mask"].sum(1).tolist())) == 3


def test_llava_counts_along_one_line(folders, pictures):
    model, processor = load_policy(folders["llava"]), load_processor(folders["llava"])
    prompts, kept = asked_and_kept(processor, pictures)
    rows = rows_without(model, prompts, kept)
    for i, (ids, keep) in enumerate(zip(prompts.ids, kept)):
        at, image = [], iter(keep.tolist())
        for t, token in enumerate(ids.tolist()):
            if token != prompts.image_token_id or next(image): at.append(t)
        assert rows["position_ids"][i, -len(at):].tolist() == at and at[-1] == len(ids) - 1


def masked_whole(model, prompts, kept, i, said=()):
    "One whole prompt, every token in its place, with the tokens that go hidden from all others; and what was said after it."
    alone, hidden = prompts.take([i]), torch.zeros(len(prompts.ids[i]), dtype=torch.bool)
    hidden[(prompts.ids[i] == prompts.image_token_id).nonzero()[:, 0][~kept[i]]] = True
    places = token_positions(model, alone.ids[0], alone.pictures[0])
    places = torch.cat([places, places.max() + 1 + torch.arange(len(said)).expand(len(places), -1)], 1)
    more = torch.tensor([list(said)], dtype=torch.long)
    rows = alone.padded()
    rows |= {"input_ids": torch.cat([rows["input_ids"], more], 1), "attention_mask": torch.cat([~hidden, torch.ones(len(said), dtype=torch.bool)]).long()[None], "position_ids": places[:, None] if len(places) == 3 else places}
    if "mm_token_type_ids" in rows: rows["mm_token_type_ids"] = torch.cat([rows["mm_token_type_ids"], torch.zeros_like(more)], 1)
    with torch.no_grad(): return model(**rows).logits[0, -1]


def test_going_without_is_not_being_seen(pair, pictures):
    model, processor = pair
    prompts, kept = asked_and_kept(processor, pictures, drop=0.4)
    rows = rows_without(model, prompts, kept)
    with torch.no_grad(): short, closed = model(**rows).logits[:, -1], model(**{k: v for k, v in rows.items() if k != "position_ids"} | {"position_ids": rows["attention_mask"].cumsum(1) - 1}).logits[:, -1]
    for i in range(3): torch.testing.assert_close(short[i], masked_whole(model, prompts, kept, i), atol=2e-5, rtol=0)
    assert (short - closed).abs().max() > 1e-3  # closing the gaps is another picture


def test_an_answer_goes_on_where_the_whole_prompt_ended(pair, pictures):
    model, processor = pair
    prompts, kept = asked_and_kept(processor, pictures, drop=0.4)
    texts, ended = answer_rows(model, processor, rows_without(model, prompts, kept), 8)
    ends = {processor.tokenizer.eos_token_id}
    banned = torch.tensor([t for n in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id") if (t := getattr(model.config, n, None)) is not None])
    for i in range(3):
        said = []
        while len(said) < 8 and not ends & set(said): said.append(int(masked_whole(model, prompts, kept, i, said).index_fill(0, banned, float("-inf")).argmax()))
        assert texts[i] == processor.tokenizer.decode(said, skip_special_tokens=True) and ended[i] == bool(ends & set(said)), i


# ---- both stages

def test_a_batch_is_every_picture_alone(pair, pictures):
    model, processor = pair
    together = sepm_answers(model, processor, pictures, EMOSET8, max_new_tokens=10)
    for image, a in zip(pictures, together):
        (b,) = sepm_answers(model, processor, [image], EMOSET8, max_new_tokens=10)
        assert (a.text, a.ended, a.polarity) == (b.text, b.ended, b.polarity) and torch.equal(a.kept, b.kept)
        torch.testing.assert_close(a.attention, b.attention, atol=1e-6, rtol=1e-4)
        assert (a.p_positive, a.p_negative) == pytest.approx((b.p_positive, b.p_negative), rel=1e-3, abs=1e-7)


def test_the_same_picture_twice_is_asked_twice(qwen, pictures):
    a, b = sepm_answers(*qwen, [pictures[0], pictures[0]], EMOSET8, max_new_tokens=10)
    assert a.text == b.text and torch.equal(a.attention, b.attention)


POSITIVE, NEGATIVE = "amusement, awe, contentment, excitement", "anger, disgust, fear, sadness"
ALL = "amusement, anger, awe, contentment, disgust, excitement, fear, sadness"
ROUTES = {(0.9, 0.05): POSITIVE, (0.05, 0.9): NEGATIVE, (0.5, 0.5): ALL, (0.8, 0.2): {"sepm": ALL, "sepm_code": POSITIVE}, (0.2, 0.8): {"sepm": ALL, "sepm_code": NEGATIVE}, (0.0, 0.0): ALL, (1.0, 0.0): POSITIVE, (0.0, 1.0): NEGATIVE}


@pytest.mark.parametrize("settings", SEPM_METHODS.values(), ids=SEPM_METHODS)
def test_every_route(qwen, pictures, monkeypatch, settings):
    "Stage 1 is told, stage 2's question is read."
    model, processor = qwen
    chats, seen = [], torch.arange(16.0)
    monkeypatch.setattr(sepm, "look", lambda model, processor, images, s: [(*p, seen) for p in ROUTES])
    monkeypatch.setattr(sepm, "encode_prompts", lambda processor, messages: (chats.extend(messages), encode_prompts(processor, messages))[1])
    monkeypatch.setattr(sepm, "answer_rows", lambda model, processor, rows, n: ([str(int(m)) for m in rows["attention_mask"].sum(1)], [True] * len(ROUTES)))
    answers = sepm_answers(model, processor, [pictures[0]] * len(ROUTES), EMOSET8, settings)
    whole = encode_prompts(processor, chats).lengths.tolist()
    for (p, labels), chat, a, n in zip(ROUTES.items(), chats, answers, whole, strict=True):
        labels = labels[settings.name] if isinstance(labels, dict) else labels
        (text,) = [c["text"] for c in chat[0]["content"] if c["type"] == "text"]
        hint = "This is an ambiguous emotion.\n" if labels == ALL else ""
        assert text.startswith(f"Please focus on emotion.\n{hint}Which emotion does this picture evoke? Choose one of: {labels}."), (p, text)
        assert a.polarity == {POSITIVE: "positive", NEGATIVE: "negative", ALL: None}[labels] and a.gap == abs(p[0] - p[1])
        gone = {"sepm": 3, "sepm_code": 1}[settings.name]  # of 16
        assert int(a.text) == n - gone and a.kept.flatten().tolist() == [False] * gone + [True] * (16 - gone) and a.kept.shape == (4, 4)


def test_the_report_is_one_that_every_table_takes(qwen, tmp_path, monkeypatch):
    xs = make_scenes("in_domain", "test", 12)
    texts = iter([r"\boxed{%s}" % x.label for x in xs[:5]] + [r"\boxed{joy}", "awe", r"\boxed{Fear }", "", *[r"\boxed{awe}"] * 3])
    with monkeypatch.context() as m:
        m.setattr(sepm, "answer_rows", lambda model, processor, rows, n: ([next(texts) for _ in rows["attention_mask"]], [True] * len(rows["attention_mask"])))
        report = sepm_report(*qwen, xs, SEPM_CODE, batch_size=5)
    gold = [x.label for x in xs]
    assert [g.predicted for g in report.predictions] == [*gold[:5], None, None, "fear", None, "awe", "awe", "awe"] and [g.id for g in report.predictions] == [x.id for x in xs]
    assert report.correct == 5 + (gold[7] == "fear") + sum(l == "awe" for l in gold[9:]) and report.unparsed == 3 / 12 and report.method == "sepm_code" and report.label_set is EMOSET8
    assert report.grounding is None and report.to_dict()["n"] == 12 and "in_domain" in report_table({"in_domain": report})
    plain = evaluate(PolicySampler(*qwen), xs, method="direct", max_new_tokens=16)
    assert compare(plain, report).n == 12
    assert read_predictions(write_predictions(tmp_path / "p.jsonl", {"in_domain": report}))["in_domain"].predictions == report.predictions


def test_batches_do_not_matter_to_the_report(pair):
    xs = make_scenes("faces", "test", 5)
    a, b = (sepm_report(*pair, xs, batch_size=n, max_new_tokens=10) for n in (5, 2))
    assert a.predictions == b.predictions and a.label_set is EMOTION6 and a.n == 5


def test_an_answer_that_is_cut_is_noticed(qwen):
    assert sepm_report(*qwen, make_scenes("in_domain", "test", 2), max_new_tokens=1).clipped == 1.0


def test_an_adapter_answers_as_its_merged_weights(qwen, pictures):
    worn = embedded("lora")
    a = sepm_answers(worn, qwen[1], pictures, EMOSET8, max_new_tokens=10)
    b = sepm_answers(embedded("lora").merge_and_unload(), qwen[1], pictures, EMOSET8, max_new_tokens=10)
    plain = sepm_answers(*qwen, pictures, EMOSET8, max_new_tokens=10)
    for x, y, z in zip(a, b, plain):
        torch.testing.assert_close(x.attention, y.attention, atol=1e-5, rtol=1e-3)
        assert x.text == y.text and (x.attention - z.attention).abs().max() > 1e-4


def test_pictures_of_half_the_precision(folders, pictures):
    for folder in folders.values():
        model, processor = load_policy(folder, dtype="bfloat16"), load_processor(folder)
        assert len(sepm_answers(model, processor, pictures, EMOSET8, max_new_tokens=4)) == 3


def test_the_command_measures_both(tmp_path, capsys):
    import json
    from emo_r3.cli import main
    for method in WITHOUT_TRAINING:
        assert main(["evaluate", "embedded", "scenes:faces", "--size", "4", "--method", method, "--output", str(tmp_path / f"{method}.json")]) in (0, None)
        figures = json.loads((tmp_path / f"{method}.json").read_text())["domains"]["faces"]
        assert figures["method"] == method and figures["n"] == 4
    capsys.readouterr()

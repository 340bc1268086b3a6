"Evaluation: the denominator, the intervals, the pairs, the judge's shares, the tables, and one picture's probabilities."

import io
import json
import math
from dataclasses import replace
from datetime import datetime
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.stats import binom, binomtest
from sklearn.metrics import f1_score

from emo_r3 import evaluate as module
from emo_r3.data import EMOSET8, EMOTION6, DataError, EmotionExample, LabelSet, emotion_question
from emo_r3.embedded.warm_up import build_image_processor, build_model, build_tokenizer
from emo_r3.evaluate import (ClassScore, Comparison, EvalReport, Graded, Prediction, before_after_table, class_scores, compare, confusion_counts, evaluate, grade,
                             label_probabilities, macro_f1, mean_or_none, plot_confusion, plot_prediction, predict, report_table, upload_widget, wilson_interval)
from emo_r3.parsing import description, parse_set, parse_think
from emo_r3.policy import VLProcessor
from emo_r3.prompts import EVAL_METHODS, PromptTemplates, set_messages
from emo_r3.rewards import RewardWeights
from emo_r3.sampling import Rollouts, score_answers
from emo_r3.scenes import BOOK_COMPLETIONS, book_example, named_objects

GHOST = book_example()
C1, C2, C3, C4 = BOOK_COMPLETIONS
BLUE = C1.replace("shiver and want to hide", "laugh at the joke")  # amused reasoning, and fear in the box


class Script:
    "Says what it was told to, and notes how it was asked."
    def __init__(self, texts, ended=True): self.texts, self.calls, self.ended = list(texts), [], ended

    def sample(self, messages, num_generations, max_new_tokens, temperature=1.0, seed=None):
        self.calls.append(SimpleNamespace(messages=messages, num_generations=num_generations, max_new_tokens=max_new_tokens, temperature=temperature))
        n = len(messages)
        said, self.texts = self.texts[:n], self.texts[n:]
        return Rollouts({}, torch.zeros(n, 1).long(), torch.ones(n, 1).long(), torch.zeros(n, 1), torch.full((n,), self.ended), tuple(said), 1)


class BookJudge:
    "Knows the ghost's picture and two feelings; `nods` says Yes to every description."
    def __init__(self, nods=False): self.nods, self.asked = nods, []

    def score(self, messages, answers):
        texts = [m[0]["content"][-1]["text"] for m in messages]
        self.asked += texts
        return [[0.0 if a == self.wanted(t) else -9.0 for a in options] for t, options in zip(texts, answers)]

    def wanted(self, text):
        if "Yes or No" in text: return "Yes" if self.nods or set(named_objects(text)) <= set(GHOST.objects) else "No"
        return "amusement" if "laugh" in text else "fear"


def ghosts(n): return [replace(GHOST, id=f"ghost {i}") for i in range(n)]


def run(*texts, **options): return evaluate(Script(texts), ghosts(len(texts)), **options)


def report_of(pairs, label_set=EMOSET8, **fields):
    return EvalReport(tuple(Graded(str(i), label, predicted, "", True, **fields) for i, (label, predicted) in enumerate(pairs)), label_set, "set", "strict")


labels8 = st.sampled_from(EMOSET8.labels)
answered = st.lists(st.tuples(labels8, st.one_of(st.none(), labels8)), min_size=1, max_size=40)


# --- the denominator

def test_every_sample_is_counted():
    r = run(C1, C1.replace(r"\boxed{fear}", ""), C1.replace("fear}", "neutral}"), "", C2)
    assert (r.n, r.accuracy, r.unparsed) == (5, 1 / 5, 3 / 5)
    assert [g.predicted for g in r.predictions] == ["fear", None, None, None, "amusement"]
    assert [g.id for g in r.predictions] == [f"ghost {i}" for i in range(5)]


def test_strict_and_lenient_on_the_same_texts():
    texts = [C1.replace("{fear}", box) for box in (r"{\text{fear}}", "{Fear}", "{fearful}", "{not fear}", "{fearless}")]
    assert [g.correct for g in run(*texts).predictions] == [False, True, False, False, False]
    assert [g.correct for g in run(*texts, mode="lenient").predictions] == [True, True, True, False, False]


def test_book_completions_under_all_that_is_known():
    r = run(*BOOK_COMPLETIONS, BLUE, judge=BookJudge())
    assert [g.correct for g in r.predictions] == [True, False, True, True, True]
    assert [g.well_formed for g in r.predictions] == [True, True, True, False, True]
    assert [g.grounded for g in r.predictions] == [True, True, False, True, True]
    assert [g.coverage for g in r.predictions] == pytest.approx([1, 2 / 3, 0, 2 / 3, 1])
    assert [g.judged for g in r.predictions] == [True, True, True, False, True]
    assert [g.judged_label for g in r.predictions] == ["fear", "amusement", "fear", None, "amusement"]
    assert (r.format, r.consistent, r.faithfulness, r.judge_accuracy, r.judge_catches) == (4 / 5, 3 / 4, 3 / 4, 1.0, 1.0)
    assert r.predictions[3].why


@settings(max_examples=60)
@given(st.lists(st.one_of(st.text(max_size=80), st.sampled_from([C1, C4, "\\boxed{", "\\boxed{}", "<think>", "<step1></step1>", "\ud800", "{" * 50])), min_size=1, max_size=6),
       st.sampled_from(EVAL_METHODS), st.sampled_from(["strict", "lenient"]))
def test_no_text_breaks_it(texts, method, mode):
    r = run(*texts, method=method, mode=mode)
    assert r.n == len(texts) and all(g.predicted is None or g.predicted in EMOSET8 for g in r.predictions)
    assert r.accuracy + r.unparsed <= 1
    json.dumps(r.to_dict(), allow_nan=False)


# --- how the sampler is asked

def test_it_is_greedy_and_batched():
    sampler = Script([C1] * 5)
    evaluate(sampler, ghosts(5), max_new_tokens=77, batch_size=2)
    assert [len(c.messages) for c in sampler.calls] == [2, 2, 1]
    assert {(c.num_generations, c.temperature, c.max_new_tokens) for c in sampler.calls} == {(1, 0.0, 77)}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_changes_nothing(batch_size):
    assert run(*BOOK_COMPLETIONS, BLUE, judge=BookJudge(), batch_size=batch_size) == run(*BOOK_COMPLETIONS, BLUE, judge=BookJudge(), batch_size=5)


def test_each_method_asks_its_own_prompt_about_the_picture():
    marks = {"grpo": "<think>", "set": "<step1>", "emo_r3": "<step1>", "sft": "Answer with the emotion in", "direct": "Answer with the emotion in"}
    for method in EVAL_METHODS:
        sampler = Script([C1])
        evaluate(sampler, [GHOST], method=method)
        picture, text = sampler.calls[0].messages[0][0]["content"]
        assert picture["image"].size == GHOST.image.size and GHOST.question in text["text"]
        assert [m for m, mark in marks.items() if mark in text["text"]] == [m for m in marks if marks[m] == marks[method]]


def test_own_templates_and_tags_are_followed():
    templates = PromptTemplates(set="{question} <a></a> <b></b> <c></c> \\boxed{}", tags=("a", "b", "c"))
    text = "<a>A ghost.</a><b>A shiver.</b><c>Negative.</c>\\boxed{fear}"
    assert run(text, templates=templates).format == 1.0 and run(text).format == 0.0


def test_too_few_completions_are_an_error():
    with pytest.raises(ValueError): evaluate(Script([C1]), ghosts(2))


def test_completions_that_ran_into_the_limit_are_counted():
    assert evaluate(Script([C1, C1], ended=False), ghosts(2)).clipped == 1.0 and run(C1).clipped == 0.0


def test_it_reads_pictures_from_files(tmp_path):
    GHOST.image.save(tmp_path / "a.png")
    example = EmotionExample(tmp_path / "a.png", GHOST.question, "fear", EMOSET8, id="a")
    r = evaluate(Script([C1]), [example])
    assert r.accuracy == 1.0 and r.grounding is None and r.coverage is None
    with pytest.raises(FileNotFoundError, match="gone.png"): evaluate(Script([C1]), [replace(example, image=tmp_path / "gone.png")])


@pytest.mark.parametrize("options, said", [
    (dict(method="emo-r3"), "method: got 'emo-r3'; allowed: grpo, set, emo_r3, sft, direct; did you mean 'emo_r3'?"),
    (dict(mode="leniant"), "mode: got 'leniant'; allowed: strict, lenient; did you mean 'lenient'?"),
    (dict(batch_size=0), "batch_size = 0; allowed: 1 or more"), (dict(examples=[]), "examples: there are none"),
])
def test_what_cannot_be_evaluated_is_said(options, said):
    with pytest.raises(ValueError) as caught: evaluate(**{"sampler": Script([C1]), "examples": ghosts(1)} | options)
    assert said in str(caught.value)


def test_two_label_sets_are_not_mixed():
    other = replace(GHOST, label_set=EMOTION6, question=emotion_question(EMOTION6))
    with pytest.raises(ValueError, match="emoset8, emotion6"): evaluate(Script([C1, C1]), [GHOST, other])


# --- what describes the picture

def test_grounding_of_each_method():
    think = "<think>A ghost next to a clock. A viewer would shiver.</think>\n\\boxed{fear}"
    r = run(think, think.replace("ghost", "spider"), think.replace("</think>", ""), method="grpo")
    assert [g.grounded for g in r.predictions] == [True, False, False] and r.coverage == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert r.format == pytest.approx(2 / 3)
    direct = run(r"\boxed{fear}", r"\boxed{}", "fear", method="direct")
    assert direct.grounding is None and direct.coverage is None and direct.format == pytest.approx(1 / 3) and direct.accuracy == pytest.approx(1 / 3)


def test_a_missing_description_is_not_grounded():
    r = run("\\boxed{fear}", C1)
    assert [g.grounded for g in r.predictions] == [False, True] and r.grounding == 0.5 and r.coverage == 0.5


def test_the_thought_ends_at_its_tag():
    assert description(parse_think(r"<think> a ghost </think> a spider \boxed{fear}")) == "a ghost"
    assert description(parse_think("</think> a ghost <think>")) is None
    assert description(parse_set("no steps")) is None


def test_no_known_objects_is_unknown():
    for objects in (None, ()): assert grade(replace(GHOST, objects=objects), parse_set(C1)).grounded is None


# --- the judge

def test_malformed_completions_cost_no_question():
    judge = BookJudge()
    r = run(C4, "", "\\boxed{fear}", judge=judge)
    assert judge.asked == [] and (r.consistent, r.faithfulness, r.judge_accuracy, r.judge_catches) == (None,) * 4 and r.to_dict()["judged"] == 0


@pytest.mark.parametrize("method", ["grpo", "direct"])
def test_nothing_is_asked_without_steps(method):
    judge = BookJudge()
    assert run(r"<think>A ghost.</think>\boxed{fear}", method=method, judge=judge).faithfulness is None and judge.asked == []


def test_no_judge_no_shares():
    r = run(C1, C2)
    assert (r.consistent, r.faithfulness, r.judge_accuracy, r.judge_catches) == (None,) * 4


def test_a_nodding_judge_is_found_out():
    r = run(C1, C1, C1, C3, judge=BookJudge(nods=True))
    assert (r.consistent, r.judge_accuracy, r.judge_catches) == (1.0, 0.75, 0.0)


def test_an_answer_without_label_is_not_faithful():
    r = run(C1.replace("{fear}", "{dread}"), judge=BookJudge())
    assert r.predictions[0].judged_label == "fear" and r.faithfulness == 0.0 and r.unparsed == 1.0


class Mumbler:
    "Answers in words, and badly."
    def __init__(self, *answers): self.answers = answers
    def generate(self, messages): return [self.answers["Which emotion" in m[0]["content"][-1]["text"]] for m in messages]


def test_an_unreadable_verdict_is_neither_yes_nor_no():
    r = run(C1, judge=Mumbler("perhaps", "who knows"), reflection="generate", weights=RewardWeights.preset("paper"))
    g = r.predictions[0]
    assert g.judged and g.consistent is None and g.judged_label is None and not replace(g, predicted=None).faithful
    assert (r.consistent, r.faithfulness, r.judge_accuracy) == (0.0, 0.0, 0.0)


def test_a_written_verdict_counts():
    r = run(C1, C3, judge=Mumbler("Yes.", "Fear"), reflection="generate")
    assert (r.consistent, r.faithfulness, r.judge_accuracy, r.judge_catches) == (1.0, 1.0, 0.5, 0.0)


def test_the_format_check_follows_the_weights():
    chatty = "Well, let me see. " + C1
    assert run(chatty).format == 1.0 and run(chatty, weights=RewardWeights.preset("released")).format == 0.0


def test_the_judge_is_asked_by_the_rules_of_the_weights():
    judge = BookJudge()
    assert run("Well, let me see. " + C1, judge=judge, weights=RewardWeights.preset("released")).consistent is None and judge.asked == []
    assert run(C1, judge=judge, weights=RewardWeights.preset("released")).consistent == 1.0
    assert len(judge.asked) == 2 and all("<step1>A ghost" in text for text in judge.asked)  # tags included


# --- intervals

@pytest.mark.parametrize("k, n, low, high", [  # statsmodels 0.15.0: proportion_confint(k, n, method="wilson")
    (8, 10, 0.49016247153664183, 0.9433178485456247), (0, 10, 0.0, 0.27753279986288926), (10, 10, 0.7224672001371106, 1.0),
    (1, 1, 0.2065493143772374, 1.0), (50, 100, 0.4038315303659956, 0.5961684696340044), (1530, 2000, 0.7459206266557312, 0.7830633382852048)])
def test_wilson_golden(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=1e-12)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(kn):
    k, n = kn
    peer = binomtest(k, n).proportion_ci(method="wilson")
    low, high = wilson_interval(k, n)
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=1e-9) and 0 <= low <= k / n <= high <= 1
    assert wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize("k, n", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match=f"k = {k} of n = {n}"): wilson_interval(k, n)


# --- classes and confusions

@given(answered)
def test_report_figures_agree_with_each_other(pairs):
    r = report_of(pairs)
    counts, scores = r.confusion, r.per_class
    assert counts.shape == (8, 9) and counts.sum() == r.n == len(pairs) and np.trace(counts) == r.correct
    assert counts[:, -1].sum() == round(r.unparsed * r.n) and r.accuracy == pytest.approx(r.correct / r.n)
    for i, label in enumerate(EMOSET8):
        gold, said, hit = counts[i].sum(), counts[:, i].sum(), counts[i, i]
        assert scores[label].n == gold
        assert scores[label].accuracy == (pytest.approx(hit / gold) if gold else None)
        assert scores[label].precision == (pytest.approx(hit / said) if said else None)
        assert scores[label].f1 == (pytest.approx(2 * hit / (gold + said)) if gold + said else None)


@given(answered)
def test_macro_f1_is_sklearns_over_annotated_labels(pairs):
    gold, said = zip(*[(g, p or "unparsed") for g, p in pairs])
    assert report_of(pairs).macro_f1 == pytest.approx(f1_score(gold, said, labels=sorted(set(gold)), average="macro", zero_division=0))


def test_the_confusion_matrix_is_not_transposed():
    counts = confusion_counts(report_of([("fear", "awe"), ("fear", None)]).predictions, EMOSET8)
    assert counts[EMOSET8.index("fear"), EMOSET8.index("awe")] == 1 and counts[EMOSET8.index("fear"), 8] == 1 and counts.sum() == 2


def test_class_scores_by_hand():
    scores = class_scores(report_of([("fear", "fear"), ("fear", "awe"), ("awe", "awe"), ("awe", None)]).predictions, EMOSET8)
    assert scores["fear"] == ClassScore(2, 0.5, 1.0, 2 / 3) and scores["awe"] == ClassScore(2, 0.5, 0.5, 0.5) and scores["anger"] == ClassScore(0, None, None, None)
    assert macro_f1(scores) == pytest.approx((2 / 3 + 0.5) / 2)


def test_means_of_the_known():
    assert mean_or_none([]) is None and mean_or_none([None, None]) is None and mean_or_none(iter([True, None, False])) == 0.5


def test_to_dict_is_plain_json_with_the_promised_names():
    d = run(*BOOK_COMPLETIONS, judge=BookJudge()).to_dict()
    assert json.loads(json.dumps(d, allow_nan=False)) == d
    assert {"accuracy", "n", "ci95", "unparsed", "format", "grounding", "coverage", "macro_f1", "per_class", "confusion", "consistent", "faithfulness", "judge_accuracy"} <= set(d)
    assert d["per_class"]["fear"] == {"n": 4, "accuracy": 0.75, "precision": 1.0, "f1": pytest.approx(6 / 7)} and d["per_class"]["awe"]["accuracy"] is None
    assert d["confusion"]["columns"] == [*EMOSET8.labels, "unparsed"] and d["confusion"]["counts"][EMOSET8.index("fear")][EMOSET8.index("fear")] == 3
    unknown = run(C1, method="direct").to_dict()
    assert [unknown[name] for name in ("grounding", "coverage", "consistent", "faithfulness", "judge_accuracy")] == [None] * 5


# --- pairs

def coins(gained, lost):  # the two-sided exact p-value, by counting
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n)


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (7, 1), (1, 9), (5, 5), (30, 12), (0, 20)])
def test_mcnemar_by_counting(gained, lost):
    assert Comparison(100, gained, lost).p_value == pytest.approx(coins(gained, lost))


def test_mcnemar_golden():  # statsmodels 0.15.0: mcnemar([[101, 121], [59, 33]], exact=True)
    assert Comparison(314, gained=121, lost=59).p_value == pytest.approx(4.4344492637551645e-06, rel=1e-9)


def test_the_interval_of_a_difference_by_hand():
    c = Comparison(98, gained=20, lost=10)  # 20.5, 10.5, 100
    half = 1.959963984540054 / 100 * math.sqrt(31 - 1.0)
    assert c.ci95 == pytest.approx((0.1 - half, 0.1 + half)) and c.difference == pytest.approx(10 / 98)
    for n, gained, lost in product((1, 3), (0, 1), (0, 1)):
        if gained + lost <= n: assert -1 <= Comparison(n, gained, lost).ci95[0] < Comparison(n, gained, lost).ci95[1] <= 1


@pytest.mark.parametrize("gain, loss", [(0.02, 0.02), (0.2, 0.1), (0.35, 0.02)])
def test_the_interval_covers_the_true_difference(gain, loss):
    n, covered = 64, 0.0
    for b in range(n + 1):
        p_b = binom.pmf(b, n, gain)
        for c in range(n - b + 1) if p_b > 1e-9 else ():
            low, high = Comparison(n, b, c).ci95
            if low <= gain - loss <= high: covered += p_b * binom.pmf(c, n - b, loss / (1 - gain))
    assert covered > 0.93


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_pairs_are_made_by_id(flags, random):
    first, second = (report_of([("fear", "fear" if f[k] else "awe") for f in flags]) for k in (0, 1))
    rows = list(second.predictions)
    random.shuffle(rows)
    c = compare(first, replace(second, predictions=tuple(rows)))
    assert (c.n, c.gained, c.lost) == (len(flags), sum(b and not a for a, b in flags), sum(a and not b for a, b in flags))
    assert c.difference == pytest.approx(second.accuracy - first.accuracy)
    back = compare(second, first)
    assert back.difference == -c.difference and back.p_value == c.p_value and back.ci95 == pytest.approx((-c.ci95[1], -c.ci95[0]))


def test_what_cannot_be_paired_is_said():
    base = report_of([("fear", "fear"), ("awe", None)])
    rename = lambda r, id: replace(r, predictions=(r.predictions[0], replace(r.predictions[1], id=id)))
    with pytest.raises(ValueError, match="2 ids are in one report only, such as '1'"): compare(base, rename(base, "x"))
    with pytest.raises(ValueError, match="after: id '0' stands there more than once"): compare(base, rename(base, "0"))
    with pytest.raises(ValueError, match="example '1' is labelled 'awe' in one and 'fear'"): compare(base, report_of([("fear", None), ("fear", None)]))
    with pytest.raises(ValueError, match="mode: 'strict' before and 'lenient' after"): compare(base, replace(base, mode="lenient"))
    with pytest.raises(ValueError, match="label_set: 'emoset8' before and 'emotion6' after"): compare(base, report_of([("fear", None), ("joy", None)], EMOTION6))


# --- tables

def test_before_after_table_in_both_forms():
    before, after = report_of([("fear", "awe")] * 9 + [("fear", "fear")]), report_of([("fear", "fear")] * 9 + [("fear", None)])
    table = before_after_table({"in_domain": before, "a much longer name": after}, {"in_domain": after, "a much longer name": after})
    head, rule, first, second = table.splitlines()
    assert {len(line) for line in (head, rule, first, second)} == {len(head)} and set(rule) == {"-", " "}
    assert "10.0 [2, 40]" in first and "90.0 [60, 98]" in first and "+80.0 [" in first and "0.021" in first and "0.0 -> 10.0" in first and first.endswith("-")
    assert "+0.0 [" in second and "1.000" in second
    markdown = before_after_table({"in_domain": before}, {"in_domain": after}, markdown=True).splitlines()
    assert len(markdown) == 3 and len({line.count("|") for line in markdown}) == 1 and markdown[1].startswith("| :-") and markdown[1].endswith("-: |")


def test_the_tables_need_the_same_domains():
    r = report_of([("fear", "fear")])
    with pytest.raises(ValueError, match="domains a and b"): before_after_table({"a": r}, {"b": r})


def test_report_table_says_what_is_unknown():
    line = report_table({"d": run(C1)}).splitlines()[2].split()
    assert line[:2] == ["d", "1"] and line[-3:] == ["-", "-", "-"] and "100.0" in line
    assert report_table({"d": run(C1)}, markdown=True).startswith("| domain")


# --- one picture

@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    processor = VLProcessor(build_image_processor(), tokenizer, chat_template=tokenizer.chat_template)
    return build_model(tokenizer).eval(), processor


ODD = LabelSet("odd", ("awe", "awestruck wonder", "fear", "quiet unease"))


@pytest.mark.parametrize("before", ["", "\\boxed{awe} and then "])
@pytest.mark.parametrize("label_set", [EMOSET8, ODD], ids=["one token", "several"])
def test_label_probabilities_are_those_of_whole_completions(tiny, label_set, before):
    model, processor = tiny
    messages = set_messages(emotion_question(label_set), GHOST.load_image())
    found = label_probabilities(model, processor, messages, before + C1, label_set)
    scores, = score_answers(model, processor, [messages], [[before + C1.replace("{fear}", f"{{{label}}}") for label in label_set]])  # the whole text, not its tail
    assert list(found) == list(label_set) and list(found.values()) == pytest.approx(torch.tensor(scores).double().softmax(0).tolist(), abs=1e-4)
    assert sum(found.values()) == pytest.approx(1) and max(found.values()) - min(found.values()) > 1e-3


def test_label_probabilities_look_at_the_last_box_and_no_further(tiny):
    messages = set_messages(GHOST.question, GHOST.load_image())
    found = label_probabilities(*tiny, messages, C1, EMOSET8)
    assert label_probabilities(*tiny, messages, C1.replace("{fear}", "{anything} and on"), EMOSET8) == pytest.approx(found)
    assert label_probabilities(*tiny, messages, C1, LabelSet("one", ("fear",))) == {"fear": 1.0}
    with pytest.raises(ValueError, match="there is no"): label_probabilities(*tiny, messages, "fear", EMOSET8)


def test_labels_whose_letters_stick_to_the_brace():
    pieces = {"x{awe}": [6, 1, 2, 3], "x{fear}": [6, 4, 5, 3]}  # x, {a, we, }; x, {f, ear, }
    processor = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text, add_special_tokens: pieces[text]))
    assert module._tails(processor, "x{", LabelSet("two", ("awe", "fear"))) == ([6], [[1, 2, 3], [4, 5, 3]])


def speak(monkeypatch, text): monkeypatch.setattr(module, "PolicySampler", lambda model, processor: Script([text]))


def test_predict_reads_what_was_said(tiny, monkeypatch, tmp_path):
    speak(monkeypatch, C1.replace("{fear}", "{Fearful.}"))
    GHOST.image.save(tmp_path / "ghost.png")
    for image in (GHOST.image, tmp_path / "ghost.png", str(tmp_path / "ghost.png")):
        p = predict(*tiny, image, EMOSET8)
        assert p.label == "fear" and p.steps[0].startswith("A ghost") and p.well_formed and p.why == ""
        assert p.probability == p.probabilities["fear"] and sum(p.probabilities.values()) == pytest.approx(1)
        assert json.loads(json.dumps(p.to_dict()))["probability"] == p.probability
    assert predict(*tiny, GHOST.image, EMOSET8, mode="strict").label is None


def test_predict_without_a_box_has_no_label(tiny, monkeypatch):
    speak(monkeypatch, "I see a ghost.")
    p = predict(*tiny, GHOST.image, EMOSET8)
    assert (p.label, p.probability, p.probabilities, p.well_formed) == (None, None, None, False) and p.why
    assert p.to_dict()["probabilities"] is None


def test_predict_runs_on_a_real_policy(tiny):
    for method in EVAL_METHODS: assert isinstance(predict(*tiny, Image.new("RGBA", (30, 70)), EMOSET8, method=method, max_new_tokens=4), Prediction)


def test_predict_names_what_is_wrong(tiny, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nand then nothing")
    with pytest.raises(DataError, match="torn.png"): predict(*tiny, tmp_path / "torn.png", EMOSET8)
    with pytest.raises(FileNotFoundError, match="gone.png"): predict(*tiny, tmp_path / "gone.png", EMOSET8)
    with pytest.raises(ValueError, match="method: got 'sett'"): predict(*tiny, GHOST.image, EMOSET8, method="sett")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return memoryview(buffer.getvalue())


def test_the_upload_widget_shows_pictures_and_says_what_is_none(tiny, monkeypatch):
    speak(monkeypatch, C1)
    box = upload_widget(*tiny, EMOSET8)
    button, shown = box.children
    file = lambda name, content: {"name": name, "type": "image/png", "size": len(content), "content": content, "last_modified": datetime(2026, 1, 1)}
    button.value = (file("a.png", png(GHOST.image)), file("../../etc/evil.png", memoryview(b"no picture")), file("..", png(GHOST.image)))
    first, second, third = shown.children
    assert bytes(first.value).startswith(b"\x89PNG") and bytes(third.value).startswith(b"\x89PNG")
    assert "../../etc/evil.png: not a picture" in second.value


@pytest.mark.parametrize("prediction", [
    Prediction("fear", dict.fromkeys(EMOSET8.labels, 0.125), ("It costs $x_{$ or so", "b" * 900, None), "t", False, "why"), Prediction(None, None, (None,) * 3, "", False, "why")])
def test_any_prediction_can_be_drawn(prediction):
    buffer = io.BytesIO()
    plot_prediction(GHOST.image, prediction).savefig(buffer, format="png")
    assert buffer.tell() > 1000


def test_the_confusion_picture_writes_every_count():
    from matplotlib.figure import Figure
    ax = plot_confusion(report_of([("fear", "fear")] * 3 + [("awe", None)]), Figure().subplots())
    at = {tuple(map(int, t.get_position())): t.get_text() for t in ax.texts}
    assert at == {(EMOSET8.index("fear"), EMOSET8.index("fear")): "3", (8, EMOSET8.index("awe")): "1"}

"The price list: golden numbers of both presets, what is refused, and what cheating earns."

import dataclasses
import json
import math
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, strategies as st

from emo_r3.data import EMOSET8, EMOTION6
from emo_r3.parsing import parse_set, parse_think
from emo_r3.rewards import (RewardRecord, RewardWeights, accuracy_reward, coherence_reward, consistency_reward, extra_share, format_reward,
                            overall_reward, parse_coherence, parse_consistency, reflective_reward, reward_completion, reward_shares)
from emo_r3.scenes import BOOK_COMPLETIONS

PAPER, RELEASED = RewardWeights.preset("paper"), RewardWeights.preset("released")
BOTH = pytest.mark.parametrize("weights", [PAPER, RELEASED], ids=["paper", "released"])
unit = st.floats(0, 1)


def completion(step1="A ghost.", box="fear", before=""):
    return parse_set(f"{before}<step1>{step1}</step1>\n<step2>A shiver.</step2>\n<step3>Negative.</step3>\n\\boxed{{{box}}}")


# --- the presets, row by row of method.md's table

def test_presets_hold_every_row():
    assert dataclasses.asdict(PAPER) == dict(
        lambda_reflective=0.1, lambda_format=0.1, reflective="mean", unparseable=0.0, consistency_rule="answer", label_mode="lenient",
        format_check="ordered", step_text="content", std="population", eps=0.0, judge_temperature=0.6, judge_top_p=0.95)
    assert dataclasses.asdict(RELEASED) == dict(
        lambda_reflective=0.1, lambda_format=0.1, reflective="sum", unparseable=0.5, consistency_rule="anywhere", label_mode="strict",
        format_check="full", step_text="tagged", std="sample", eps=1e-6, judge_temperature=0.6, judge_top_p=0.95)
    assert PAPER == RewardWeights()


@pytest.mark.parametrize("accuracy, format, consistency, coherence, paper, released", [
    (1, 1, 1, 1, 1.0, 1.1),
    (1, 1, 0, 1, 0.95, 1.0),
    (1, 1, 0, 0, 0.9, 0.9),
    (1, 0, 0, 0, 0.8, 0.8),
    (0, 1, 1, 1, 0.2, 0.3),
    (0, 1, 1, 0, 0.15, 0.2),
    (0, 0, 1, 0, 0.05, 0.1),
    (1, 0, .5, .5, 0.85, 0.9),
    (0, 0, 0, 0, 0.0, 0.0),
])
def test_overall_reward_to_the_last_digit(accuracy, format, consistency, coherence, paper, released):
    assert overall_reward(accuracy, format, consistency, coherence, PAPER) == paper
    assert overall_reward(accuracy, format, consistency, coherence, RELEASED) == released


@pytest.mark.parametrize("weights, overall", [(PAPER, [1.0, 0.15, 0.95, 0.8]), (RELEASED, [1.1, 0.2, 1.0, 0.9])], ids=["paper", "released"])
def test_the_books_four_completions(weights, overall):
    verdicts = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (None, None)]
    records = [reward_completion(parse_set(text), "fear", EMOSET8, weights, consistency=a, coherence=b)
               for text, (a, b) in zip(BOOK_COMPLETIONS, verdicts)]
    assert [r.overall for r in records] == overall
    assert [r.format for r in records] == [1, 1, 1, 0]
    assert [r.accuracy for r in records] == [1, 0, 1, 1]
    assert (records[3].consistency, records[3].coherence) == (weights.unparseable, weights.unparseable)


def test_methods():
    assert RewardWeights.for_method("emo_r3") == PAPER and RewardWeights.for_method("emo_r3", "released") == RELEASED
    for method in ("grpo", "set"):
        for preset in ("paper", "released"):
            w = RewardWeights.for_method(method, preset)
            assert (w.lambda_accuracy, w.lambda_reflective, w.lambda_format) == (0.9, 0.0, 0.1)
            assert (w.std, w.eps, w.label_mode) == (lambda p: (p.std, p.eps, p.label_mode))(RewardWeights.preset(preset))
            assert overall_reward(1, 1, 0, 0, w) == 1.0 and overall_reward(0, 1, 1, 1, w) == 0.1


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_grpo_is_paid_for_its_own_form(preset):
    w = RewardWeights.for_method("grpo", preset)
    right = reward_completion(parse_think("<think>A ghost.</think>\\boxed{fear}"), "fear", EMOSET8, w)
    assert right == RewardRecord(1.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    assert reward_completion(parse_think("A ghost.\\boxed{fear}"), "fear", EMOSET8, w).overall == 0.9


# --- what is refused

@pytest.mark.parametrize("field, value, words", [
    ("lambda_reflective", -0.1, "-0.1"), ("lambda_format", -1e-12, "lambda_format"), ("lambda_reflective", math.nan, "nan"),
    ("lambda_format", math.inf, "inf"), ("lambda_format", "0.1", "'0.1'"), ("lambda_reflective", None, "None"), ("lambda_format", True, "True"),
    ("lambda_reflective", 1.5, "1.5"), ("lambda_reflective", 0.91, "at most 1"), ("unparseable", 2, "2"), ("unparseable", math.nan, "nan"),
    ("eps", -1e-6, "-1e-06"), ("eps", math.nan, "nan"), ("judge_temperature", -1, "-1"), ("judge_top_p", 0, "0"), ("judge_top_p", 1.01, "1.01"),
    ("reflective", "average", "mean, sum"), ("std", "populaton", "did you mean 'population'"), ("std", None, "population, sample"),
    ("label_mode", "fuzzy", "lenient, strict"), ("format_check", "", "ordered, full"), ("step_text", "tags", "content, tagged"),
    ("consistency_rule", ["answer"], "answer, anywhere"),
])
def test_weights_that_cannot_be_meant(field, value, words):
    with pytest.raises(ValueError) as error:
        RewardWeights(**{field: value})
    message = str(error.value)
    assert f"rewards.{field}" in message and words in message and "allowed" in message and "\n" not in message


def test_lambda_sum_may_be_one_but_not_more():
    assert RewardWeights(0.7, 0.3).lambda_accuracy == 0.0  # 1 - .7 - .3 is 5.6e-17
    assert RewardWeights(1.0, 0.0).lambda_accuracy == 0.0
    with pytest.raises(ValueError, match="0.7 . 0.31"):
        RewardWeights(0.7, 0.31)


@given(st.floats(0, 1), st.floats(0, 1))
def test_weights_add_up_or_are_refused(l1, l2):
    if l1 + l2 > 1 + 1e-9:
        with pytest.raises(ValueError, match="at most 1"):
            RewardWeights(l1, l2)
    else:
        w = RewardWeights(l1, l2)
        assert w.lambda_accuracy >= 0 and math.isclose(w.lambda_accuracy + l1 + l2, 1, abs_tol=2e-9)


@pytest.mark.parametrize("make, words", [
    (lambda: RewardWeights.preset("Paper"), "did you mean 'paper'"), (lambda: RewardWeights.preset(None), "paper, released"),
    (lambda: RewardWeights.for_method("emo-r3"), "did you mean 'emo_r3'"), (lambda: RewardWeights.for_method("set", "easyr1"), "paper, released"),
])
def test_unknown_names(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("position, name", list(enumerate(["accuracy", "format", "consistency", "coherence"])))
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.01, 1.01, None, "1"])
def test_a_reward_that_is_no_reward_is_refused(position, name, value):
    rewards = [1.0] * 4
    rewards[position] = value
    with pytest.raises(ValueError, match=f"{name} reward: got "):
        overall_reward(*rewards, PAPER)


def test_numbers_of_numpy_are_numbers():
    record = reward_completion(completion(), "fear", EMOSET8, PAPER, consistency=np.float32(1), coherence=np.float64(0))
    assert record.overall == 0.95 and type(record.overall) is float and type(record.consistency) is float


def test_everything_is_frozen():
    record = reward_completion(completion(), "fear", EMOSET8)
    for value, field in ((record, "overall"), (PAPER, "lambda_format")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 0.0)


# --- arithmetic

@BOTH
@given(unit, unit, unit, unit)
def test_the_shares_add_up_to_the_reward(weights, accuracy, format, consistency, coherence):
    reflective = reflective_reward(consistency, coherence, weights)
    overall = overall_reward(accuracy, format, consistency, coherence, weights)
    shares = reward_shares(RewardRecord(format, accuracy, consistency, coherence, reflective, overall), weights)
    assert list(shares) == ["accuracy", "consistency", "coherence", "format"]
    assert math.isclose(sum(shares.values()), overall, abs_tol=1e-9)
    assert 0 <= overall <= (1.0 if weights is PAPER else 1.1)


@given(st.floats(0, 0.5), st.floats(0, 0.5), unit, unit, unit)
def test_a_better_part_never_costs(l1, l2, a, b, c):
    w = RewardWeights(l1, l2)
    better = [overall_reward(1, a, b, c, w), overall_reward(a, 1, b, c, w), overall_reward(a, b, 1, c, w), overall_reward(a, b, c, 1, w)]
    worse = [overall_reward(x, y, z, v, w) for x, y, z, v in [(0, a, b, c), (a, 0, b, c), (a, b, 0, c), (a, b, c, 0)]]
    assert all(x >= y for x, y in zip(better, worse))


def test_equal_on_paper_is_equal_as_a_number():
    assert 0.85 + 0.1 * 1 != 0.85 + 0.1 * 0.5 + 0.05  # a group of these two would seem to have a spread
    w = RewardWeights(0.1, 0.05)
    assert overall_reward(1, 0, 1, 1, w) == overall_reward(1, 1, 0, 1, w) == overall_reward(1, 1, 1, 0, w) == 0.95


# --- rewards of one's own, behind Eq. 6

@BOTH
@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), max_size=3), unit)
def test_extra_rewards_are_added_with_their_weights(weights, own, coherence):
    plain = reward_completion(completion(), "fear", EMOSET8, weights, consistency=1.0, coherence=coherence)
    record = reward_completion(completion(), "fear", EMOSET8, weights, consistency=1.0, coherence=coherence, extra={f"r{i}": pair for i, pair in enumerate(own)})
    assert math.isclose(record.overall, plain.overall + sum(w * v for w, v in own), abs_tol=1e-9)
    assert record.extra == {f"r{i}": v for i, (_, v) in enumerate(own)}
    assert dataclasses.replace(record, overall=plain.overall, extra={}) == plain  # nothing else moves
    assert reward_shares(record, weights) == reward_shares(plain, weights)
    assert math.isclose(extra_share(record, weights), sum(w * v for w, v in own), abs_tol=1e-9) and extra_share(plain, weights) == 0


def test_a_record_with_extras_is_json_and_comes_back():
    record = reward_completion(completion(), "fear", EMOSET8, PAPER, consistency=1, coherence=1, extra={"short": (0.5, np.float32(0.25)), "loud": (-1, True)})
    assert record.overall == 1 + 0.125 - 1 and record.extra == {"short": 0.25, "loud": 1.0} and all(type(v) is float for v in record.extra.values())
    assert RewardRecord(**json.loads(json.dumps(dataclasses.asdict(record)))) == record
    assert len({record, dataclasses.replace(record)}) == 1  # still hashable
    assert reward_completion(completion(), "fear", EMOSET8).extra == {}


@pytest.mark.parametrize("weight, value, words", [
    (1.0, math.nan, "got nan"), (1.0, math.inf, "got inf"), (0.0, -math.inf, "got -inf"), (1.0, None, "got None"), (1.0, "1", "got '1'"),
    (math.nan, 1.0, "weight nan"), (1.0, 1.1e5, "adds 110000; allowed: to add from -100000 to 100000"), (1e300, -1e300, "adds -inf"),
])
def test_extra_rewards_that_are_no_rewards(weight, value, words):
    with pytest.raises(ValueError, match="extra reward mine: ") as error:
        reward_completion(completion(), "fear", EMOSET8, extra={"mine": (weight, value)})
    assert words in str(error.value)


def test_the_most_that_may_be_added_leaves_a_verdict_visible_in_float32():
    most = [reward_completion(completion(), "fear", EMOSET8, consistency=c, coherence=1, extra={"huge": (1e5, 1.0)}).overall for c in (0, 1)]
    assert np.float32(most[1]) - np.float32(most[0]) > 0.04


# --- format and accuracy

@pytest.mark.parametrize("text, paper, released", [
    (completion().text, 1, 1),
    ("\n \t" + completion().text, 1, 1),
    ("Sure: " + completion().text, 1, 0),
    (completion().text + " That is all.", 1, 1),
    ("<step1></step1><step2></step2><step3></step3>\\boxed{fear}", 0, 1),
    (completion(box="").text, 0, 1),
    (completion().text.replace("</step2>", ""), 0, 0),
    (completion().text.replace("step1", "x").replace("step2", "step1").replace("x>", "step2>"), 0, 0),
    ("\\boxed{fear}" + completion().text.replace("\\boxed{fear}", ""), 0, 0),
    ("\\boxed{fear}", 0, 0),
    ("", 0, 0),
])
def test_format(text, paper, released):
    parsed = parse_set(text)
    assert (format_reward(parsed, PAPER), format_reward(parsed, RELEASED)) == (paper, released)


@pytest.mark.parametrize("answer, paper, released", [
    ("fear", 1, 1), ("FEAR", 1, 1), (" fear ", 1, 1), ("\\text{fear}", 1, 0), ("fear.", 1, 0), ("fearful", 1, 0),
    ("anger", 0, 0), ("fearless", 0, 0), ("not fear", 0, 0), ("fear and anger", 0, 0), ("yearfear", 0, 0), ("none", 0, 0), ("", 0, 0), (None, 0, 0),
])
def test_accuracy(answer, paper, released):
    assert (accuracy_reward(answer, "fear", EMOSET8, PAPER), accuracy_reward(answer, "fear", EMOSET8, RELEASED)) == (paper, released)


@pytest.mark.parametrize("label", ["Fear", "", "joy", None])
def test_an_annotation_outside_the_set_is_an_error(label):
    with pytest.raises(ValueError, match="label: got .*allowed: amusement"):
        accuracy_reward("fear", label, EMOSET8)


# --- reading free-text reflection

@pytest.mark.parametrize("text, paper, released", [
    ("Yes", True, True), ("yes.", True, True), (" YES\n", True, True), ("**Yes**", True, True), ("\\boxed{Yes}", True, True), ("Ｙｅｓ", True, None),
    ("Yes, the text describes the image.", True, True), ("Yes, but there is no clock.", None, True), ("Yes? It doesn\u2019t.", None, True),
    ("No", False, False), ("No, it does not.", False, False), ("no yes", None, True), ("yes yes no", None, True), ("Yes No", None, True),
    ("The answer is No", None, False), ("eyes", None, True), ("I know", None, False), ("Nothing", None, False), ("yesterday", None, True),
    ("", None, None), ("?", None, None), ("maybe", None, None), ("\\boxed{}", None, None),
    ("Yes " * 2000, None, True),
])
def test_consistency_verdicts(text, paper, released):
    assert parse_consistency(text, PAPER) is paper
    assert parse_consistency(text, RELEASED) is released


@pytest.mark.parametrize("text, paper, released", [
    ("fear", "fear", "fear"), ("Fear\n", "fear", "fear"), ("\\boxed{fear}", "fear", "fear"), ("I say \\boxed{Fear}.", "fear", "fear"),
    ("Fear.", "fear", "fear."), ("fearful", "fear", "fearful"), ("fear, anger", None, "fear, anger"), ("not fear", None, "not fear"),
    ("", None, None), ("  ", None, None), ("None", None, None), ("\\boxed{}", None, None), ("\\boxed{fear", None, None), ("\\boxed{none}", None, None),
    ("joy", None, "joy"), (", ".join(EMOSET8), None, ", ".join(EMOSET8)),
])
def test_coherence_answers(text, paper, released):
    labels = dataclasses.replace(EMOSET8, aliases={"fearful": "fear"})
    assert parse_coherence(text, labels, PAPER) == paper
    assert parse_coherence(text, labels, RELEASED) == released


@pytest.mark.parametrize("weights, unreadable", [(PAPER, 0.0), (RELEASED, 0.5)], ids=["paper", "released"])
def test_what_a_verdict_earns(weights, unreadable):
    assert [consistency_reward(v, weights) for v in (True, False, None)] == [1.0, 0.0, unreadable]
    assert [coherence_reward(a, "fear", weights) for a in ("fear", "anger", "fear.", None)] == [1.0, 0.0, 0.0, unreadable]


@BOTH
@given(st.text())
def test_reading_never_fails(weights, text):
    assert parse_consistency(text, weights) in (True, False, None)
    answer = parse_coherence(text, EMOTION6, weights)
    assert answer is None or answer in EMOTION6 or (weights is RELEASED and coherence_reward(answer, "joy", weights) == 0)


@BOTH
@pytest.mark.parametrize("text", ["yes " * 250_000, "\\boxed{" * 140_000, "\u0300" * 1_000_000, "\\boxed{" + "no" * 500_000 + "}", "'" * 1_000_000])
def test_a_megabyte_is_read_in_a_moment(weights, text):
    start = time.process_time()
    parse_consistency(text, weights)
    parse_coherence(text, EMOSET8, weights)
    assert time.process_time() - start < 3  # CPU seconds: far above what linear time takes, far below what quadratic would


# --- reward hacking (reliability.md, row 20): each probe earns what the rules say

def worth(parsed, yes_no, emotion, weights):
    if not parsed.well_formed:  # nobody is asked
        return reward_completion(parsed, "fear", EMOSET8, weights).overall
    consistency = consistency_reward(parse_consistency(yes_no, weights), weights)
    coherence = coherence_reward(parse_coherence(emotion, EMOSET8, weights), "fear", weights)
    return reward_completion(parsed, "fear", EMOSET8, weights, consistency=consistency, coherence=coherence).overall


@pytest.mark.parametrize("probe, yes_no, emotion, paper, released", [
    (completion(), "Yes", "fear", 1.0, 1.1),
    (completion(box=", ".join(sorted(EMOSET8))), "Yes", "fear", 0.2, 0.3),
    (completion(box=" or ".join(EMOSET8)), "No", "anger", 0.1, 0.1),
    (completion(box=""), "Yes", "fear", 0.0, 0.2),
    (completion("A spider."), "yes yes no", "fear", 0.95, 1.1),
    (completion(), "Yes", ", ".join(EMOSET8), 0.95, 1.0),
    (completion("This picture evokes fear."), "No", "fear", 0.95, 1.0),
    (completion("fear"), "Yes", "fear", 1.0, 1.1),
    (completion("</step1>\\boxed{fear}<step1>"), "Yes", "fear", 0.8, 1.0),
    (parse_set("\\boxed{fear}"), "Yes", "fear", 0.8, 0.9),
], ids=["honest", "every label", "every label and no reasoning", "empty box", "yes yes no", "judge lists every label", "label in step 1",
        "label alone as step 1", "tags inside a step", "box alone"])
def test_probe(probe, yes_no, emotion, paper, released):
    assert worth(probe, yes_no, emotion, PAPER) == paper
    assert worth(probe, yes_no, emotion, RELEASED) == released


@BOTH
def test_no_cheat_pays_more_than_the_honest_completion(weights):
    honest = worth(completion(), "Yes", "fear", weights)
    rng = random.Random(0)
    for _ in range(200):
        pieces = ["<step1>", "</step1>", "<step2>", "</step2>", "<step3>", "</step3>", "fear", "\\boxed{fear}", "\\boxed{}", "yes", " "]
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 30)))
        assert worth(parse_set(text), rng.choice(["yes yes no", "Yes", "No"]), "fear", weights) <= honest


def test_imports_and_pays_without_torch():
    code = ("import sys; sys.modules['torch'] = None\n"
            "from emo_r3.rewards import RewardWeights, reward_completion\n"
            "from emo_r3.parsing import parse_set; from emo_r3.data import EMOSET8\n"
            "c = parse_set('<step1>a</step1><step2>b</step2><step3>c</step3>\\\\boxed{fear}')\n"
            "print(reward_completion(c, 'fear', EMOSET8, consistency=1.0, coherence=1.0).overall, 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["1.0", "False"]

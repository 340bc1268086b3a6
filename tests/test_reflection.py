"""Reflection: what is shown to a judge, how often, what its answers pay, and what happens when it answers nonsense."""
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emo_r3.data import EMOSET8, EMOTION6, DataError, EmotionExample, LabelSet, emotion_question
from emo_r3.parsing import parse_set, parse_think
from emo_r3.prompts import DEFAULT_TEMPLATES
from emo_r3.reflection import ReflectionVerdict, judge_accuracy, reflect, reflected_steps, score_verdict, written_verdict
from emo_r3.rewards import RewardWeights, UserCodeError, reward_completion
from emo_r3.scenes import BOOK_COMPLETIONS, book_example, make_scenes

PAPER, RELEASED = RewardWeights.preset("paper"), RewardWeights.preset("released")
BOOK = [parse_set(t) for t in BOOK_COMPLETIONS]
X = book_example()
EMPTY_BOX = parse_set("<step1>A ghost.</step1><step2>A shiver.</step2><step3>Negative.</step3>\\boxed{}")
PREAMBLE = parse_set("Let me see. <step1>A ghost.</step1><step2>A shiver.</step2><step3>Negative.</step3>\\boxed{fear}")


def text_of(messages): return messages[0]["content"][-1]["text"]
def pictures_of(messages): return [p["image"] for p in messages[0]["content"] if p["type"] == "image"]


class BookJudge:
    "Knows what is right about the book's scene; keeps every call. Scores are far apart; written answers are terse."
    def __init__(self): self.score_calls, self.generate_calls = [], []

    @property
    def asked(self): return [m for call in self.score_calls + self.generate_calls for m in call]

    def opinion(self, messages):
        text = text_of(messages)
        if "Yes or No" in text: return "No" if "spider" in text else "Yes"
        return "amusement" if "laugh" in text else "fear"

    def score(self, messages, answers):
        assert len(messages) == len(answers)
        self.score_calls.append(list(messages))
        return [[-0.1 if a == self.opinion(m) else -5.0 for a in options] for m, options in zip(messages, answers)]

    def generate(self, messages):
        self.generate_calls.append(list(messages))
        return [self.opinion(m) for m in messages]


class Says:
    "Returns the same answer, whatever is asked."
    def __init__(self, answer): self.answer = answer
    def score(self, messages, answers): return self.answer(messages, answers) if callable(self.answer) else self.answer
    generate = lambda self, messages: self.answer(messages) if callable(self.answer) else self.answer


def rewards(verdicts, weights, completions=BOOK):
    return [reward_completion(c, X.label, X.label_set, weights, consistency=v.consistency, coherence=v.coherence).overall for c, v in zip(completions, verdicts)]


# --- the book's numbers

@pytest.mark.parametrize("mode", ["score", "generate"])
def test_book_numbers(mode):
    v = reflect(BOOK, [X] * 4, BookJudge(), PAPER, mode=mode)
    assert [(a.consistency, a.coherence) for a in v] == [(1, 1), (1, 0), (0, 1), (0, 0)]
    assert [(a.consistency_answer, a.coherence_answer) for a in v] == [("Yes", "fear"), ("Yes", "amusement"), ("No", "fear"), (None, None)]
    assert rewards(v, PAPER) == [1.0, 0.15, 0.95, 0.8]
    assert rewards(reflect(BOOK, [X] * 4, BookJudge(), RELEASED, mode=mode), RELEASED) == [1.1, 0.2, 1.0, 0.9]
    assert [a.asked for a in v] == [True, True, True, False]


def test_defaults_are_the_papers_rules_and_score():
    judge = BookJudge()
    assert reflect(BOOK, [X] * 4, judge) == reflect(BOOK, [X] * 4, BookJudge(), PAPER, "score", DEFAULT_TEMPLATES)
    assert judge.score_calls and not judge.generate_calls


def test_verdict_keeps_what_its_mode_knows_and_is_frozen():
    scored, written = (reflect(BOOK[:1], [X], BookJudge(), PAPER, mode=m)[0] for m in ("score", "generate"))
    assert scored.p_yes == pytest.approx(1 / (1 + math.exp(-4.9))) and scored.written is None
    assert len(scored.label_probs) == 8 and sum(scored.label_probs) == pytest.approx(1)
    assert max(range(8), key=scored.label_probs.__getitem__) == EMOSET8.index("fear")
    assert written.written == ("Yes", "fear") and written.p_yes is None is written.label_probs
    with pytest.raises(FrozenInstanceError): scored.consistency = 0.0
    assert {"consistency_answer", "coherence_answer", "p_yes"} <= set(asdict(scored))


# --- what is shown

@pytest.mark.parametrize("mode", ["score", "generate"])
@pytest.mark.parametrize("weights", [PAPER, RELEASED])
def test_consistency_has_picture_and_step_1_and_coherence_no_picture(mode, weights):
    judge = BookJudge()
    reflect(BOOK, [X] * 4, judge, weights, mode=mode)
    about_image, about_text = judge.asked[:3], judge.asked[3:]
    assert len(about_text) == 3
    for m, c in zip(about_image, BOOK):
        (picture,) = pictures_of(m)
        assert picture.tobytes() == X.load_image().tobytes() and [p["type"] for p in m[0]["content"]] == ["image", "text"]
        assert c.steps[0] in text_of(m) and c.steps[1] not in text_of(m) and c.steps[2] not in text_of(m)
    for m, c in zip(about_text, BOOK):
        assert [p["type"] for p in m[0]["content"]] == ["text"] and len(m) == 1
        assert not any(isinstance(v, Image.Image) for p in m[0]["content"] for v in p.values())
        assert c.steps[0] in text_of(m) and c.steps[1] in text_of(m) and c.steps[2] not in text_of(m) and "boxed" not in text_of(m)


def test_steps_are_bare_under_paper_and_tagged_under_released():
    bare, tagged = BookJudge(), BookJudge()
    reflect(BOOK[:1], [X], bare, PAPER)
    reflect(BOOK[:1], [X], tagged, RELEASED)
    assert not any("<step" in text_of(m) for m in bare.asked)
    assert "<step1>A ghost stands out, next to a clock and a key.</step1>" in text_of(tagged.asked[0])
    assert "<step2>A viewer would shiver and want to hide.</step2>" in text_of(tagged.asked[1])


def test_only_allowed_answers_are_scored_in_the_sets_order():
    seen = []
    def score(messages, answers):
        seen.extend(answers)
        return [[-float(k) for k in range(len(options))] for options in answers]
    v = reflect(BOOK[:1], [X], Says(score))
    assert [list(o) for o in seen] == [["Yes", "No"], list(EMOSET8.labels)]
    assert v[0].coherence_answer == "amusement" and v[0].consistency_answer == "Yes"  # the first of each


def test_own_templates_and_tags_are_used():
    mine = replace(DEFAULT_TEMPLATES, consistency="PICTURE? {step1}", coherence="TEXT? {step1}|{step2}|{labels}")
    seen = []
    def score(messages, answers):
        seen.extend(text_of(m) for m in messages)
        return [[-float(k) for k in range(len(o))] for o in answers]
    reflect(BOOK[:1], [X], Says(score), templates=mine)
    c = BOOK[0]
    assert seen == [f"PICTURE? {c.steps[0]}", f"TEXT? {c.steps[0]}|{c.steps[1]}|{', '.join(sorted(EMOSET8))}"]
    tags = ("a", "b", "c")
    named = parse_set("<a>A ghost.</a><b>A shiver.</b><c>Bad.</c>\\boxed{fear}", tags)
    assert reflected_steps(named, PAPER) == ("A ghost.", "A shiver.") and reflected_steps(named, RELEASED) == ("<a>A ghost.</a>", "<b>A shiver.</b>")


def test_each_examples_own_picture_and_label_set_are_asked_about():
    faces, scene = make_scenes("faces", "test", 1)[0], make_scenes("in_domain", "test", 1)[0]
    seen = []
    def score(messages, answers):
        seen.append((messages, answers))
        return [[-float(k) for k in range(len(o))] for o in answers]
    v = reflect([BOOK[0], BOOK[0]], [faces, scene], Says(score))
    (images, _), (_, labels) = seen
    assert [pictures_of(m)[0].tobytes() for m in images] == [x.load_image().tobytes() for x in (faces, scene)]
    assert [list(o) for o in labels] == [list(EMOTION6.labels), list(EMOSET8.labels)]
    assert [len(a.label_probs) for a in v] == [6, 8]


# --- who is not asked

def test_malformed_completions_cost_nothing_and_earn_what_the_preset_says():
    for weights, worth in ((PAPER, 0.0), (RELEASED, 0.5)):
        for mode in ("score", "generate"):
            judge = BookJudge()
            broken = [BOOK[3], parse_set(""), parse_set("\\boxed{fear}"), parse_think("<think>A ghost.</think>\\boxed{fear}")]
            v = reflect(broken, [X] * 4, judge, weights, mode=mode)
            assert judge.score_calls == judge.generate_calls == []  # not even called without a question
            assert v == [ReflectionVerdict(worth, worth)] * 4 and not any(a.asked for a in v)


def test_malformed_is_what_the_presets_own_check_says():
    "An empty box fails the paper's check only, a preamble the released one only."
    asked = {(n, p): reflect([c], [X], BookJudge(), w)[0].asked for n, c in (("box", EMPTY_BOX), ("preamble", PREAMBLE)) for p, w in (("paper", PAPER), ("released", RELEASED))}
    assert asked == {("box", "paper"): False, ("box", "released"): True, ("preamble", "paper"): True, ("preamble", "released"): False}


def test_a_think_completion_is_never_asked_about_even_in_form():
    c = parse_think("<think>A ghost.</think>\\boxed{fear}")
    assert c.well_formed and reflected_steps(c, PAPER) is None and reflected_steps(c, RELEASED) is None


def test_answers_stay_with_their_completions_around_malformed_ones():
    order = [3, 2, 3, 0, 1, 3, 2]
    v = reflect([BOOK[i] for i in order], [X] * 7, BookJudge())
    alone = [reflect([c], [X], BookJudge())[0] for c in BOOK]
    assert v == [alone[i] for i in order]


def test_examples_stay_with_their_completions_behind_malformed_ones():
    other = replace(make_scenes("in_domain", "test", 1)[0], label="amusement")
    judge = BookJudge()
    v = reflect([BOOK[3], BOOK[0], BOOK[1]], [X, other, X], judge)
    assert [pictures_of(m)[0].tobytes() for m in judge.asked[:2]] == [other.load_image().tobytes(), X.load_image().tobytes()]
    assert [a.coherence for a in v] == [0, 0, 0] and v[1].coherence_answer == "fear"  # fear is not this one's label
    assert [a.coherence for a in reflect([BOOK[3], BOOK[1], BOOK[0]], [X, other, X], BookJudge())] == [0, 1, 1]


def test_pictures_of_malformed_completions_are_not_opened(tmp_path):
    gone = EmotionExample(image=tmp_path / "gone.png", question=emotion_question(EMOSET8), label="fear", label_set=EMOSET8)
    assert reflect([BOOK[3]], [gone], BookJudge())[0] == ReflectionVerdict(0.0, 0.0)
    with pytest.raises(FileNotFoundError, match="gone.png"): reflect([BOOK[0]], [gone], BookJudge())
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="bad.png"): reflect([BOOK[0]], [replace(gone, image=tmp_path / "bad.png")], BookJudge())


def test_nothing_to_reflect_on_is_nothing():
    judge = BookJudge()
    assert reflect([], [], judge) == [] == reflect([], [], judge, mode="generate") and judge.asked == []


# --- how often

def test_the_same_question_is_scored_once_and_written_every_time():
    group = [BOOK[0], BOOK[2], BOOK[0], BOOK[0]]
    scoring, writing = BookJudge(), BookJudge()
    v = reflect(group, [X] * 4, scoring)
    assert [len(call) for call in scoring.score_calls] == [2, 2]  # each kind of question in one call
    assert v[0] == v[2] == v[3] and [a.consistency for a in v] == [1, 0, 1, 1]
    reflect(group, [X] * 4, writing, mode="generate")
    assert [len(call) for call in writing.generate_calls] == [4, 4]


def test_the_same_words_about_another_picture_are_another_question():
    other = make_scenes("in_domain", "test", 1)[0]
    judge = BookJudge()
    reflect([BOOK[0]] * 4, [X, other, X, other], judge)
    assert [len(call) for call in judge.score_calls] == [2, 1]  # two pictures; the text alone is the same
    assert pictures_of(judge.score_calls[0][0])[0].tobytes() != pictures_of(judge.score_calls[0][1])[0].tobytes()


def test_the_same_words_for_another_label_set_are_another_question():
    two = LabelSet("two", ("joy", "fear"))
    y = EmotionExample(image=X.image, question="?", label="fear", label_set=two)
    ask = replace(DEFAULT_TEMPLATES, coherence="{step1} {step2} Which emotion?")  # the labels are not in the text
    judge = BookJudge()
    v = reflect([BOOK[0]] * 2, [X, y], judge, templates=ask)
    assert [len(call) for call in judge.score_calls] == [1, 2] and [len(a.label_probs) for a in v] == [8, 2]


def test_written_answers_may_differ_for_the_same_completion():
    said = iter(["Yes", "No", "fear", "awe"])
    v = reflect([BOOK[0]] * 2, [X] * 2, Says(lambda m: [next(said) for _ in m]), mode="generate")
    assert [(a.consistency, a.coherence) for a in v] == [(1, 1), (0, 0)]


def test_a_picture_is_loaded_once_for_its_group(monkeypatch):
    loads = []
    load = EmotionExample.load_image
    monkeypatch.setattr(EmotionExample, "load_image", lambda self: loads.append(self.id) or load(self))
    reflect([BOOK[0], BOOK[1], BOOK[2], BOOK[3]] * 2, [X] * 8, BookJudge())
    assert loads == [X.id]


# --- from answers to verdicts

@pytest.mark.parametrize("weights, worth", [(PAPER, 0.0), (RELEASED, 0.5)])
def test_ties_are_no_verdict(weights, worth):
    v = score_verdict([-0.7, -0.7], [-2.0] * 8, X, weights)
    assert (v.consistency, v.coherence, v.consistency_answer, v.coherence_answer) == (worth, worth, None, None) and v.asked
    assert v.p_yes == 0.5 and v.label_probs == (0.125,) * 8
    undecided = Says(lambda messages, answers: [[-1.0] * len(options) for options in answers])
    assert [(a.consistency, a.coherence) for a in reflect(BOOK[:1], [X], undecided, weights)] == [(worth, worth)]
    behind = [-1.0 if label in ("awe", "fear") else -3.0 for label in EMOSET8]
    assert score_verdict([-0.1, -3.0], behind, X, weights).coherence_answer is None  # a tie in front
    tail = [-1.0 if label == "fear" else -3.0 for label in EMOSET8]
    assert score_verdict([-0.1, -3.0], tail, X, weights).coherence == 1.0  # a tie behind the leader does not matter


@pytest.mark.parametrize("yes, no, p", [(0.0, -math.log(3), 0.75), (-1000.0, -1001.0, 1 / (1 + math.exp(-1))), (-1e308, 1e308, 0.0), (1e308, -1e308, 1.0), (-1e-300, 0.0, 0.5)])
def test_p_yes_by_hand_without_overflow(yes, no, p):
    assert score_verdict([yes, no], [-float(k) for k in range(8)], X).p_yes == pytest.approx(p)


@given(st.lists(st.floats(-200, 0), min_size=8, max_size=8), st.lists(st.floats(-200, 0), min_size=2, max_size=2), st.floats(-50, 50))
def test_probabilities_and_invariance(labels, yes_no, shift):
    v = score_verdict(yes_no, labels, X)
    assert math.isclose(sum(v.label_probs), 1, rel_tol=1e-9) and 0 <= v.p_yes <= 1
    if v.coherence_answer is not None: assert v.label_probs[EMOSET8.index(v.coherence_answer)] == max(v.label_probs)
    if v.consistency_answer is not None: assert v.p_yes >= 0.5 if v.consistency_answer == "Yes" else v.p_yes <= 0.5
    assert v.coherence in (0.0, 1.0) and (v.coherence == 1.0) == (v.coherence_answer == "fear")
    moved = score_verdict([l + shift for l in yes_no], [l + shift for l in labels], X)  # only differences count
    assert moved.p_yes == pytest.approx(v.p_yes, abs=1e-9) and moved.label_probs == pytest.approx(v.label_probs, abs=1e-9)


# --- soft: probabilities as rewards

class Believes:
    "Scores by hand: P(Yes) and P(E) are what was written down, times a common factor, as a model spends probability on answers that were not offered."
    def __init__(self, p_yes=0.8, p_fear=0.3, offered=0.5): self.p_yes, self.p_fear, self.offered, self.calls = p_yes, p_fear, offered, []
    def score(self, messages, answers):
        self.calls.append(list(messages))
        p = lambda a, n: {"Yes": self.p_yes, "No": 1 - self.p_yes, "fear": self.p_fear}.get(a, (1 - self.p_fear) / (n - 1))
        return [[math.log(self.offered * p(a, len(options))) for a in options] for options in answers]


@pytest.mark.parametrize("weights, unasked", [(PAPER, 0.0), (RELEASED, 0.5)])
def test_soft_pays_the_probabilities_and_names_the_answers(weights, unasked):
    v = reflect(BOOK, [X] * 4, Believes(0.8, 0.3), weights, mode="soft")
    assert [(a.consistency, a.coherence) for a in v[:3]] == [(pytest.approx(0.8), pytest.approx(0.3))] * 3
    assert [(a.consistency_answer, a.coherence_answer) for a in v] == [("Yes", "fear")] * 3 + [(None, None)]
    assert v[3] == ReflectionVerdict(unasked, unasked) and [a.asked for a in v] == [True] * 3 + [False]
    assert rewards(v[:1], PAPER, BOOK[:1]) == [pytest.approx(0.8 + 0.1 * (0.8 + 0.3) / 2 + 0.1)]


def test_soft_pays_the_annotated_label_and_not_the_leading_one():
    (v,) = reflect(BOOK[:1], [X], Believes(0.2, 0.05), mode="soft")
    assert v.coherence == pytest.approx(0.05) and v.consistency == pytest.approx(0.2) and v.consistency_answer == "No" and v.coherence_answer is None  # the other seven are tied
    (v,) = reflect(BOOK[:1], [replace(X, label="awe")], Believes(0.9, 0.3), mode="soft")
    assert v.coherence == pytest.approx(0.1) and v.coherence_answer == "fear"


def test_soft_asks_like_score_and_knows_the_same():
    "The same questions, each once, by the same method; only what is paid differs."
    group = [BOOK[0], BOOK[2], BOOK[0], BOOK[3]]
    hard, soft = Believes(), Believes()
    a, b = reflect(group, [X] * 4, hard), reflect(group, [X] * 4, soft, mode="soft")
    assert [list(map(text_of, call)) for call in hard.calls] == [list(map(text_of, call)) for call in soft.calls] and [len(call) for call in soft.calls] == [2, 2]
    for v, w in zip(a, b): assert (v.p_yes, v.label_probs, v.consistency_answer, v.coherence_answer, v.asked) == (w.p_yes, w.label_probs, w.consistency_answer, w.coherence_answer, w.asked)
    assert [v.consistency for v in a] == [1, 1, 1, 0] and b[0].consistency == b[0].p_yes == pytest.approx(0.8)
    with pytest.raises(ValueError, match="Writes has no method 'score', which mode = 'soft' needs"):
        class Writes:
            def generate(self, messages): return ["Yes"] * len(messages)
        reflect(BOOK, [X] * 4, Writes(), mode="soft")


@given(st.lists(st.floats(-200, 0), min_size=8, max_size=8), st.lists(st.floats(-200, 0), min_size=2, max_size=2), st.sampled_from(EMOSET8.labels))
def test_soft_rewards_are_shares(labels, yes_no, label):
    y = replace(X, label=label)
    v, hard = score_verdict(yes_no, labels, y, soft=True), score_verdict(yes_no, labels, y)
    total = sum(math.exp(l - max(labels)) for l in labels)
    assert v.coherence == pytest.approx(math.exp(labels[EMOSET8.index(label)] - max(labels)) / total) and 0 <= v.coherence <= 1
    assert v.consistency == pytest.approx(1 / (1 + math.exp(min(700, yes_no[1] - yes_no[0])))) and 0 <= v.consistency <= 1
    assert replace(v, consistency=hard.consistency, coherence=hard.coherence) == hard
    if hard.coherence_answer == label: assert v.coherence >= 1 / 8
    reward_completion(BOOK[0], label, EMOSET8, PAPER, consistency=v.consistency, coherence=v.coherence)  # inside the range that a reward may have


@pytest.mark.parametrize("weights", [PAPER, RELEASED])
def test_soft_ties_are_worth_their_share(weights):
    v = score_verdict([-0.7, -0.7], [-2.0] * 8, X, weights, soft=True)
    assert (v.consistency, v.coherence, v.consistency_answer, v.coherence_answer) == (0.5, 0.125, None, None)


def test_soft_is_guarded_like_score():
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"completion 1 .*'Yes' is {value}"): reflect(BOOK[:2], [X] * 2, spoil(1, value), mode="soft")
    with pytest.raises(ValueError, match="got 3 values"): reflect(BOOK[:1], [X], Says([[-1, -2, -3]]), mode="soft")
    def broken(messages, answers): raise ConnectionError("server gone")
    with pytest.raises(UserCodeError, match="judge Says.score failed"): reflect(BOOK, [X] * 4, Says(broken), mode="soft")


@given(st.permutations(range(8)), st.integers(0, 7))
def test_the_order_of_the_labels_does_not_matter(order, best):
    shuffled = LabelSet("shuffled", tuple(EMOSET8.labels[i] for i in order))
    y = EmotionExample(image=X.image, question="?", label="fear", label_set=shuffled)
    for lead in (0.0, 1.0):  # a tie of all, or one leader
        logps = {l: -2.0 + lead * (l == EMOSET8.labels[best]) for l in EMOSET8}
        a, b = (score_verdict([0.0, -1.0], [logps[l] for l in z.label_set], z) for z in (X, y))
        assert (a.coherence, a.coherence_answer) == (b.coherence, b.coherence_answer)


@pytest.mark.parametrize("about_image, about_text, paper, released", [
    ("Yes", "fear", (1, 1), (1, 1)), ("no.", "Fear", (0, 1), (0, 1)), ("Her eyes are open.", "none", (0, 0), (1, 0.5)), ("Perhaps", "", (0, 0), (0.5, 0.5)),
    ("", "\\boxed{fear}", (0, 1), (0.5, 1)), ("Yes.", "fearful", (1, 1), (1, 0)), ("yes yes no", "fear or anger", (0, 0), (1, 0)), ("Yes" * 10**5, "fear " * 10**5, (0, 0), (1, 0)),
])
def test_written_answers_are_read_by_the_preset(about_image, about_text, paper, released):
    for weights, expected in ((PAPER, paper), (RELEASED, released)):
        v = written_verdict(about_image, about_text, X, weights)
        assert (v.consistency, v.coherence) == expected and v.written == (about_image, about_text) and v.asked
        assert v == reflect(BOOK[:1], [X], Says(lambda m: [about_image if "Yes or No" in text_of(q) else about_text for q in m]), weights, mode="generate")[0]


def test_unreadable_written_answers_are_none_not_no():
    v = written_verdict("Perhaps", "who knows", X, PAPER)
    assert (v.consistency_answer, v.coherence_answer) == (None, None)
    assert written_verdict("No", "awe", X, PAPER).consistency_answer == "No"


# --- judges that answer nonsense

def spoil(question, value, k=0):
    "A scoring judge whose answer to the given question (of each kind) holds a bad value."
    def score(messages, answers):
        rows = [[-float(j) for j in range(len(o))] for o in answers]
        rows[question][k] = value
        return rows
    return Says(score)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), np.float32("nan")])
def test_non_finite_scores_name_judge_sample_and_value(value):
    completions = [BOOK[3], BOOK[0], BOOK[3], BOOK[1]]
    with pytest.raises(ValueError) as e: reflect(completions, [X] * 4, spoil(1, value))
    assert "judge Says.score" in str(e.value) and f"completion 3 (example '{X.id}')" in str(e.value) and "consistency" in str(e.value)
    assert f"'Yes' is {float(value)}" in str(e.value) and "\n" not in str(e.value)
    late = lambda messages, answers: [[-1.0, -2.0] if len(o) == 2 else [-1.0] * 6 + [value, -1.0] for o in answers]
    with pytest.raises(ValueError, match=rf"coherence of completion 1 .*'fear' is {float(value)}"): reflect(completions, [X] * 4, Says(late))


def test_errors_name_the_first_completion_that_asked_the_question():
    with pytest.raises(ValueError, match="consistency of completion 2 "): reflect([BOOK[0], BOOK[0], BOOK[1]], [X] * 3, spoil(1, math.nan))


@pytest.mark.parametrize("came, says", [
    (None, "got None"), ([], "0 answers came to 3 questions"), ([[-1, -2]] * 2, "2 answers came to 3 questions"), ([[-1, -2]] * 4, "4 answers came to 3 questions"),
    ([[-1, -2], [-1], [-1, -2]], r"completion 1 .*got 1 values, \[-1.0\]; expected 2, one for each of Yes, No"), ([[-1, -2], [], [-1, -2]], "completion 1 .*got 0 values"),
    ([[-1, -2, -3], [-1, -2], [-1, -2]], "completion 0 .*got 3 values"), ([-1, -2, -3], "expected for each question a list"), ([["Yes", "No"]] * 3, "expected for each question a list"),
    ([[-1, None]] * 3, "expected for each question a list"), ([["-1", "-2"]] * 3, "expected for each question a list"), ({0: [-1, -2]}, "got {0:"),
    (iter([[-1, -2]] * 3), "got <list_"), ([iter([-1, -2])] * 3, "expected for each question a list"), ([{-1, -2}] * 3, "expected for each question a list"), ("abc", "expected for each question a list"),
])
def test_wrongly_shaped_scores(came, says):
    with pytest.raises(ValueError, match=f"judge Says.score: .*{says}|judge Says.score: {says}"): reflect(BOOK[:3], [X] * 3, Says(came))


@pytest.mark.parametrize("came, says", [
    (None, "got None"), ("Yes", "got 'Yes'; expected a list of 3 texts"), ("Yes", "expected a list"), (["Yes"], "expected a list of 3"), (["Yes"] * 4, "expected a list of 3"),
    (["Yes", None, "Yes"], "completion 1 .*got None; expected a text"), (["Yes", "Yes", b"Yes"], "completion 2 .*got b'Yes'"), (iter(["Yes"] * 3), "expected a list of 3"),
    ({"Yes": 1, "No": 2, "Perhaps": 3}, "expected a list of 3"), ({"Yes", "No", "Perhaps"}, "expected a list of 3"),
])
def test_wrongly_shaped_written_answers(came, says):
    with pytest.raises(ValueError, match=f"judge Says.generate: .*{says}"): reflect(BOOK[:3], [X] * 3, Says(came), mode="generate")


def test_three_letters_are_not_three_answers():
    with pytest.raises(ValueError, match="got 'Yes'"): reflect(BOOK[:3], [X] * 3, Says("Yes"), mode="generate")


def test_a_long_wrong_answer_makes_a_short_message():
    with pytest.raises(ValueError) as e: reflect(BOOK[:1], [X], Says([[0.5] * 10**5]))
    assert len(str(e.value)) < 400
    with pytest.raises(ValueError) as e: reflect(BOOK[:1], [X], Says(["x" * 10**5] * 10**3))
    assert len(str(e.value)) < 400


def test_arrays_and_tuples_are_welcome():
    arrays = Says(lambda messages, answers: np.array([[-float(j) for j in range(len(answers[0]))] for _ in answers], dtype=np.float32))
    v = reflect(BOOK, [X] * 4, arrays)
    assert [a.consistency for a in v] == [1, 1, 1, 0] and type(v[0].p_yes) is float
    assert reflect(BOOK[:1], [X], Says(lambda m: ("Yes",) if "Yes or No" in text_of(m[0]) else ("fear",)), mode="generate")[0].coherence == 1.0


def test_a_judges_own_error_is_not_swallowed():
    def broken(messages, answers): raise ConnectionError("server gone")
    with pytest.raises(UserCodeError, match="judge Says.score failed.*ConnectionError: server gone") as e: reflect(BOOK, [X] * 4, Says(broken))
    assert type(e.value.__cause__) is ConnectionError


@pytest.mark.parametrize("kwargs, says", [(dict(mode="scor"), "mode: got 'scor'; allowed: score, generate, soft; did you mean 'score'"), (dict(mode=None), "mode: got None"), (dict(mode="__init__"), "mode: got '__init__'")])
def test_unknown_modes(kwargs, says):
    with pytest.raises(ValueError, match=says): reflect(BOOK, [X] * 4, BookJudge(), **kwargs)


def test_examples_must_match_completions():
    for n in (0, 1, 5):
        with pytest.raises(ValueError, match=f"got {n} for 4 completions"): reflect(BOOK, [X] * n, BookJudge())


def test_a_judge_without_the_modes_method():
    class ScoresOnly:
        def score(self, messages, answers): return [[-float(j) for j in range(len(o))] for o in answers]
    assert reflect(BOOK, [X] * 4, ScoresOnly())[0].asked
    with pytest.raises(ValueError, match="ScoresOnly has no method 'generate'"): reflect(BOOK, [X] * 4, ScoresOnly(), mode="generate")
    with pytest.raises(ValueError, match="NoneType has no method 'score'"): reflect(BOOK, [X] * 4, None)


# --- is the judge right?

def verdict(answer): return ReflectionVerdict(0.0, 0.0, answer, None, written=("", ""))


def test_judge_accuracy_by_hand():
    truth = ["Yes", "Yes", "No"]
    assert judge_accuracy([verdict(a) for a in truth], BOOK[:3], [X] * 3) == 1.0
    assert judge_accuracy([verdict(a) for a in ("No", "No", "Yes")], BOOK[:3], [X] * 3) == 0.0
    assert judge_accuracy([verdict("Yes")] * 3, BOOK[:3], [X] * 3) == pytest.approx(2 / 3)
    assert judge_accuracy([verdict("Yes"), verdict(None), verdict("No")], BOOK[:3], [X] * 3) == pytest.approx(2 / 3)  # unreadable: wrong


def test_judge_accuracy_counts_only_what_was_asked_and_is_known():
    unknown = replace(X, objects=None)
    unasked = ReflectionVerdict(0.5, 0.5)
    assert judge_accuracy([verdict("Yes"), verdict("No"), unasked], [BOOK[0], BOOK[0], BOOK[3]], [X, unknown, X]) == 1.0
    assert judge_accuracy([verdict("Yes")], [BOOK[0]], [unknown]) is None
    assert judge_accuracy([unasked], [BOOK[3]], [X]) is None and judge_accuracy([], [], []) is None
    with pytest.raises(ValueError): judge_accuracy([verdict("Yes")], BOOK, [X] * 4)


def test_judge_accuracy_is_about_step_1_alone():
    elsewhere = parse_set("<step1>A ghost.</step1><step2>As at a spider, a shiver.</step2><step3>A chair.</step3>\\boxed{fear}")
    assert judge_accuracy([verdict("Yes")], [elsewhere], [X]) == 1.0


# --- a model as the judge, and the module's own manners

@pytest.fixture(scope="module")
def random_judge(tmp_path_factory):
    import torch
    from emo_r3.embedded.warm_up import build_image_processor, build_model, build_tokenizer, save
    from emo_r3.policy import load_policy, load_processor
    from emo_r3.sampling import PolicyJudge
    folder = tmp_path_factory.mktemp("random_policy")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    save(build_model(tokenizer), tokenizer, build_image_processor(), folder)
    return PolicyJudge(load_policy(folder), load_processor(folder), max_new_tokens=4)


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_a_model_judges_without_gradient_and_unchanged(random_judge, mode):
    import torch
    model = random_judge.model
    assert any(p.requires_grad for p in model.parameters())  # else nothing would be shown
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.enable_grad():
        v = reflect(BOOK, [X] * 4, random_judge, mode=mode)
        assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert mode == "generate" or torch.equal(state, torch.get_rng_state())
    assert [a.asked for a in v] == [True, True, True, False]
    assert all(type(n) is float for a in v for n in (a.consistency, a.coherence))  # plain numbers, no graph behind them


def test_a_models_scores_leave_no_graph_behind(random_judge):
    import torch
    kept = []
    forward = random_judge.model.lm_head.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        with torch.enable_grad(): reflect(BOOK, [X] * 4, random_judge)
    finally: forward.remove()
    assert kept and not any(logits.requires_grad for logits in kept)


def test_a_model_gives_the_same_verdict_alone_and_in_company(random_judge):
    "Batching and padding change the last bits only; asking once for all gives what asking for each gives."
    together = reflect(BOOK[:3] * 2, [X] * 6, random_judge)
    alone = [reflect([c], [X], random_judge)[0] for c in BOOK[:3]]
    for a, b in zip(together, alone * 2):
        assert a.p_yes == pytest.approx(b.p_yes, abs=1e-4) and a.label_probs == pytest.approx(b.label_probs, abs=1e-4)


def test_a_model_with_nan_weights_is_found_out(random_judge):
    import torch
    head = random_judge.model.model.language_model.norm.weight
    kept = head.detach().clone()
    with torch.no_grad(): head.fill_(float("nan"))
    try:
        with pytest.raises(ValueError, match=r"judge PolicyJudge.score: consistency of completion 0 .*'Yes' is nan"): reflect(BOOK, [X] * 4, random_judge)
    finally:
        with torch.no_grad(): head.copy_(kept)


def test_module_does_not_import_torch_or_later_modules():
    code = "import sys, emo_r3.reflection; print(sorted(m for m in sys.modules if m in ('torch', 'transformers') or m.startswith('emo_r3.')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout
    assert out.strip() == str(sorted(f"emo_r3.{m}" for m in ("data", "scenes", "prompts", "parsing", "rewards", "reflection")))

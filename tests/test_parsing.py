"""Hostile strings for the parser: every row of the trap table in both modes, format checks, properties, and a megabyte of each."""

import dataclasses
import re
import subprocess
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emo_r3.data import EMOSET8, EMOTION6, WEBEMO7, LabelSet
from emo_r3.parsing import SETCompletion, extract_boxed, match_label, parse_set, parse_think, read_completion
from emo_r3.prompts import DEFAULT_TEMPLATES, PromptTemplates
from emo_r3.scenes import BOOK_COMPLETIONS

settings.register_profile("busy_machine", deadline=None, derandomize=True)  # examples are the same in every run; time is tested below
settings.load_profile("busy_machine")

WEBEMO25 = LabelSet("fine", ("rage", "lust", "cheerfullness", "irritabilty", "love"), aliases={"cheerfulness": "cheerfullness", "irritability": "irritabilty"})
ABSTRACT = LabelSet("abstract", ("amusement", "anger", "awe", "content", "disgust", "excitement", "fear", "sad"), aliases={"contentment": "content", "sadness": "sad"})
WITH_NONE = LabelSet("with_none", ("none", "fear"))
MODES = ("strict", "lenient")


def grade(text, label_set=EMOSET8):
    "What each mode reads in a completion's last box."
    return tuple(match_label(extract_boxed(text), label_set, mode) for mode in MODES)


# --- the trap table ---------------------------------------------------------------------------------------------------------

RIGHT_IN_BOTH = [r"\boxed{AWE}", r"\boxed{Awe}", r"\boxed{ awe }", "\\boxed{\u00a0awe\u00a0}", "\\boxed{awe\u3000}", "\\boxed{awe\n}", "\\boxed{awe}\n", "\\boxed{\tawe\r\n}",
                 r"\boxed{fear} ... \boxed{awe}", r"\boxed{fear}\boxed{}\boxed{awe}", r"\boxed{fear \boxed{awe}", r"\boxed{\boxed{awe}}",
                 r"\boxed{awe} }}} and {", r"\boxed{awe} \boxe", r"\boxed{awe} \boxed fear"]


@pytest.mark.parametrize("text", RIGHT_IN_BOTH)
def test_right_in_both_modes(text):
    assert grade(text) == ("awe", "awe")


RIGHT_IF_LENIENT = [
    r"\text{awe}", r"\textbf{awe}", r"\mathrm{awe}", r"\text{\textbf{awe}}", r"\mathrm{\text{ \textit{AWE} }}", r"\text {awe}", r"{\bf awe}", r"\displaystyle\text{awe}",
    r"\TEXT{awe}", r"\\text{awe}", "{awe}", "{{awe}}", "$awe$", "$$awe$$", r"\(awe\)", r"\[ awe \]", r"$\text{awe}$", r"\ awe\,", r"awe\\", r"\quad awe", "~awe",
    "awe.", "awe!", "awe?", "...awe...", "awe,", "(awe)", "[awe]", "- awe", "-awe-", "1. awe", "(a) awe", "'awe'", '"awe"', "‘awe’", "“awe”", "«awe»", "`awe`",
    "**awe**", "*awe*", "***awe***", "_awe_", "__awe__", "# awe", "> awe", r"\*\*awe\*\*", r"\"awe\"", "**awe**.", "ａｗｅ", "ＡＷＥ", "𝐚𝐰𝐞",
    "awe\u200b", "a\u200bwe", "\ufeffawe", "\u2060awe", "a\u200dw\u200ce", "a\u00adwe", "\u200eawe\u200f", "😮 awe", "awe 😮\ufe0f",
    "the emotion is awe", "Answer: awe", "awe (positive)", "awed", "Awestruck!", "awe, awed", "awe/awe", "awe and awe", "a deep\nawe",
]


@pytest.mark.parametrize("answer", RIGHT_IF_LENIENT)
def test_wrong_if_strict_and_right_if_lenient(answer):
    assert match_label(answer, EMOSET8) is None
    assert match_label(answer, EMOSET8, "lenient") == "awe"


def test_wrappers_inside_a_box_survive_the_brace_matching():
    assert extract_boxed(r"\boxed{\text{\textbf{awe}}} done") == r"\text{\textbf{awe}}"
    assert grade(r"\boxed{{awe}}") == (None, "awe")
    assert grade(r"\boxed{\text{awe}}") == (None, "awe")


LAST_BOX_LOST = [r"\boxed{awe} \boxed{}", r"\boxed{awe} \boxed{ }", "\\boxed{awe} \\boxed{\n}", r"\boxed{awe} \boxed{fear", r"\boxed{awe} \boxed{\text{fear}", r"\boxed{awe} \boxed{"]
NO_ANSWER = ["", "   ", "\u200b", "{}", "$$", "***", r"\text{}", "awe and fear", "awe, fear", "awe/fear", "awe or fear", "awe & fear", "awe fear", "awe\nfear", "awe vs fear",
             r"\text{awe}, \text{fear}", r"\text{awe}\text{fear}", "not awe", "no awe", "never awe", "isn't awe", "isn’t awe", "neither awe nor disgust", "without awe",
             "awe (not fear)", "anything but awe", "lack of awe", "non-awe", "un-awe", "¬awe", "!awe", "!= awe", "≠ awe", "~~awe~~", r"\cancel{awe}", r"\not awe", r"\sout{awe}",
             r"\frac{awe}{fear}", "a\u0336w\u0336e\u0336", "awe\u0336", "neutral", "none of the above", "none", "None", "N/A", "unknown", "fear or surprise", "surprise/fear", "emotion",
             "awesome", "awe-inspiring", "aweful", "danger", "fearless", "fear-less", "**fear**less", r"\text{fear}less", "fear less", "discontentment", "discontent", "yearfear", "fearyear", "fear_awe",
             "awe.some", "8", "0", "awe" * 2, "awe " * 400 + "x", "ａｗｅｓｏｍｅ", "аwe", "awé", "\ud800"]


@pytest.mark.parametrize("text", LAST_BOX_LOST + ["awe", "", "The answer is awe.", r"\fbox{awe}", r"\boxed(awe)", r"boxed{awe}", r"\boxed {awe}"])
def test_no_readable_last_box_is_wrong(text):
    assert grade(text) == (None, None)


@pytest.mark.parametrize("answer", NO_ANSWER)
def test_no_answer_in_either_mode(answer):
    assert match_label(answer, EMOSET8, "strict") is None
    assert match_label(answer, EMOSET8, "lenient") is None


@pytest.mark.parametrize("answer, label_set, inside", [
    ("awesome", EMOSET8, "awe"), ("danger", EMOSET8, "anger"), ("fearless", EMOSET8, "fear"), ("discontentment", EMOSET8, "contentment"),
    ("enjoyment", EMOTION6, "joy"), ("enjoy", EMOTION6, "joy"), ("average", WEBEMO25, "rage"), ("illustration", WEBEMO25, "lust"), ("glove", WEBEMO25, "love"),
    ("unhappy", EMOTION6, "happy"), ("unafraid", EMOSET8, "afraid")])
def test_a_label_inside_a_word_is_not_that_label(answer, label_set, inside):
    assert inside in answer  # the trap is real
    assert grade(rf"\boxed{{{answer}}}", label_set) == (None, None)


def test_none_is_no_label_unless_the_set_says_so():
    assert grade("no box at all", WITH_NONE) == (None, None)  # str(None) must never be compared with a gold "none"
    assert match_label(None, WITH_NONE) is match_label(None, WITH_NONE, "lenient") is None
    assert grade(r"\boxed{None}", WITH_NONE) == ("none", "none")
    assert grade(r"\boxed{**None**}", WITH_NONE) == (None, "none")
    assert grade(r"\boxed{none of the above}", WITH_NONE) == (None, None)


@pytest.mark.parametrize("answer, label_set, label", [
    ("fearful", EMOSET8, "fear"), ("Sad", EMOSET8, "sadness"), ("angry", EMOSET8, "anger"), ("content", EMOSET8, "contentment"),
    ("happiness", EMOTION6, "joy"), ("surprised", EMOTION6, "surprise"), ("happiness", EMOSET8, None), ("surprised", EMOSET8, None),
    ("disgust", WEBEMO7, "anger"), ("pride", WEBEMO7, "joy"), ("cheerfulness", WEBEMO25, "cheerfullness"), ("irritability", WEBEMO25, "irritabilty"),
    ("contentment", ABSTRACT, "content"), ("sadness", ABSTRACT, "sad"), ("fearful", ABSTRACT, None), ("joy and happiness", EMOTION6, "joy"), ("joy and fear", EMOTION6, None)])
def test_aliases_belong_to_a_data_set(answer, label_set, label):
    assert match_label(answer, label_set, "strict") is None
    assert match_label(answer, label_set, "lenient") == label


def test_a_gold_name_is_read_as_itself_in_both_modes():
    assert grade(r"\boxed{content}", ABSTRACT) == ("content", "content")
    assert grade(r"\boxed{sad}", ABSTRACT) == ("sad", "sad")
    assert grade(r"\boxed{disgust}") == ("disgust", "disgust")


def test_labels_of_several_words():
    labels = LabelSet("long", ("positive", "surprise", "positive surprise", "no emotion", "fear and trembling"))
    assert match_label("Positive **Surprise**.", labels, "lenient") == "positive surprise"
    assert match_label("a positive surprise", labels, "lenient") == "positive surprise"
    assert match_label("a surprise", labels, "lenient") == "surprise"
    assert match_label("'no emotion'", labels, "lenient") == "no emotion"
    assert match_label("fear and  trembling.", labels, "lenient") == "fear and trembling"
    assert match_label("x y", LabelSet("only", ("fear and trembling",)), "lenient") is None


def test_a_label_wins_over_an_alias_that_differs_only_by_dress():
    labels = LabelSet("odd", ("joy", "fear"), aliases={"fear.": "joy"})
    assert match_label("fear!", labels, "lenient") == "fear"


def test_equal_labels_with_other_aliases_do_not_share_a_cache():
    one, other = LabelSet("same", ("joy", "fear"), aliases={"thrill": "joy"}), LabelSet("same", ("joy", "fear"), aliases={"thrill": "fear"})
    assert [match_label("thrill", s, "lenient") for s in (one, other, one)] == ["joy", "fear", "joy"]


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode: got 'fuzzy'; allowed: strict, lenient"):
        match_label("awe", EMOSET8, "fuzzy")
    with pytest.raises(ValueError, match="mode"):
        match_label(None, EMOSET8, "Strict")


# --- parse_set --------------------------------------------------------------------------------------------------------------

BODY = "<step1>A ghost.</step1>\n<step2>Shivers.</step2>\n<step3>Negative.</step3>\n"
GOOD = BODY + r"\boxed{fear}"
FORMATS = [  # text, well formed for the paper, for the released code, a part of the reason
    (GOOD, True, True, ""),
    ("\n  " + GOOD, True, True, ""),
    (GOOD + " <|im_end|>\n", True, True, ""),
    (GOOD.replace("\n", " so "), True, True, ""),
    ("Well. " + GOOD, True, False, ""),
    ("\u200b" + GOOD, True, False, ""),
    (BODY + r"\boxed{awe} no, \boxed{fear}", True, True, ""),
    (GOOD.replace("Negative.", r"Negative, \boxed{fear}."), True, True, ""),
    (GOOD.replace("A ghost.", " \n"), False, True, "<step1> is empty"),
    ("<step1></step1><step2></step2><step3></step3>\\boxed{}", False, True, "<step1> is empty"),
    (BODY + r"\boxed{}", False, True, "empty"),
    (BODY + r"\boxed{ }", False, True, "empty"),
    (BODY, False, False, "there is no"),
    (BODY + "fear", False, False, "there is no"),
    (BODY + r"\boxed{fear", False, False, "not closed"),
    (BODY + r"\boxed{awe} \boxed{fear", False, True, "not closed"),
    (r"\boxed{fear}" + BODY, False, False, "before </step3>"),
    (BODY.replace("Negative.", r"Negative, \boxed{fear}."), False, False, "before </step3>"),
    (GOOD.replace("<step2>Shivers.</step2>", ""), False, False, "<step2> is missing"),
    (GOOD.replace("</step2>", ""), False, False, "<step2> is not closed"),
    (GOOD.replace("<step2>", ""), False, False, "</step2> has no <step2>"),
    (GOOD.replace("<step2>Shivers.</step2>", "</step2>Shivers.<step2>"), False, False, "</step2> has no <step2>"),
    (GOOD.replace("<step1>", "<step1><step1>"), False, True, "<step1> stands there more than once"),
    (GOOD.replace("</step3>", "</step3></step3>"), False, True, "<step3> stands there more than once"),
    (BODY + GOOD, False, True, "more than once"),
    (r"<step2>b</step2><step1>a</step1><step3>c</step3>\boxed{fear}", False, False, "<step2> begins before </step1>"),
    (r"<step1>a</step1><step3>c</step3><step2>b</step2>\boxed{fear}", False, False, "<step3> begins before </step2>"),
    (r"<step1>a<step2>b</step2></step1><step3>c</step3>\boxed{fear}", False, False, "<step2> begins before </step1>"),
    (r"<step1>a<step2>b</step1></step2><step3>c</step3>\boxed{fear}", False, False, "<step2> begins before </step1>"),
    (GOOD.replace("<step1>", "< step1 >"), False, True, "</step1> has no <step1>"),
    (GOOD.replace("step", "STEP"), False, False, "<step1> is missing"),
    ("", False, False, "<step1> is missing"),
]


@pytest.mark.parametrize("text, paper, released, reason", FORMATS)
def test_format_checks(text, paper, released, reason):
    completion = parse_set(text)
    assert (completion.well_formed, completion.well_formed_released) == (paper, released)
    assert reason in completion.why and bool(completion.why) == (not paper)
    assert completion.text == text


def test_the_books_completions():
    parsed = [parse_set(c) for c in BOOK_COMPLETIONS]
    assert [c.answer for c in parsed] == ["fear", "amusement", "fear", "fear"]
    assert [c.well_formed for c in parsed] == [c.well_formed_released for c in parsed] == [True, True, True, False]
    assert parsed[0].steps == ("A ghost stands out, next to a clock and a key.", "A viewer would shiver and want to hide.", "Negative, high arousal.")
    assert parsed[3].steps == ("A ghost stands out, next to a key.", None, None)
    assert parsed[3].tagged_steps == ("<step1>A ghost stands out, next to a key.</step1>", None, None)
    assert parsed[3].why == "<step2> is not closed"


def test_contents_are_trimmed_and_tagged_steps_are_as_written():
    completion = parse_set("<step1>\n A ghost. </step1><step2>\u00a0b</step2><step3>c</step3>\\boxed{fear}")
    assert completion.steps == ("A ghost.", "b", "c")
    assert completion.tagged_steps == ("<step1>\n A ghost. </step1>", "<step2>\u00a0b</step2>", "<step3>c</step3>")


def test_what_is_there_is_kept_in_a_malformed_completion():
    assert parse_set("<step3>c</step3><step1>a</step1>").steps == ("a", None, "c")
    assert parse_set("</step1><step1>a</step1>").steps[0] == "a"
    assert parse_set("<step1>a").answer is None
    assert parse_set(r"\boxed{}").answer == ""


def test_tags_follow_the_templates():
    text = r"<a>x</a><b.*>y</b.*><c>z</c>\boxed{fear}"  # a tag is a name, never a pattern
    completion = parse_set(text, tags=("a", "b.*", "c"))
    assert completion.well_formed and completion.well_formed_released and completion.steps == ("x", "y", "z")
    assert not parse_set(text).well_formed
    assert parse_set(GOOD, DEFAULT_TEMPLATES.tags) == parse_set(GOOD) == parse_set(GOOD, list(DEFAULT_TEMPLATES.tags))


def test_the_default_prompt_is_not_itself_an_answer():
    assert parse_set(DEFAULT_TEMPLATES.set).answer == ""  # a policy that parrots the prompt has answered nothing
    assert not parse_set(DEFAULT_TEMPLATES.set).well_formed


@pytest.mark.parametrize("tags", [("a", "a", "b"), ("a", "b"), "abc", ("a", "b", "")])
def test_tags_that_cannot_work_are_refused(tags):
    with pytest.raises(ValueError, match="tags: expected three different names"):
        parse_set(GOOD, tags=tags)


def test_a_completion_is_frozen_and_hashable():
    completion = parse_set(GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        completion.answer = "awe"
    assert hash(completion) == hash(parse_set(GOOD))


@pytest.mark.parametrize("text, paper, released, reason", [
    (r"<think>A ghost.</think>\boxed{fear}", True, True, ""),
    (r"Hm. <think>A ghost.</think> \boxed{fear}", True, False, ""),
    (r"<think> </think>\boxed{fear}", False, True, "<think> is empty"),
    (r"<think>A ghost. \boxed{fear}", False, False, "<think> is not closed"),
    (r"<think>A ghost. \boxed{fear}</think>", False, False, "before </think>"),
    (r"<think>A ghost.</think>fear", False, False, "there is no"),
    (GOOD, False, False, "<think> is missing"),
])
def test_think(text, paper, released, reason):
    completion = parse_think(text)
    assert isinstance(completion, SETCompletion)
    assert (completion.well_formed, completion.well_formed_released) == (paper, released)
    assert reason in completion.why and bool(completion.why) == (not paper)
    assert completion.steps == completion.tagged_steps == (None, None, None)
    assert completion.answer == extract_boxed(text)


@pytest.mark.parametrize("text", [*BOOK_COMPLETIONS, r"<think>A ghost.</think>\boxed{fear}", r"\boxed{fear}", ""])
def test_each_method_has_its_reader(text):
    templates = PromptTemplates(set="{question} <a></a> <b></b> <c></c> \\boxed{}", tags=("a", "b", "c"))
    assert read_completion("grpo", text) == parse_think(text)
    for method in ("set", "emo_r3"): assert (read_completion(method, text), read_completion(method, text, templates)) == (parse_set(text), parse_set(text, templates.tags))
    with pytest.raises(ValueError, match="method: got 'sett'.*did you mean 'set'"): read_completion("sett", text)


@pytest.mark.parametrize("text, answer, why", [(r"\boxed{fear}", "fear", ""), (r"\boxed{fear}</>", "fear", ""), (r"\boxed{ }", "", "the last \\boxed{} is empty"),
                                               ("fear", None, "there is no \\boxed{}"), (r"\boxed{fear", None, "the last \\boxed{ is not closed")])
def test_a_direct_answer_is_in_form_when_its_box_is_filled(text, answer, why):
    completion = read_completion("direct", text)
    assert (completion.answer, completion.why, completion.well_formed, completion.well_formed_released) == (answer, why, not why, not why)
    assert completion.steps == completion.tagged_steps == (None,) * 3


# --- properties -------------------------------------------------------------------------------------------------------------

PIECES = ["<step1>", "</step1>", "<step2>", "</step2>", "<step3>", "</step3>", "<think>", "</think>", "\\boxed{", "}", "{", "fear", "awe", "fearful", " ", "\n", "<", "/", ">",
          "not", "and", ",", "/", "\\text{", "$", "**", "~~", "\\", "'", "\u200b", "ａｗｅ", "\u0301", "\ud800", "x"]
NEARLY = [*re.findall(r"<[^>]*>|[^<]+", BODY), "\\boxed{", "fear", "}"]
nearly_good = st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 1, 0, 2]), min_size=len(NEARLY), max_size=len(NEARLY)).map(
    lambda times: "".join(piece * n for piece, n in zip(NEARLY, times)))  # GOOD with a few pieces left out or repeated
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join), nearly_good)
sets = st.sampled_from([EMOSET8, EMOTION6, WEBEMO7, WEBEMO25, ABSTRACT, WITH_NONE])
modes = st.sampled_from(MODES)


@given(texts)
def test_parsing_never_raises_and_never_invents(text):
    for completion in (parse_set(text), parse_think(text)):
        assert completion.well_formed == (completion.why == "")
        assert all(part is None or part in text for part in (*completion.steps, *completion.tagged_steps, completion.answer))
        assert not completion.well_formed or completion.answer
    completion = parse_set(text)
    assert not completion.well_formed or all(completion.steps)


@given(st.one_of(st.none(), texts), sets, modes)
def test_a_match_is_a_label_of_the_set_and_matches_itself(answer, label_set, mode):
    label = match_label(answer, label_set, mode)
    assert label is None or label in label_set
    assert match_label(label, label_set, mode) == label


@given(texts, sets)
def test_lenient_accepts_what_strict_accepts(answer, label_set):
    strict = match_label(answer, label_set)
    assert strict is None or match_label(answer, label_set, "lenient") == strict


@given(texts, sets, modes)
@example(r"\text{awe}", EMOSET8, "lenient")
def test_case_does_not_matter(answer, label_set, mode):
    swapped = re.sub("[a-zA-Z]", lambda m: m[0].swapcase(), answer)
    assert match_label(swapped, label_set, mode) == match_label(answer, label_set, mode)


@given(sets, st.data())
def test_every_name_is_read_inside_any_dress(label_set, data):
    name = data.draw(st.sampled_from([*label_set, *label_set.aliases]))
    wrap = data.draw(st.sampled_from([r"\text{%s}", "**%s**", "$%s$", "'%s'", "{{%s}}", "%s.", r"\mathrm{\textbf{%s}}", "_%s_", "\u200b%s"]))
    meant = label_set.aliases.get(name, name)
    assert match_label(wrap % name, label_set, "lenient") == meant
    assert match_label(wrap % name, label_set) is None
    assert match_label(f"not {wrap % name}", label_set, "lenient") is None


@given(sets, st.data())
def test_two_labels_are_no_answer(label_set, data):
    one, other = data.draw(st.lists(st.sampled_from(label_set.labels), min_size=2, max_size=2, unique=True))
    between = data.draw(st.sampled_from([" and ", ", ", "/", " or ", " ", "\n", ";", " & ", " vs "]))
    assert match_label(one + between + other, label_set, "lenient") is None


@given(texts)
def test_the_box_is_found_as_a_slow_reader_would(text):
    start, depth, expected = text.rfind("\\boxed{"), 0, None
    for i in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            expected = text[start + 7:i].strip()
            break
    assert extract_boxed(text) == expected


@given(st.lists(st.sampled_from([*PIECES[:6], "< /step1 >", "\\boxed{", "}", " ", "\n", "x", "<", ">"]), max_size=20).map("".join))
@example(GOOD)
@example("  < step1 > a < / step1 ><step2></step2><step3></step3>\\boxed{}")
@settings(max_examples=300)
def test_the_released_check_is_the_full_match_it_stands_for(text):
    closed_up = re.sub(r"\s*([<>/])\s*", r"\1", text)
    pattern = ".*".join(rf"<step{k}>.*</step{k}>" for k in (1, 2, 3)) + r".*\\boxed\{.*\}.*"
    assert parse_set(text).well_formed_released == bool(re.fullmatch(pattern, closed_up, re.DOTALL))


# --- a megabyte -------------------------------------------------------------------------------------------------------------

MB = 1_000_000
HOSTILE = {
    "boxes": "\\boxed{" * (MB // 7),
    "closed boxes": "\\boxed{}" * (MB // 8),
    "open braces": "{" * MB,
    "box of open braces": "\\boxed{" + "{" * MB,
    "nested braces": "\\boxed{" + "{" * (MB // 2) + "}" * (MB // 2 + 1),
    "pairs of braces": "\\boxed{" + "{}" * (MB // 2),
    "closing braces": "}" * MB,
    "spaces": " " * MB,
    "box of spaces": BODY + "\\boxed{" + " " * MB + "awe}",
    "spaces and brackets": "< " * (MB // 2),
    "spaces before a bracket": " " * MB + "<",
    "opening tags": "<step1>" * (MB // 7),
    "closing tags": "</step3>" * (MB // 8),
    "all tags": BODY * (MB // len(BODY)),
    "everything but a box": BODY * (MB // len(BODY)) + "\\boxed{",
    "stacked accents": BODY + "\\boxed{" + "\u0301\u0316" * (MB // 2) + "}",
    "wrappers": BODY + "\\boxed{" + "\\text{" * (MB // 6) + "}" * (MB // 6) + "}",
    "backslashes": "\\boxed{" + "\\" * MB + "}",
    "labels": "\\boxed{" + "awe " * (MB // 4) + "}",
    "long step": "<step1>" + "word " * (MB // 5) + "</step1><step2>b</step2><step3>c</step3>\\boxed{fear}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_takes_well_under_a_second(name):
    text = HOSTILE[name]
    assert len(text) > 0.9 * MB
    began = time.process_time()
    for completion in (parse_set(text), parse_think(text)):
        for mode in MODES:
            match_label(completion.answer, EMOSET8, mode)
            match_label(text, EMOSET8, mode)
    assert time.process_time() - began < 2  # typically below 0.1; anything quadratic takes minutes


def test_a_long_answer_is_no_label_and_a_padded_one_is():
    assert match_label("awe. " * 2000, EMOSET8, "lenient") is None
    assert match_label(" " * MB + "awe." + "\n" * MB, EMOSET8, "lenient") == "awe"
    assert match_label(" " * MB + "awe", EMOSET8) == "awe"


def test_importing_the_parser_leaves_torch_alone():
    code = "import sys, emo_r3.parsing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

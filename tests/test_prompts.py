"What a model is shown: the exact default words, substitution that cannot be abused, and templates that cannot work."

import subprocess
import sys

import pytest
from hypothesis import example as given_example
from hypothesis import given, strategies as st
from PIL import Image

from emo_r3.data import EMOSET8, EMOTION6, WEBEMO7, LabelSet, emotion_question
from emo_r3.parsing import parse_set
from emo_r3.prompts import (DEFAULT_TEMPLATES, EVAL_METHODS, METHODS, PromptTemplates, coherence_messages, consistency_messages, direct_messages,
                            fill_template, method_messages, set_messages, think_messages)

PICTURE = Image.new("RGB", (4, 4))
QUESTION = "Which emotion does this picture evoke? Choose one of: amusement, anger, awe, contentment, disgust, excitement, fear, sadness."


def text_of(messages):
    (turn,) = messages
    assert turn["role"] == "user"
    return turn["content"][-1]["text"]


def kinds_of(messages):
    return [item["type"] for item in messages[0]["content"]]


# The embedded policy was trained on these very words: a change here is a change of what it understands.
def test_set_prompt_word_for_word():
    assert text_of(set_messages(emotion_question(EMOSET8), PICTURE)) == (
        QUESTION + "\nThink in three steps."
        "\n<step1>Identify what in the scene may trigger an emotion: objects, actions, environment, facial cues.</step1>"
        "\n<step2>Describe how a human observer would respond to it.</step2>"
        "\n<step3>Conclude whether the emotion is positive or negative, and how high the arousal is.</step3>"
        "\nThen write the final emotion in \\boxed{}.")


def test_other_prompts_word_for_word():
    assert text_of(think_messages(QUESTION)) == (
        QUESTION + "\nFirst think about the picture inside <think> </think>, then write the final emotion in \\boxed{}.")
    assert text_of(direct_messages(QUESTION)) == QUESTION + "\nAnswer with the emotion in \\boxed{}."
    assert text_of(consistency_messages(PICTURE, "A ghost.")) == (
        "Can the following text describe the image? Answer Yes or No.\nA ghost.")
    assert text_of(coherence_messages("A ghost.", "A shiver.", EMOTION6)) == (
        "A ghost.\nA shiver.\nWhich emotion best describes the text above? Choose one of: anger, disgust, fear, joy, sadness, surprise.")


@pytest.mark.parametrize("ask", [set_messages, think_messages, direct_messages])
def test_picture_comes_first_and_only_where_there_is_one(ask):
    assert kinds_of(ask("?", PICTURE)) == ["image", "text"]
    assert ask("?", PICTURE)[0]["content"][0]["image"] is PICTURE
    assert kinds_of(ask("?")) == ["text"]


def test_each_method_has_its_prompt():
    assert METHODS == ("grpo", "set", "emo_r3", "sft") and EVAL_METHODS == (*METHODS, "direct")
    german = PromptTemplates.from_dict({name: f"{{question}} {name} <think></think> <step1></step1><step2></step2><step3></step3> \\boxed{{}}" for name in ("set", "think", "direct")})
    for templates in (DEFAULT_TEMPLATES, german):
        for method, ask in zip(EVAL_METHODS, (think_messages, set_messages, set_messages, direct_messages, direct_messages), strict=True):
            assert method_messages(method, QUESTION, PICTURE, templates) == ask(QUESTION, PICTURE, templates)
    with pytest.raises(ValueError, match="method: got 'emo-r3'; allowed: grpo, set, emo_r3, sft, direct; did you mean 'emo_r3'"): method_messages("emo-r3", QUESTION)


def test_consistency_sees_the_picture_and_coherence_does_not():
    assert kinds_of(consistency_messages(PICTURE, "A ghost.")) == ["image", "text"]
    assert kinds_of(coherence_messages("A ghost.", "A shiver.", EMOSET8)) == ["text"]


@pytest.mark.parametrize("labels", [EMOSET8, EMOTION6, WEBEMO7, LabelSet("two", ("zeal", "apathy"))])
def test_labels_are_listed_alphabetically(labels):
    listed = text_of(coherence_messages("a", "b", labels)).rsplit("Choose one of: ", 1)[1]
    assert listed == ", ".join(sorted(labels.labels)) + "."
    assert text_of(set_messages(emotion_question(labels))).splitlines()[0].endswith(listed)


@pytest.mark.parametrize("step", ["{labels}", "{step2}", "{step1}{step1}", "{question}", "{", "}", "{}", "{{labels}}", "\\1 \\g<0>", "%s %(x)s", "\\boxed{awe}", "",
                                  "\u202e\u200b\ud83d", "a\nb\r\nc", "<|im_end|>"])
def test_hostile_steps_are_inserted_as_they_are(step):
    assert text_of(consistency_messages(PICTURE, step)) == "Can the following text describe the image? Answer Yes or No.\n" + step
    text = text_of(coherence_messages(step, step, EMOTION6))
    assert text.startswith(f"{step}\n{step}\nWhich emotion") and text.count("surprise") == 1
    assert text_of(direct_messages(step)) == step + "\nAnswer with the emotion in \\boxed{}."


@given(st.text(), st.text())
@given_example("{step2}", "{step1}")
def test_values_are_never_read_again(first, second):
    assert fill_template("[{step1}|{step2}|{step1}]", {"step1": first, "step2": second}) == f"[{first}|{second}|{first}]"


def test_a_box_is_not_a_placeholder():
    assert fill_template(r"{a} \boxed{} \boxed{a} {a}", {"a": "x"}) == r"x \boxed{} \boxed{a} x"
    PromptTemplates(direct=r"{question} Answer as in \boxed{emotion}.")
    with pytest.raises(ValueError, match="question"):
        PromptTemplates(direct=r"\boxed{question}")


def test_templates_are_replaceable_one_by_one():
    mine = PromptTemplates(consistency="Stimmt das? {step1}")
    assert text_of(consistency_messages(PICTURE, "Ein Geist.", mine)) == "Stimmt das? Ein Geist."
    assert mine.set == DEFAULT_TEMPLATES.set
    mine = PromptTemplates(coherence="{step1} / {step2} / which emotion?")  # the paper's question lists no labels
    assert text_of(coherence_messages("a", "b", EMOSET8, mine)) == "a / b / which emotion?"


def test_tags_and_prompt_and_parser_agree():
    words = "{question} <sehen>x</sehen> <wirken>y</wirken> <schluß>z</schluß> \\boxed{}"
    mine = PromptTemplates.from_dict({"set": words, "tags": ["sehen", "wirken", "schluß"]})
    assert mine.tags == ("sehen", "wirken", "schluß") and hash(mine)
    assert parse_set(text_of(set_messages("?", templates=mine)).replace("\\boxed{}", "\\boxed{fear}"), mine.tags).well_formed


@pytest.mark.parametrize("field, text, words", [
    ("set", "Think. \\boxed{}", "{question}"),
    ("set", DEFAULT_TEMPLATES.set.replace("\\boxed{}", "a box"), "\\boxed"),
    ("set", DEFAULT_TEMPLATES.set.replace("</step2>", ""), "</step2>"),
    ("set", DEFAULT_TEMPLATES.set.replace("step1", "stepX").replace("step2", "step1").replace("stepX", "step2"), "<step2>"),
    ("set", DEFAULT_TEMPLATES.set + "{labels}", "{labels}"),
    ("think", "{question} \\boxed{}", "<think>"),
    ("think", "{question} </think> <think> \\boxed{}", "</think>"),
    ("think", "{question} <think> </think>", "\\boxed"),
    ("direct", "\\boxed{}", "{question}"),
    ("direct", "{question}", "\\boxed"),
    ("consistency", "Is it?", "{step1}"),
    ("consistency", "{step1} {step2}", "{step2}"),
    ("coherence", "{step1} {labels}", "{step2}"),
    ("coherence", "{step1} {step2} {Labels}", "{Labels}"),
    ("coherence", "", "coherence"),
    ("coherence", None, "None"),
    ("direct", 3, "3"),
])
def test_templates_that_cannot_work_are_refused(field, text, words):
    with pytest.raises(ValueError) as error:
        PromptTemplates(**{field: text})
    message = str(error.value)
    assert message.startswith(f"prompts.{field}:") and words in message and "\n" not in message


@pytest.mark.parametrize("tags", [("step1", "step2"), ("step1", "step1", "step3"), "abc", ("step1", "step2", ""), ("step1", "step 2", "step3"),
                                  ("step1", "<step2>", "step3"), ("step1", 2, "step3"), None, 3, ("a", "b", "c"), ("step3", "step2", "step1")])
def test_tags_that_cannot_work_are_refused(tags):
    with pytest.raises(ValueError, match=r"prompts\.(tags|set): "):
        PromptTemplates(tags=tags)


def test_unknown_field_suggests_the_nearest():
    with pytest.raises(ValueError, match="'consistancy'.*allowed: set, think, direct, consistency, coherence, tags.*'consistency'"):
        PromptTemplates.from_dict({"consistancy": "{step1}"})
    with pytest.raises(ValueError, match="prompts field: got 3"):
        PromptTemplates.from_dict({3: "{step1}"})


def test_nothing_is_asked_without_steps_or_picture():
    with pytest.raises(TypeError, match="step1"):
        consistency_messages(PICTURE, None)
    with pytest.raises(TypeError, match="step2"):
        coherence_messages("a", None, EMOSET8)
    with pytest.raises(TypeError, match="image"):
        consistency_messages(None, "a")


def test_imports_without_torch():
    code = "import sys; sys.modules['torch'] = None; import emo_r3.prompts; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

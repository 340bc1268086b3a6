"""Groups, widgets and the report: what a page must never do, checked on made-up runs and in a real browser."""
import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import zlib
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import test_methods
import torch
import yaml
from hypothesis import given, strategies as st
from matplotlib.figure import Figure
from PIL import Image

from emo_r3 import explore
from emo_r3.advantages import group_advantages
from emo_r3.data import EMOSET8, DataError, SetAside, write_quarantine
from emo_r3.evaluate import Comparison, EvalReport, Graded
from emo_r3.explore import (Html, Line, RunReport, browse_groups, clip_explorer, direction, escape, group_html, join, line_chart, marked_objects, picture_uri, plot_clip, ranking_html, read_config,
                            read_metrics, read_quarantine, read_sample, read_summary, reprice, reward_sliders, sample_picture, show_group, smooth, tag, token_loss)
from emo_r3.parsing import parse_set
from emo_r3.rewards import RewardWeights, coherence_reward, consistency_reward, reward_completion
from emo_r3.scenes import BOOK_COMPLETIONS, book_example, is_grounded, make_scenes, scene_objects
from emo_r3.config import make_config

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></style></title>'\"&amp; \u202e \x00\x07 \ud800 ]]> ${x}"
FEELS = dict(fear="shiver and want to hide", amusement="laugh at the joke", awe="stare in wonder", contentment="relax and breathe out", excitement="jump up with energy",
             anger="clench their fists", disgust="turn away in revulsion", sadness="sigh with a heavy heart")


# ---- made-up groups and runs ----------------------------------------------------------------------------------------------

def make_group(example, texts, weights=RewardWeights(), picture="", feels=None):
    "A group's record as training writes it, judged by an oracle."
    rows = []
    for text in texts:
        c, verdict = parse_set(text), None
        if c.well_formed:
            said = "Yes" if is_grounded(c.steps[0], example.objects or ()) else "No"
            felt = next((label for label, phrase in FEELS.items() if phrase in c.steps[1]), None)
            verdict = dict(consistency=consistency_reward(said == "Yes", weights), coherence=coherence_reward(felt, example.label, weights), consistency_answer=said, coherence_answer=felt, p_yes=0.9, label_probs=None, written=None)
        else: verdict = dict(consistency=weights.unparseable, coherence=weights.unparseable, consistency_answer=None, coherence_answer=None, p_yes=None, label_probs=None, written=None)
        rewards = reward_completion(c, example.label, example.label_set, weights, consistency=verdict["consistency"], coherence=verdict["coherence"])
        rows.append(dict(text=c.text, steps=list(c.steps), answer=c.answer, well_formed=c.well_formed, why=c.why, rewards=asdict(rewards), verdict=verdict, length=len(text) // 4))
    advantages = group_advantages(torch.tensor([[r["rewards"]["overall"] for r in rows]]), weights.std, weights.eps)[0].tolist()
    return dict(id=example.id, picture=picture, label=example.label, labels=list(example.label_set.labels), question=example.question, objects=list(example.objects) if example.objects else None,
                completions=[{**r, "advantage": a} for r, a in zip(rows, advantages)])


def speak(rng, example, right, true, formed):
    "A completion that is right, true to the picture and well formed with these probabilities."
    names = list(example.objects)
    if rng.random() > true: names[-1] = rng.choice([n for n in scene_objects() if n not in names])
    label = example.label if rng.random() < right else rng.choice([l for l in EMOSET8 if l != example.label])
    sign = EMOSET8.polarity[label].capitalize()
    text = f"<step1>A {names[0]} stands out, next to a {' and a '.join(names[1:])}.</step1>\n<step2>A viewer would {FEELS[label]}.</step2>\n<step3>{sign}, high arousal.</step3>\n\\boxed{{{label}}}"
    return text if rng.random() < formed else text.replace("</step2>", "")


def predictions(rng, n, right, true, formed=0.98):
    labels = [EMOSET8.labels[i % 8] for i in range(n)]
    answers = [l if rng.random() < right else rng.choice(EMOSET8.labels) for l in labels]
    return EvalReport(tuple(Graded(str(i), l, a if rng.random() < formed else None, "", rng.random() < formed, grounded=rng.random() < true) for i, (l, a) in enumerate(zip(labels, answers))), EMOSET8, "emo_r3", "strict")


def make_metrics(rng, steps, evaluations):
    rows = [{"step": 0, **evaluations["before"]}]
    for s in range(1, steps + 1):
        p, noise = 1 - math.exp(-s / (steps / 3)), lambda size: rng.gauss(0, size)
        clamp = lambda v: min(1.0, max(0.0, v))
        accuracy, truth, rollout = clamp(0.43 + 0.45 * p + noise(0.05)), clamp(0.72 + 0.2 * p + noise(0.03)), abs(2.1 - 0.4 * p + noise(0.08))
        row = {"step": s, "rewards/accuracy/mean": accuracy, "rewards/format/mean": clamp(0.94 + 0.055 * p + noise(0.01)), "rewards/consistency/mean": clamp(truth + 0.05 * p + noise(0.02)),
               "rewards/coherence/mean": clamp(accuracy - 0.02 + noise(0.02)), "grounding": truth, "judge/consistency_accuracy": clamp(0.95 - 0.04 * p + noise(0.01)), "kl": 0.09 * p * p + abs(noise(0.004)),
               "entropy": 0.32 - 0.2 * p + noise(0.012), "reward_std": 0.3 - 0.16 * p + noise(0.02), "frac_reward_zero_std": clamp(0.05 + 0.4 * p + noise(0.06)), "grad_norm": 1.4 - 0.5 * p + abs(noise(0.2)),
               "completions/mean_length": 44 + 2 * p + noise(0.4), "completions/min_length": 36 + noise(1), "completions/max_length": 54 + abs(noise(2)), "completions/clipped_ratio": 0.004,
               "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.0, "timing_s/rollout": rollout, "timing_s/reflect": 0.45, "timing_s/logps": 0.3, "timing_s/update": 0.9, "step_time": rollout + 1.75, "perf/tokens_per_s": 128 * 45 / (rollout + 1.75)}
        row["reward"] = 0.8 * accuracy + 0.05 * (row["rewards/consistency/mean"] + row["rewards/coherence/mean"]) + 0.1 * row["rewards/format/mean"]
        if steps >= 8 and s % (steps // 4) == 0 and s < steps: row |= {f"eval/{d}/{k}": v for d, a in (("in_domain", 0.57), ("style", 0.53)) for k, v in (("accuracy", a + 0.36 * p), ("grounding", 0.95), ("n", 64))}
        rows.append(row)
    return [*rows, {"step": steps + 1, **evaluations["after"]}]


def make_run(folder, steps=100, G=8, hostile=False, seed=0, finished=True, paired=True, samples=(10, 100)):
    "A made-up run's folder, of the shape that `train` and the command line write."
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(make_config(dict(policy="embedded", min_pixels=None, max_pixels=None, eval_size=128, prompts_per_step=16, prompts_per_update=16, num_generations=G,
             max_completion_tokens=64, learning_rate=1e-4, precision="fp32", epochs=1, max_steps=steps, eval_every=25))).items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    start = {"in_domain": (0.53, 0.96), "style": (0.46, 0.95), "unseen_triggers": (0.3, 0.97), "faces": (0.52, 0.99)}
    gain = {"in_domain": 0.4, "style": 0.3, "unseen_triggers": 0.12, "faces": 0.0}
    reports = {"before": {d: predictions(rng, 128, a, g, 0.96) for d, (a, g) in start.items()}, "after": {d: predictions(rng, 128, a + gain[d], g - 0.01) for d, (a, g) in start.items()}}
    figures = {when: {d: r.to_dict() for d, r in found.items()} for when, found in reports.items()}
    flat = {when: {f"eval/{d}/{k}": v for d, f in found.items() for k, v in f.items() if isinstance(v, (int, float))} for when, found in figures.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_metrics(rng, steps, flat)))
    (folder / "samples").mkdir()
    for step in samples:
        late, groups = step > steps / 2, []
        for i, example in enumerate(make_scenes("in_domain", "train", 2, seed=step)):
            picture = f"step_{step:05d}_{i}.png"
            example.load_image().save(folder / "samples" / picture)
            texts = [speak(rng, example, 0.85 if late else 0.4, 0.95 if late else 0.7, 0.99 if late else 0.85) for _ in range(G)]
            if hostile: texts[0], texts[1] = HOSTILE, f"<step1>{HOSTILE}</step1><step2>{HOSTILE}</step2><step3>{HOSTILE}</step3>\\boxed{{{HOSTILE}}}"
            record = make_group(example, texts, picture=picture)
            groups.append(record | ({"label": HOSTILE, "objects": [HOSTILE]} if hostile else {}))
        (folder / "samples" / f"step_{step:05d}.json").write_text(json.dumps({"step": step, "groups": groups}))
    if finished:
        summary = {"recipe": "scenes_cpu", "method": "emo_r3", "seed": 1, "steps": steps, "wall_s": 512.3, **figures}
        if paired:
            right = lambda r: {g.id: g.correct for g in r.predictions}
            pairs = {d: [(right(reports["before"][d])[i], right(reports["after"][d])[i]) for i in right(reports["before"][d])] for d in start}
            summary["comparison"] = {d: Comparison(len(p), sum(a and not b for b, a in p), sum(b and not a for b, a in p)).to_dict() for d, p in pairs.items()}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory): return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory): return make_run(tmp_path_factory.mktemp("runs") / "hostile", steps=12, G=4, hostile=True, samples=(4, 12))


@pytest.fixture(scope="module")
def book(): return make_group(book_example(), BOOK_COMPLETIONS)


# ---- text stays text ------------------------------------------------------------------------------------------------------

class Page(HTMLParser):
    "Everything that a browser would find in a page."
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(page); self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append(name); self.attributes += [(name, key, value) for key, value in attributes]
        if name not in ("img", "meta", "link", "br", "hr"): self.open.append(name)

    def handle_endtag(self, name):
        assert self.open and self.open[-1] == name, f"</{name}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open: self.text += data

    def check(self):
        assert not self.open, f"never closed: {self.open}"
        assert set(self.tags) <= OURS, f"tags that nobody here writes: {set(self.tags) - OURS}"
        for name, key, value in self.attributes:
            assert not key.startswith("on"), f"{name} has a handler {key}"
            if key in ("src", "href"): assert value.startswith(("data:", "#")), f"{name} {key} leads outside: {value[:60]}"
        return self


OURS = set("html head meta link title style body header nav main section footer article figure figcaption svg g path circle line text div span p a b i h1 h2 h3 table caption thead tbody tr th td ol li ins del code pre img".split())


@given(st.text())
def test_escaping_keeps_the_text_and_lets_nothing_through(text):
    safe = escape(text)
    assert not re.search("[<>\"']", safe)
    assert Page(f"<p>{safe}</p>").text == explore._UNSHOWABLE.sub("\ufffd", text)
    safe.encode("utf-8")


def test_escape_golden():
    assert escape('<b class="x">&') == "&lt;b class=&quot;x&quot;&gt;&amp;"
    assert escape(Html("<b>")) == "<b>" and escape(None) == "None" and escape(1.5) == "1.5"
    assert escape("\ud800\x00\x1b[31m") == "\ufffd\ufffd\ufffd[31m"


def test_attributes_are_escaped_even_where_they_are_html():
    assert tag("p", "x", title=Html('"><script>')) == '<p title="&quot;&gt;&lt;script&gt;">x</p>'
    assert tag("img", src="a", alt=None) == '<img src="a">'
    assert join(["<", None, Html("<br>")], ", ") == "&lt;, <br>"


texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=40) | st.sampled_from([HOSTILE, "</pre></li>", "<!--", "<![CDATA[", "<step1>a</step1><step2>b</step2><step3>c</step3>\\boxed{<b>}", "A ghost. <del>"])


@given(st.lists(texts, min_size=2, max_size=4))
def test_whatever_a_model_writes_is_shown_as_text(completions):
    page = Page(group_html(make_group(book_example(), completions), book_example().load_image())).check()
    assert "script" not in page.tags and page.tags.count("img") == 1


def test_a_hostile_group_shows_its_words(book):
    record = make_group(book_example(), [HOSTILE, BOOK_COMPLETIONS[0].replace("ghost", "<script>ghost</script>")]) | {"label": HOSTILE, "objects": [HOSTILE]}
    page = Page(show_group(record, "no/such\"><script>.png").data).check()
    assert page.text.count("<script>document.title='owned'</script>") >= 3 and "A <script>ghost</script> stands out" in page.text


# ---- pictures and groups ---------------------------------------------------------------------------------------------------

def test_pictures_are_scaled_down_and_errors_name_the_file(tmp_path):
    assert len(picture_uri(Image.effect_noise((3000, 2000), 90))) < 80_000
    assert picture_uri(Image.new("RGBA", (8, 8))).startswith("data:image/webp;base64,")
    with pytest.raises(FileNotFoundError, match="gone.png.* does not exist"): picture_uri(tmp_path / "gone.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no")
    with pytest.raises(DataError, match="bad.png: not a picture"): picture_uri(tmp_path / "bad.png")


def chunk(kind, data): return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb(side): # a PNG of one bit a pixel, all of them black
    head = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes((side // 8 + 1) * side), 9)) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(anything) run\n%%EOF\n"
NO_PICTURES = {"a program": POSTSCRIPT, "a bomb": bomb(9600), "empty": b"", "cut off": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)), "text": b"<svg onload=alert(1)>"}


@pytest.mark.parametrize("what", list(NO_PICTURES))
def test_what_is_no_picture_is_a_note_in_its_place(what, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'sprung'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    folder = make_run(tmp_path / "run", steps=2, G=2, samples=(2,))
    path = folder / "samples" / "step_00002_0.png"
    path.write_bytes(NO_PICTURES[what])
    with pytest.raises(DataError, match="step_00002_0.png: "): picture_uri(path)
    page = Page(RunReport(folder).html()).check()
    assert "step_00002_0.png cannot be shown" in page.text and page.tags.count("img") == 1 and "What is mistaken for what" in page.text
    assert not (tmp_path / "sprung").exists()


def test_a_bomb_just_below_the_bound_is_a_picture(tmp_path):
    (tmp_path / "large.png").write_bytes(bomb(2000))
    assert picture_uri(tmp_path / "large.png").startswith("data:image/webp")


OUTSIDE = ("{root}/private.png", "../private.png", "../../private.png", "sub/in.png", "./in.png", "..", ".", "link.png", "loop.png", "a\0b.png", "\ud800.png", "..\\private.png", "x" * 5000, "gone.png", "sub")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_sample_leads_to_no_picture_outside_its_folder(name, tmp_path):
    folder, name = make_run(tmp_path / "run", steps=2, G=2, samples=(2,)), name.replace("{root}", str(tmp_path))
    for place in (tmp_path, folder): Image.new("RGB", (8, 8), (1, 2, 3)).save(place / "private.png")
    (folder / "samples/sub").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "samples/sub/in.png")
    (folder / "samples/link.png").symlink_to(tmp_path / "private.png")
    (folder / "samples/loop.png").symlink_to("loop.png")
    path = folder / "samples/step_00002.json"
    sample = json.loads(path.read_text())
    sample["groups"][0]["picture"] = name
    path.write_text(json.dumps(sample))
    page = Page(RunReport(folder).html()).check()
    assert page.tags.count("img") == 1 and any(said in page.text for said in ("is not followed; allowed: the name of a file in samples/", "is missing", "cannot be shown"))
    box = browse_groups(folder)
    assert Page(box.shown.value).check().tags.count("img") == 0


def test_links_within_samples_and_a_linked_run_are_followed(tmp_path):
    folder = make_run(tmp_path / "run", steps=2, G=2, samples=(2,))
    (folder / "samples/step_00002_0.png").rename(folder / "samples/first.png")
    (folder / "samples/step_00002_0.png").symlink_to("first.png")
    (tmp_path / "linked").symlink_to(folder)
    assert Page(RunReport(tmp_path / "linked").html()).check().tags.count("img") == 2
    assert sample_picture(folder, "") is sample_picture(folder, None) is None


def test_a_missing_picture_is_named_in_the_group(book, tmp_path):
    assert "gone.png is missing" in group_html(book, tmp_path / "gone.png")
    assert "no picture" in group_html(book)


def test_objects_are_marked_by_what_is_there():
    assert marked_objects("A spider and a Ghost.", ("ghost", "key")) == 'A <del title="not in the picture">spider</del> and a <ins title="in the picture">Ghost</ins>.'
    assert marked_objects("ghostly ghosts", ("ghost",)) == "ghostly ghosts"
    assert marked_objects("A ghost", None) == "A ghost" and marked_objects("A ghost", ()) == 'A <del title="not in the picture">ghost</del>'
    for example in make_scenes("in_domain", "test", 20, seed=3):
        html = marked_objects(f"A {example.objects[0]} next to a {example.objects[1]}.", example.objects)
        assert html.count("<ins") == 2 and "<del" not in html


def test_a_group_is_ordered_by_advantage_and_equal_completions_share_a_card(book):
    twice = make_group(book_example(), (BOOK_COMPLETIONS[1], *BOOK_COMPLETIONS[:2]))
    text = Page(group_html(twice)).text
    assert text.index("c2") < text.index("c1, c3") and "× 2" in text
    text = Page(group_html(book)).text
    assert [text.index(f"c{i}") for i in (1, 3, 4, 2)] == sorted(text.index(f"c{i}") for i in (1, 3, 4, 2))
    assert "<step2> is not closed" in text and "not asked" in text and "−1.69" in text


def test_a_group_without_spread_says_so():
    assert "teaches nothing" in group_html(make_group(book_example(), BOOK_COMPLETIONS[:1] * 3))


def test_a_group_of_a_method_without_steps_or_judge(book):
    plain = {**book, "objects": None, "completions": [{**c, "steps": [None] * 3, "verdict": None, "well_formed": True, "why": "", "text": "<think>hm</think> \\boxed{awe}"} for c in book["completions"][:2]]}
    text = Page(group_html(plain)).text
    assert "<think>hm</think> \\boxed{awe}" in text and "consistency" not in text


def test_long_completions_are_cut(book):
    long = make_group(book_example(), [f"<step1>{'a ghost ' * 5000}</step1><step2>b</step2><step3>c</step3>\\boxed{{fear}}", "x" * 50_000])
    page = group_html(long, longest=500)
    assert len(page) < 12_000 and "characters more" in page


# ---- other prices ----------------------------------------------------------------------------------------------------------

def test_repricing_golden(book):
    overall = lambda w: [c["rewards"]["overall"] for c in reprice(book, w)["completions"]]
    assert overall(RewardWeights()) == [1.0, 0.15, 0.95, 0.8]
    assert overall(RewardWeights.preset("released")) == pytest.approx([1.1, 0.2, 1.0, 0.9])
    assert overall(RewardWeights(lambda_reflective=0, lambda_format=0)) == [1, 0, 1, 1]
    assert [c["advantage"] for c in reprice(book, RewardWeights(lambda_reflective=0, lambda_format=0))["completions"]] == pytest.approx([3**-0.5, -(3**0.5), 3**-0.5, 3**-0.5])


def test_repricing_normalises_as_the_preset_does(book):
    paid = torch.tensor([1.1, 0.2, 1.0, 0.9])
    expected = (paid - paid.mean()) / (paid.std() + 1e-6)  # released: sample std
    assert [c["advantage"] for c in reprice(book, RewardWeights.preset("released"))["completions"]] == pytest.approx(expected.tolist(), rel=1e-4)


def test_advantage_bars_point_the_right_way():
    assert 'class="up" style="left:50%;width:50.0%"' in explore.advantage_bar(2.0, 2.0) and "advantage +2.00" in explore.advantage_bar(2.0, 2.0)
    assert 'class="down" style="left:25.0%;width:25.0%"' in explore.advantage_bar(-1.0, 2.0) and "advantage −1.00" in explore.advantage_bar(-1.0, 2.0)
    assert "width:0.0%" in explore.advantage_bar(0.0, 0.0)


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["paper", "released"]))
def test_repricing_keeps_the_facts_and_the_group(l1, l2, preset):
    book = make_group(book_example(), BOOK_COMPLETIONS)
    from dataclasses import replace
    new = reprice(book, replace(RewardWeights.preset(preset), lambda_reflective=l1 * (1 - l2), lambda_format=l2))
    for old, c in zip(book["completions"], new["completions"]):
        assert all(old[name] == c[name] for name in ("text", "verdict", "length")) and all(old["rewards"][name] == c["rewards"][name] for name in ("accuracy", "format"))
    assert sum(c["advantage"] for c in new["completions"]) == pytest.approx(0, abs=1e-6)


def with_own(group, weight, values):
    "The group as it is recorded with a reward of the user's own."
    rewards = [c["rewards"] | {"extra": {"brevity": v}, "overall": round(c["rewards"]["overall"] + weight * v, 12)} for c, v in zip(group["completions"], values)]
    return group | {"completions": [c | {"rewards": r} for c, r in zip(group["completions"], rewards)]}


@pytest.mark.parametrize("made_with", [RewardWeights(), RewardWeights.preset("released"), RewardWeights(lambda_reflective=0.6, lambda_format=0.3)])
def test_repricing_keeps_what_rewards_of_your_own_added(made_with):
    group, values = make_group(book_example(), BOOK_COMPLETIONS, made_with), (0.0, 1.0, -3.0, 0.5)
    own, overall = with_own(group, 0.25, values), lambda record: [c["rewards"]["overall"] for c in record["completions"]]
    for weights in (made_with, RewardWeights(), RewardWeights(lambda_reflective=0.6), RewardWeights.preset("released")):
        new = reprice(own, weights, made_with)
        assert overall(new) == pytest.approx([plain + 0.25 * v for plain, v in zip(overall(reprice(group, weights)), values)], abs=1e-9)
        assert [c["rewards"]["extra"] for c in new["completions"]] == [{"brevity": v} for v in values]
    paid = torch.tensor([overall(reprice(own, RewardWeights(), made_with))], dtype=torch.float64)
    assert [c["advantage"] for c in reprice(own, RewardWeights(), made_with)["completions"]] == pytest.approx(group_advantages(paid, "population", 0.0)[0].tolist())
    assert overall(reprice(own, made_with, made_with)) == pytest.approx(overall(own), abs=1e-9)


def test_repricing_asks_for_the_prices_of_that_time(book):
    with pytest.raises(ValueError, match=r"made_with: None for a group with rewards of your own \(brevity\); allowed: the weights that it was made with"): reprice(with_own(book, 0.2, [1, 0, 0, 0]), RewardWeights())
    assert reprice(with_own(book, 0.0, [0] * 4) | {"completions": [c | {"rewards": c["rewards"] | {"extra": {}}} for c in book["completions"]]}, RewardWeights())


def test_rewards_of_your_own_are_shown(book):
    own = with_own(book, 0.2, (0.0, 1.0, -3.0, 0.5))
    assert "brevity −3" in Page(group_html(own)).check().text and "brevity" not in group_html(book)
    table = Page(ranking_html(own, RewardWeights(lambda_reflective=0.6), RewardWeights())).check()
    assert "your own" in table.text and "−0.600" in table.text and "+0.200" in table.text and "your own" not in ranking_html(book, RewardWeights())
    bars = [value for name, key, value in table.attributes if key == "aria-label" and value.startswith("reward ")]
    assert len(bars) == 4 and any("your own -0.60" in bar for bar in bars)
    assert all(float(width) <= 100 for width in re.findall(r"width:([\d.]+)%", ranking_html(with_own(book, 50.0, (0.0, 1.0, -3.0, 0.5)), RewardWeights(), RewardWeights())))
    box = reward_sliders(own, RewardWeights())
    assert re.findall(r'<th scope="row">(c\d)</th>', box.shown.value)[0] == "c1" and "your own" in box.shown.value


def test_a_run_knows_the_prices_of_its_groups(tmp_path):
    folder = make_run(tmp_path / "run", steps=2, G=2, samples=())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for given, weights in (({}, RewardWeights()), ({"preset": "released", "lambda_format": 0.2}, replace(RewardWeights.preset("released"), lambda_format=0.2)), ({"method": "grpo"}, RewardWeights.for_method("grpo"))):
        (folder / "config.yaml").write_text(yaml.safe_dump(config | given))
        assert RunReport(folder).weights == weights
    for given in ({"preset": "other"}, {"preset": [1]}, {"lambda_format": "a"}, {"lambda_reflective": [0.1]}, {"method": "<b>"}):
        (folder / "config.yaml").write_text(yaml.safe_dump(config | given))
        assert RunReport(folder).html()
        with pytest.raises(ValueError): RunReport(folder).weights


def test_reward_sliders_rank_anew(book):
    box = reward_sliders(book)
    order = lambda: re.findall(r'<th scope="row">(c\d)</th>', box.shown.value)
    assert order() == ["c1", "c3", "c4", "c2"]
    box.lambda_reflective.value = 0.6
    assert order() == ["c1", "c3", "c2", "c4"] and "▲ 1" in box.shown.value and "accuracy keeps 0.30" in box.shown.value
    box.lambda_reflective.value = 1.0  # together they may not pass 1: the other gives way
    assert box.lambda_format.value == 0 and "accuracy keeps 0.00" in box.shown.value
    box.lambda_format.value = 0.25
    assert box.lambda_reflective.value == 0.75
    box.lambda_reflective.value, box.lambda_format.value = 0.1, 0.1
    before, box.preset.value = box.shown.value, "released"
    assert box.shown.value != before and "1.100" in box.shown.value and "0.900" in box.shown.value
    Page(box.shown.value).check()


# ---- clip and KL -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("advantage", [1.0, -1.0, -0.5])
@pytest.mark.parametrize("delta", [3.0, None])
def test_the_shaded_range_is_where_the_gradient_is_zero(advantage, delta):
    ax = plot_clip(0.2, 0.3, delta, advantage)
    shaded = ax.collections[0].get_paths()
    for ratio in (0.1, 0.5, 0.75, 0.85, 1.0, 1.25, 1.35, 2.0, 2.95, 3.05, 3.9):
        x = ax.transData.transform((ratio, 0))[0]
        inside = any(p.get_extents().x0 <= ratio <= p.get_extents().x1 for p in shaded)
        assert inside == (token_loss(ratio, advantage, 0.2, 0.3, delta)[1] == 0), ratio


def test_token_loss_is_the_loss_of_training():
    from emo_r3.loss import grpo_loss
    for ratio in (0.3, 1.0, 1.2, 2.5, 3.5):
        for advantage in (1.5, -0.7):
            expected, _ = grpo_loss(torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), epsilon_low=0.2, epsilon_high=0.3, delta=3.0)
            assert token_loss(ratio, advantage)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_clip_explorer_follows_its_controls():
    box = clip_explorer()
    said = lambda: Page(box.shown.value).text
    assert "ratio 1.00: loss -1.00, gradient -1.00: the token is made likelier" in said()
    box.ratio.value = 1.5
    assert "loss -1.30, held" in said()
    box.epsilon_high.value = 0.6
    assert "loss -1.50, gradient -1.50" in said()
    box.sign.value = -1.0
    assert "gradient +1.50: the token is made rarer" in said()
    box.ratio.value = 3.5
    assert "loss +3.00, held" in said()
    box.dual.value = False
    assert "loss +3.50, gradient +3.50" in said()
    box.ratio.value, box.epsilon_low.value = 0.5, 0.3
    assert "loss +0.70, held" in said()
    before, box.dual.value = box.shown.value, True
    box.delta.value = 1.2
    assert box.shown.value != before and box.shown.value.count("<svg") == 1


# ---- stepping through a run ------------------------------------------------------------------------------------------------

def test_browsing_steps_through_all_groups(run):
    box = browse_groups(run)
    assert [name for name, _ in box.position.options] == ["step 10, picture 1", "step 10, picture 2", "step 100, picture 1", "step 100, picture 2"]
    seen = []
    for _ in range(5):
        seen.append(box.shown.value)
        box.next.click()
    assert len(set(seen)) == 4 and seen[3] == seen[4] and box.position.value == 3  # the last stays
    for _ in range(9): box.previous.click()
    assert box.position.value == 0 and box.shown.value == seen[0]
    Page(box.shown.value).check()


def test_browsing_a_run_without_samples_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"samples: holds no step_\*.json"): browse_groups(make_run(tmp_path / "run", steps=4, samples=()))


# ---- reading a folder ------------------------------------------------------------------------------------------------------

def test_metrics_may_end_in_the_middle_of_a_line_but_not_break_inside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == ([], False)
    path.write_text('{"step": 1}\n{"step": 2, "x": NaN}\n{"st')
    rows, torn = read_metrics(path)
    assert [r["step"] for r in rows] == [1, 2] and torn
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not readable"): read_metrics(path)
    path.write_text('{"step": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"line 2: got \[\]; allowed: an object"): read_metrics(path)
    path.write_text('{"step": 1}\n{"reward": 2}\n')
    with pytest.raises(ValueError, match=r"line 2: step is missing; allowed: a whole number"): read_metrics(path)


@pytest.mark.parametrize("file, content, error, said", [
    ("config.yaml", None, FileNotFoundError, "config.yaml is missing: .* is not the folder of a run"), ("config.yaml", "[1", ValueError, "config.yaml: not readable as YAML"),
    ("config.yaml", "- a\n", ValueError, "allowed: a mapping"), ("summary.json", "{", ValueError, "summary.json: not readable as JSON"), ("summary.json", "[]", ValueError, r"got \[\]; allowed: an object"),
    ("summary.json", '{"before": {"in_domain": {"n": 3}}}', ValueError, "summary.json: before.in_domain.accuracy is missing; allowed: a number from 0 to 1"),
    ("summary.json", '{"after": {"style": 3}}', ValueError, "after.style: got 3; allowed: an object"), ("summary.json", "[" * 100_000, ValueError, "summary.json: not readable as JSON"),
    ("summary.json", '{"after": {"a b": {"n": 3, "accuracy": 1.5}}}', ValueError, "after.'a b'.accuracy: got 1.5; allowed: a number from 0 to 1"),
    ("samples/step_00010.json", "{}", ValueError, "step_00010.json: step is missing"), ("samples/step_00010.json", '{"step": 1, "groups": [{"label": "x", "completions": []}]}', ValueError, r"groups\[0\].completions: got \[\]; allowed: a list of one or more"),
    ("samples/step_00010.json", '{"step": 1, "groups": [{"label": "x", "completions": [{"text": 3}]}]}', ValueError, r"groups\[0\].completions\[0\].text: got 3; allowed: a text"),
    ("samples/step_00010.json", "nope", ValueError, "step_00010.json: not readable as JSON"), ("metrics.jsonl", "[" * 100_000 + "\n", ValueError, "metrics.jsonl, line 1: not readable as JSON"),
    ("metrics.jsonl", '{"step": 1, "eval/x/accuracy": 7}\n', ValueError, "metrics.jsonl, line 1: 'eval/x/accuracy': got 7; allowed: a number from 0 to 1"),
    ("quarantine.jsonl", '{"where": "x"}\n', ValueError, "quarantine.jsonl, line 1: reason is missing; allowed: a text"),
    ("config.yaml", "method: 2024-11-05\n", ValueError, "config.yaml: method: got datetime.date"), ("config.yaml", "method: 2024-13-45\n", ValueError, "config.yaml: not readable as YAML .*month"),
    ("config.yaml", "method: [a]\n", ValueError, r"config.yaml: method: got \['a'\]; allowed: a text or null"), ("config.yaml", "method: !!set {a, b}\n", ValueError, "line 1: tag tag:yaml.org,2002:set; allowed: values without tags"),
    ("config.yaml", "method: !!timestamp x\n", ValueError, "line 1: tag"), ("config.yaml", "a: &a [1]\nb: *a\n", ValueError, r"line 2: alias \*a; allowed: values written out"), ("config.yaml", "a: &a {b: *a}\n", ValueError, "alias"),
    ("config.yaml", "1: 2\n", ValueError, "a field's name: got 1; allowed: a text"), ("config.yaml", "? [a]\n: b\n", ValueError, "config.yaml: not readable as YAML"), ("config.yaml", "a: {2024-11-05: b}\n", ValueError, "config.yaml: a: got"),
    ("config.yaml", "x: " + "[" * 900 + "]" * 900, ValueError, "config.yaml: not readable as YAML .*recursion"), ("config.yaml", f"seed: 0x{'f' * 4000}\n", ValueError, "config.yaml: seed: got"),
    ("config.yaml", "x: " + "y" * 2**20, ValueError, "config.yaml: 1,048,579 bytes; allowed: 1,048,576"), ("config.yaml", "x: \x00", ValueError, "config.yaml: not readable as YAML")])
def test_a_broken_file_is_named(tmp_path, file, content, error, said):
    folder = make_run(tmp_path / "run", steps=4, samples=(10,))
    if content is None: (folder / file).unlink()
    else: (folder / file).write_text(content)
    with pytest.raises(error, match=said) as raised: RunReport(folder).write()
    assert len(str(raised.value)) < 800 and not list(folder.glob("*report*")) and not list(folder.glob(".report*"))


@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "metrics.jsonl", "quarantine.jsonl", "samples/step_00010.json"])
def test_a_folder_in_a_files_place_and_bytes_that_are_no_text(tmp_path, file):
    folder = make_run(tmp_path / "run", steps=4, samples=(10,))
    for make in (lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff\xfe\x00{\n")):
        shutil.rmtree(folder / file, ignore_errors=True)
        (folder / file).unlink(missing_ok=True)
        make(folder / file)
        with pytest.raises((ValueError, OSError), match=re.escape(str(folder / file))): RunReport(folder).html()
        if (folder / file).is_dir(): (folder / file).rmdir()


# every field of every file, with everything that it may not hold

GONE = object()
DEEP = json.loads("[" * 60 + "]" * 60)
BAD = (GONE, None, True, 0, 3, -1, 0.5, 1e308, -1e99, math.nan, math.inf, 10**400, "x", "<script>", [], {}, [3], [None], [[]], {"a": []}, {"accuracy": 2}, DEEP)


def places(found, at=()):
    "Where something stands in a file: every key, and the first of every list."
    if at: yield at
    for key, value in found.items() if isinstance(found, dict) else enumerate(found[:1]) if isinstance(found, list) else (): yield from places(value, (*at, key))


def changed(found, at, value):
    found = copy.deepcopy(found)
    *way, last = at
    inner = found
    for key in way: inner = inner[key]
    if value is GONE: del inner[last]
    else: inner[last] = value
    return found


def lines(rows): return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    "A short run, and for each of its files what it holds and how it is written."
    run = make_run(tmp_path_factory.mktemp("short") / "run", steps=3, G=2, samples=(2,))
    sample, summary = json.loads((run / "samples/step_00002.json").read_text()), json.loads((run / "summary.json").read_text())
    sample["groups"] = sample["groups"][:1]
    sample["groups"][0]["completions"][0]["rewards"]["extra"] = {"brevity": 0.5}
    for when in ("before", "after", "comparison"): summary[when] = {"in_domain": summary[when]["in_domain"]}
    for when in ("before", "after"): summary[when]["in_domain"]["per_class"] = {"awe": summary[when]["in_domain"]["per_class"]["awe"]}
    rows = [{k: v for k, v in json.loads(line).items() if not k.startswith("eval/") or k.startswith("eval/in_domain")} for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1] |= {"skipped_updates": 1.0, "data/quarantined": 2, "eval/in_domain/accuracy": 0.5, "eval/in_domain/grounding": 0.5, "eval/in_domain/n": 8}
    rows[1] |= {"filter/kept": 0.5, "filter/all_right": 0.25, "filter/all_wrong": 0.25, "filter/refills": 2, "rewards/brevity/mean": 0.4, "cispo_clip_ratio": 0.1}
    summary |= {"ended": {"why": "depleted", "step": 1, "kept": 0.1, "all_right": 0.8, "all_wrong": 0.1, "refills": 20}, "reported": {"checkpoint": "step_000001", "validation_accuracy": 0.5}}
    rows[2] = {"step": 2, "filter/kept": 0.1, "filter/all_right": 0.8, "filter/all_wrong": 0.1, "filter/refills": 20, "eval/in_domain/accuracy": 0.5, "eval/in_domain/n": 8}
    config = {"method": "emo_r3", "seed": 1, "policy": "embedded", "preset": "paper", "templates": {"set": "x"}, "adam_betas": [0.9, 0.99], "num_generations": 2, "judge": "policy"}
    files = {"samples/step_00002.json": (sample, json.dumps), "summary.json": (summary, json.dumps), "metrics.jsonl": (rows[:3] + rows[-1:], lines),
             "quarantine.jsonl": ([{"where": "a", "id": "b", "reason": "c"}], lines), "config.yaml": (config, yaml.safe_dump)}
    for name, (found, dump) in files.items(): (run / name).write_text(dump(found))
    return run, files


def tried(run, name, found, dump, cases):
    "Makes the report with each change of a file; returns how many pages and how many refusals came of it. Anything but ValueError and OSError comes out of here."
    outcome = {"page": 0, "refused": 0}
    for at, bad in cases:
        (run / name).write_text(dump(changed(found, at, bad)))
        try: page = RunReport(run).html()
        except (ValueError, OSError) as error:
            assert str(run / name) in str(error) and len(str(error)) < 800, (at, bad)
            outcome["refused"] += 1
        else:
            assert len(page) < 400_000 and not re.search(r"(?<![a-z])(nan|inf)[%,;]|[,M]nan", page), (at, bad)
            Page(page).check()
            outcome["page"] += 1
    (run / name).write_text(dump(found))
    return outcome


def spots(found): return [(i, *at) for i, row in enumerate(found) for at in places(row)] if isinstance(found, list) else list(places(found))


@pytest.mark.parametrize("name", ["samples/step_00002.json", "summary.json", "metrics.jsonl", "quarantine.jsonl", "config.yaml"])
def test_a_damaged_field_is_refused_by_name_or_does_no_harm(short, name):
    run, files = short
    found, dump = files[name]
    rng, at = random.Random(name), spots(found)
    outcome = tried(run, name, found, dump, [(place, bad) for place in at for bad in rng.sample(BAD, 2)])
    assert outcome["page"] and outcome["refused"] and sum(outcome.values()) == 2 * len(at), outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samples/step_00002.json", "summary.json", "metrics.jsonl", "quarantine.jsonl", "config.yaml"])
def test_every_damaged_field_is_refused_by_name_or_does_no_harm(short, name):
    run, files = short
    found, dump = files[name]
    outcome = tried(run, name, found, dump, itertools.product(spots(found), BAD))
    assert outcome["page"] and outcome["refused"]


USED = {"samples/step_00002.json": [("step",), ("groups",), ("groups", 0, "label"), ("groups", 0, "completions"), *(("groups", 0, "completions", 0, name) for name in ("text", "steps", "well_formed", "why", "rewards", "advantage", "length")),
                                    *(("groups", 0, "completions", 0, "rewards", name) for name in ("overall", "accuracy", "format", "consistency", "coherence", "reflective"))],
        "summary.json": [(when, "in_domain", name) for when in ("before", "after") for name in ("n", "accuracy")] + [("comparison", "in_domain", name) for name in ("n", "gained", "lost", "p_value")]
        + [("ended", name) for name in ("why", "step", "kept", "all_right", "all_wrong", "refills")] + [("reported", name) for name in ("checkpoint", "validation_accuracy")]}


@pytest.mark.parametrize("name", list(USED))
def test_a_field_that_the_page_needs_must_be_there(short, name):
    run, files = short
    found, dump = files[name]
    for at in USED[name]:
        for bad in (GONE, None):
            (run / name).write_text(dump(changed(found, at, bad)))
            with pytest.raises(ValueError, match=re.escape(f"{run / name}: ") + rf".*{at[-1]}.*; allowed: "): RunReport(run).html()
    (run / name).write_text(dump(found))


@pytest.mark.parametrize("value", [0, -1, 1e99, -1e99, math.nan, None, "x", True])
def test_a_whole_column_may_be_odd(short, value):
    run, files = short
    rows, dump = files["metrics.jsonl"]
    for name in [n for n in rows[1] if n != "step" and not n.startswith("eval/")] if value in (0, -1e99) else ():
        (run / "metrics.jsonl").write_text(dump([row | {name: value} if name in row else row for row in rows]))
        Page(RunReport(run).html()).check()
    (run / "metrics.jsonl").write_text(dump([{"step": row["step"]} | {name: value for name in rows[1] if not name.startswith(("eval/", "step"))} for row in rows]))
    Page(RunReport(run).html()).check()
    (run / "metrics.jsonl").write_text(dump(rows))


@given(data=st.data())
def test_flipped_and_lost_bytes(short, data):
    run, files = short
    name = data.draw(st.sampled_from(list(files)))
    found, dump = files[name]
    raw = bytearray(dump(found).encode())
    for _ in range(data.draw(st.integers(1, 3))): raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (run / name).write_bytes(raw[: data.draw(st.integers(0, len(raw))) if data.draw(st.booleans()) else len(raw)])
    try: Page(RunReport(run).html()).check()
    except ValueError as error: assert str(run / name) in str(error)
    finally: (run / name).write_text(dump(found))


def test_aliases_do_not_unfold(tmp_path):
    folder = make_run(tmp_path / "run", steps=2, G=2, samples=())
    bomb = "\n".join(["l0: &l0 [x, x, x, x, x, x, x, x, x]"] + [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30)])
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + bomb + "\n")
    with pytest.raises(ValueError, match=r"alias \*l0; allowed: values written out"): RunReport(folder)


def test_long_values_are_cut(tmp_path):
    folder = make_run(tmp_path / "run", steps=2, G=2, samples=(2,))
    (folder / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()) | {"policy": "p" * 100_000, "templates": {"set": "t" * 100_000}}))
    path = folder / "samples/step_00002.json"
    sample = json.loads(path.read_text())
    for record in sample["groups"]:
        record |= {"label": "l" * 100_000, "objects": ["o" * 1000] * 100}
        for i, c in enumerate(record["completions"]): c |= {"why": "w" * 100_000, "answer": "a" * 100_000, "text": f"{i}" * 100_000, "verdict": {"consistency_answer": "y" * 100_000, "coherence_answer": "z" * 100_000, "p_yes": None}}
    path.write_text(json.dumps(sample))
    assert len(RunReport(folder).html()) < 200_000


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="run folder .*nowhere does not exist"): RunReport(tmp_path / "nowhere")


# ---- charts ----------------------------------------------------------------------------------------------------------------

def test_smoothing():
    assert smooth([5.0] * 50) == pytest.approx([5.0] * 50) and smooth([1, 9]) == [1, 9]
    assert smooth(list(range(100)))[50] == pytest.approx(50)
    noisy = [random.Random(i).gauss(0, 1) for i in range(400)]
    assert len(smooth(noisy)) == 400 and sum(v * v for v in smooth(noisy)) < 0.15 * sum(v * v for v in noisy)


@pytest.mark.parametrize("y", [[0.5], [0.3, 0.3], [1e-7, 2e-7, 5e-7], [-3, 1e6, 4], [0.0] * 30])
@pytest.mark.parametrize("bounds", [(None, None), (0, None), (0, 1)])
def test_charts_stay_inside_their_frame(y, bounds):
    page = Page(line_chart("t", "n", [Line("a", "a", list(range(len(y))), y)], bounds=bounds)).check()
    points = [p for name, key, value in page.attributes if name == "path" and key == "d" for p in re.findall(r"(-?[\d.]+),(-?[\d.]+)", value)]
    assert points
    if bounds == (None, None) or (bounds == (0, 1) and 0 <= min(y) and max(y) <= 1): assert all(0 <= float(px) <= 340 and 0 <= float(py) <= 190 for px, py in points)


def test_names_at_the_ends_do_not_overlap():
    page = line_chart("t", "n", [Line(f"line {c}", c, [0, 1], [0, 0.5 + 0.001 * i]) for i, c in enumerate("abcd")], bounds=(0, 1))
    at = sorted(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)" class="t', page))
    assert len(at) == 4 and all(b - a >= 12 for a, b in zip(at, at[1:]))


def test_a_long_run_makes_a_small_chart():
    steps = list(range(20_000))
    assert len(line_chart("t", "n", [Line("a", "a", steps, [math.sin(s) for s in steps], low=[-1] * 20_000, high=[1] * 20_000)])) < 20_000


def test_colours_can_be_read():
    def luminance(colour):
        parts = [int(colour[i: i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4) for w, p in zip((0.2126, 0.7152, 0.0722), parts))
    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)
    for palette in (explore._LIGHT, explore._DARK):
        for name in ("ink", "dim", "a", "b", "c", "d", "e", "good", "bad", "half"): assert contrast(palette[name], palette["paper"]) >= 4.5, name
        for name in ("ink", "dim"): assert contrast(palette[name], palette["soft"]) >= 4.5, name
        for name in ("good", "bad", "half"): assert min(contrast(palette[name], palette[f"{name}_soft"]), contrast(palette["ink"], palette[f"{name}_soft"])) >= 4.5, name


# ---- the report ------------------------------------------------------------------------------------------------------------

def test_directions():
    figures = lambda k, n: {"accuracy": k / n, "n": n}
    assert direction(figures(50, 100), figures(80, 100)) == "rose" and direction(figures(80, 100), figures(50, 100)) == "fell"
    assert direction(figures(50, 100), figures(60, 100)) == "unclear" and direction(figures(50, 100), figures(60, 100), {"p_value": 0.002}) == "rose"
    assert direction(figures(50, 100), figures(80, 100), {"p_value": 0.3}) == "unclear" and direction(figures(5, 10), figures(5, 10), {"p_value": 0.001}) == "unclear"


def test_the_report_tells_the_numbers(run):
    page = Page(RunReport(run).html()).check()
    summary = json.loads((run / "summary.json").read_text())
    percent = lambda v: f"{100 * v:.1f}\u00a0%"
    for d in summary["before"]:
        for when in ("before", "after"): assert percent(summary[when][d]["accuracy"]) in page.text
        c = summary["comparison"][d]
        assert f"{c['gained']} gained, {c['lost']} lost" in page.text
    b, a = (summary[when]["in_domain"]["accuracy"] for when in ("before", "after"))
    assert f"Accuracy in domain rose from {percent(b)} to {percent(a)}" in page.text and "EMO-R3 trained for 100 steps in 8 min 32 s." in page.text
    for title in ("Before and after", "Reward", "Truth and the judge", "KL to the reference", "Early: step 10", "Late: step 100", "unparsed", "asking the judge", "max_completion_tokens", "default 2048", "released code"): assert title in page.text, title
    assert page.tags.count("img") == 4 and page.tags.count("svg") == 4 + 11
    counts = summary["before"]["in_domain"]["confusion"]["counts"]
    assert f"{counts[0][0]} of {sum(counts[0])} annotated amusement were answered amusement" in [v for _, k, v in page.attributes if k == "title"]


def test_a_matrix_frames_the_right_answers_and_names_the_worst_mistake():
    confusion = {"rows": ["awe", "fear"], "columns": ["awe", "fear", "unparsed"], "counts": [[7, 2, 1], [0, 4, 6]]}
    cells = re.findall(r'<td style="--s:([\d.]+)"(?: class="(\w+)")?', explore._matrix(confusion, "before"))
    assert cells == [("0.700", "right"), ("0.200", ""), ("0.100", ""), ("0.000", "none"), ("0.400", "right"), ("0.600", "")]
    assert explore._worst(confusion) == "fear answered as unparsed, 6 times"
    worst = lambda *counts: explore._worst(confusion | {"counts": counts})
    assert worst([9, 1, 0], [0, 9, 0]) == "awe answered as fear, once" and worst([9, 1, 0], [1, 9, 0]) == "none was made twice (2 single ones)" and worst([9, 0, 0], [0, 9, 0]) == "no mistake"


def test_curves_end_at_the_last_step(run):
    report = RunReport(run)
    assert report.curve("eval/in_domain/accuracy")[0] == [0, 25, 50, 75, 100] and report.curve("eval/faces/accuracy")[0] == [0, 100]
    assert report.curve("reward")[0] == list(range(1, 101)) and report.curve("nothing") == ([], []) and report.ends("nothing") is None
    values = report.curve("reward")[1]
    assert report.ends("reward") == pytest.approx((sum(values[:10]) / 10, sum(values[-10:]) / 10))


def test_the_report_needs_nobody_and_runs_nothing(run, hostile_run):
    for folder in (run, hostile_run):
        html = RunReport(folder).html()
        page = Page(html).check()
        assert "script" not in page.tags and "://" not in html and "@import" not in html and "url(" not in html
        assert ("meta", "content", explore._SAFE) in page.attributes and "default-src 'none'" in explore._SAFE


def test_a_large_run_makes_a_small_page(tmp_path):
    folder = make_run(tmp_path / "run", steps=1500, G=8, samples=(10, 1500))
    for path in (folder / "samples").glob("*.json"):
        sample = json.loads(path.read_text())
        for record in sample["groups"]:
            for i, c in enumerate(record["completions"]): c["text"], c["steps"] = f"{i}" + "word " * 2000, ["word " * 800] * 3
            Image.effect_noise((2400, 1800), 80).save(folder / "samples" / record["picture"])
        path.write_text(json.dumps(sample))
    page = RunReport(folder).write()
    assert page.stat().st_size < 500_000 and "characters more" in page.read_text()


def test_missing_pieces_are_said(tmp_path):
    text = lambda name, **options: Page(RunReport(make_run(tmp_path / name, steps=12, **options)).html()).check().text
    unfinished = text("unfinished", finished=False, samples=(4, 12))
    assert "has not ended: summary.json is missing. The last step on record is 12." in unfinished and "nothing to compare yet" in unfinished and "No confusion matrix" in unfinished
    assert "No group was written" in text("no samples", samples=()) and "no second sample" in text("one sample", samples=(4,)) and "no McNemar test" in text("not paired", paired=False)
    bare = tmp_path / "bare"
    bare.mkdir(); (bare / "config.yaml").write_text("method: emo_r3\nseed: 3\nsome_new_field: [1, '<b>']\n")
    said = Page(RunReport(bare).html()).check().text
    for part in ("No step is on record.", "No evaluation is on record.", "No training step is on record", "No timing is on record.", "some_new_field", "not a field of this version", '[1, "<b>"]'): assert part in said, part
    (bare / "summary.json").write_text('{"steps": 5, "before": {}, "after": {}}')
    assert "not evaluated before and after" in RunReport(bare).html()


def test_a_torn_run_is_reported_as_far_as_it_came(tmp_path):
    folder = make_run(tmp_path / "run", steps=12, finished=False, samples=(4,))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:6]) + lines[6][:40])
    (folder / "samples" / "step_00004_1.png").unlink()
    text = Page(RunReport(folder).html()).check().text
    assert "The last step on record is 5. The last line of metrics.jsonl is only half written." in text and "step_00004_1.png is missing" in text


def test_what_went_wrong_is_said(tmp_path):
    folder = make_run(tmp_path / "run", steps=40, samples=())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "reward" in row: row |= {"grounding": 0.6, "rewards/consistency/mean": 0.9, "frac_reward_zero_std": 0.8, "completions/clipped_ratio": 0.3, "clip_ratio/high_mean": 0.1, "kl": math.nan}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((folder / "summary.json").read_text())
    summary["before"]["in_domain"]["grounding"], summary["after"]["in_domain"]["grounding"] = 0.97, 0.8
    (folder / "summary.json").write_text(json.dumps(summary))
    text = Page(RunReport(folder).html()).check().text
    for part in ("grounding fell by 17 points", "the judge says Yes to 90.0\u00a0% of the step 1s while 60.0\u00a0% are true", "80.0\u00a0% of the groups were paid alike", "30.0\u00a0% of the completions ran into", "Clipped tokens"): assert part in text, part
    assert "KL to the reference" not in text  # nothing finite was recorded


def test_health_is_told_where_there_is_something_to_tell(run, tmp_path):
    text = lambda folder: Page(RunReport(folder).html()).check().text
    assert "updates skipped" not in text(run) and "set aside" not in text(run)
    folder = make_run(tmp_path / "run", steps=12, samples=())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:-1]: row |= {"skipped_updates": 2.0 if row["step"] in (3, 7) else 0.0, "data/quarantined": 5}
    (folder / "metrics.jsonl").write_text(lines(rows))
    (folder / "skipped/step_000003-1").mkdir(parents=True)
    said = text(folder)
    assert "4 updates skipped, for loss or gradient was not finite (steps 3, 7)." in said and "5 pictures or rows set aside." in said
    write_quarantine(folder / "quarantine.jsonl", [SetAside(f"p/{i}.png", f"{i}.png", f"p/{i}.png: <b>not a picture</b>") for i in range(5)])
    assert "5 pictures or rows set aside, the first: p/0.png: <b>not a picture</b>; p/1.png: <b>not a picture</b>." in text(folder)
    for row in rows[1:-1]: row |= {"skipped_updates": 1.0}
    (folder / "metrics.jsonl").write_text(lines(rows))
    write_quarantine(folder / "quarantine.jsonl", [SetAside("x", "x", "r" * 5000)])
    assert "12 updates skipped, for loss or gradient was not finite (steps 1, 2, 3, 4, 5 and 7 more)." in text(folder) and f"1 picture or row set aside: {'r' * 90}…." in text(folder)


def test_one_is_one_and_no_change_is_none(tmp_path):
    folder = make_run(tmp_path / "run", steps=1, G=2, samples=())
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"steps": 1, "after": summary["before"], "comparison": {d: Comparison(figures["n"], 0, 0).to_dict() for d, figures in summary["before"].items()}, "wall_s": 60.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    text, accuracy = Page(RunReport(folder).html()).check().text, f"{100 * summary['before']['in_domain']['accuracy']:.1f}\u00a0%"
    assert "trained for 1 step in 1 min. " in text and "1 step took" in text and not re.search(r"\b1 (steps|pictures|tokens|rows)\b", text)
    assert f"Accuracy in domain stayed at {accuracy} (of 128 pictures 0 gained, 0 lost, McNemar p = 1.00). Elsewhere, in points: style unchanged, " in text
    assert "+0.0" not in text and "−0.0 " not in text and "chance could explain" not in text and "(within chance)" not in text
    (folder / "summary.json").unlink()
    assert "The mean reward of the sampled completions stayed at" in RunReport(folder).html()
    assert [explore._signed(v) for v in (0.0, -0.0, -0.001, 0.25, -3)] == ["0.00", "0.00", "0.00", "+0.25", "−3.00"]
    assert [explore._time(s) for s in (0.2, 59, 60, 61, 3600, 7260)] == ["0.2 s", "59 s", "1 min", "1 min 1 s", "1 h", "2 h 1 min"]


def test_numbers_say_what_they_are_of(run):
    text = Page(RunReport(run).html()).check().text
    summary = json.loads((run / "summary.json").read_text())
    b, a = (f"{100 * summary[when]['in_domain']['grounding']:.1f}\u00a0%" for when in ("before", "after"))
    assert re.search(f"Of the answers in domain, {b} before and {a} after describe only what is in the picture \\(elsewhere, in points: style ", text)
    assert "description true, in domain" in text and "form kept, in domain" in text and "accuracy, 3 other domains" in text and ", their mean" in text
    assert re.search(r"Truth and the judgegrounding \d+ → \d+ %", text) and re.search(r"Reflectionconsistency \d+ → \d+ %", text) and re.search(r"Reward0\.\d+ → 0\.\d+", text)


def test_grounding_that_falls_elsewhere_is_noticed(tmp_path):
    folder = make_run(tmp_path / "run", steps=4, samples=())
    summary = json.loads((folder / "summary.json").read_text())
    for d, (before, after) in {"in_domain": (0.9, 0.9), "style": (0.9, 0.7), "faces": (0.9, 0.8)}.items(): summary["before"][d]["grounding"], summary["after"][d]["grounding"] = before, after
    (folder / "summary.json").write_text(json.dumps(summary))
    text = Page(RunReport(folder).html()).check().text
    assert "grounding fell by 20 points on style, by 10 points on faces, so the answers came" in text and "90.0\u00a0% before and after describe only" in text


def test_names_from_files_are_escaped_too(tmp_path):
    folder = make_run(tmp_path / "run", steps=4, samples=())
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"policy": "<script>x</script>", "templates": {"set": "<step1>"}, "method": "<i>"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((folder / "summary.json").read_text()) | {"recipe": "</title><script>y</script>"}
    for when in ("before", "after"): summary[when] = {"<script>z</script>": summary[when]["style"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = Page(RunReport(folder).html()).check()
    assert all(f"<script>{c}</script>" in page.text for c in "xyz")


def test_a_report_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    target = RunReport(run).write(tmp_path / "page.html")
    assert target == tmp_path / "page.html" and [p.name for p in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(FileNotFoundError, match="nowhere/page.html"): RunReport(run).write(tmp_path / "nowhere" / "page.html")
    old = target.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device: .*page.html"): RunReport(run).write(target)
    assert target.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_every_curve_and_phase_is_a_metric_that_training_writes(run, depleted):
    known = {key for folder in (run, depleted) for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {name for *_, lines in explore._CURVES for name, _, _ in lines} | set(explore._PHASES) <= known


# ---- runs that filter, teach, choose, or were measured once ------------------------------------------------------------------

def text_of(run): return Page(run.html()).check().text


def charts_of(html): return dict(re.findall(r'<figure class="chart"><figcaption class="cap"><b>(.*?)</b>.*?aria-label="(.*?)"', html))


def rewritten(folder, config=None, summary=None, rows=None):
    "A run's folder with other fields in its configuration and summary, and other lines of metrics."
    (folder / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()) | (config or {})))
    if summary is not None: (folder / "summary.json").write_text(json.dumps(json.loads((folder / "summary.json").read_text()) | summary))
    if rows is not None: (folder / "metrics.jsonl").write_text(lines(rows))
    return folder


def rows_of(folder): return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def depleted(tmp_path_factory):
    "A real run whose groups pass the filter for two steps, and never again; every step is evaluated, and the best policy reported."
    folder, real = tmp_path_factory.mktemp("depleted") / "run", test_methods.loop.group_means
    def means(experience, key):
        trained = sum('"reward"' in line for line in (folder / "metrics.jsonl").read_text().splitlines()) >= 2
        return torch.full((len(experience.examples),), 1.0 if trained else 0.5, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_methods.loop, "group_means", means)
        test_methods.go(replace(test_methods.DAPO, max_refills=3, report="best", eval_every=1), folder)
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    "A real run of supervised answers, two steps."
    folder = tmp_path_factory.mktemp("taught") / "run"
    test_methods.go(replace(test_methods.SFT, max_steps=2), folder)
    return folder


def test_a_depleted_run_says_so_and_its_dots_stand_where_the_policy_was(depleted):
    report, summary = RunReport(depleted), json.loads((depleted / "summary.json").read_text())
    html, text, accuracy = report.html(), text_of(report), f"{100 * summary['reported']['validation_accuracy']:.1f}\u00a0%"
    step = int(summary["reported"]["checkpoint"][-6:])
    assert "Plain GRPO trained for 2 steps in" in text and "and ended early after step 2: only 0.0\u00a0% of the groups drawn passed the filter in 3 draws. " in text
    assert "! Ended early after step 2: only 0.0\u00a0% of the groups drawn passed the filter in 3 draws (100.0\u00a0% were all right, 0.0\u00a0% all wrong), fewer than a step needs." in text
    assert f"Measured and saved at the end is the policy after step {step}, best of 3 on validation pictures ({accuracy} there). " in text and "groups filtered by accuracy" in text
    assert [row["step"] for row in report.rows] == [0, 1, 2, 3, 4]  # before, two steps, the draws in vain, after
    assert [[row["step"] for row in rows] for rows in (report.steps, report.drawn, report.evaluations)] == [[1, 2], [3], [0, 4]]
    assert report.curve("eval/here/accuracy")[0] == [0, 1, 2, 2, step] and report.curve("filter/kept") == ([1, 2, 3], [1.0, 1.0, 0.0])
    ends, dots = explore._evaluated(report, "here", "accuracy", "a")
    assert (ends.kind, ends.x, dots.kind, dots.x) == ("ends", [0, step], "dots", [1, 2, 2])
    charts = charts_of(html)
    assert charts["Groups that pass the filter"].startswith("Groups that pass the filter. kept 100 → 0 %; all right ") and charts["Draws a step"] == "Draws a step. draws 1.00 → 3.00"


def test_a_run_depleted_before_its_first_step(tmp_path):
    folder = make_run(tmp_path / "run", steps=1, G=2, samples=())
    before, _, after = rows_of(folder)
    figures = {"kept": 0.25, "all_right": 0.5, "all_wrong": 0.125, "refills": 1}
    drawn = {"step": 1, **{f"filter/{name}": value for name, value in figures.items()}, "eval/in_domain/accuracy": 0.5, "eval/in_domain/n": 16}
    ended = {"why": "depleted", "step": 0, **figures}
    rewritten(folder, {"method": "grpo", "filter_key": "accuracy"}, {"steps": 0, "ended": ended, "reported": {"checkpoint": "step_000000", "validation_accuracy": 0.5}}, [before, drawn, after])
    report = RunReport(folder)
    text, charts = text_of(report), charts_of(report.html())
    assert "trained for 0 steps" in text and "ended early after step 0: only 25.0\u00a0% of the groups drawn passed the filter in 1 draw. Measured and saved at the end is the policy before its first step, best of 1 " in text
    assert report.curve("eval/in_domain/accuracy")[0] == [0, 0, 0] and report.curve("filter/refills") == ([1], [1.0])
    assert charts["Groups that pass the filter"] == "Groups that pass the filter. kept 25 %; all right 50 %; all wrong 12 %"
    assert report.html().count('<circle cx="40.0"') >= 4 + 4  # a line of one point is drawn as a dot: three shares and the draws; and the evaluations
    rewritten(folder, summary={"ended": {"why": "<i>a flood</i>", "step": 0}})
    assert "ended early after step 0 (<i>a flood</i>). " in text_of(RunReport(folder)) and "! Ended early after step 0 (<i>a flood</i>)." in text_of(RunReport(folder))


def test_a_filter_that_passes_little_is_to_be_watched(tmp_path):
    folder = make_run(tmp_path / "run", steps=20, samples=())
    rows = [row | ({"filter/kept": 0.9 - 0.03 * row["step"]} if "reward" in row else {}) for row in rows_of(folder)]
    assert "at the end only 31.5\u00a0% of the groups drawn passed the filter" in text_of(RunReport(rewritten(folder, rows=rows)))  # (0.33 + 0.30) / 2
    assert "ended early" not in text_of(RunReport(folder)) and "Measured and saved" not in text_of(RunReport(folder))


@pytest.mark.parametrize("field, value, said", [
    ("ended", 3, r"summary.json: ended: got 3; allowed: an object or null"), ("ended", {"why": "depleted", "step": 3}, "ended.kept is missing; allowed: a number from 0 to 1"), ("ended", {"step": 3}, "ended.why is missing"),
    ("ended", {"why": "depleted", "step": 3, "kept": 1.5, "all_right": 0, "all_wrong": 0, "refills": 1}, "ended.kept: got 1.5; allowed: a number from 0 to 1"),
    ("reported", {"checkpoint": "../../x", "validation_accuracy": 0.5}, "reported.checkpoint: got '../../x'; allowed: a checkpoint's name, such as step_000050"),
    ("reported", {"checkpoint": "step_000001"}, "reported.validation_accuracy is missing; allowed: a number from 0 to 1")])
def test_a_broken_end_of_a_run_is_named(tmp_path, field, value, said):
    folder = rewritten(make_run(tmp_path / "run", steps=2, G=2, samples=()), summary={field: value})
    with pytest.raises(ValueError, match=said): RunReport(folder)


def test_what_was_measured_after_training_only_is_shown_as_that(tmp_path):
    folder = make_run(tmp_path / "run", steps=12, samples=())
    rewritten(folder, summary={"before": {}, "comparison": {}}, rows=rows_of(folder)[1:])
    report, after = RunReport(folder), json.loads((folder / "summary.json").read_text())["after"]
    html, text, percent = report.html(), text_of(report), lambda v: f"{100 * v:.1f}\u00a0%"
    a, (low, high) = after["in_domain"], after["in_domain"]["ci95"]
    assert report.domains == [] and report.measured[0] == "in_domain" and set(report.measured) == set(after)
    assert f"It was measured after training only, so what the training changed cannot be said. Accuracy in domain is {percent(a['accuracy'])} (95 % interval {100 * low:.0f} to {100 * high:.0f}, 128 pictures, guessing 12.5\u00a0%). " in text
    assert f"Of the answers in domain, {percent(a['grounding'])} describe only what is in the picture; {percent(a['format'])} keep the form. " in text and f"style {percent(after['style']['accuracy'])}" in text
    assert "<h2>After training</h2>" in html and '<a href="#before-after">After training</a>' in html and "Before and after" not in html and "not evaluated before and after" not in text and "No confusion" not in text
    assert html.count("<caption>after</caption>") == len(after) and "<caption>before</caption>" not in html and "McNemar" not in html and "pt before" not in html and "ci before" not in html
    for figures in after.values():
        for name in ("grounding", "format", "unparsed"): assert f"<td class=\"num\">{100 * figures[name]:.1f}</td>" in html
    assert f"95 % interval {100 * low:.0f} to {100 * high:.0f}</p>" in html and "Disc: after training only. " in text and "was " not in re.findall('<div class="tiles">.*?<nav', html, re.DOTALL)[0]
    assert report.curve("eval/faces/accuracy")[0] == [12]


def test_a_domain_without_a_before_stands_beside_those_that_have_one(tmp_path):
    folder = make_run(tmp_path / "run", steps=4, samples=())
    summary = json.loads((folder / "summary.json").read_text())
    rewritten(folder, summary={"before": {"in_domain": summary["before"]["in_domain"]}, "comparison": {"in_domain": summary["comparison"]["in_domain"]}})
    report = RunReport(folder)
    html = report.html()
    assert report.domains == ["in_domain"] and len(report.measured) == 4 and "Accuracy <b>in domain</b>" in html and "<h2>Before and after</h2>" in html
    style = re.findall(r'<th scope="row">style<div class="dim small">128 pictures</div></th>(.*?)</tr>', html)[0]
    assert [re.sub("<.*?>", "", cell) for cell in re.findall('<td class="num">(.*?)</td>', style)][::2][:2] == ["–", "–"] and html.count("<caption>after</caption>") == 4 and html.count("<caption>before</caption>") == 1


def test_the_domain_that_was_trained_on_comes_first(tmp_path):
    folder = make_run(tmp_path / "run", steps=2, samples=())
    assert RunReport(folder).domains[0] == "in_domain" and RunReport(rewritten(folder, {"data": "scenes:faces"})).domains[0] == "faces"


def test_the_chosen_checkpoint_is_named_and_its_disc_stands_at_its_step(tmp_path):
    folder = rewritten(make_run(tmp_path / "run", steps=100, samples=()), {"report": "best"}, {"reported": {"checkpoint": "step_000050", "validation_accuracy": 0.8125}})
    report = RunReport(folder)
    text = text_of(report)
    assert text.count("the policy after step 50, best of 3 on validation pictures (81.2\u00a0% there)") == 2  # the opening, and below the table
    assert report.curve("eval/faces/accuracy")[0] == [0, 50] and report.curve("eval/in_domain/accuracy")[0] == [0, 25, 50, 75, 50] and report.curve("kl")[0][-1] == 100
    assert "The one of after stands at step 50, for that policy was measured." in text


def test_supervised_answers_are_no_rewards(taught, tmp_path):
    report = RunReport(taught)
    html, text, rows = report.html(), text_of(report), rows_of(taught)
    assert "<title>SFT (supervised answers) · " in html and "SFT (supervised answers) trained for 2 steps in" in text and "2 steps took" in text and "0 steps" not in text
    first, last = (row["loss"] for row in rows[1:3])
    assert list(charts_of(html))[1] == "Loss" and charts_of(html)["Loss"] == f"Loss. loss {first:.2f} → {last:.2f}" and "taught answers, nats a token" in text and "Reward" not in charts_of(html)
    told = html[html.index("<body"):html.index('id="configuration"')]
    assert len(told) > 5000 and "reward" not in told.lower() and "G = 1" not in text and "taught: \\boxed{" in text and "the answers that were taught" in text
    folder = shutil.copytree(taught, tmp_path / "run")
    rewritten(folder, summary={"after": {}, "before": {}})
    assert f"The loss on the taught answers went from {first:.2f} to {last:.2f} nats a token. " in text_of(RunReport(folder)) and "loss at the end, nats a token" in text_of(RunReport(folder))
    (folder / "summary.json").unlink()
    assert "The last step on record is 2." in text_of(RunReport(folder))


def test_a_taught_answer_describes_nothing_that_could_be_true(tmp_path):
    folder = rewritten(make_run(tmp_path / "run", steps=4, samples=()), {"method": "sft"})
    report = RunReport(folder)
    assert all(figures["grounding"] is None for when in ("before", "after") for figures in report.summary[when].values())
    assert "grounding, %" not in text_of(report) and "description true" not in text_of(report) and "describe only" not in text_of(report) and "keep the form" in text_of(report) and "the description is true" not in text_of(report)
    assert report.summary["after"]["style"]["accuracy"] == json.loads((folder / "summary.json").read_text())["after"]["style"]["accuracy"]


def test_capped_weights_are_charted_as_clipped_tokens(tmp_path):
    folder = make_run(tmp_path / "run", steps=4, samples=())
    plain = [{k: v for k, v in row.items() if not k.startswith("clip_ratio")} for row in rows_of(folder)]
    chart = lambda capped: charts_of(RunReport(rewritten(folder, rows=[row | ({"cispo_clip_ratio": capped * row["step"]} if "reward" in row else {}) for row in plain])).html())
    assert chart(0.01)["Clipped tokens"] == "Clipped tokens. weight capped 1 → 4 %" and "Clipped tokens" not in chart(0.0)
    assert "Share of tokens whose weight is capped (CISPO)" in RunReport(rewritten(folder, rows=[row | {"cispo_clip_ratio": 0.01} if "reward" in row else row for row in plain])).html()


def test_own_rewards_have_a_chart_each(run, tmp_path):
    assert "Own rewards" not in RunReport(run).html()
    folder = make_run(tmp_path / "run", steps=4, samples=())
    own = {"brevity": 2.0, "<b>calm</b>": -0.5, "a/mean": 1.0}
    rows = [row | ({f"rewards/{name}/mean": value * row["step"] for name, value in own.items()} | {"rewards/brevity/std": 9.0} if "reward" in row else {}) for row in rows_of(folder)]
    html = RunReport(rewritten(folder, rows=rows)).html()
    part, text = html[html.index("<h3>Own rewards</h3>"):html.index('id="groups"')], Page(html).check().text
    assert list(charts_of(part)) == ["brevity", "&lt;b&gt;calm&lt;/b&gt;", "a/mean"] and charts_of(part)["brevity"] == "brevity. brevity 2.00 → 8.00" and "<b>calm</b>-0.50 → -2.00" in text
    assert html.index("<h3>Own rewards</h3>") > html.index("<b>Length</b>")


# ---- in a browser ----------------------------------------------------------------------------------------------------------

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)


def browser(folder, *options):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars".split()
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)})


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian and Ubuntu: apt-get install chromium)")
def test_a_browser_shows_the_page_and_obeys_no_completion(hostile_run, tmp_path):
    page = RunReport(hostile_run).write(tmp_path / "page.html")
    dom = browser(tmp_path, "--dump-dom", page.as_uri()).stdout
    found = Page(dom)
    assert "<title>EMO-R3 · scenes_cpu · seed 1</title>" in dom and "script" not in found.tags
    assert found.text.count("<script>document.title='owned'</script>") >= 8 and found.tags.count("img") == 4
    for theme in ("light", "dark"):
        options = ["--blink-settings=preferredColorScheme=0", "--force-dark-mode"] if theme == "dark" else []
        browser(tmp_path, f"--screenshot={tmp_path / theme}.png", "--window-size=1200,1600", *options, page.as_uri())
    light, dark = (Image.open(tmp_path / f"{theme}.png").convert("L") for theme in ("light", "dark"))
    brightness = [sum(i * n for i, n in enumerate(picture.histogram())) / (1200 * 1600) for picture in (light, dark)]
    assert light.size == (1200, 1600) and brightness[0] > 200 and brightness[1] < 90 and len(light.getcolors()) > 50

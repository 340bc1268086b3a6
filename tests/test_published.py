"""The published data sets in every published layout, broken in every way, and graded by hand."""
import json
import sys
import warnings
from collections import Counter
from hashlib import sha256
from pathlib import Path
from shutil import copytree
from subprocess import run

import pytest
import torch
from published_fixtures import AWE, BROKEN, CATEGORY, HEADER, edit, emoset, emoset_stored, emotion6, lines, picture, truth_line, webemo
from PIL import Image

from emo_r3 import cli, published as module
from emo_r3.data import EMOSET8, EMOTION6, WEBEMO7, DataError, LabelSet, load_examples, read_manifest
from emo_r3.evaluate import evaluate
from emo_r3.published import (DATA_FORMATS, KINDS, PAPER_CROP, SIGNS, WEBEMO25, WEBEMO_CATEGORIES, Defect, check_data, emotion6_test, format_labels, left_out_line, load_published, manifest_sha256,
                              published_rows, read_categories, read_emotion6, sample_data)
from emo_r3.sampling import Rollouts

BUILD = {"emoset": emoset, "emotion6": emotion6, "webemo": webemo}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in; its name never enters a message."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Where a sound copy of each set lies, and its numbers, to compare broken ones with."""
    copies = {format: build(tmp_path_factory.mktemp(format) / "data") for format, build in BUILD.items()}
    return {format: (path, {split: dict(n) for split, n in check_data(path, format, published={}, quick=True).rows.items()}) for format, path in copies.items()}


def pairs(examples): return [(x.id, x.label) for x in examples]
def code(line, *more) -> int: return cli.main([*line.split(), *more])


# ---- what is published

def test_published_numbers():
    totals = {name: {split: n["all"] for split, n in f.rows.items()} for name, f in DATA_FORMATS.items()}
    assert totals == {"emoset": {"train": 94481, "validation": 5905, "test": 17716}, "emotion6": {"train": 1386, "test": 594}, "webemo": {"train": 213952, "test": 53489}}
    test = DATA_FORMATS["emoset"].rows["test"]
    assert [test[x] for x in ("excitement", "amusement", "contentment", "awe", "fear", "sadness", "anger", "disgust")] == [3014, 2770, 2484, 2260, 1974, 1845, 1708, 1661]
    assert {x: n for x, n in DATA_FORMATS["emotion6"].rows["test"].items() if x != "all"} == dict.fromkeys(EMOTION6, 99)
    assert PAPER_CROP == {"train": {"all": 2100}, "test": {"all": 2000}}


MIDDLE = {"love": "affection gratitude lust", "joy": "cheerfullness contentment enthrallment optimism pride relief zest", "anger": "disgust envy exasperation irritabilty rage",
          "fear": "horror nervousness", "sadness": "disappointment neglect sadness shame suffering sympathy", "confusion": "confusion", "surprise": "surprise"}
ORDER = ("affection cheerfullness confusion contentment disappointment disgust enthrallment envy exasperation gratitude horror irritabilty lust neglect nervousness optimism pride rage relief sadness shame "
         "suffering surprise sympathy zest").split()


def test_webemo_words():
    meant = {fine: middle for middle, words in MIDDLE.items() for fine in words.split()}
    assert [fine for fine, _, _ in WEBEMO_CATEGORIES] == ORDER == list(WEBEMO25)
    assert {fine: middle for fine, middle, _ in WEBEMO_CATEGORIES} == meant
    assert {middle for _, middle, sign in WEBEMO_CATEGORIES if sign == "positive"} == {"love", "joy", "surprise"}
    assert dict(WEBEMO25.aliases) == {"cheerfulness": "cheerfullness", "irritability": "irritabilty"}


def test_format_labels():
    assert [format_labels(f) for f in DATA_FORMATS] == [EMOSET8, EMOTION6, WEBEMO7]
    assert (format_labels("webemo", "fine"), format_labels("emoset", "sign"), format_labels("emotion6", "most_likely")) == (WEBEMO25, SIGNS, EMOTION6)
    with pytest.raises(ValueError, match="did you mean 'webemo'"): format_labels("webemos")
    with pytest.raises(ValueError, match="label of webemo: got 'middel'.*did you mean 'middle'"): format_labels("webemo", "middel")


def test_torch_stays_out():
    assert run([sys.executable, "-c", "import sys, emo_r3.published; sys.exit('torch' in sys.modules)"]).returncode == 0


# ---- EmoSet

@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("fields", [3, 4])
def test_emoset_rows_of_three_and_four_fields(here, fields, nested):
    emoset(here / "e", fields=fields, nested=nested)
    test = load_published("e", "emoset", "test", domain="emoset")
    assert pairs(test)[:3] == [("image/amusement/amusement_00003.jpg", "amusement"), ("image/amusement/amusement_00004.jpg", "amusement"), ("image/awe/awe_00003.jpg", "awe")]
    assert Counter(x.label for x in test) == dict.fromkeys(EMOSET8, 2) and {x.domain for x in test} == {"emoset"}
    assert all(isinstance(x.image, Path) for x in test) and test[0].load_image().size == (9, 7)  # pictures stay on disk until they are looked at
    assert [len(load_published("e", "emoset", s)) for s in ("train", "val", "validation", "dev", "test")] == [16, 8, 8, 8, 16]
    assert check_data("e", "emoset", published={}).problems == ()


def test_emoset_in_the_archives_folder_and_with_rows_of_both_kinds(here):
    emoset(here / "download" / "EmoSet-118K")
    edit(here / "download/EmoSet-118K/test.json", lambda rows: [[r[0], Path(r[1]).stem, *r[1:]] if i % 2 else r for i, r in enumerate(rows)])
    assert len(load_published("download", "emoset", "test")) == 16 and load_published("download", "emoset", "test")[1].id == "image/amusement/amusement_00004.jpg"


def test_emoset_signs(here):
    emoset(here / "e")
    assert [x.label for x in load_published("e", "emoset", "val", label="sign")] == ["positive"] * 4 + ["negative"] * 4


def test_pictures_come_upright_and_in_rgb(here):
    emoset(here / "e")
    tags = Image.Exif()
    tags[0x112] = 6
    Image.new("CMYK", (9, 7)).save(here / "e" / AWE, exif=tags)
    x = next(x for x in load_published("e", "emoset", "train") if x.id == AWE)
    assert (x.load_image().size, x.load_image().mode) == ((7, 9), "RGB")


def test_emoset_parquet_with_names(here):
    emoset_stored(here / "hub")
    test = load_published("hub", "emoset", "test")
    assert [x.label for x in test] == [label for label in EMOSET8 for _ in range(2)] and test[3].id == "[test]3" and test[0].load_image().size == (9, 7)
    assert [x.label for x in load_published("hub/test-00000-of-00001.parquet", "emoset")] == [x.label for x in test]
    check = check_data("hub", "emoset")
    assert check.counts == {"count": 11} and check.published["test"]["awe"] == 2260  # the published numbers; there are no other problems


def test_emoset_parquet_whose_names_are_in_another_order(here):
    emoset_stored(here / "hub", words=sorted(EMOSET8))
    assert [x.label for x in load_published("hub", "emoset", "test")] == [label for label in EMOSET8 for _ in range(2)]  # the words count
    assert check_data("hub", "emoset", published={}).counts == {"order": 2}


def test_bare_numbers_are_in_the_published_order(here):
    emoset_stored(here / "hub", number=True)
    assert [x.label for x in load_published("hub", "emoset", "train")] == [label for label in EMOSET8 for _ in range(2)]


def test_the_papers_crops(here):
    emoset_stored(here / "crop", column="images", n=1)
    assert [x.label for x in load_published("crop", "emoset", "train")] == list(EMOSET8)
    assert [x.label for x in load_published("crop", "emoset", "train", label="sign")] == ["positive"] * 4 + ["negative"] * 4
    check = check_data("crop", "emoset")
    assert [(p.kind, p.said) for p in check.problems] == [("count", "train, all: 8 rows; published: 2,100 (-2,092)"), ("count", "test, all: 8 rows; published: 2,000 (-1,992)")]


# ---- Emotion6

def test_emotion6_is_divided_by_class(here):
    emotion6(here / "six")
    train, test = (load_published("six", "emotion6", split) for split in ("train", "test"))
    assert Counter(x.label for x in train) == dict.fromkeys(EMOTION6, 7) and Counter(x.label for x in test) == dict.fromkeys(EMOTION6, 3)
    assert not {x.id for x in train} & {x.id for x in test} and len(load_published("six", "emotion6")) == 60
    assert all(x.id.partition("/")[0] == x.label for x in train)
    other = load_published("six", "emotion6", "test", split_seed=1)
    assert {x.id for x in other} != {x.id for x in test} and Counter(x.label for x in other) == dict.fromkeys(EMOTION6, 3)
    with pytest.raises(ValueError, match="split of emotion6: got 'validation'; allowed: train, test"): load_published("six", "emotion6", "val")


def test_the_real_number_of_test_pictures():
    names = [f"{label}/{i}.jpg" for label in EMOTION6 for i in range(1, 331)]
    test = emotion6_test(names)
    assert (len(test), 1980 - len(test)) == (594, 1386) and Counter(n.partition("/")[0] for n in test) == dict.fromkeys(EMOTION6, 99)
    assert emotion6_test(reversed(names)) == test and sorted(test)[:4] == ["anger/1.jpg", "anger/101.jpg", "anger/105.jpg", "anger/111.jpg"]  # the same everywhere, and for ever
    for label in EMOTION6:  # by the rule itself: of each class the 99 smallest hashes
        ranked = sorted((sha256(f"0\n{label}/{i}.jpg\n1".encode()).hexdigest(), f"{label}/{i}.jpg") for i in range(1, 331))
        assert {n for _, n in ranked[:99]} == {n for n in test if n.startswith(label)}


def test_a_missing_picture_does_not_move_the_others(here):
    emotion6(here / "six")
    whole = {split: [x.id for x in load_published("six", "emotion6", split)] for split in ("train", "test")}
    gone = whole["test"][4]
    (here / "six/images" / gone).unlink()
    aside = []
    assert [x.id for x in load_published("six", "emotion6", "train")] == whole["train"]
    assert [x.id for x in load_published("six", "emotion6", "test", set_aside=aside)] == [n for n in whole["test"] if n != gone] and [x.id for x in aside] == [gone]
    with pytest.raises(FileNotFoundError, match=gone): load_published("six", "emotion6", "test")


def test_the_truth_is_read_by_position(here):
    emotion6(here / "six", n=1)
    votes = [0.1, 0.2, 0.0, 0.05, 0.25, 0.1, 0.3]
    (here / "six/ground_truth.txt").write_text("one\ttwo\n" + "".join(truth_line(f"{x}/1.jpg", votes, "2.5", "7") + "\n" for x in EMOTION6))
    truth = read_emotion6("six/ground_truth.txt")["joy/1.jpg"]
    assert (truth.valence, truth.arousal, truth.most_likely) == (2.5, 7.0, "sadness")  # neutral has more votes, and is none of the six
    assert dict(truth.probabilities) == dict(zip(("anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral"), votes))
    assert {x.label for x in load_published("six", "emotion6", label="most_likely")} == {"sadness"}
    assert {x.label for x in load_published("six", "emotion6")} == set(EMOTION6)


def test_among_equals_the_first_is_most_likely(here):
    picture(here / "six/images/joy/1.jpg", 1)
    (here / "six/ground_truth.txt").write_text(HEADER + "\n" + truth_line("joy/1.jpg", [0, 0, 0.4, 0.4, 0.2, 0, 0]) + "\n")
    assert read_emotion6("six/ground_truth.txt")["joy/1.jpg"].most_likely == "fear"


def test_without_the_truth_the_folders_are_read(here):
    emotion6(here / "six")
    test = pairs(load_published("six", "emotion6", "test"))
    (here / "six/ground_truth.txt").unlink()
    assert pairs(load_published("six", "emotion6", "test")) == test
    with pytest.raises(FileNotFoundError, match="ground_truth.txt"): load_published("six", "emotion6", label="most_likely")


def test_a_bad_line_of_the_truth_stops_or_is_set_aside(here):
    emotion6(here / "six")
    lines(here / "six/ground_truth.txt", lambda t: [*t[:5], t[5].rpartition("\t")[0], *t[6:]])
    with pytest.raises(Defect, match=r"ground_truth.txt, line 6: 9 columns; allowed: 10"): load_published("six", "emotion6")
    assert len(load_published("six", "emotion6", set_aside=(aside := []))) == 59 and aside[0].id == "anger/5.jpg"


# ---- WEBEmo

@pytest.mark.parametrize("layout", ["numbers", "digits", "names"])
def test_webemo_in_its_three_layouts(here, layout):
    webemo(here / "web", layout=layout)
    meant = {fine: middle for middle, words in MIDDLE.items() for fine in words.split()}
    test = load_published("web", "webemo", "test")
    assert pairs(test) == [(f"test/{n}/220_F_{100 + n}.jpg", meant[ORDER[n]]) for n in range(25)]  # the same ids wherever the pictures lie
    assert [x.label for x in load_published("web", "webemo", "train", label="fine")] == ORDER
    assert [x.label for x in load_published("web", "webemo", "test", label="sign")] == [sign for _, _, sign in WEBEMO_CATEGORIES]
    assert check_data("web", "webemo", published={}).problems == ()


@pytest.mark.parametrize("layout", ["numbers", "names"])
def test_webemo_without_its_lists(here, layout):
    webemo(here / "with", layout=layout), webemo(here / "without", layout=layout, lists=False)
    assert pairs(load_published("without", "webemo", "test")) == pairs(load_published("with", "webemo", "test"))


def test_a_last_digit_needs_its_list(here):
    webemo(here / "web", layout="digits", lists=False)
    with pytest.raises(DataError, match="only the last digit of a label; put test25.txt into web"): load_published("web", "webemo", "test")


def test_validation_is_for_those_who_divided_anew(here):
    webemo(here / "web", layout="names")
    (here / "web/train").rename(here / "web/validation")
    assert len(load_published("web", "webemo", "val")) == 25
    webemo(here / "other")
    with pytest.raises(FileNotFoundError, match="other: no validation25.txt, and no folder validation"): load_published("other", "webemo", "val")


TWICE = [("a.jpg", 10), ("b.jpg", 14), ("b.jpg", 10), ("c.jpg", 5), ("c.jpg", 18), ("d.jpg", 2), ("e.jpg", 9), ("e.jpg", 12), ("e.jpg", 9)]  # b: both fear; c: anger and joy; e: both love


@pytest.mark.parametrize("layout, lists", [("numbers", True), ("digits", True), ("names", True), ("numbers", False), ("names", False)])
def test_conflicting_pictures_are_left_out_and_counted(here, layout, lists):
    webemo(here / "web", layout=layout, lists=lists, test=TWICE)
    kept = [("test/10/a.jpg", "fear"), ("test/10/b.jpg", "fear"), ("test/2/d.jpg", "confusion"), ("test/9/e.jpg", "love")]
    assert sorted(pairs(load_published("web", "webemo", "test", left_out=(out := [])))) == sorted(kept)
    assert left_out_line(out) == "left out: 1 with conflicting labels, 0 not fetched" and out[0].id == "test/5/c.jpg" and "anger and joy" in out[0].reason
    fine = load_published("web", "webemo", "test", label="fine", left_out=(out := []))
    assert [x.id for x in fine if x.label == "confusion"] == ["test/2/d.jpg"] and left_out_line(out) == "left out: 3 with conflicting labels, 0 not fetched"
    with pytest.warns(UserWarning, match="web: left out: 1 with conflicting labels"): load_published("web", "webemo", "test")


def test_equal_names_in_two_folders_are_two_pictures(here):
    for number in (5, 18): picture(here / f"web/test/{number}/1.jpg", number)
    assert pairs(load_published("web", "webemo", "test", left_out=(out := []))) == [("test/5/1.jpg", "anger"), ("test/18/1.jpg", "joy")] and not out


def test_what_was_not_fetched_is_left_out_and_counted(here):
    webemo(here / "web")
    for n in (3, 4): (here / f"web/test/{n}/220_F_{100 + n}.jpg").unlink()
    assert len(load_published("web", "webemo", "test", left_out=(out := []))) == 23 and left_out_line(out) == "left out: 0 with conflicting labels, 2 not fetched"
    for n in range(25): (here / f"web/test/{n}/220_F_{100 + n}.jpg").unlink(missing_ok=True)
    with pytest.raises(DataError, match="no picture of WEBEmo can be used in split 'test', for 25 rows"): load_published("web", "webemo", "test", left_out=[])


def test_corrected_spellings_of_folders(here):
    for word in ("cheerfulness", "Irritability"): picture(here / f"web/test/{word}/1.jpg", word)
    assert [x.label for x in load_published("web", "webemo", "test")] == ["joy", "anger"]


def test_categories_as_published(here):
    Path("category.txt").write_text(CATEGORY)
    assert CATEGORY.startswith("#") and "labels=[" in CATEGORY and read_categories("category.txt") == WEBEMO_CATEGORIES
    for text in (CATEGORY.partition("=")[2], CATEGORY.replace("[(", "((").replace(")]", "))"), "\ufeff" + CATEGORY):
        Path("category.txt").write_text(text, encoding="utf-8")
        assert read_categories("category.txt") == WEBEMO_CATEGORIES


HOSTILE = ["__import__('os').system('touch pwned')", "labels = open('pwned', 'w')", "import os\nlabels = []", "labels = [x for x in ()]", "labels = [('a', 'b', '+')] * 10**9", "labels = (lambda: 1)()",
           "labels.x = []", "a = b = []", "f'{open(1)}'", "[" * 190, "-" * 9000 + "1", "(" * 9000, "1" * 9000, "", "labels", "labels = {}", "labels = [('a', 'b', '?')]", "labels = [['a', 'b']]", "labels = [(1, 2, 3)]",
           "labels = 'abc'", "\0", "labels = [('a', 'b', '+')", "x" * 10_001, "labels = {[]: 1}", "def f(): pass", "del x", "labels: list = []", "9" * 4400]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_categories_are_data(here, text):
    Path("category.txt").write_text(text)
    with pytest.raises(Defect) as caught: read_categories("category.txt")
    assert "0x" not in str(caught.value) and caught.value.kind in ("corrupt", "fields") and not Path("pwned").exists() and str(caught.value).startswith("category.txt") and len(str(caught.value)) < 400


def test_other_categories_are_refused(here):
    webemo(here / "web")
    (here / "web/category.txt").write_text(CATEGORY.replace("'confusion', 'confusion'", "'confusion', 'sadness'"))
    with pytest.raises(Defect, match="entry 2: confusion, sadness, negative; published: confusion, confusion, negative"): load_published("web", "webemo", "test")


# ---- one door

def test_what_cannot_be_opened(here):
    emoset(here / "e"), (here / "empty").mkdir()
    with pytest.raises(DataError, match="e is divided; say which split: train, validation, test"): load_published("e", "emoset")
    with pytest.raises(ValueError, match="split of emoset: got 'tset'.*did you mean 'test'"): load_published("e", "emoset", "tset")
    with pytest.raises(DataError, match="empty: not EmoSet-118K as published; one of train.json"): load_published("empty", "emoset", "test")
    with pytest.raises(FileNotFoundError, match="nothing"): load_published("./nothing/at/all", "emoset", "test")
    with pytest.raises(ValueError, match="did you mean 'emoset'"): load_published("e", "emosets", "test")
    (here / "e/test.json").unlink()
    with pytest.raises(FileNotFoundError, match="test.json: no such file"): load_published("e", "emoset", "test")


def test_rows_that_cannot_be_used_stop_or_are_set_aside(here):
    emoset(here / "e")
    (here / "e" / AWE).unlink()
    edit(here / "e/train.json", lambda rows: [rows[0][:2], *rows[1:]])
    with pytest.raises(Defect, match=r"train.json, row 0: 2 fields; allowed: \[emotion, image_path"): load_published("e", "emoset", "train")
    assert len(load_published("e", "emoset", "train", set_aside=(aside := []))) == 14 and [x.where for x in aside] == ["e/train.json, row 0", "e/train.json, row 2"]
    (here / "e/train.json").write_text("[[], []]")
    with pytest.raises(DataError, match="no picture of EmoSet-118K can be used in split 'train', for 2 rows were set aside"): load_published("e", "emoset", "train", set_aside=[])


def test_no_row_leads_out_of_the_folder(here):
    emoset(here / "e")
    picture(here / "secret.jpg", "secret")
    for bad in ("../secret.jpg", str(here / "secret.jpg"), "image/../../secret.jpg", "image\\..\\..\\secret.jpg", "a\0b.jpg", "C:\\secret.jpg"):
        edit(here / "e/test.json", lambda rows: [["awe", bad, "annotation/awe/awe_00003.json"]])
        with pytest.raises(Defect, match="leads out of the folder"): load_published("e", "emoset", "test")


def test_ids_are_the_same_wherever_the_copy_lies(here):
    for format, build in BUILD.items():
        build(here / "one" / format), build(here / "elsewhere" / "deep" / format)
        assert pairs(load_published(f"one/{format}", format, "test")) == pairs(load_published(here / "elsewhere/deep" / format, format, "test"))


# ---- the check

@pytest.mark.parametrize("format", DATA_FORMATS)
def test_a_sound_copy_is_sound(sound, format):
    path, expected = sound[format]
    check = check_data(path, format, published=expected)
    assert check.ok and check.problems == () and check.rows == expected and {s: dict(n) for s, n in check.usable.items()} == expected
    assert {s: n["all"] for s, n in expected.items()} == {"emoset": {"train": 16, "validation": 8, "test": 16}, "emotion6": {"train": 42, "test": 18}, "webemo": {"train": 25, "test": 25}}[format]

@pytest.mark.parametrize("name", BROKEN)
def test_each_defect_is_found(here, sound, name):
    _, damage, found = BROKEN[name]
    format = name.partition(":")[0]
    path, expected = sound[format]
    copytree(path, "data")
    damage(here / "data")
    check = check_data("data", format, published=expected)
    told = "\n".join(f"{p.kind}: {p.said}" for p in check.problems)
    assert check.counts == found and not check.ok, told
    report = json.loads(json.dumps(check.to_dict()))
    assert report["ok"] is False and report["counts"] == check.counts and len(report["problems"]) == len(check.problems)
    assert all("\n" not in p.said and p.kind in KINDS for p in check.problems)


def test_the_table(here):
    emotion6(here / "six")
    (here / "six/images/anger/1.jpg").unlink()
    text = check_data("six", "emotion6").table(most=1)
    table = [line.split() for line in text.splitlines()[:15]]
    assert table[0] == ["split", "label", "rows", "published", "difference", "usable"]
    assert table[1] in (["train", "anger", "7", "231", "-224", "6"], ["train", "anger", "7", "231", "-224", "7"]) and table[14] in (["test", "all", "18", "594", "-576", "17"], ["test", "all", "18", "594", "-576", "18"])
    assert "missing: 1 (named, and not there)" in text and "  ... and 13 more" in text and text.endswith("not ok: 15 problems; every picture was tried")
    assert check_data("six", "emotion6", allowed=["count"]).table().endswith("not ok: 1 problem, 14 allowed differences; every picture was tried")
    assert check_data("six", "emotion6", allowed=["count", "missing"]).table().endswith("\nok: 15 allowed differences; every picture was tried")
    assert check_data("six", "emotion6", quick=True).table().endswith("not ok: 15 problems; pictures were looked for, not opened")
    emotion6(here / "whole")
    assert check_data("whole", "emotion6", allowed=["count"]).table().endswith("\nok: 14 allowed differences; every picture was opened")
    assert check_data("whole", "emotion6", published={}).table().endswith("\nok: 0 problems; every picture was opened")


def test_one_is_not_several(here):
    emoset(here / "e")
    rows = json.loads((here / "e/test.json").read_text())
    (here / "e/test.json").write_text(json.dumps([rows[0][:1], *rows[1:]]))
    check = check_data("e", "emoset", published={})
    assert [p.said.partition(";")[0] for p in check.problems if p.kind == "fields"] == ["e/test.json, row 0: 1 field"] and "1 problem;" in check.table()


def test_a_quick_check_opens_nothing(here, monkeypatch):
    emoset(here / "e")
    (here / "e" / AWE).write_text("no picture")
    (here / "e/image/fear/fear_00000.jpg").unlink()
    edit(here / "e/test.json", lambda rows: [*rows, ["awe", AWE, AWE.replace("image", "annotation").replace("jpg", "json")]])
    monkeypatch.setattr(module.EmotionExample, "checked_sha256", lambda self: pytest.fail("opened"))
    check = check_data("e", "emoset", published={}, quick=True)
    assert check.counts == {"missing": 1, "leak": 1} and check.quick and "looked for, not opened" in check.table()


def test_each_picture_is_read_once(here, monkeypatch):
    emotion6(here / "six")
    read, plain = Counter(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (read.update([str(self)]), plain(self))[1])
    check_data("six", "emotion6", published={})
    assert [n for name, n in read.items() if name.endswith(".jpg")] == [1] * 60


def test_some_kinds_may_be_allowed(here):
    emotion6(here / "six")
    assert not check_data("six", "emotion6").ok and check_data("six", "emotion6", allowed=["count"]).ok
    with pytest.raises(ValueError, match="allowed: got 'counts'.*did you mean 'count'"): check_data("six", "emotion6", allowed=["counts"])


def test_one_split_alone(here):
    emoset(here / "e")
    check = check_data("e", "emoset", "val")
    assert list(check.rows) == ["validation"] and check.published == {"validation": {"all": 5905}} and check.counts == {"count": 1}


def test_the_machines_own_failures_end_the_check(here, monkeypatch):
    emotion6(here / "six")
    def full(self): raise OSError(24, "Too many open files")
    monkeypatch.setattr(module.EmotionExample, "checked_sha256", full)
    with pytest.raises(OSError, match="Too many open files"): check_data("six", "emotion6")


def test_a_bomb_is_found_from_every_thread(here, monkeypatch):
    emotion6(here / "six")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture(here / "six/images/joy/1.jpg", 1, size=(15, 10))
    before = list(warnings.filters)
    check = check_data("six", "emotion6", published={}, workers=8)
    assert check.counts == {"corrupt": 1} and "more pixels than the 100 allowed" in check.problems[0].said and list(warnings.filters) == before


@pytest.mark.parametrize("kind", ["folders", "csv", "jsonl", "parquet"])
def test_generic_sources_are_checked_too(here, kind):
    rows = [("train", "joy", 1), ("train", "fear", 2), ("train", "fear", 1), ("test", "joy", 2), ("test", "bliss", 3), ("test", "joy", 4)]  # 1 twice in train, 2 in both, each with two labels
    files = [picture(here / f"pics/{split}/{label}/{i}.png", n) for i, (split, label, n) in enumerate(rows)]
    files[5].write_bytes(files[5].read_bytes()[:40])
    names = [f.relative_to(here).as_posix() for f in files]
    if kind == "csv": Path("p.csv").write_text("image,label,split\n" + "".join(f"{n},{r[1]},{r[0]}\n" for n, r in zip(names, rows)))
    if kind == "jsonl": Path("p.jsonl").write_text("".join(json.dumps({"images": [n], "answer": r[1], "split": r[0]}) + "\n" for n, r in zip(names, rows)))
    if kind == "parquet":
        import datasets
        datasets.disable_progress_bars()
        (here / "p").mkdir()
        for split in ("train", "test"):
            part = [(n, r[1]) for n, r in zip(names, rows) if r[0] == split]
            datasets.Dataset.from_dict({"image": [Path(n).read_bytes() for n, _ in part], "label": [x for _, x in part]}).to_parquet(f"p/{split}.parquet")
    check = check_data({"folders": "pics", "csv": "p.csv", "jsonl": "p.jsonl", "parquet": "p"}[kind], label_set=EMOTION6)
    assert check.counts == {"corrupt": 1, "duplicate": 1, "leak": 1, "conflict": 2, "label": 1} and check.published == {} and "published" not in check.table()
    assert check.rows["train"]["all"] == 3 and check.rows["test"]["all"] == 3 and check.usable["test"] == {"joy": 1, "all": 1}


# ---- the crop

def test_a_sample_is_the_same_everywhere(here):
    emoset(here / "one", train=dict.fromkeys(EMOSET8, 5)), emoset(here / "deep/two", train=dict.fromkeys(EMOSET8, 5))
    a = sample_data("one", "emoset", "train", "new/a.jsonl", size=16, seed=3)
    b = sample_data("deep/two", "emoset", "train", "b.jsonl", size=16, seed=3)
    assert a.sha256 == b.sha256 == manifest_sha256("new/a.jsonl") and Path("new/a.jsonl").read_bytes() == Path("b.jsonl").read_bytes() and len(a.examples) == 16
    assert pairs(read_manifest(a.manifest, load_published("deep/two", "emoset", "train"))) == pairs(a.examples)
    assert sample_data("one", "emoset", "train", "c.jsonl", size=16, seed=4).sha256 != a.sha256
    even = sample_data("one", "emoset", "train", "d.jsonl", size=16, seed=3, stratified=True)
    assert Counter(x.label for x in even.examples) == dict.fromkeys(EMOSET8, 2)


def test_a_sample_lists_nothing_that_cannot_be_used(here):
    emoset(here / "e")
    with pytest.raises(DataError, match="e: a sample of 2,000 was asked for; allowed: up to 16, the pictures there are in split 'train'"): sample_data("e", "emoset", "train", "m.jsonl")
    (here / "e" / AWE).write_text("no picture")
    with pytest.raises(DataError, match="awe_00000.jpg: not a picture"): sample_data("e", "emoset", "train", "m.jsonl", size=16)
    assert not Path("m.jsonl").exists()


# ---- the command line

def test_check_command(here, capsys):
    emoset(here / "e")
    assert code("data check e --format emoset") == 1 and "count: 11" in (text := capsys.readouterr().out) and "94,481" in text
    assert code("data check e --format emoset --allow count") == 0
    (here / "e" / AWE).unlink()
    assert code("data check e --format emoset --allow count --quick --output out/report.json") == 1
    report = json.loads(Path("out/report.json").read_text())
    assert (report["ok"], report["quick"], report["counts"]["missing"], report["published"]["test"]["awe"]) == (False, True, 1, 2260)
    assert [p["said"] for p in report["problems"] if p["kind"] == "missing"] == ["e/train.json, row 2: picture 'e/image/awe/awe_00000.jpg' does not exist"]


@pytest.mark.parametrize("line, told", [
    ("data check e --format emosset", "did you mean 'emoset'"), ("data check e --format emoset --labels emoset8", "implies its labels"), ("data check e --format emoset --label-column x", "--label-column"),
    ("data check e --gold fine", "--format"), ("data check e --format emoset --gold fine", "--gold of emoset"), ("data check e --format emoset --split x", "split of emoset"), ("data check none --format emoset", "none"),
    ("data check e --format emotion6", "not Emotion6 as published"), ("data check e --format emoset --allow all", "allowed: got 'all'"), ("data chekc e", "did you mean 'data check'"), ("data", "data check, data sample"),
    ("data check e --format emoset --quik", "did you mean '--quick'"), ("data sample e --format emoset --split train", "--output"), ("data sample e --format emoset --split train --output m --size 0", "--size = 0"),
    ("data sample e --format emoset --split train --output m", "2,000"), ("data sample e --format emoset --output m", "say which split"), ("evaluate embedded scenes --format emoset", "--format"),
    ("evaluate embedded e --format emoset --manifest none.jsonl", "no such file")])
def test_bad_usage_ends_with_2(here, capsys, line, told):
    emoset(here / "e")
    assert code(line) == 2
    said = capsys.readouterr().err
    assert told in said and said.startswith("emo-r3: error: ") and said.count("\n") == 1


def test_sample_command(here, capsys):
    webemo(here / "web", train=[*((f"{n}.jpg", n % 25) for n in range(100)), ("3.jpg", 10)])
    assert code("data sample web --format webemo --split train --size 30 --seed 2 --stratified --output m.jsonl") == 0
    out = capsys.readouterr()
    assert f"30 pictures in m.jsonl, sha256 {manifest_sha256('m.jsonl')}" in out.out and "left out: 1 with conflicting labels, 0 not fetched" in out.err
    assert len(Path("m.jsonl").read_text().splitlines()) == 30


# ---- grading: what a policy says about fixtures of the three layouts, and how often it is right, counted by hand

class Script:
    """Says what it was told to, picture by picture."""
    texts: list = []

    def __init__(self, *_): pass

    def sample(self, messages, num_generations, max_new_tokens, temperature=1.0, seed=None):
        said, Script.texts = Script.texts[:len(messages)], Script.texts[len(messages):]
        return Rollouts({}, torch.zeros(len(said), 1).long(), torch.ones(len(said), 1).long(), torch.zeros(len(said), 1), torch.full((len(said),), True), tuple(said), 1)


def measure(monkeypatch, line, texts) -> dict:
    """The figures that `emo-r3 evaluate` writes about a policy that says these texts."""
    monkeypatch.setattr(cli, "load_pair", lambda *_, **__: (None, None))
    monkeypatch.setattr("emo_r3.sampling.PolicySampler", Script)
    Script.texts = list(texts)
    assert code(f"evaluate stub {line} --method direct --output figures.json") == 0 and not Script.texts
    figures = json.loads(Path("figures.json").read_text())
    (domain, measured), = figures["domains"].items()
    return measured | {"domain": domain, "manifest": figures["manifest"]}


def box(answer): return rf"I see it. \boxed{{{answer}}}"


BOTH, LENIENT, NEITHER = (True, True), (False, True), (False, False)
TRAPS = {  # format -> (gold, completion, right if strict and if lenient)
    "emoset": [
        *(("awe", box(a), BOTH) for a in ("awe", "AWE", " awe ", "\u00a0awe\u00a0", "awe\n")), ("awe", box("awe") + "\n", BOTH),
        *(("awe", box(a), LENIENT) for a in (r"\text{awe}", r"\textbf{awe}", r"\mathrm{awe}", "{awe}", "$awe$", "awe.", "'awe'", "**awe**", "ａｗｅ", "a\u200bwe")),
        ("awe", r"\boxed{fear} no: \boxed{awe}", BOTH), ("awe", r"\boxed{awe} \boxed{}", NEITHER), ("awe", r"\boxed{awe} \boxed{fear", NEITHER),
        *(("awe", box(a), NEITHER) for a in ("awe and fear", "awe/fear", "not awe", "neutral", "none of the above", "", "awesome")), ("awe", "awe", NEITHER), ("awe", "None", NEITHER),
        ("anger", box("danger"), NEITHER), ("anger", box("angry"), LENIENT), ("fear", box("fearless"), NEITHER), ("fear", box("yearfear"), NEITHER), ("fear", box("fearful"), LENIENT), ("fear", box("fear"), BOTH),
        ("contentment", box("discontentment"), NEITHER), ("contentment", box("content"), LENIENT), ("sadness", box("sad"), LENIENT), ("sadness", box("surprised"), NEITHER), ("excitement", box("happiness"), NEITHER)],
    "emotion6": [
        ("joy", box("joy"), BOTH), ("joy", box("enjoyment"), NEITHER), ("joy", box("happiness"), LENIENT), ("surprise", box("surprised"), LENIENT), ("surprise", box("Surprise"), BOTH), ("anger", box("angry"), LENIENT),
        ("fear", box("fearful"), LENIENT), ("fear", box("fear and joy"), NEITHER), ("sadness", box("content"), NEITHER), ("disgust", box("disgust"), BOTH), ("disgust", box("anger"), NEITHER), ("disgust", "", NEITHER)],
    "webemo": [
        ("anger", box("anger"), BOTH), ("anger", box("disgust"), LENIENT), ("anger", box("average"), NEITHER), ("anger", box("irritability"), LENIENT), ("anger", box("irritabilty"), LENIENT), ("joy", box("cheerfulness"), LENIENT),
        ("love", box("illustration"), NEITHER), ("love", box("love"), BOTH), ("love", box("lust"), LENIENT), ("love", box("glove"), NEITHER), ("fear", box("horror"), LENIENT), ("fear", box("sadness"), NEITHER),
        ("confusion", box("confused"), LENIENT), ("surprise", box("surprise"), BOTH)]}
COUNTED = {"emoset": (8, 22, 39), "emotion6": (3, 7, 12), "webemo": (3, 10, 14)}  # right if strict, right if lenient, of so many
FINE = {"anger": 5, "joy": 1, "love": 0, "fear": 10, "confusion": 2, "surprise": 22}


def in_layout(format, variant, root) -> tuple[str, list]:
    """Builds a fixture with a picture for each trap; returns how the command line names it, and the traps in the pictures' order."""
    need = Counter(gold for gold, _, _ in TRAPS[format])
    if format == "emoset": emoset(root, fields=variant, nested=variant == 4, test=dict(need))
    if format == "webemo": webemo(root, layout=variant, test=[(f"{n}.jpg", FINE[gold]) for n, (gold, _, _) in enumerate(TRAPS[format])])
    if format == "emotion6":  # the test set is drawn: a third of the pictures more than it needs, in classes of their own size
        emotion6(root, n=10)
    examples, left = load_published(root, format, "test"), {gold: [t for t in TRAPS[format] if t[0] == gold] for gold in need}
    return f"{root} --format {format}", [left[x.label].pop(0) if left.get(x.label) else (x.label, "nothing", NEITHER) for x in examples]


@pytest.mark.parametrize("format, variant", [("emoset", 3), ("emoset", 4), ("emotion6", None), ("webemo", "numbers"), ("webemo", "digits"), ("webemo", "names")])
def test_every_trap_in_every_layout(here, monkeypatch, format, variant):
    line, traps = in_layout(format, variant, Path("data"))
    strict, lenient, told = COUNTED[format]
    total = 18 if format == "emotion6" else told  # three of each of six classes; the pictures without a trap get no box, and count
    assert len(traps) == total and sum(text != "nothing" for _, text, _ in traps) == told
    for mode, right in (("strict", strict), ("lenient", lenient)):
        figures = measure(monkeypatch, f"{line} --mode {mode}", [text for _, text, _ in traps])
        assert (figures["n"], figures["accuracy"], figures["domain"], figures["label_set"]) == (total, right / total, format, format_labels(format).name)
        assert right == sum(ok[mode == "lenient"] for _, _, ok in traps)
        for gold, score in figures["per_class"].items(): assert score["n"] == sum(g == gold for g, _, _ in traps)


@pytest.mark.parametrize("format", DATA_FORMATS)
@pytest.mark.parametrize("mode", ["strict", "lenient"])
def test_each_trap_by_itself(here, format, mode):
    line, traps = in_layout(format, {"emoset": 3, "webemo": "numbers"}.get(format), Path("data"))
    Script.texts = [text for _, text, _ in traps]
    report = evaluate(Script(), load_published("data", format, "test"), method="direct", mode=mode)
    assert [(g.label, g.text, g.correct) for g in report.predictions] == [(gold, text, ok[mode == "lenient"]) for gold, text, ok in traps]


def test_gold_names_of_another_set_are_read_as_themselves(here):
    labels = LabelSet("abstract", ("amusement", "anger", "awe", "content", "disgust", "excitement", "fear", "sad"))
    for label in ("content", "sad"): picture(here / f"art/{label}/1.png", label)
    for mode, text, right in (("strict", box("content"), 0.5), ("lenient", box("content"), 0.5), ("strict", box("contentment"), 0.0), ("lenient", box("sadness"), 0.0)):
        Script.texts = [text] * 2
        assert evaluate(Script(), load_examples("art", labels), method="direct", mode=mode).accuracy == right


def test_evaluate_on_hub_forms_and_on_other_annotations(here, monkeypatch):
    emoset_stored(here / "hub", n=1), emoset_stored(here / "crop", column="images", n=1)
    for path in ("hub", "crop", "hub/test-00000-of-00001.parquet"): assert measure(monkeypatch, f"{path} --format emoset", [box("awe")] * 8)["accuracy"] == 1 / 8
    assert measure(monkeypatch, "hub --format emoset --gold sign --split train", [box("positive")] * 8)["accuracy"] == 1 / 2
    emotion6(here / "six", n=10)
    votes = [0.0, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    lines(here / "six/ground_truth.txt", lambda t: [t[0], *(truth_line(line.split("\t")[0], votes) for line in t[1:])])
    assert [measure(monkeypatch, f"six --format emotion6 {more}", [box("disgust")] * 18)["accuracy"] for more in ("", "--gold most_likely")] == [1 / 6, 1.0]
    webemo(here / "web")
    assert measure(monkeypatch, "web --format webemo --gold fine --mode lenient", [box("irritability")] * 25)["accuracy"] == 1 / 25
    assert measure(monkeypatch, "web --format webemo --gold fine", [box("irritability")] * 25)["accuracy"] == 0


def test_evaluate_on_a_manifest(here, monkeypatch, capsys):
    webemo(here / "web", test=TWICE)
    assert code("data sample web --format webemo --split test --size 3 --seed 1 --output m.jsonl") == 0
    chosen = [json.loads(line)["label"] for line in Path("m.jsonl").read_text().splitlines()]
    figures = measure(monkeypatch, "web --format webemo --manifest m.jsonl", [box(label) for label in chosen])
    assert (figures["n"], figures["accuracy"], figures["manifest"]) == (3, 1.0, manifest_sha256("m.jsonl"))
    assert "left out: 1 with conflicting labels" in capsys.readouterr().err

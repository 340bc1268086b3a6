"""What no page should show of emo_r3.data: hostile files, odd pictures, every reader's errors, and properties."""
import copy
import json
import os
import pickle
import random
import string
import struct
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from emo_r3.data import (EMOSET8, EMOTION6, WEBEMO7, DataError, EmotionExample, LabelSet, StoredPicture, check_choice, did_you_mean, emotion_question,
                         label_set, load_examples, read_manifest, subsample, write_manifest)

COLOURS = {"joy": (240, 200, 40), "fear": (90, 60, 160), "anger": (220, 40, 30)}


def png(path: Path, colour=(10, 20, 30), size=(4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def faces(tmp_path):
    for label, colour in COLOURS.items():
        for n in range(4):
            png(tmp_path / "faces" / label / f"{n}.png", (*colour[:2], n))
    return tmp_path / "faces"


def message(error_type, call, *args, **options) -> str:
    """The message of the error that a call must raise; it must be one line."""
    with pytest.raises(error_type) as caught: call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def one(image, label="joy") -> EmotionExample:
    return EmotionExample(image, "?", label, EMOTION6, id="x")


# ---- label sets

def test_published_orders_and_signs():
    assert EMOSET8.labels == ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness")
    assert [EMOSET8.polarity[x] for x in EMOSET8] == ["positive"] * 4 + ["negative"] * 4
    assert EMOTION6.labels == ("anger", "disgust", "fear", "joy", "sadness", "surprise")
    assert set(WEBEMO7) == {"love", "joy", "anger", "fear", "sadness", "confusion", "surprise"}
    assert {x for x in WEBEMO7 if WEBEMO7.polarity[x] == "positive"} == {"love", "joy", "surprise"}


FINE = {
    "love": "affection gratitude lust", "joy": "cheerfullness contentment enthrallment optimism pride relief zest",
    "anger": "disgust envy exasperation irritabilty rage", "fear": "horror nervousness",
    "sadness": "disappointment neglect sadness shame suffering sympathy", "confusion": "confusion", "surprise": "surprise"}


def test_webemo_has_all_25_fine_words():
    fine = {word: middle for middle, words in FINE.items() for word in words.split()}
    assert len(fine) == 25
    for word, middle in fine.items(): assert (word if word in WEBEMO7 else WEBEMO7.aliases[word]) == middle
    assert (WEBEMO7.aliases["cheerfulness"], WEBEMO7.aliases["irritability"]) == ("joy", "anger")


@pytest.mark.parametrize("labels, word, meant", [
    (EMOSET8, "fearful", "fear"), (EMOSET8, "scared", "fear"), (EMOSET8, "sad", "sadness"), (EMOSET8, "angry", "anger"),
    (EMOSET8, "amused", "amusement"), (EMOSET8, "content", "contentment"), (EMOSET8, "happy", None), (EMOSET8, "joy", None),
    (EMOSET8, "awesome", None), (EMOSET8, "fearless", None), (EMOSET8, "surprised", None), (EMOTION6, "happiness", "joy"),
    (EMOTION6, "happy", "joy"), (EMOTION6, "surprised", "surprise"), (EMOTION6, "content", None), (EMOTION6, "disgust", None),
    (WEBEMO7, "disgust", "anger"), (WEBEMO7, "content", None), (WEBEMO7, "contentment", "joy")])
def test_aliases_are_per_set(labels, word, meant):
    assert labels.aliases.get(word) == meant


@pytest.mark.parametrize("bad, says", [
    (dict(labels=()), "empty"), (dict(labels="joy"), "tuple"), (dict(labels=("joy", "joy")), "'joy' twice"), (dict(labels=("Joy",)), "'Joy'"),
    (dict(labels=(" joy",)), "' joy'"), (dict(labels=("joy", "")), "''"), (dict(labels=(3,)), "3"),
    (dict(labels=("joy",), aliases={"glad": "happy"}), "'happy'; allowed: joy"), (dict(labels=("joy", "awe"), aliases={"awe": "joy"}), "'awe'"),
    (dict(labels=("joy",), aliases={"Glad": "joy"}), "'Glad'"), (dict(labels=("joy", "awe"), polarity={"joy": "positive"}), "every label"),
    (dict(labels=("joy",), polarity={"joy": "up"}), "'up'; allowed: positive, negative")])
def test_contradictory_label_sets_are_refused(bad, says):
    text = message(DataError, LabelSet, "mine", **bad)
    assert says in text and "'mine'" in text


def test_label_sets_are_values():
    again = pickle.loads(pickle.dumps(EMOSET8))
    assert again == EMOSET8 and hash(again) == hash(EMOSET8) and copy.deepcopy(EMOSET8) == EMOSET8
    assert EMOSET8 != EMOTION6
    with pytest.raises(FrozenInstanceError): EMOSET8.name = "x"
    with pytest.raises(TypeError): again.aliases["joy"] = "awe"
    mine = {"glad": "joy"}
    kept = LabelSet("mine", ["joy"], mine)
    mine["sad"] = "joy"
    assert kept.aliases == {"glad": "joy"} and kept.labels == ("joy",)


def test_index_and_names():
    assert [EMOSET8.index(x) for x in EMOSET8] == list(range(8))
    assert "amusement" in message(DataError, EMOSET8.index, "amusment")
    assert [label_set(n) for n in ("emoset8", " EMOTION6 ", "WebEmo7")] == [EMOSET8, EMOTION6, WEBEMO7]
    text = message(DataError, label_set, "webemo")
    assert "'webemo'" in text and "did you mean 'webemo7'?" in text and "emoset8, emotion6, webemo7" in text


def test_question_lists_labels_alphabetically():
    assert emotion_question(EMOSET8) == ("Which emotion does this picture evoke? Choose one of: "
                                         "amusement, anger, awe, contentment, disgust, excitement, fear, sadness.")


def test_did_you_mean():
    assert did_you_mean("FEAR ", ["fear", "awe"]) == "; did you mean 'fear'?"
    assert did_you_mean("zzz", ["fear"]) == "" and did_you_mean("fear", []) == ""


def test_check_choice():
    check_choice("it", "fear", EMOTION6)
    assert message(ValueError, check_choice, "it", "Fear", ("fear", "awe")) == "it: got 'Fear'; allowed: fear, awe; did you mean 'fear'?"
    for value in (None, 3, [], "far away"): assert message(ValueError, check_choice, "it", value, ("fear", "awe")) == f"it: got {value!r}; allowed: fear, awe"


# ---- pictures

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    assert one(Image.new(mode, (3, 2))).load_image().mode == "RGB"


@pytest.mark.parametrize("suffix, mode", [("jpg", "CMYK"), ("jpg", "L"), ("png", "P"), ("png", "RGBA"), ("png", "I;16"), ("gif", "P"), ("webp", "RGBA"),
                                          ("bmp", "RGB"), ("tiff", "CMYK"), ("ppm", "RGB")])
def test_formats_from_disk(tmp_path, suffix, mode):
    Image.new(mode, (5, 4)).save(tmp_path / f"p.{suffix}")
    picture = one(tmp_path / f"p.{suffix}").load_image()
    assert (picture.mode, picture.size) == ("RGB", (5, 4))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.new("I;16", (1, 1), 100 * 256 + 255).save(tmp_path / "deep.png")
    assert one(tmp_path / "deep.png").load_image().getpixel((0, 0)) == (100, 100, 100)


def test_transparency_stands_on_white(tmp_path):
    Image.new("RGBA", (1, 1), (200, 0, 0, 0)).save(tmp_path / "a.png")
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 255])
    palette.save(tmp_path / "b.png", transparency=0)
    assert [one(tmp_path / f"{n}.png").load_image().getpixel((0, 0)) for n in "ab"] == [(255, 255, 255)] * 2
    assert one(Image.new("RGBA", (1, 1), (200, 0, 0, 255))).load_image().getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("orientation, first_row", [  # of the 2 x 2 picture "ab / cd", as it should be seen
    (1, "ab"), (2, "ba"), (3, "dc"), (4, "cd"), (5, "ac"), (6, "ca"), (7, "db"), (8, "bd")])
def test_exif_orientation(tmp_path, orientation, first_row):
    grey = dict(zip("abcd", (0, 60, 120, 180)))
    picture = Image.new("RGB", (2, 2))
    picture.putdata([(grey[x],) * 3 for x in "abcd"])
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "p.png", exif=exif)
    seen = one(tmp_path / "p.png").load_image()
    assert [seen.getpixel((x, 0))[0] for x in (0, 1)] == [grey[x] for x in first_row]


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 2), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert one(tmp_path / "a.gif").load_image().getpixel((0, 0)) == (255, 0, 0)


def png_bytes(width, height, *chunks):
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(part(*c) for c in chunks)


@pytest.mark.parametrize("side", [10_000, 100_000])  # Pillow warns of the first and raises for the second
def test_decompression_bombs(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_bytes(side, side, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")))
    text = message(DataError, one(tmp_path / "bomb.png").load_image)
    assert "bomb.png" in text and "89,478,485" in text


@pytest.mark.parametrize("content, says", [
    (b"", "not a picture"), (b"GIF89a", "not a picture"), (b"hello", "not a picture"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"), (png_bytes(4, 4, (b"IDAT", b"not deflate")), "damaged"),
    (png_bytes(4, 4, (b"IDAT", zlib.compress(b"\0" * 9))), "damaged"), (png_bytes(0, 0, (b"IDAT", zlib.compress(b""))), "")])
def test_unreadable_pictures_name_the_file(tmp_path, content, says):
    (tmp_path / "odd.png").write_bytes(content)
    text = message(DataError, one(tmp_path / "odd.png").load_image)
    assert "odd.png" in text and says in text


def test_a_truncated_picture_at_every_length(tmp_path):
    path = tmp_path / "p.png"
    Image.effect_noise((12, 12), 90).save(path)
    whole = path.read_bytes()
    for length in range(len(whole) - 28):  # the last bytes only repeat checksums and say "end"
        path.write_bytes(whole[:length])
        assert "p.png" in message(DataError, one(path).load_image)


@settings(max_examples=80, deadline=None)
@given(st.binary(min_size=1, max_size=6), st.integers(0, 600), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
def test_damaged_bytes_either_decode_or_say_so(tmp_path_factory, junk, at, kind):
    path = tmp_path_factory.mktemp("junk") / "p"
    Image.linear_gradient("L").resize((12, 12)).convert("RGB").save(path, format=kind)
    whole = bytearray(path.read_bytes())
    at %= len(whole)
    whole[at:at + len(junk)] = junk
    path.write_bytes(bytes(whole))
    try: assert one(path).load_image().mode == "RGB"
    except DataError as error: assert str(path) in str(error)


def test_missing_and_unreadable_files(tmp_path):
    assert "gone.png" in message(FileNotFoundError, one(tmp_path / "gone.png").load_image)
    assert "gone.png" in message(FileNotFoundError, one(tmp_path / "gone.png").sha256)
    assert str(tmp_path) in message(DataError, one(tmp_path).load_image)


def test_pictures_are_lazy_and_fresh(faces):
    examples = load_examples(faces, EMOTION6)
    assert all(isinstance(x.image, Path) for x in examples)
    first = examples[0].load_image()
    first.putpixel((0, 0), (1, 2, 3))
    assert examples[0].load_image().getpixel((0, 0)) != (1, 2, 3)
    in_memory = one(Image.new("RGB", (1, 1), "red"))
    in_memory.load_image().putpixel((0, 0), (0, 0, 0))
    assert in_memory.load_image().getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (402, 2)])
def test_strips_are_refused_by_name(tmp_path, size):
    png(tmp_path / "strip.png", size=size)
    for picture, name in ((tmp_path / "strip.png", str(tmp_path / "strip.png")), (Image.new("RGB", size), "example 'seen'")):
        text = message(DataError, EmotionExample(picture, "?", "joy", EMOTION6, id="seen").load_image)
        assert name in text and f"{size[0]} x {size[1]} pixels" in text and "200 times" in text
    png(tmp_path / "wide.png", size=(200, 1))
    assert one(tmp_path / "wide.png").load_image().size == (200, 1)


def test_the_widest_picture_that_is_read_can_be_encoded():
    from emo_r3.policy import load_processor
    for size in ((200, 1), (1, 200), (1000, 5)): load_processor().image_processor(one(Image.new("RGB", size)).load_image())


def test_sha256(tmp_path):
    import hashlib
    path = png(tmp_path / "a.png")
    assert one(path).sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    red, wide = Image.new("RGB", (2, 1), "red"), Image.new("RGB", (1, 2), "red")
    assert one(red).sha256() == one(red.copy()).sha256() != one(wide).sha256()


def test_examples_are_values(tmp_path):
    x = one(str(png(tmp_path / "a.png")))
    assert isinstance(x.image, Path) and pickle.loads(pickle.dumps(x)) == x and len({x, x}) == 1
    assert hash(one(Image.new("RGB", (1, 1)))) is not None
    with pytest.raises(FrozenInstanceError): x.label = "fear"
    text = message(DataError, EmotionExample, x.image, "?", "joyy", EMOTION6, id="a.png")
    assert "'a.png'" in text and "'joyy'" in text and "anger, disgust, fear, joy, sadness, surprise" in text and "did you mean 'joy'" in text


# ---- folders

def test_class_folders(faces):
    examples = load_examples(str(faces), EMOTION6, domain="mine")
    assert Counter(x.label for x in examples) == {"joy": 4, "fear": 4, "anger": 4}
    assert [x.id for x in examples][:2] == ["anger/0.png", "anger/1.png"]
    assert {x.domain for x in examples} == {"mine"} and {x.question for x in examples} == {emotion_question(EMOTION6)}
    assert load_examples(faces, EMOTION6, question="How?")[0].question == "How?"


def test_class_folders_pass_over_other_files(faces):
    for name in ("Thumbs.db", "notes.txt", ".hidden.png", "list.json"): (faces / "joy" / name).write_text("x")
    (faces / ".git").mkdir()
    (faces / "__MACOSX").mkdir()
    png(faces / "joy" / "deeper" / "5.JPEG")
    (faces / "readme.md").write_text("x")
    examples = load_examples(faces, EMOTION6)
    assert len(examples) == 13 and "joy/deeper/5.JPEG" in {x.id for x in examples}


def test_class_names_ignore_case_only(faces):
    (faces / "joy").rename(faces / "JOY")
    assert Counter(x.label for x in load_examples(faces, EMOTION6))["joy"] == 4
    (faces / "JOY").rename(faces / "happiness")
    text = message(DataError, load_examples, faces, EMOTION6)
    assert "happiness" in text and "label_map={'happiness': 'joy'}" in text
    assert len(load_examples(faces, EMOTION6, label_map={"happiness": "joy"})) == 12


def test_splits_of_folders(tmp_path):
    for split, n in (("train", 3), ("val", 2), ("Test", 1)):
        for k in range(n): png(tmp_path / split / "joy" / f"{k}.png")
    counts = {s: len(load_examples(tmp_path, EMOTION6, split=s)) for s in ("train", "val", "validation", "valid", "test", "Test")}
    assert counts == {"train": 3, "val": 2, "validation": 2, "valid": 2, "test": 1, "Test": 1}
    assert load_examples(tmp_path, EMOTION6, split="train")[0].id == "train/joy/0.png"
    assert "train" in message(DataError, load_examples, tmp_path, EMOTION6)
    assert "'holdout'" in message(DataError, load_examples, tmp_path, EMOTION6, split="holdout")


def test_split_of_an_undivided_folder(faces):
    text = message(DataError, load_examples, faces, EMOTION6, split="train")
    assert "'train'" in text and "anger, fear, joy" in text


def test_missing_and_empty_places(tmp_path):
    assert "gone" in message(FileNotFoundError, load_examples, tmp_path / "gone", EMOTION6)
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "joy").mkdir(parents=True)
    for name in ("empty", "hollow"): assert name in message(DataError, load_examples, tmp_path / name, EMOTION6)
    (tmp_path / "e.csv").write_text("image,label\n")
    (tmp_path / "e.jsonl").write_text("\n\n")
    (tmp_path / "none.csv").write_text("")
    for name in ("e.csv", "e.jsonl", "none.csv"): assert name in message(DataError, load_examples, tmp_path / name, EMOTION6)
    (tmp_path / "w.xlsx").write_text("x")
    assert ".csv, .tsv, .jsonl" in message(DataError, load_examples, tmp_path / "w.xlsx", EMOTION6)


def test_home_is_expanded(faces, monkeypatch):
    monkeypatch.setenv("HOME", str(faces.parent))
    assert len(load_examples("~/faces", EMOTION6)) == 12


# ---- tables

def table(tmp_path, name, content):
    png(tmp_path / "a.png")
    png(tmp_path / "b c.png")
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("content", [
    "image,label\na.png,joy\nb c.png,fear\n", "image;label\na.png;joy\nb c.png;fear\n", "image\tlabel\na.png\tjoy\nb c.png\tfear\n",
    "label,other,image_path\nJoy,x,a.png\n FEAR ,y, b c.png\n", "\ufeffimage,label\r\na.png,joy\r\nb c.png,fear", 'image,label\n"a.png","joy"\n\n"b c.png",fear\n',
    'image,comment,label\na.png,"two\nlines, and a comma",joy\nb c.png,a\u2028b\x0bc,fear\n', " Image , Emotion\na.png,joy\nb c.png,fear\n"])
def test_csv_dialects(tmp_path, content):
    examples = load_examples(table(tmp_path, "t.csv", content), EMOTION6)
    assert [(x.id, x.label) for x in examples] == [("a.png", "joy"), ("b c.png", "fear")]
    assert examples[1].load_image().size == (4, 3)


@pytest.mark.parametrize("content, error, says", [
    ("image,mood\na.png,joy\n", DataError, ["no label column", "image, mood", "label_column"]),
    ("painting,label\na.png,joy\n", DataError, ["no image column", "painting, label", "image_column"]),
    ("image,label\na.png,joy\na.png,bliss\n", DataError, ["line 3", "'bliss'", "emotion6", "anger, disgust"]),
    ("image,label\na.png,\n", DataError, ["line 2", "empty"]), ("image,label\na.png\n", DataError, ["line 2", "empty"]),
    ("image,label\n,joy\n", DataError, ["line 2", "'image'"]), ("image,label\na.png,joy,extra\n", DataError, ["line 2", "more cells"]),
    ("image,label\ngone.png,joy\n", FileNotFoundError, ["line 2", "gone.png"]),
    ("image,label\nhttp://x/y.jpg,joy\n", FileNotFoundError, ["line 2", "not fetched"]),
    ('image,label\n"a.png,joy\n', DataError, ["CSV"]), ("image,label,label\na.png,joy,fear\n", DataError, ["'label'"]),
    ("image,label\na.png," + "x" * 200_000 + "\n", DataError, ["after line 1", "limit"]), (b"image,label\na.png,jo\xff\n", DataError, ["UTF-8", "0xff"]),
    ("image,label\na.png,3\n", DataError, ["'3'", "label_map"]), ("image,label\na\0b.png,joy\n", (DataError, FileNotFoundError), ["line 2"]),
    ("image,label\na.png," + "x" * 9_000 + "\n", DataError, ["xxx..."]), ("image,label\n.,joy\n", FileNotFoundError, ["line 2"])])
def test_csv_errors(tmp_path, content, error, says):
    path = table(tmp_path, "t.csv", content)
    text = message(error, load_examples, path, EMOTION6)
    assert str(path) in text and all(part in text for part in says) and len(text) < 1_000, text


def test_columns_by_name(tmp_path):
    path = table(tmp_path, "t.csv", "painting,feeling,label\na.png,joy,fear\n")
    got = load_examples(path, EMOTION6, image_column="painting", label_column="feeling")
    assert got[0].label == "joy"
    assert load_examples(table(tmp_path, "u.csv", "image,Label,label\na.png,joy,fear\n"), EMOTION6)[0].label == "joy"  # the first of equals
    text = message(DataError, load_examples, path, EMOTION6, image_column="paintng")
    assert "'paintng'" in text and "painting, feeling, label" in text and "did you mean 'painting'" in text


def test_csv_split_column(tmp_path):
    path = table(tmp_path, "t.csv", "image,label,split\na.png,joy,train\nb c.png,fear,test\n")
    assert [x.label for x in load_examples(path, EMOTION6, split="test")] == ["fear"]
    assert "'dev'" in message(DataError, load_examples, path, EMOTION6, split="dev")
    assert "split" in message(DataError, load_examples, table(tmp_path, "u.csv", "image,label\na.png,joy\n"), EMOTION6, split="test")


def test_a_picture_in_several_rows_keeps_distinct_ids(tmp_path):
    path = table(tmp_path, "t.csv", "image,label\na.png,joy\na.png,fear\na.png,joy\n")
    assert [x.id for x in load_examples(path, EMOTION6)] == ["a.png", "a.png#2", "a.png#3"]


def test_numbers_as_labels_need_a_map(tmp_path):
    path = table(tmp_path, "t.csv", "image,label\na.png,0\nb c.png,1\n")
    for given_map in ({"0": "joy", "1": "fear"}, {0: "joy", 1: "FEAR"}):
        assert [x.label for x in load_examples(path, EMOTION6, label_map=given_map)] == ["joy", "fear"]


def test_absolute_paths(tmp_path):
    path = table(tmp_path, "t.csv", "")
    (tmp_path / "lists").mkdir()
    moved = path.rename(tmp_path / "lists" / "t.csv")
    moved.write_text(f"image,label\n{tmp_path / 'a.png'},joy\n../a.png,fear\n")
    assert [x.load_image().size for x in load_examples(moved, EMOTION6)] == [(4, 3)] * 2


def test_jsonl(tmp_path):
    path = table(tmp_path, "t.jsonl", '{"image": "a.png", "label": "joy"}\n\n{"images": ["b c.png"], "problem": "?", "answer": ["Fear"]}')
    assert [(x.id, x.label) for x in load_examples(path, EMOTION6)] == [("a.png", "joy"), ("b c.png", "fear")]


@pytest.mark.parametrize("line, error, says", [
    ('{"image": "a.png", "label": joy}', DataError, "not a line of JSON"), ('{"image": "a.png"', DataError, "not a line of JSON"),
    ("[" * 100_000, DataError, "not a line of JSON"), ('{"image": "a.png", "label": ' + "9" * 5000 + "}", DataError, "not a line of JSON"),
    ('["a.png", "joy"]', DataError, "list"), ("3", DataError, "int"), ('{"image": "a.png"}', DataError, "the columns are: image"), ("{}", DataError, "none"),
    ('{"image": 7, "label": "joy"}', DataError, "7"), ('{"image": null, "label": "joy"}', DataError, "None"),
    ('{"images": ["a.png", "a.png"], "label": "joy"}', DataError, "one picture"), ('{"images": [], "label": "joy"}', DataError, "one picture"),
    ('{"image": "a.png", "label": null}', DataError, "empty"), ('{"image": "a.png", "label": true}', DataError, "'True'"),
    ('{"image": "a.png", "label": {"joy": 1}}', DataError, "joy"), ('{"image": "a.png", "label": ["joy", "fear"]}', DataError, "joy"),
    ('{"image": "a\\u0000.png", "label": "joy"}', FileNotFoundError, "does not exist"), ('{"image": "gone.png", "label": "joy"}', FileNotFoundError, "gone.png")])
def test_jsonl_errors_name_the_line(tmp_path, line, error, says):
    path = table(tmp_path, "t.jsonl", '{"image": "a.png", "label": "joy"}\n' + line + "\n")
    text = message(error, load_examples, path, EMOTION6)
    assert f"{path}, line 2" in text and says in text, text[:400]


def test_jsonl_bad_bytes(tmp_path):
    path = table(tmp_path, "t.jsonl", b'{"image": "a.png", "label": "jo\xff"}\n')
    assert "line 1" in message(DataError, load_examples, path, EMOTION6)


# ---- Hugging Face data sets

@pytest.fixture
def hf(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def three(hf, faces):
    paths = [str(faces / label / "1.png") for label in ("joy", "fear", "anger")]
    features = hf.Features(image=hf.Image(), labels=hf.ClassLabel(names=["anger", "fear", "joy"]))
    return hf.Dataset.from_dict({"image": paths, "labels": ["joy", "fear", "anger"]}, features)


def check_three(examples, faces):
    assert [x.label for x in examples] == ["joy", "fear", "anger"]
    for x in examples:
        assert isinstance(x.image, StoredPicture)
        assert x.load_image().tobytes() == Image.open(faces / x.label / "1.png").tobytes()
    assert len({x.id for x in examples}) == 3


def test_saved_dataset(three, faces, tmp_path):
    three.save_to_disk(tmp_path / "saved")
    check_three(load_examples(tmp_path / "saved", EMOTION6), faces)
    assert "split" in message(DataError, load_examples, tmp_path / "saved", EMOTION6, split="train")


def test_saved_dataset_dict(hf, three, faces, tmp_path):
    hf.DatasetDict(train=three, test=three.select([1])).save_to_disk(tmp_path / "saved")
    check_three(load_examples(tmp_path / "saved", EMOTION6, split="train"), faces)
    assert [x.label for x in load_examples(tmp_path / "saved", EMOTION6, split="test")] == ["fear"]
    text = message(DataError, load_examples, tmp_path / "saved", EMOTION6)
    assert "train, test" in text
    hf.DatasetDict(only=three).save_to_disk(tmp_path / "single")
    check_three(load_examples(tmp_path / "single", EMOTION6), faces)


def test_parquet(hf, three, faces, tmp_path):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    embedded = three.map(lambda row: row, features=three.features)  # rewrites the pictures as bytes
    embedded.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    embedded.select([0]).to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    check_three(load_examples(tmp_path / "hub", EMOTION6, split="train"), faces)
    assert len(load_examples(tmp_path / "hub", EMOTION6, split="test")) == 1
    single = tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"
    check_three(load_examples(single, EMOTION6), faces)
    assert "no splits" in message(DataError, load_examples, single, EMOTION6, split="train")


def test_the_papers_columns_and_shuffled_rows(hf, faces, tmp_path):
    features = hf.Features(images=hf.List(hf.Image()), problem=hf.Value("string"), answer=hf.Value("string"))
    rows = hf.Dataset.from_dict({"images": [[str(faces / label / "1.png")] for label in ("anger", "joy", "fear")], "problem": ["<image>?"] * 3,
                                 "answer": ["anger", "joy", "fear"]}, features).select([1, 2, 0])
    rows.save_to_disk(tmp_path / "crops")
    check_three(load_examples(tmp_path / "crops", EMOTION6), faces)


def test_plain_columns(hf, faces, tmp_path):
    """Parquet that pandas or Spark wrote: no data set features, pictures as bytes, paths or {bytes, path}."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    data = (faces / "joy" / "1.png").read_bytes()
    cells = {"bytes": data, "path": "faces/joy/1.png", "struct": {"bytes": data, "path": None}}
    for kind, cell in cells.items():
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"image": [cell], "label": ["joy"]}), path)
        assert load_examples(path, EMOTION6)[0].sha256() == load_examples(faces, EMOTION6)[9].sha256(), kind


def test_datasets_that_do_not_fit(hf, three, faces, tmp_path):
    three.rename_column("labels", "mood").save_to_disk(tmp_path / "nolabel")
    assert "image, mood" in message(DataError, load_examples, tmp_path / "nolabel", EMOTION6)
    numbers = three.cast_column("labels", hf.Value("int64"))
    numbers.save_to_disk(tmp_path / "numbers")
    assert "row 0" in (text := message(DataError, load_examples, tmp_path / "numbers", EMOTION6)) and "label_map" in text
    check_three(load_examples(tmp_path / "numbers", EMOTION6, label_map={"0": "anger", "1": "fear", "2": "joy"}), faces)
    assert "row 0" in (text := message(DataError, load_examples, tmp_path / "nolabel", EMOSET8, label_column="mood")) and "'joy'" in text
    unlabelled = hf.Dataset.from_dict({"image": [None, None], "label": [2, -1]}, hf.Features(image=hf.Image(), label=three.features["labels"]))
    unlabelled.save_to_disk(tmp_path / "unlabelled")
    assert "row 1: the label is empty" in message(DataError, load_examples, tmp_path / "unlabelled", EMOTION6)
    unlabelled.select([0]).save_to_disk(tmp_path / "nopicture")
    assert "row 0" in message(DataError, load_examples(tmp_path / "nopicture", EMOTION6)[0].load_image)
    pairs = hf.Dataset.from_dict({"images": [[str(faces / "joy" / "1.png")] * 2], "label": ["joy"]}, hf.Features(images=hf.List(hf.Image()), label=hf.Value("string")))
    pairs.save_to_disk(tmp_path / "pairs")
    assert "2 pictures" in message(DataError, load_examples(tmp_path / "pairs", EMOTION6)[0].load_image)
    hf.Dataset.from_dict({"image": [str(tmp_path / "gone.png")], "label": ["joy"]}).save_to_disk(tmp_path / "dangling")
    assert "gone.png" in message(FileNotFoundError, load_examples(tmp_path / "dangling", EMOTION6)[0].load_image)


def test_a_damaged_dataset(hf, three, tmp_path):
    three.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    assert str(tmp_path / "saved") in message(DataError, load_examples, tmp_path / "saved", EMOTION6)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "bad.parquet" in message(DataError, load_examples, tmp_path / "bad.parquet", EMOTION6)


def test_hub_names(hf, monkeypatch, tmp_path, three):
    monkeypatch.chdir(tmp_path)
    asked = []

    def fake(name, **options):
        asked.append(name)
        if name == "someone/gone": raise ConnectionError("no network\nmore")
        return hf.DatasetDict(train=three)

    monkeypatch.setattr(hf, "load_dataset", fake)
    assert len(load_examples("someone/EmoSet-v1.0", EMOTION6)) == 3
    assert "someone/gone" in message(FileNotFoundError, load_examples, "someone/gone", EMOTION6)
    (tmp_path / "data").mkdir()
    for local in ("data/emoset", "./someone/emoset", "someone", "someone/list.csv", "/someone/emoset", "a/b/c", "../x/y"):
        assert "no such file or folder" in message(FileNotFoundError, load_examples, local, EMOTION6)
    assert asked == ["someone/EmoSet-v1.0", "someone/gone"]


# ---- sub-sampling and manifests

def made(labels, name="r") -> list[EmotionExample]:
    return [EmotionExample(Image.new("RGB", (1, 1), (k % 256, k // 256, 0)), "?", label, EMOTION6, id=f"{name}{k}") for k, label in enumerate(labels)]


labels_strategy = st.lists(st.sampled_from(EMOTION6.labels), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(labels_strategy, st.data(), st.integers(-5, 10**12), st.booleans())
def test_subsample_properties(labels, data, seed, stratified):
    examples = made(labels)
    n = data.draw(st.integers(0, len(examples)))
    got = subsample(examples, n, seed, stratified)
    places = [examples.index(x) for x in got]
    assert len(got) == n and places == sorted(set(places))
    shuffled = examples[:]
    random.Random(1).shuffle(shuffled)
    assert {x.id for x in subsample(shuffled, n, seed, stratified)} == {x.id for x in got}
    if stratified:
        counts, kept = Counter(labels), Counter(x.label for x in got)
        for label, count in counts.items(): assert abs(kept[label] - n * count / len(labels)) < 1
    else:
        m = data.draw(st.integers(0, n))
        assert {x.id for x in subsample(examples, m, seed)} <= {x.id for x in got}


def test_subsample_golden():
    """Fixed for good: published manifests depend on it, whatever the version of Python."""
    examples = made(["joy", "fear", "anger"] * 10)
    assert [x.id for x in subsample(examples, 5, seed=0)] == GOLDEN[0]
    assert [x.id for x in subsample(examples, 5, seed=1)] == GOLDEN[1]
    assert [x.id for x in subsample(examples, 6, seed=0, stratified=True)] == GOLDEN[2]


GOLDEN = (["r0", "r16", "r21", "r23", "r28"],
          ["r6", "r8", "r12", "r15", "r18"],
          ["r0", "r11", "r16", "r21", "r23", "r28"])


def test_the_largest_remainder_gets_the_place_left_over():
    kept = Counter(x.label for x in subsample(made(["joy"] * 12 + ["fear"] * 12 + ["anger"] * 4), 10, seed=0, stratified=True))
    assert kept == {"joy": 4, "fear": 4, "anger": 2}  # 4.29, 4.29, 1.43


def test_subsample_is_uniform_enough():
    hits = Counter(x.id for seed in range(400) for x in subsample(made(["joy"] * 8), 4, seed))
    assert len(hits) == 8 and all(150 <= n <= 250 for n in hits.values())  # 200 expected, standard deviation 10


def test_subsample_without_ids():
    examples = [EmotionExample(Image.new("RGB", (1, 1)), "?", "joy", EMOTION6) for _ in range(10)]
    got = subsample(examples, 4, seed=3)
    assert len(got) == 4 and len({id(x) for x in got}) == 4


@pytest.mark.parametrize("n", [-1, 4, 1.5, True, "2", None])
def test_subsample_refuses(n):
    text = message(DataError, subsample, made(["joy"] * 3), n, 0)
    assert repr(n) in text and "0 to 3" in text


def test_manifest_round_trip(faces, tmp_path):
    examples = load_examples(faces, EMOTION6)
    chosen = subsample(examples, 5, seed=2)[::-1]
    path = write_manifest(tmp_path / "m.jsonl", chosen)
    assert read_manifest(path, load_examples(faces, EMOTION6)) == chosen
    assert [json.loads(line).keys() for line in path.read_text().splitlines()] == [{"id", "label", "sha256"}] * 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces", "m.jsonl"]


def test_manifest_of_pictures_without_files(tmp_path):
    examples = made(["joy", "fear", "anger"], name="zoë\n\"x\"")
    assert read_manifest(write_manifest(tmp_path / "m.jsonl", examples), examples[::-1]) == examples


def test_manifest_errors(faces, tmp_path):
    examples = load_examples(faces, EMOTION6)
    path = write_manifest(tmp_path / "m.jsonl", examples[:3])
    assert "'anger/0.png' is not among the 9" in message(DataError, read_manifest, path, examples[3:])
    relabelled = [EmotionExample(x.image, "?", "joy", EMOTION6, id=x.id) for x in examples]
    assert "'joy', the manifest says 'anger'" in message(DataError, read_manifest, path, relabelled)
    png(faces / "anger" / "1.png", (9, 9, 9))
    text = message(DataError, read_manifest, path, examples)
    assert "line 2" in text and "sha256" in text
    for broken in ('{"id": "anger/0.png", "label": "anger"}', '{"id": 3}', "[]", "{"):
        path.write_text(broken + "\n")
        assert f"{path}, line 1" in message(DataError, read_manifest, path, examples)
    assert "gone" in message(FileNotFoundError, read_manifest, tmp_path / "gone", examples)
    for bad in (examples[:1] * 2, [EmotionExample(examples[0].image, "?", "joy", EMOTION6)]):
        message(DataError, write_manifest, tmp_path / "bad.jsonl", bad)
    assert not (tmp_path / "bad.jsonl").exists()


def test_a_failed_manifest_leaves_the_old_one(faces, tmp_path):
    examples = load_examples(faces, EMOTION6)
    path = write_manifest(tmp_path / "m.jsonl", examples)
    before = path.read_text()
    examples[5].image.unlink()
    message(FileNotFoundError, write_manifest, path, examples)
    assert path.read_text() == before and sorted(p.name for p in tmp_path.iterdir()) == ["faces", "m.jsonl"]


# ---- the module itself

def test_no_torch_and_no_datasets_on_import():
    code = "import sys, emo_r3.data; print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=string.printable + "éß\u200b", max_size=200))
def test_any_text_as_csv_or_jsonl_ends_in_a_named_error(tmp_path_factory, text):
    for name in ("t.csv", "t.jsonl"):
        path = tmp_path_factory.mktemp("any") / name
        path.write_text(text, encoding="utf-8", newline="")
        with pytest.raises((DataError, FileNotFoundError)) as caught: load_examples(path, EMOTION6)
        assert str(path) in str(caught.value)


def test_a_folder_without_permission(faces):
    if os.geteuid() == 0: pytest.skip("root may read everything")
    (faces / "joy" / "0.png").chmod(0)
    assert "0.png" in message(DataError, load_examples(faces, EMOTION6)[8].load_image)

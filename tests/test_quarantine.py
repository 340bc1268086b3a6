"""A run survives bad data: what cannot be used is set aside with a reason that finds it, the rest comes through in order, and the machine's own failures are not blamed on the data."""
import errno
import gzip
import io
import json
import os
import random
import re
import resource
import stat
import struct
import tarfile
import weakref
import zipfile
import zlib
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from emo_r3 import data as module
from emo_r3.data import EMOTION6, WEBEMO7, DataError, EmotionExample, SetAside, load_examples, read_manifest, sound_examples, unpack, write_quarantine

GOOD = [("good0.png", "joy"), ("good1.png", "fear"), ("good2.png", "anger")]


def png(path: Path, size=(4, 3), colour=(10, 20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with three good pictures; its name never enters a message."""
    monkeypatch.chdir(tmp_path)
    for name, _ in GOOD: png(Path(name))
    return tmp_path


def picture(image, name="x", label="joy") -> EmotionExample: return EmotionExample(image, "?", label, EMOTION6, id=name)


def among_good(bad: EmotionExample) -> list[EmotionExample]:
    good = [picture(Path(name), name, label) for name, label in GOOD]
    return [good[0], bad, *good[1:]]


# ---- pictures: each stands among three good ones

def noise(path, kind, **options):
    Image.effect_noise((40, 30), 90).convert("RGB").save(path, format=kind, **options)
    return Path(path).read_bytes()


def half(kind):
    def make(path):
        whole = noise(path, kind)
        Path(path).write_bytes(whole[:len(whole) // 2])
    return make


def bomb(path):
    chunk = lambda kind, content: struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def flipped(path):
    """A PNG with one bit turned over in its compressed pixels: the header is sound, only a full decoding finds it."""
    whole = bytearray(noise(path, "PNG"))
    whole[len(whole) // 2] ^= 4
    Path(path).write_bytes(bytes(whole))


BAD_PICTURES = {
    "a truncated JPEG": (half("JPEG"), "a damaged picture"),
    "a truncated PNG": (half("PNG"), "a damaged picture"),
    "a truncated WebP": (half("WEBP"), "damaged|not a picture"),
    "a PNG with one bit turned over": (flipped, "a damaged picture"),
    "an empty file": (lambda p: Path(p).write_bytes(b""), "not a picture .0 bytes"),
    "a text called .jpg": (lambda p: Path(p).write_text("shopping: eggs"), "not a picture"),
    "a web page called .jpg": (lambda p: Path(p).write_text("<html><title>403 Forbidden</title></html>"), "not a picture"),
    "a drawing that would start another program": (lambda p: Path(p).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a picture"),
    "a decompression bomb": (bomb, "more pixels than"),
    "a strip 1 x 500": (lambda p: Image.new("RGB", (1, 500)).save(p, format="PNG"), "1 x 500 pixels"),
    "a strip 500 x 1": (lambda p: Image.new("RGB", (500, 1)).save(p, format="PNG"), "500 x 1 pixels"),
    "a missing file": (lambda p: None, "does not exist"),
    "a broken link": (lambda p: os.symlink("nowhere.png", p), "does not exist"),
    "a link to itself": (lambda p: os.symlink(p, p), "cannot be read"),
    "a folder named like a picture": (lambda p: os.mkdir(p), "cannot be read"),
    "a pipe that nobody writes to": (lambda p: os.mkfifo(p), "a pipe or a device"),
    "a device without an end": (lambda p: os.symlink("/dev/zero", p), "a pipe or a device"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_a_bad_picture_is_set_aside_among_good_ones(here, kind):
    make, reason = BAD_PICTURES[kind]
    make("bad.jpg")
    aside = []
    sound = sound_examples(among_good(picture(Path("bad.jpg"), "bad")), aside, most=0.25)
    assert [x.id for x in sound] == [name for name, _ in GOOD]
    assert [(x.where, x.id) for x in aside] == [("bad.jpg", "bad")] and "bad.jpg" in aside[0].reason
    assert re.search(reason, aside[0].reason), aside[0].reason


@pytest.mark.parametrize("name", ["null\0byte.png", "surrogate\ud800.png", "long" * 2_000 + ".png", "good0.png/inside.png"])
def test_names_that_no_file_can_have(here, name):
    aside = []
    assert len(sound_examples(among_good(picture(Path(name), name)), aside, most=0.25)) == 3
    assert len(aside) == 1 and aside[0].reason.isprintable() and len(aside[0].reason) <= 1_003
    write_quarantine("q.jsonl", aside).read_bytes().decode("ascii")
    assert name[:4] in aside[0].where and name[:4] in aside[0].reason


def test_names_that_play_with_the_screen(here):
    name = "red \x1b[31m\nnew line \u202e.png"
    Path(name).write_bytes(b"")
    aside = []
    assert len(sound_examples(among_good(picture(Path(name), name)), aside, most=0.25)) == 3
    assert aside[0].where == aside[0].id == "red \\x1b[31m\\nnew line \\u202e.png" and aside[0].reason.isprintable()
    plain = "Träume 夢 'a' \"b\".png"
    Path(plain).write_bytes(b"")
    sound_examples([picture(Path(plain), plain)], aside, most=1, total=10)
    assert aside[1].where == aside[1].id == plain  # what can be read stays what it is


def test_a_file_far_too_heavy_is_not_read(here, monkeypatch):
    with open("film.jpg", "wb") as file: file.truncate(50 * 2**30)  # a hole, which takes no room on the disk
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read") if self.name == "film.jpg" else open(self, "rb").read())
    aside = []
    assert len(sound_examples(among_good(picture(Path("film.jpg"))), aside, most=0.25)) == 3
    assert "film.jpg" in aside[0].reason and "53,687,091,200 bytes" in aside[0].reason


def test_the_bomb_bound_is_pillows(here, monkeypatch):
    png(Path("large.png"), size=(60, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # Pillow warns above it and raises above twice as much; both are refused
    aside = []
    assert len(sound_examples(among_good(picture(Path("large.png"))), aside, most=0.25)) == 3
    assert "large.png: more pixels than the 1,000 allowed" in aside[0].reason


GOOD_PICTURES = {
    "CMYK": lambda p: Image.new("CMYK", (5, 4), (0, 255, 255, 0)).save(p, format="JPEG"),
    "one pixel": lambda p: Image.new("RGB", (1, 1), "red").save(p, format="PNG"),
    "sixteen bits": lambda p: Image.new("I;16", (5, 4), 40_000).save(p, format="PNG"),
    "an animation": lambda p: Image.new("RGB", (5, 4), "red").save(p, format="GIF", save_all=True, append_images=[Image.new("RGB", (5, 4), "blue")]),
    "a palette with transparency": lambda p: Image.new("P", (5, 4), 0).save(p, format="PNG", transparency=0),
    "grey with alpha": lambda p: Image.new("LA", (5, 4)).save(p, format="PNG"),
    "black and white": lambda p: Image.new("1", (5, 4)).save(p, format="PNG"),
    "another format than its name says": lambda p: Image.new("RGB", (5, 4)).save(p, format="WEBP"),
    "the widest that is read": lambda p: Image.new("RGB", (200, 1)).save(p, format="PNG"),
    "a link to a good one": lambda p: os.symlink("good0.png", p),
}


@pytest.mark.parametrize("kind", GOOD_PICTURES)
def test_an_odd_picture_is_used(here, kind):
    GOOD_PICTURES[kind]("odd.jpg")
    aside, all_four = [], among_good(picture(Path("odd.jpg"), "odd"))
    assert sound_examples(all_four, aside, most=0) == all_four and aside == []
    seen = all_four[1].load_image()
    assert seen.mode == "RGB"
    if kind in ("an animation", "one pixel"): assert seen.getpixel((0, 0)) == (255, 0, 0)  # the first frame
    if kind == "sixteen bits": assert seen.getpixel((0, 0)) == (156,) * 3  # 40,000 / 256, not clipped


def test_a_file_that_may_not_be_read(here):
    if os.geteuid() == 0: pytest.skip("root may read everything")
    png(Path("locked.png")).chmod(0)
    aside = []
    assert len(sound_examples(among_good(picture(Path("locked.png"))), aside, most=0.25)) == 3
    assert "locked.png cannot be read: Permission denied" in aside[0].reason


def test_a_folder_that_may_not_be_entered_is_not_a_pictures_fault(here):
    if os.geteuid() == 0: pytest.skip("root may enter everything")
    png(Path("closed/a.png"))
    Path("closed").chmod(0)
    try:
        with pytest.raises(PermissionError): sound_examples([picture(Path("closed/a.png"))], [], most=1)
        with pytest.raises(PermissionError): load_examples(".", EMOTION6, label_map={"closed": "joy"}, set_aside=[])
        Path("t.csv").write_text("image,label\nclosed/a.png,joy\n")
        with pytest.raises(PermissionError): load_examples("t.csv", EMOTION6, set_aside=[])
    finally: Path("closed").chmod(0o755)


@pytest.mark.parametrize("folder_open", [True, False])
def test_permission_by_file_or_by_folder(here, monkeypatch, folder_open):
    """The same with a pretended refusal, for those who test as root."""
    locked, read = png(Path("locked.png")), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) if self.name != "locked.png" else (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied", str(self))))
    monkeypatch.setattr(os, "access", lambda *_: folder_open)
    aside, examples = [], among_good(picture(locked))
    if folder_open:
        assert len(sound_examples(examples, aside, most=0.25)) == 3 and "locked.png cannot be read: Permission denied" in aside[0].reason
    else:
        with pytest.raises(PermissionError): sound_examples(examples, aside, most=1)
        assert aside == []


# ---- rows of tables: each stands among three good ones

BAD_LINES = {  # for JSON Lines: the line, and words of the reason
    "an unreadable line": ('{"image": "good0.png", "label": joy}', ["not a line of JSON"]),
    "half a line": ('{"image": "good0.p', ["not a line of JSON"]),
    "a list": ('["good0.png", "joy"]', ["list where an object"]),
    "a number": ("3", ["int where an object"]),
    "null": ("null", ["NoneType where an object"]),
    "deeper than Python can follow": ("[" * 100_000, ["not a line of JSON"]),
    "deep where a word should be": ('{"image": "good0.png", "label": ' + "[" * 300 + "]" * 300 + "}", ["label '[[["]),
    "deep where a path should be": ('{"image": ' + '{"a":' * 300 + "1" + "}" * 300 + ', "label": "joy"}', ["'image' holds {'a'"]),
    "a number too long to be one": ('{"image": "good0.png", "label": ' + "9" * 5_000 + "}", ["not a line of JSON"]),
    "not UTF-8": (b'{"image": "good0.png", "label": "jo\xff"}', ["not a line of JSON"]),
    "a binary line": (b"\x89PNG\r\x1a\x00\x00", ["not a line of JSON"]),
    "no label column": ('{"image": "good0.png"}', ["no label column", "the columns are: image"]),
    "no picture column": ('{"label": "joy"}', ["no image column", "the columns are: label"]),
    "an empty object": ("{}", ["no image column", "none"]),
    "a label outside the set": ('{"image": "good0.png", "label": "bliss"}', ["'bliss' is not in emotion6; allowed: anger"]),
    "a wrong label of another set": ('{"image": "good0.png", "label": "awe"}', ["'awe' is not in emotion6"]),
    "an alias without a map": ('{"image": "good0.png", "label": "happiness"}', ["'happiness'", "label_map={'happiness': 'joy'}"]),
    "a number for a label": ('{"image": "good0.png", "label": 3}', ["'3'", "label_map"]),
    "a number of many digits for a label": ('{"image": "good0.png", "label": "' + "7" * 5_000 + '"}', ["label '7777", "..."]),
    "an empty label": ('{"image": "good0.png", "label": " "}', ["the label is empty"]),
    "no label at all": ('{"image": "good0.png", "label": null}', ["the label is empty"]),
    "two labels": ('{"image": "good0.png", "label": ["joy", "fear"]}', ["['joy', 'fear']"]),
    "a huge label": ('{"image": "good0.png", "label": "' + "x" * 1_000_000 + '"}', ["xxx..."]),
    "a label with a null and half a character": ('{"image": "good0.png", "label": "j\\u0000o\\ud800y"}', ["is not in emotion6"]),
    "a missing picture": ('{"image": "gone.png", "label": "joy"}', ["picture 'gone.png' does not exist"]),
    "an address": ('{"image": "https://example.org/a.png", "label": "joy"}', ["not fetched"]),
    "a folder for a picture": ('{"image": ".", "label": "joy"}', ["does not exist"]),
    "no picture in the cell": ('{"image": null, "label": "joy"}', ["column 'image' holds None"]),
    "a hundred thousand pictures in the cell": ('{"image": [' + ", ".join(['"good0.png"'] * 100_000) + '], "label": "joy"}', ["one picture's path"]),
    "an empty path": ('{"image": " ", "label": "joy"}', ["column 'image' holds ' '"]),
    "several pictures in the cell": ('{"image": ["good0.png", "good1.png"], "label": "joy"}', ["one picture's path"]),
    "a path with a null byte": ('{"image": "good0\\u0000.png", "label": "joy"}', ["does not exist"]),
    "a path with half a character": ('{"image": "good\\ud800.png", "label": "joy"}', ["does not exist"]),
    "a path that is far too long": ('{"image": "' + "p" * 100_000 + '.png", "label": "joy"}', ["picture 'pppp"]),
}


def lines_of(bad: str | bytes) -> bytes:
    rows = [json.dumps({"image": name, "label": label}).encode() for name, label in GOOD]
    return b"\n".join([rows[0], bad if isinstance(bad, bytes) else bad.encode(), *rows[1:]]) + b"\n"


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_of_json_is_set_aside(here, kind):
    bad, words = BAD_LINES[kind]
    Path("t.jsonl").write_bytes(lines_of(bad))
    aside = []
    examples = load_examples("t.jsonl", EMOTION6, set_aside=aside)
    assert [x.label for x in examples] == ["joy", "fear", "anger"] and [str(x.image) for x in examples] == [name for name, _ in GOOD]
    assert len(aside) == 1 and aside[0].where == "t.jsonl, line 2" and aside[0].reason.startswith("t.jsonl, line 2: ")
    assert all(word in aside[0].reason for word in words) and len(aside[0].reason) <= 1_003 and aside[0].reason.isprintable(), aside[0].reason
    with pytest.raises((DataError, FileNotFoundError), match="t.jsonl, line 2") as caught: load_examples("t.jsonl", EMOTION6)  # as ever, without a list
    assert str(caught.value).startswith(aside[0].reason[:1_000].split("\\")[0]) and (len(str(caught.value)) < 1_000 or kind == "a path that is far too long")


def test_what_nobody_could_print_is_shown_in_short():
    deep = []
    for _ in range(100_000): deep = [deep]
    for value in ([deep, deep], {"joy": deep}):
        with pytest.raises(DataError, match="here: label .* is not in emotion6"): module._gold(value, EMOTION6, {}, "here")
    assert "holds [" in str(module._table_picture(Path("t.jsonl"), deep, "image", "here"))


BAD_CSV = {
    "too many cells": ("good0.png,joy,extra", ["line 3: more cells than the 2 columns"]), "too few cells": ("good0.png", ["line 3: the label is empty"]),
    "an empty label": ("good0.png,", ["line 3: the label is empty"]), "a label outside the set": ("good0.png,bliss", ["line 3: label 'bliss'"]),
    "an alias without a map": ("good0.png,happy", ["line 3", "label_map"]), "no path": (",joy", ["line 3: column 'image' holds ''"]),
    "a missing picture": ("gone.png,joy", ["line 3: picture 'gone.png' does not exist"]), "a quote that is not closed": ('"good0.png,joy', ["after line 2: not readable as CSV"]),
    "a quote in the middle": ('"good0".png,joy', ["after line 2: not readable as CSV"]), "a cell beyond all bounds": ("good0.png," + "x" * 200_000, ["after line 2", "limit"]),
    "a huge label": ("good0.png," + "x" * 100_000, ["line 3", "xxx..."]), "a null byte": ("good\0.png,joy", ["line"]), "a header again": ("image,label", ["line 3: picture 'image'"]),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_bad_line_of_csv_is_set_aside(here, kind):
    bad, words = BAD_CSV[kind]
    rows = [",".join(row) for row in GOOD]
    Path("t.csv").write_text("\n".join(["image,label", rows[0], bad, *rows[1:]]), newline="")
    aside = []
    examples = load_examples("t.csv", EMOTION6, set_aside=aside)
    assert [(x.id.split("#")[0], x.label) for x in examples] == GOOD
    assert len(aside) == 1 and aside[0].where == "t.csv, line 3" and "t.csv, " in aside[0].reason
    assert all(word in aside[0].reason for word in words) and len(aside[0].reason) <= 1_003, aside[0].reason
    with pytest.raises((DataError, FileNotFoundError), match="t.csv, (line 3|after line 2)"): load_examples("t.csv", EMOTION6)


def test_a_map_makes_an_alias_good(here):
    Path("t.jsonl").write_bytes(lines_of('{"image": "good0.png", "label": "happiness"}'))
    aside = []
    assert len(load_examples("t.jsonl", EMOTION6, label_map={"happiness": "joy"}, set_aside=aside)) == 4 and aside == []


def test_repeated_ids_are_kept_and_stay_what_they_are(here):
    rows = [{"image": "good0.png", "label": label} for label in ("joy", "bliss", "fear", "joy")]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    aside = []
    assert [x.id for x in load_examples("t.jsonl", EMOTION6, set_aside=aside)] == ["good0.png", "good0.png#3", "good0.png#4"]
    assert [x.id for x in aside] == ["good0.png#2"]
    rows[1]["label"] = "anger"  # mended: no other example changes its name
    Path("t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [x.id for x in load_examples("t.jsonl", EMOTION6, set_aside=[])] == ["good0.png", "good0.png#2", "good0.png#3", "good0.png#4"]


def test_lines_without_a_name(here):
    Path("t.jsonl").write_bytes(lines_of("[\n["))
    aside = []
    assert len(load_examples("t.jsonl", EMOTION6, set_aside=aside)) == 3 and [(x.where, x.id) for x in aside] == [("t.jsonl, line 2", ""), ("t.jsonl, line 3", "")]


def test_line_numbers_after_blank_lines_and_long_cells(here):
    Path("t.csv").write_text('image,note,label\ngood0.png,,joy\n\n\ngood1.png,"two\nlines",fear\ngood2.png,,bliss\n"good0.png,,joy\n\n"good1.png",,anger\n')
    aside = []
    assert [x.label for x in load_examples("t.csv", EMOTION6, set_aside=aside)] == ["joy", "fear", "anger"]
    assert [x.where for x in aside] == ["t.csv, line 7", "t.csv, line 8"]


def test_rows_of_other_splits_are_not_set_aside(here):
    Path("t.csv").write_text("image,label,split\ngood0.png,joy,train\ngone.png,joy,test\ngood1.png,bliss,train\n")
    aside = []
    assert len(load_examples("t.csv", EMOTION6, split="train", set_aside=aside)) == 1 and [x.where for x in aside] == ["t.csv, line 4"]


def test_class_folders(here):
    for name in ("faces/joy/1.png", "faces/joy/2.png", "faces/happy/3.png", "faces/fear/4.png"): png(Path(name))
    os.symlink("nowhere.png", "faces/joy/1b.png")
    Path("faces/joy/3.png").mkdir()
    png(Path("faces/joy/3.png/4.png"))
    os.symlink("nowhere", "faces/joy/notes.txt")
    aside = []
    examples = load_examples("faces", EMOTION6, set_aside=aside)
    assert [x.id for x in examples] == ["fear/4.png", "joy/1.png", "joy/2.png", "joy/3.png/4.png"]  # a folder named like a picture is a folder
    assert [(x.where, x.id) for x in aside] == [("folder faces/happy", "happy/3.png"), ("faces/joy/1b.png", "joy/1b.png")]
    assert "label_map={'happy': 'joy'}" in aside[0].reason and "faces/joy/1b.png" in aside[1].reason and "does not exist" in aside[1].reason
    Path("faces/happy").rename("faces/.happy")
    assert [x.id for x in load_examples("faces", EMOTION6)] == [x.id for x in examples]  # without a list, links that lead nowhere are passed over


def test_rows_of_a_dataset(here):
    hf = pytest.importorskip("datasets")
    hf.disable_progress_bars()
    rows = {"image": [{"bytes": Path("good0.png").read_bytes(), "path": None}, None, {"bytes": b"no picture", "path": None}, {"bytes": None, "path": "gone.png"},
                      {"bytes": None, "path": "good1.png"}, {"bytes": Path("good2.png").read_bytes(), "path": None}],
            "label": ["joy", "joy", "joy", "joy", "fear", "bliss"]}
    hf.Dataset.from_dict(rows, hf.Features(image={"bytes": hf.Value("binary"), "path": hf.Value("string")}, label=hf.Value("string"))).to_parquet("rows.parquet")
    aside = []
    examples = load_examples("rows.parquet", EMOTION6, set_aside=aside)
    assert [x.where for x in aside] == ["rows.parquet, row 5"] and "'bliss'" in aside[0].reason
    assert [x.id for x in sound_examples(examples, aside, most=1)] == ["0", "4"]
    assert [x.where for x in aside[1:]] == ["rows.parquet, row 1", "rows.parquet, row 2", "rows.parquet, row 3"]
    assert ["holds no picture" in aside[1].reason, "not a picture" in aside[2].reason, "gone.png" in aside[3].reason] == [True] * 3


@pytest.mark.parametrize("name, content, options, error", [
    ("gone.csv", None, {}, FileNotFoundError), ("t.csv", b"image,label\ngood0.png,jo\xff\n", {}, DataError), ("t.csv", b"image,mood\ngood0.png,joy\n", {}, DataError),
    ("t.csv", b"painting,label\ngood0.png,joy\n", {}, DataError), ("t.csv", b"image,label\ngood0.png,joy\n", dict(label_column="mood"), DataError),
    ("t.csv", b"image,label\ngood0.png,joy\n", dict(split="train"), DataError), ("t.csv", b"image,label,split\ngood0.png,joy,test\n", dict(split="train"), DataError),
    ("t.csv", b"image,label,label\ngood0.png,joy,joy\n", {}, DataError), ("t.csv", b'"image,label\ngood0.png,joy\n', {}, DataError),
    ("t.xlsx", b"", {}, DataError), ("t.jsonl", b"\n", {}, DataError), ("t.parquet", b"PAR1", {}, DataError)])
def test_what_concerns_the_whole_source_is_raised(here, name, content, options, error):
    if content is not None: Path(name).write_bytes(content)
    aside = []
    with pytest.raises(error) as caught: load_examples(name, EMOTION6, set_aside=aside, **options)
    assert name in str(caught.value) and aside == []


def test_no_such_split(here):
    png(Path("faces/train/joy/1.png"))
    with pytest.raises(DataError, match="no split 'test'"): load_examples("faces", EMOTION6, split="test", set_aside=[])
    with pytest.raises(DataError, match="say which split"): load_examples("faces", EMOTION6, set_aside=[])


def test_nothing_left(here):
    Path("t.jsonl").write_text('{"image": "gone.png", "label": "joy"}\n[]\n')
    earlier = SetAside("elsewhere", "", "why")
    aside = [earlier]
    with pytest.raises(DataError, match="t.jsonl: nothing is left, for all 2 rows were set aside; the first: t.jsonl, line 1: picture 'gone.png'"): load_examples("t.jsonl", EMOTION6, set_aside=aside)
    assert aside[0] is earlier and [x.where for x in aside[1:]] == ["t.jsonl, line 1", "t.jsonl, line 2"]


GOOD_ROW, BAD_ROWS = st.sampled_from(GOOD), st.sampled_from(sorted(BAD_LINES))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(GOOD_ROW, BAD_ROWS), min_size=1, max_size=12))
def test_any_mix_of_json_lines(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("mix")
    for name, _ in GOOD: png(folder / name)
    lines = [json.dumps({"image": row[0], "label": row[1]}).encode() if isinstance(row, tuple) else (b if isinstance(b := BAD_LINES[row][0], bytes) else b.encode()) for row in rows]
    (folder / "t.jsonl").write_bytes(b"\n".join(lines))
    check_mix(folder / "t.jsonl", rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(GOOD_ROW, st.sampled_from(sorted(BAD_CSV))), min_size=1, max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_any_mix_of_csv_lines(tmp_path_factory, rows, end):
    folder = tmp_path_factory.mktemp("mix")
    for name, _ in GOOD: png(folder / name)
    (folder / "t.csv").write_text(end.join(["image,label", *(",".join(row) if isinstance(row, tuple) else BAD_CSV[row][0] for row in rows)]), newline="")
    check_mix(folder / "t.csv", rows)


def check_mix(path, rows):
    good, aside = [row for row in rows if isinstance(row, tuple)], []
    if not good:
        with pytest.raises(DataError, match="nothing is left"): load_examples(path, EMOTION6, set_aside=aside)
        assert len(aside) == len(rows)
        return
    examples = load_examples(path, EMOTION6, set_aside=aside)
    assert [(x.image.name, x.label) for x in examples] == good
    assert len(examples) + len(aside) == len(rows)
    assert len({x.id for x in examples}) == len(examples)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.just(None), st.sampled_from(sorted(BAD_PICTURES)), st.sampled_from(sorted(GOOD_PICTURES))), max_size=8))
def test_any_mix_of_pictures(tmp_path_factory, kinds):
    folder, home = tmp_path_factory.mktemp("mix"), os.getcwd()
    os.chdir(folder)
    try:
        png(Path("good0.png"))
        for k, kind in enumerate(kinds):
            if kind is None: png(Path(f"{k}.jpg"))
            else: BAD_PICTURES[kind][0](f"{k}.jpg") if kind in BAD_PICTURES else GOOD_PICTURES[kind](f"{k}.jpg")
        examples, aside = [picture(Path(f"{k}.jpg"), str(k)) for k in range(len(kinds))], []
        sound = sound_examples(examples, aside, most=1)
    finally: os.chdir(home)
    assert sound == [x for x, kind in zip(examples, kinds) if kind not in BAD_PICTURES]
    assert [x.id for x in aside] == [str(k) for k, kind in enumerate(kinds) if kind in BAD_PICTURES]


# ---- how much may be set aside

def few_bad(n, bad):
    Image.new("RGB", (2, 2)).save("a.png")
    return [picture(Path("gone.png" if k < bad else "a.png"), str(k)) for k in range(n)]


@pytest.mark.parametrize("n, bad, most, fine", [(20, 1, 0.05, True), (20, 2, 0.05, False), (19, 1, 0.05, False), (100, 29, 0.29, True), (100, 30, 0.29, False), (100, 7, 0.07, True),
                                                (10, 0, 0, True), (10, 1, 0, False), (3, 3, 1, True), (0, 0, 0, True), (10, 1, 0.1, True)])
def test_the_share(here, n, bad, most, fine):
    aside = []
    if fine: assert len(sound_examples(few_bad(n, bad), aside, most)) == n - bad
    else:
        with pytest.raises(DataError): sound_examples(few_bad(n, bad), aside, most)
    assert len(aside) == bad  # all of them, also where it ends in an error


def test_the_message_of_the_share(here):
    with pytest.raises(DataError) as caught: sound_examples(few_bad(20, 5), [])
    text = str(caught.value)
    assert "5 of 20 examples (25.0%) cannot be used; allowed: 1 (5.0%); the first: " in text and "\n" not in text
    assert [f"example '{k}'" in text for k in range(5)] == [True, True, True, False, False]


def test_the_share_counts_what_was_set_aside_before(here):
    before = [SetAside("t.csv, line 2", "", "why"), SetAside("t.csv, line 3", "", "why")]
    assert len(sound_examples(few_bad(18, 0), before[:], most=0.1)) == 18  # 2 of 20
    with pytest.raises(DataError, match="3 of 20 .* t.csv, line 2|3 of 20"): sound_examples(few_bad(18, 1), before[:], most=0.1)
    assert len(sound_examples(few_bad(2, 1), [], most=0.1, total=10)) == 1  # of a part of the data, the share is of the whole
    with pytest.raises(DataError, match="2 of 10"): sound_examples(few_bad(2, 2), [], most=0.1, total=10)


@pytest.mark.parametrize("most", [5, -0.1, float("nan")])
def test_a_share_is_a_share(here, most):
    with pytest.raises(DataError, match="allowed: a share from 0 to 1"): sound_examples(few_bad(2, 0), [], most)


def test_no_decoded_picture_is_kept(here, monkeypatch):
    load, alive, most_alive = EmotionExample.load_image, [], []

    def watched(self):
        seen = load(self)
        alive.append(weakref.ref(seen))
        most_alive.append(sum(ref() is not None for ref in alive))
        return seen
    monkeypatch.setattr(EmotionExample, "load_image", watched)
    examples = [picture(png(Path(f"{k}.png")), str(k)) for k in range(30)]
    assert sound_examples(examples, []) == examples
    assert len(alive) == 30 and max(most_alive) == 1 and not any(ref() for ref in alive)


def test_every_picture_is_opened_once(here, monkeypatch):
    read, asked = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda self: asked.append(self.name) or read(self))
    sound_examples([picture(Path(name), name) for name, _ in GOOD], [])
    assert asked == [name for name, _ in GOOD]


# ---- the machine's failures

@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN])
def test_machine_errors_are_raised(here, monkeypatch, number):
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) if self.name != "good1.png" else (_ for _ in ()).throw(OSError(number, os.strerror(number), str(self))))
    aside = []
    with pytest.raises(OSError) as caught: sound_examples([picture(Path(name), name) for name, _ in GOOD], aside, most=1)
    assert caught.value.errno == number and "good1.png" in str(caught.value) and aside == [] and not isinstance(caught.value, FileNotFoundError)


def test_too_many_open_files_for_real(here):
    examples, aside, (soft, hard) = [picture(Path(name), name) for name, _ in GOOD], [], resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError) as caught: sound_examples(examples, aside, most=1)
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE and aside == []


@pytest.mark.parametrize("failure", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), KeyboardInterrupt()])
def test_machine_errors_while_decoding(here, monkeypatch, failure):
    """Pillow loads its decoders when they are first needed: that may fail as well, and says nothing of the picture."""
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(failure))
    aside = []
    with pytest.raises(type(failure)): sound_examples([picture(Path("good0.png"))], aside, most=1)
    assert aside == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_machine_errors_while_reading_rows(here, monkeypatch, number):
    Path("t.csv").write_text("image,label\ngood0.png,joy\ngood1.png,fear\n")
    about = os.stat

    def failing(path, *rest, **options):
        if str(path).endswith("good1.png"): raise OSError(number, os.strerror(number), str(path))
        return about(path, *rest, **options)
    monkeypatch.setattr(os, "stat", failing)
    aside = []
    with pytest.raises(OSError) as caught: load_examples("t.csv", EMOTION6, set_aside=aside)
    assert caught.value.errno == number and aside == []


def test_a_class_folder_that_cannot_be_listed_is_raised(here, monkeypatch):
    png(Path("faces/joy/1.png")), png(Path("faces/fear/1.png"))
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scan(path) if not str(path).endswith("fear") else (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied", str(path))))
    for aside in (None, []):
        with pytest.raises(PermissionError, match="faces/fear"): load_examples("faces", EMOTION6, set_aside=aside)


# ---- quarantine.jsonl

def test_set_aside_is_a_value():
    x = SetAside("a.csv, line 2", "a.png", "why")
    assert asdict(x) == {"where": "a.csv, line 2", "id": "a.png", "reason": "why"} and len({x, SetAside(**asdict(x))}) == 1
    with pytest.raises(FrozenInstanceError): x.reason = "other"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(SetAside, *[st.text(st.characters(), max_size=30)] * 3), min_size=1, max_size=5))
def test_quarantine_round_trip(tmp_path_factory, aside):
    path = tmp_path_factory.mktemp("q") / "quarantine.jsonl"
    assert write_quarantine(path, aside) == path
    lines = path.read_text(encoding="ascii").splitlines()
    assert [SetAside(**json.loads(line)) for line in lines] == aside
    assert [p.name for p in path.parent.iterdir()] == ["quarantine.jsonl"]


def test_quarantine_of_an_earlier_run(here):
    write_quarantine("q.jsonl", [SetAside("a", "b", "c"), SetAside("d", "e", "f")])
    write_quarantine("q.jsonl", [SetAside("g", "h", "i")])
    assert len(Path("q.jsonl").read_text().splitlines()) == 1
    assert write_quarantine("q.jsonl", []) is None and not Path("q.jsonl").exists()
    assert write_quarantine("q.jsonl", []) is None and not Path("q.jsonl").exists()


def test_a_failed_quarantine_leaves_the_old_one(here, monkeypatch):
    write_quarantine("q.jsonl", [SetAside("a", "b", "c")])
    before, listed = Path("q.jsonl").read_text(), sorted(os.listdir())
    with pytest.raises(TypeError): write_quarantine("q.jsonl", [SetAside("a", "b", {1, 2})])  # not for JSON
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError): write_quarantine("q.jsonl", [SetAside("g", "h", "i")])
    assert Path("q.jsonl").read_text() == before and sorted(os.listdir()) == listed


def test_manifests_still_stop_at_a_bad_line(here):
    Path("m.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="m.jsonl, line 1: not a line of JSON"): read_manifest("m.jsonl", [])


# ---- archives

def zipped(name, *members, method=zipfile.ZIP_STORED):
    """Members are (name, content, mode)."""
    with zipfile.ZipFile(name, "w") as archive:
        for member, content, mode in members:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = member
            info.external_attr, info.compress_type = mode << 16, method
            archive.writestr(info, content)
    return name


def tarred(name, *members):
    """Members are (name, content, type), the content of a link being its target."""
    with tarfile.open(name, "w:gz" if name.endswith("gz") else "w") as archive:
        for member, content, kind in members:
            info = tarfile.TarInfo(member)
            info.type = kind
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE): info.linkname, content = content, b""
            if kind == tarfile.DIRTYPE: info.mode = 0o755
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return name


FILE, LINK, FOLDER, PIPE, DEVICE = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755, stat.S_IFIFO | 0o644, stat.S_IFCHR | 0o666


@pytest.mark.parametrize("name", ["faces.zip", "faces.tar", "faces.tar.gz", "FACES.TGZ"])
def test_unpack(here, name):
    one = Path("good0.png").read_bytes()
    if name.endswith("zip"): zipped(name, ("faces/", b"", FOLDER), ("faces/joy/1.png", one, FILE), ("./faces/joy/../joy/2.png".replace("../joy/", ""), one, 0), ("faces\\fear\\3.png", one, FILE))
    else: tarred(name if name.islower() else "x.tgz", ("faces", b"", tarfile.DIRTYPE), ("faces/joy/1.png", one, tarfile.REGTYPE), ("./faces/joy/2.png", one, tarfile.AREGTYPE), ("faces/fear/3.png", one, tarfile.REGTYPE))
    if not name.islower(): os.rename("x.tgz", name)
    before = set(os.listdir())
    assert unpack(name, "new") == Path("new") and set(os.listdir()) - before == {"new"}
    examples = load_examples("new/faces", EMOTION6)
    assert [x.id for x in examples] == ["fear/3.png", "joy/1.png", "joy/2.png"] and all(x.load_image().size == (4, 3) for x in examples)
    assert stat.S_IMODE(os.stat("new").st_mode) == 0o777 & ~umask() and stat.S_IMODE(os.stat("new/faces/joy/1.png").st_mode) == 0o666 & ~umask()


def umask():
    os.umask(now := os.umask(0))
    return now


def refused(here, archive, *words, most_bytes=10_000_000, folder="deep/inside/new"):
    """The message of an archive that must be refused, after which nothing is anywhere that was not there before."""
    Path("deep/inside").mkdir(parents=True, exist_ok=True)
    listed = lambda: sorted(str(p) for p in here.rglob("*"))
    outside = lambda: sorted(os.listdir(here.parent)) + sorted(os.listdir("/tmp")) + sorted(os.listdir("/"))
    before, around = listed(), [n for n in outside() if n.startswith("evil")]
    with pytest.raises(DataError) as caught: unpack(archive, folder, most_bytes)
    text = str(caught.value)
    assert listed() == before and [n for n in outside() if n.startswith("evil")] == around == []
    assert str(archive) in text and all(word in text for word in words) and len(text) < 1_000 and "\n" not in text, text
    return text


OUTSIDE = ["../evil.png", "../../evil.png", "faces/../../evil.png", "faces/..", "..", "/evil.png", "/tmp/evil.png", "//evil.png", "C:\\evil.png", "c:evil.png", "C:/evil.png",
           "..\\evil.png", "faces\\..\\..\\evil.png", "\\evil.png", "\\\\server\\share\\evil.png"]


@pytest.mark.parametrize("member", OUTSIDE)
def test_names_that_lead_out(here, member):
    refused(here, zipped("a.zip", ("fine.png", b"fine", FILE), (member, b"evil", FILE)), repr(member), "leads out of the folder")
    refused(here, tarred("a.tar", ("fine.png", b"fine", tarfile.REGTYPE), (member, b"evil", tarfile.REGTYPE)), repr(member), "leads out of the folder")
    refused(here, zipped("f.zip", (member.rstrip("/") + "/", b"", FOLDER)), "leads out of the folder")
    refused(here, tarred("f.tgz", (member, b"", tarfile.DIRTYPE)), "leads out of the folder")


@pytest.mark.parametrize("target", ["../evil.png", "../../../evil", "/etc/passwd", "/", "..", "C:\\evil", "..\\..\\evil"])
def test_links_that_lead_out(here, target):
    refused(here, zipped("a.zip", ("link", target.encode(), LINK)), "'link'", "leads out of the folder")
    refused(here, tarred("a.tar", ("link", target, tarfile.SYMTYPE)), "'link'", "leads out of the folder")
    refused(here, tarred("h.tar.gz", ("link", target, tarfile.LNKTYPE)), "'link'", "leads out of the folder")


def test_writing_through_a_link(here):
    """The classical attack: a link to a folder outside, then a file below the link's name."""
    refused(here, tarred("a.tar", ("door", "../../..", tarfile.SYMTYPE), ("door/evil.png", b"evil", tarfile.REGTYPE)), "'door'")
    refused(here, zipped("a.zip", ("door", b"../../..", LINK), ("door/evil.png", b"evil", FILE)), "'door'")
    # by two steps, each of which stays inside by itself
    refused(here, tarred("b.tar", ("a", ".", tarfile.SYMTYPE), ("a/b", "..", tarfile.SYMTYPE), ("a/b/evil.png", b"evil", tarfile.REGTYPE)), "link")
    # and by a link whose name is taken again by a file
    Path("evil-target").write_text("as it was")
    refused_or_inside = tarred("c.tar", ("name", "fine", tarfile.SYMTYPE), ("fine", b"fine", tarfile.REGTYPE), ("name", b"evil", tarfile.REGTYPE))
    unpack(refused_or_inside, "c")
    assert not Path("c/name").is_symlink() and Path("evil-target").read_text() == "as it was"


def test_links_inside_become_copies(here):
    tarred("a.tar", ("faces/1.png", b"one", tarfile.REGTYPE), ("faces/soft.png", "1.png", tarfile.SYMTYPE), ("up/soft.png", "../faces/1.png", tarfile.SYMTYPE),
           ("faces/hard.png", "faces/1.png", tarfile.LNKTYPE), ("early.png", "faces/2.png", tarfile.SYMTYPE), ("faces/2.png", b"two", tarfile.REGTYPE))
    unpack("a.tar", "tar")
    zipped("a.zip", ("early.png", b"faces/2.png", LINK), ("faces/2.png", b"two", FILE))
    unpack("a.zip", "zip")
    found = {p.relative_to(here).as_posix(): p.read_text() for top in ("tar", "zip") for p in (here / top).rglob("*.png") if not p.is_symlink() and p.stat().st_nlink == 1}
    assert found == {"tar/faces/1.png": "one", "tar/faces/soft.png": "one", "tar/up/soft.png": "one", "tar/faces/hard.png": "one", "tar/early.png": "two", "tar/faces/2.png": "two",
                     "zip/early.png": "two", "zip/faces/2.png": "two"}


@pytest.mark.parametrize("members", [
    [("a", "nowhere", tarfile.SYMTYPE)], [("a", "a", tarfile.SYMTYPE)], [("a", "b", tarfile.SYMTYPE), ("b", "a", tarfile.SYMTYPE)], [("a", ".", tarfile.SYMTYPE)],
    [("d/1", b"1", tarfile.REGTYPE), ("a", "d", tarfile.SYMTYPE)], [("1", b"1", tarfile.REGTYPE), ("b", "1", tarfile.SYMTYPE), ("a", "b", tarfile.SYMTYPE)], [("a", "gone", tarfile.LNKTYPE)]])
def test_links_to_no_file(here, members):
    refused(here, tarred("a.tar", *members), "a link to", "allowed: links to files of the archive")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Q"])
def test_devices_in_tar(here, kind):
    refused(here, tarred("a.tar", ("fine", b"fine", tarfile.REGTYPE), ("odd", b"", kind)), "'odd'", "a device, a pipe")


@pytest.mark.parametrize("mode", [PIPE, DEVICE, stat.S_IFBLK | 0o600, stat.S_IFSOCK | 0o600])
def test_devices_in_zip(here, mode):
    refused(here, zipped("a.zip", ("fine", b"fine", FILE), ("odd", b"", mode)), "'odd'", "a device, a pipe")


def test_null_bytes_in_names(here):
    for name in ("fine.png0../../evil.png", "fine.png0.exe"):
        zipped("a.zip", (name, b"evil", FILE))
        Path("a.zip").write_bytes(Path("a.zip").read_bytes().replace(b"fine.png0", b"fine.png\0"))
        refused(here, "a.zip", "'fine.png\\x00", "leads out of the folder")


def test_encrypted_members(here):
    zipped("a.zip", ("fine.png", b"fine", FILE), ("secret.png", b"secret", FILE))
    content = bytearray(Path("a.zip").read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): content[content.rindex(mark) + flags] |= 1
    Path("a.zip").write_bytes(bytes(content))
    refused(here, "a.zip", "member 'secret.png': is encrypted; allowed: archives without a password")


def test_bombs_that_say_so(here):
    refused(here, zipped("a.zip", ("fine.png", b"fine", FILE), ("bomb.png", bytes(20_000_000), FILE), method=zipfile.ZIP_DEFLATED), "'bomb.png'", "10,000,000 bytes allowed")
    refused(here, tarred("a.tgz", ("bomb.png", bytes(20_000_000), tarfile.REGTYPE)), "'bomb.png'", "10,000,000 bytes allowed")
    refused(here, zipped("b.zip", *((f"{k}.png", bytes(3_000_000), FILE) for k in range(4)), method=zipfile.ZIP_DEFLATED), "'3.png'", "10,000,000 bytes allowed")  # by the sum


def test_a_bomb_that_says_so_is_refused_before_it_is_written(here, monkeypatch):
    tarred("a.tgz", ("bomb.png", bytes(20_000_000), tarfile.REGTYPE))
    monkeypatch.setattr(tarfile.ExFileObject, "read", lambda *_: pytest.fail("it was unpacked"))
    refused(here, "a.tgz", "'bomb.png'")


def test_bombs_that_lie(here):
    """What is written counts, not what a header says: here each of a thousand links says that it is empty, and is a copy of a megabyte."""
    refused(here, tarred("a.tgz", ("one", bytes(1_000_000), tarfile.REGTYPE), *((f"link{k}", "one", tarfile.LNKTYPE) for k in range(1_000))), "'link9'", "10,000,000 bytes allowed")
    zipped("a.zip", ("liar.png", bytes(20_000_000), FILE), method=zipfile.ZIP_DEFLATED)
    content = Path("a.zip").read_bytes()
    Path("a.zip").write_bytes(content.replace(struct.pack("<I", 20_000_000), struct.pack("<I", 20)))  # both headers now speak of twenty bytes
    refused(here, "a.zip", "'liar.png'")
    target = Path("poured")
    with pytest.raises(DataError, match="1,000,000 bytes allowed"): module._pour(io.BytesIO(bytes(5_000_000)), target, 0, 0, 1_000_000)
    assert target.stat().st_size < 1_100_000


def test_the_bound_is_exact(here):
    zipped("a.zip", ("a", bytes(600), FILE), ("b", bytes(400), FILE))
    refused(here, "a.zip", "999 bytes allowed", most_bytes=999)
    assert sum(p.stat().st_size for p in unpack("a.zip", "new", 1_000).iterdir()) == 1_000


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_cut_off_anywhere(here, name):
    one = random.Random(0).randbytes(700)
    if name == "a.zip": zipped(name, ("1", one, FILE), ("2", one, FILE))
    else: tarred(name, ("1", one, tarfile.REGTYPE), ("2", one, tarfile.REGTYPE))
    whole = Path(name).read_bytes()
    unpack(name, "whole")
    lengths = [n for n in range(0, len(whole), 97)] + [512, 1024, 1536, 2048, 3072]
    for length in lengths:  # a tar ends at its first block of zeros; what pads it says nothing
        if length >= len(whole) or name == "a.tar" and length >= 3_584: continue
        Path(name).write_bytes(whole[:length])
        refused(here, name)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_an_archive_with_one_bit_turned_over(here, name):
    """Every bit of a file's content matters: each of these is found by a checksum, or leaves the content as it was (a name or a time was hit)."""
    one = random.Random(0).randbytes(500)
    zipped(name, ("1", one, FILE)) if name == "a.zip" else tarred(name, ("1", one, tarfile.REGTYPE))
    whole, wrong = Path(name).read_bytes(), []
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 16
        Path(name).write_bytes(bytes(damaged))
        try: contents = [p.read_bytes() for p in sorted(unpack(name, f"new{at}").rglob("*")) if p.is_file()]
        except DataError as error: assert name in str(error)
        else: wrong += [] if contents == [one] else [at]
    assert wrong == []


def test_a_damaged_header_in_the_middle_is_not_the_end(here):
    """Python's tarfile takes it for the end and says nothing."""
    tarred("a.tar", *((str(k), b"x" * 10, tarfile.REGTYPE) for k in range(3)))
    content = bytearray(Path("a.tar").read_bytes())
    content[1024 + 150] ^= 1  # in the checksum of the second header
    Path("a.tar").write_bytes(bytes(content))
    with tarfile.open("a.tar") as archive: assert archive.getnames() == ["0"]
    refused(here, "a.tar", "damaged", "'0'")


def test_more_after_the_end(here):
    tarred("a.tar", ("1", b"1", tarfile.REGTYPE)), tarred("b.tar", ("2", b"2", tarfile.REGTYPE))
    Path("c.tar").write_bytes(Path("a.tar").read_bytes() + Path("b.tar").read_bytes())
    refused(here, "c.tar", "more after its end")


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    block[0:100], block[124:136], block[156:157], block[148:156] = name.ljust(100, b"\0"), size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_headers_that_ask_for_all_the_memory(here):
    for kind in (b"x", b"g", b"L", b"K"):  # a gigabyte of zeros, in a megabyte
        with gzip.open("a.tar.gz", "wb", compresslevel=1) as file:
            file.write(header(b"big", b"%011o\0" % 2**30, kind))
            for _ in range(64): file.write(bytes(2**20))
        refused(here, "a.tar.gz", "a header asks for 1,073,741,824 bytes")
    fine = header(b"fine", b"%011o\0" % 2**18, tarfile.REGTYPE) + bytes(2**18)  # content may be as long as it likes, also before such a header
    Path("b.tar").write_bytes(fine + header(b"big", b"%011o\0" % 2**20, b"x") + bytes(2**21))
    refused(here, "b.tar", "'fine'", "a header asks for 1,048,576 bytes")


def test_sizes_below_zero(here):
    """A size may be negative, and then an archive leads back to where it began."""
    negative = b"\xff" * 8 + struct.pack(">i", -512)
    for kind in (tarfile.REGTYPE, b"x", b"L", b"Q"):
        for before in (b"", header(b"fine", b"%011o\0" % 0, tarfile.REGTYPE)):
            Path("a.tar").write_bytes(before + header(b"again", negative, kind) + bytes(2048))
            refused(here, "a.tar")


def test_many_small_headers_are_bounded_together(here):
    with tarfile.open("a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:  # a sparse file's map: a list of numbers, as long as it likes, which Python keeps
        info = tarfile.TarInfo("sparse")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "sparse", "GNU.sparse.realsize": "512"}
        content = b"1000000\n" + b"0\n" * 2_000_000
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    refused(here, "a.tar.gz", "a header asks for 512 bytes; allowed: 65,536 for all headers of a member")


def test_long_names_and_sparse_files_are_used(here):
    long = "/".join(["folder" * 10] * 8) + "/1.png"
    for k, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open("a.tar", "w", format=kind) as archive:
            for name in (long, "ümlaut.png", "2.png"):
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"abc"))
        assert sorted(p.relative_to(f"new{k}").as_posix() for p in unpack("a.tar", f"new{k}").rglob("*.png")) == sorted([long, "ümlaut.png", "2.png"])


def test_names_that_do_not_go_together(here):
    refused(here, zipped("a.zip", ("a", b"1", FILE), ("a/b", b"2", FILE)), "'a/b'", "cannot be written")
    refused(here, zipped("b.zip", ("a/b", b"2", FILE), ("a", b"1", FILE)), "'a'")
    refused(here, zipped("c.zip", (".", b"1", FILE)), "'.'")
    refused(here, zipped("d.zip", ("", b"1", FILE)))
    refused(here, zipped("long.zip", ("n" * 5_000, b"1", FILE)), "nnn...nnn", "cannot be written (File name too long)")
    refused(here, zipped("deep.zip", ("a/" * 2_000 + "b", b"1", FILE)), "2,001 folders deep; allowed: 64")
    with pytest.warns(UserWarning): zipped("same.zip", ("a", b"first", FILE), ("a", b"second", FILE))
    assert (unpack("same.zip", "same") / "a").read_bytes() == b"second"  # as a tape would have it


def test_places_to_unpack_into(here):
    zipped("a.zip", ("a", b"1", FILE))
    Path("full").mkdir(), Path("full/mine").write_text("mine"), os.symlink("nowhere", "link")
    for folder in ("full", "link", "a.zip", ".", "full/mine"):
        with pytest.raises(DataError, match="exists already; allowed: a new one"): unpack("a.zip", folder)
    assert Path("full/mine").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="no folder gone to make new in"): unpack("a.zip", "gone/new")
    with pytest.raises(FileNotFoundError, match="gone.zip"): unpack("gone.zip", "new")
    Path("a.rar").write_bytes(b"Rar!"), zipped("none.zip"), Path("text.zip").write_text("hello"), Path("text.tar").write_text("hello"), Path("empty.tgz").write_bytes(b"")
    tarred("none.tar")
    for name, words in (("a.rar", ".zip, .tar, .tar.gz, .tgz"), ("none.zip", "nothing in it"), ("none.tar", ""), ("text.zip", "damaged"), ("text.tar", "damaged"), ("empty.tgz", "damaged")):
        refused(here, name, words)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EDQUOT, errno.EROFS])
def test_machine_errors_while_unpacking(here, monkeypatch, number):
    zipped("a.zip", ("a", b"1", FILE))

    def failing(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(module, "_pour", failing)
    before = sorted(os.listdir())
    with pytest.raises(OSError) as caught: unpack("a.zip", "new")
    assert caught.value.errno == number and "a.zip" in str(caught.value) and "'a'" in str(caught.value) and sorted(os.listdir()) == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_unpacking_leaves_nothing(here, monkeypatch, failure):
    zipped("a.zip", ("a", b"1", FILE), ("b", b"2", FILE))
    pour, calls = module._pour, []

    def second_fails(*given):
        calls.append(given)
        if len(calls) == 2: raise failure
        return pour(*given)
    monkeypatch.setattr(module, "_pour", second_fails)
    before = sorted(os.listdir())
    with pytest.raises(failure): unpack("a.zip", "new")
    assert sorted(os.listdir()) == before


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "C:", "\\", "a\\..", "..\\", "~", "a:"]), min_size=1, max_size=5), st.sampled_from(["zip", "tar"]), st.booleans())
def test_no_name_ever_gets_out(tmp_path_factory, parts, kind, link):
    top = tmp_path_factory.mktemp("names")
    (top / "x" / "y").mkdir(parents=True)
    home, member = os.getcwd(), "/".join(parts)
    os.chdir(top)
    try:
        if kind == "zip": zipped("a.zip", ("l", member.encode(), LINK) if link else (member, b"evil", FILE), ("l/f", b"evil", FILE))
        else: tarred("a.tar", ("l", member, tarfile.SYMTYPE) if link else (member, b"evil", tarfile.REGTYPE), ("l/f", b"evil", tarfile.REGTYPE))
        try: unpack(f"a.{kind}", "x/y/new")
        except DataError: assert sorted(p.relative_to(top).as_posix() for p in top.rglob("*")) == [f"a.{kind}", "x", "x/y"]
        else: assert all(p.is_dir() or "x/y/new" in p.as_posix() or p.name == f"a.{kind}" for p in top.rglob("*"))
    finally: os.chdir(home)
    assert not (top.parent / "evil.png").exists()


def test_from_an_archive_to_a_run(here):
    """The whole way: unpacked, read, looked at, and what was left out written down."""
    whole = Path("good0.png").read_bytes()
    zipped("faces.zip", *((f"train/{label}/{k}.png", whole, FILE) for label in ("joy", "fear") for k in range(10)), ("train/joy/bad.png", whole[:40], FILE), ("train/glee/1.png", whole, FILE))
    aside = []
    sound = sound_examples(load_examples(unpack("faces.zip", "faces"), EMOTION6, split="train", set_aside=aside), aside, most=0.1)
    assert len(sound) == 20 and [x.id for x in aside] == ["train/glee/1.png", "train/joy/bad.png"]
    assert [json.loads(line)["id"] for line in write_quarantine("quarantine.jsonl", aside).read_text().splitlines()] == ["train/glee/1.png", "train/joy/bad.png"]


def test_fine_words_are_no_bad_rows(here):
    for fine in ("cheerfullness", "rage"): png(Path(f"fine/{fine}/1.png"))
    aside = []
    assert [x.label for x in load_examples("fine", WEBEMO7, label_map=WEBEMO7.aliases, set_aside=aside)] == ["joy", "anger"] and aside == []

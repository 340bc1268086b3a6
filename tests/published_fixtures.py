"""Tiny copies of the three published data sets, file for file as their authors give them out, and one way of breaking them for each defect that a check must find."""
import json
import random
from collections import Counter
from pathlib import Path

from PIL import Image

from emo_r3.data import EMOSET8, EMOTION6
from emo_r3.published import WEBEMO25, WEBEMO_CATEGORIES

PARTS = {"train": "train.json", "validation": "val.json", "test": "test.json"}
HEADER = "[image_filename]\t[valence]\t[arousal]\t[prob. anger]\t[prob. disgust]\t[prob. fear]\t[prob. joy]\t[prob. sadness]\t[prob. surprise]\t[prob. neutral]"


def picture(path: Path, seed, size=(9, 7), kind=None) -> Path:
    """A picture of noise: another seed, another picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, random.Random(str(seed)).randbytes(3 * size[0] * size[1])).save(path, format=kind)
    return path


# ---- EmoSet-118K

def order(words) -> dict: return {"label2idx": {w: i for i, w in enumerate(words)}, "idx2label": {str(i): w for i, w in enumerate(words)}}


def info(words=EMOSET8.labels, nested=False) -> dict:
    tenths = [f"{i / 10:.1f}" for i in range(11)]
    if not nested: return order(words)
    return {"emotion": order(words), **{name: {"label2idx": {t: i for i, t in enumerate(tenths)}, "idx2label": {str(i): float(t) for i, t in enumerate(tenths)}} for name in ("brightness", "colorfulness")},
            "scene": order(["airfield", "alley"]), "object": order(["Accordion", "Tree"]), "facial_expression": order(["angry", "happy"]), "human_action": order(["clapping", "hugging"])}


def emoset(root: Path, fields=3, nested=False, train=None, validation=None, test=None) -> Path:
    """`train`, `validation` and `test`: label -> pictures; two, one and two of each label unless given."""
    counts = {"train": train or dict.fromkeys(EMOSET8, 2), "validation": validation or dict.fromkeys(EMOSET8, 1), "test": test or dict.fromkeys(EMOSET8, 2)}
    numbers = Counter()
    for part, of_label in counts.items():
        rows = []
        for label, n in of_label.items():
            for _ in range(n):
                name = f"{label}_{numbers[label]:05}"
                numbers[label] += 1
                image, note = f"image/{label}/{name}.jpg", f"annotation/{label}/{name}.json"
                picture(root / image, name)
                (root / note).parent.mkdir(parents=True, exist_ok=True)
                (root / note).write_text(json.dumps({"image_id": name, "emotion": label, "brightness": 0.3, "colorfulness": 1.0, "scene": "alley", "object": ["Tree"]}))
                rows.append([label, image, note] if fields == 3 else [label, name, image, note])
        (root / PARTS[part]).write_text(json.dumps(rows))
    (root / "info.json").write_text(json.dumps(info(nested=nested)))
    return root


def emoset_stored(root: Path, column="image", words=EMOSET8.labels, n=2, number=False) -> Path:
    """Parquet files, one a split: `image` and `labels` (a ClassLabel of `words`, or bare numbers), or the paper's own crop with `images`, `problem`, `answer`."""
    import datasets
    from datasets import ClassLabel, Features, Sequence, Value
    datasets.disable_progress_bars()
    root.mkdir(parents=True, exist_ok=True)
    kind = {"bytes": Value("binary"), "path": Value("string")}
    for part in ("train", "test"):
        labels = [label for label in EMOSET8 for _ in range(n)]
        cells = [{"bytes": picture(root / "made.jpg", f"{part}{i}").read_bytes(), "path": None} for i in range(len(labels))]
        if column == "image":
            values = [(EMOSET8.index(label) if number else list(words).index(label)) for label in labels]
            table = datasets.Dataset.from_dict({"image": cells, "labels": values}, features=Features({"image": kind, "labels": Value("int64") if number else ClassLabel(names=list(words))}))
        else:
            table = datasets.Dataset.from_dict({"images": [[cell] for cell in cells], "problem": ["<image>What does it evoke?"] * len(labels), "answer": labels, "course_grained": [EMOSET8.polarity[x] for x in labels]},
                                               features=Features({"images": [kind], "problem": Value("string"), "answer": Value("string"), "course_grained": Value("string")}))
        table.to_parquet(root / f"{part}-00000-of-00001.parquet")
    (root / "made.jpg").unlink()
    return root


# ---- Emotion6

def truth_line(name, votes=None, valence="4.2", arousal="5.1") -> str:
    label = name.partition("/")[0]
    votes = votes or [0.6 if word == label else 0.05 for word in EMOTION6] + [0.15]
    return "\t".join([name, valence, arousal, *(f"{v:g}" for v in votes)])


def emotion6(root: Path, n=10) -> Path:
    names = [f"{label}/{i}.jpg" for label in EMOTION6 for i in range(1, n + 1)]
    for name in names: picture(root / "images" / name, name)
    (root / "ground_truth.txt").write_bytes("".join(line + "\r\n" for line in (HEADER, *map(truth_line, names))).encode())
    return root


# ---- WEBEmo

CATEGORY = "# Three level hierarchy.\nlabels=[" + ", \n\t".join(repr((f, m, "+" if s == "positive" else "-")) for f, m, s in WEBEMO_CATEGORIES) + "]"


def address(name) -> str: return f"https://as2.pictures.example/jpg/00/{name}"


def webemo(root: Path, layout="numbers", lists=True, test=None, train=None) -> Path:
    """`test` and `train`: (file name, fine number) a line. `layout`: where the pictures lie, "numbers", "digits" or "names"."""
    given = {"train": train or [(f"220_F_{n}.jpg", n) for n in range(25)], "test": test or [(f"220_F_{100 + n}.jpg", n) for n in range(25)]}
    root.mkdir(parents=True, exist_ok=True)
    for part, lines in given.items():
        if lists: (root / f"{part}25.txt").write_text("".join(f"{address(name)} {number}\n" for name, number in lines))
        for name, number in lines:
            folder = {"numbers": Path(part, str(number)), "digits": Path("images", f"{part}25", str(number % 10)), "names": Path(part, WEBEMO25.labels[number])}[layout]
            picture(root / folder / name, name)
    if lists: (root / "category.txt").write_text(CATEGORY)
    return root


# ---- one broken copy for each defect: how it is broken, and what the check counts

def edit(path: Path, change) -> None:
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows) or rows))


def lines(path: Path, change) -> None:
    text = path.read_bytes().decode().splitlines()
    path.write_text("\n".join(change(text) or text) + "\n")


def cut(path: Path) -> None: path.write_bytes(path.read_bytes()[:150])
def copy(source: Path, target: Path) -> None: target.write_bytes(source.read_bytes())


def changed(rows, i, j, value): rows[i][j] = value


def replaced(rows, i, row): rows[i] = row


AWE, FEAR = "image/awe/awe_00000.jpg", "image/fear/fear_00000.jpg"  # both in train; *_00003 and *_00004 are in test
BROKEN = {
    "emoset: a picture is gone": (emoset, lambda r: (r / AWE).unlink(), {"missing": 1}),
    "emoset: a picture is a folder": (emoset, lambda r: ((r / AWE).unlink(), (r / AWE).mkdir()), {"missing": 1}),
    "emoset: a picture is cut off": (emoset, lambda r: cut(r / AWE), {"corrupt": 1}),
    "emoset: a picture is empty": (emoset, lambda r: (r / AWE).write_bytes(b""), {"corrupt": 1}),
    "emoset: a picture is a web page": (emoset, lambda r: (r / AWE).write_text("<html>404</html>"), {"corrupt": 1}),
    "emoset: a picture twice": (emoset, lambda r: copy(r / AWE, r / "image/awe/awe_00001.jpg"), {"duplicate": 1}),
    "emoset: a picture twice, with two labels": (emoset, lambda r: copy(r / AWE, r / FEAR), {"duplicate": 1, "conflict": 1}),
    "emoset: a picture in train and test": (emoset, lambda r: copy(r / AWE, r / "image/awe/awe_00003.jpg"), {"leak": 1}),
    "emoset: the same file in train and test": (emoset, lambda r: edit(r / "test.json", lambda rows: replaced(rows, 2, ["awe", AWE, AWE.replace("image", "annotation").replace("jpg", "json")])), {"leak": 1}),
    "emoset: a row twice": (emoset, lambda r: edit(r / "train.json", lambda rows: replaced(rows, 2, rows[3])), {"duplicate": 1}),
    "emoset: an annotation of another emotion": (emoset, lambda r: edit(r / "annotation/awe/awe_00000.json", lambda a: {**a, "emotion": "fear"}), {"conflict": 1}),
    "emoset: an annotation is gone": (emoset, lambda r: (r / "annotation/awe/awe_00000.json").unlink(), {"missing": 1}),
    "emoset: an annotation is cut off": (emoset, lambda r: cut(r / "annotation/awe/awe_00000.json") or (r / "annotation/awe/awe_00000.json").write_text('{"emotion": '), {"corrupt": 1}),
    "emoset: a brightness of 3": (emoset, lambda r: edit(r / "annotation/awe/awe_00000.json", lambda a: {**a, "brightness": 3}), {"fields": 1}),
    "emoset: an unknown label": (emoset, lambda r: edit(r / "train.json", lambda rows: changed(rows, 0, 0, "boredom")), {"label": 1, "conflict": 1, "count": 1}),
    "emoset: the label of another folder": (emoset, lambda r: edit(r / "train.json", lambda rows: changed(rows, 0, 0, "fear")), {"conflict": 1, "count": 2}),
    "emoset: two fields": (emoset, lambda r: edit(r / "train.json", lambda rows: replaced(rows, 0, rows[0][:2])), {"fields": 1, "count": 1}),
    "emoset: five fields": (emoset, lambda r: edit(r / "train.json", lambda rows: replaced(rows, 0, [*rows[0], "x", "y"])), {"fields": 1, "count": 1}),
    "emoset: a row is an object": (emoset, lambda r: edit(r / "train.json", lambda rows: replaced(rows, 0, {"emotion": "awe"})), {"fields": 1, "count": 1}),
    "emoset: a path leads out": (emoset, lambda r: edit(r / "train.json", lambda rows: changed(rows, 0, 1, "../../secret.jpg")), {"fields": 1, "count": 1}),
    "emoset: a split is not JSON": (emoset, lambda r: (r / "test.json").write_text('[["awe", '), {"corrupt": 1, "count": 9}),
    "emoset: a split is no list": (emoset, lambda r: (r / "test.json").write_text('{"awe": []}'), {"fields": 1, "count": 9}),
    "emoset: a split is gone": (emoset, lambda r: (r / "val.json").unlink(), {"count": 9}),
    "emoset: a row is gone": (emoset, lambda r: edit(r / "train.json", lambda rows: rows[1:]), {"count": 2}),
    "emoset: info in the order of the alphabet": (emoset, lambda r: (r / "info.json").write_text(json.dumps(info(sorted(EMOSET8)))), {"order": 2}),
    "emoset: nested info in the order of the alphabet": (emoset, lambda r: (r / "info.json").write_text(json.dumps(info(sorted(EMOSET8), nested=True))), {"order": 2}),
    "emoset: info disagrees with itself": (emoset, lambda r: (r / "info.json").write_text(json.dumps(info() | {"idx2label": order(sorted(EMOSET8))["idx2label"]})), {"order": 1}),
    "emoset: info with a ninth label": (emoset, lambda r: (r / "info.json").write_text(json.dumps(info([*EMOSET8, "neutral"]))), {"order": 2}),
    "emoset: info of another kind": (emoset, lambda r: (r / "info.json").write_text('{"emotions": []}'), {"fields": 1}),
    "emoset: info is gone": (emoset, lambda r: (r / "info.json").unlink(), {"missing": 1}),
    "emoset: info is not JSON": (emoset, lambda r: (r / "info.json").write_text("{"), {"corrupt": 1}),
    "emotion6: a picture is gone": (emotion6, lambda r: (r / "images/joy/3.jpg").unlink(), {"missing": 1}),
    "emotion6: a picture is cut off": (emotion6, lambda r: cut(r / "images/joy/3.jpg"), {"corrupt": 1}),
    "emotion6: a picture nobody listed": (emotion6, lambda r: picture(r / "images/joy/99.jpg", 99), {"unlisted": 1}),
    "emotion6: nine columns": (emotion6, lambda r: lines(r / "ground_truth.txt", lambda t: replaced(t, 5, t[5].rpartition("\t")[0])), {"fields": 1}),
    "emotion6: commas": (emotion6, lambda r: lines(r / "ground_truth.txt", lambda t: replaced(t, 5, t[5].replace("\t", ","))), {"fields": 1, "unlisted": 1, "count": 2}),
    "emotion6: no number": (emotion6, lambda r: lines(r / "ground_truth.txt", lambda t: replaced(t, 5, t[5].replace("4.2", "high"))), {"fields": 1}),
    "emotion6: nan": (emotion6, lambda r: lines(r / "ground_truth.txt", lambda t: replaced(t, 5, t[5].replace("4.2", "nan"))), {"fields": 1}),
    "emotion6: probabilities of 120 %": (emotion6, lambda r: lines(r / "ground_truth.txt", lambda t: replaced(t, 5, t[5].replace("0.15", "0.35"))), {"fields": 1}),
    "emotion6: no header": (emotion6, lambda r: lines(r / "ground_truth.txt", lambda t: t[1:]), {"fields": 1, "count": 14}),
    "emotion6: an unknown folder": (emotion6, lambda r: lines(r / "ground_truth.txt", lambda t: [*t, truth_line("calm/1.jpg", [0.1] * 6 + [0.4])]), {"label": 1}),
    "emotion6: a line twice": (emotion6, lambda r: lines(r / "ground_truth.txt", lambda t: [*t, t[5]]), {"duplicate": 1}),
    "emotion6: the truth is gone": (emotion6, lambda r: (r / "ground_truth.txt").unlink(), {"missing": 1}),
    "webemo: a picture was not fetched": (webemo, lambda r: (r / "test/3/220_F_103.jpg").unlink(), {"missing": 1}),
    "webemo: a picture is cut off": (webemo, lambda r: cut(r / "test/3/220_F_103.jpg"), {"corrupt": 1}),
    "webemo: an address with two middle labels": (webemo, lambda r: lines(r / "test25.txt", lambda t: [*t, f"{address('220_F_103.jpg')} 10"]), {"conflict": 1, "count": 2}),
    "webemo: an address in both lists": (webemo, lambda r: lines(r / "test25.txt", lambda t: replaced(t, 3, f"{address('220_F_3.jpg')} 3")) or (r / "test/3/220_F_103.jpg").rename(r / "test/3/220_F_3.jpg"), {"leak": 1}),
    "webemo: the same picture in both sets": (webemo, lambda r: copy(r / "train/3/220_F_3.jpg", r / "test/3/220_F_103.jpg"), {"leak": 1}),
    "webemo: label 25": (webemo, lambda r: lines(r / "test25.txt", lambda t: replaced(t, 3, t[3].replace(" 3", " 25"))), {"label": 1, "count": 1}),
    "webemo: a line without a label": (webemo, lambda r: lines(r / "test25.txt", lambda t: replaced(t, 3, t[3].split()[0])), {"fields": 1, "count": 1}),
    "webemo: an address that climbs": (webemo, lambda r: lines(r / "test25.txt", lambda t: replaced(t, 3, "https://pictures.example/.. 3")), {"fields": 1, "count": 1}),
    "webemo: categories in another order": (webemo, lambda r: (r / "category.txt").write_text(CATEGORY.replace("affection", "zest_").replace("'zest'", "'affection'").replace("zest_", "zest")), {"order": 1, "count": 16}),
    "webemo: confusion as sadness": (webemo, lambda r: (r / "category.txt").write_text(CATEGORY.replace("'confusion', 'confusion'", "'confusion', 'sadness'")), {"order": 1, "count": 16}),
    "webemo: categories with a call": (webemo, lambda r: (r / "category.txt").write_text("labels = __import__('os').listdir('.')"), {"corrupt": 1, "count": 16}),
    "webemo: a list is gone": (webemo, lambda r: (r / "test25.txt").unlink(), {"missing": 1}),
    "webemo: categories are gone": (webemo, lambda r: (r / "category.txt").unlink(), {"missing": 1}),
}

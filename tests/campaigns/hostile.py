"""What people and strangers hand to the command line - damaged data, odd recipes, policies with something hidden in them, run folders in the wrong state - and what comes of it.

    OMP_NUM_THREADS=1 python tests/campaigns/hostile.py    # about a minute and a half on one core; writes results/hostile.json beside it; exit code 1 if a row is not as expected

Each row has a folder of its own, with a random policy of the embedded one's shape, a recipe of one step on it, 60 pictures to train on and 8 to test, and, where it is about a run's folder, a run that
was stopped after its second step. Something in it is spoiled, one command runs there, and what it did is looked at: exit code, everything it printed, every file before and after.

A refusal is exit code 2, nothing on stdout, and exactly one line with "error", the last on stderr, at most 1,000 printable characters, which names what is wrong; no policy, summary or report appears.
What is set aside is named with its reason in the run folder's quarantine.jsonl, counted as data/quarantined in metrics.jsonl, and the run ends well without it. Never is there a traceback, is code of
the input run (it would leave a file behind), is a file left half written, or is anything that was there before changed or lost.
"""
import contextlib
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("EMO_R3_DEBUG", None)

import torch
import yaml
from PIL import Image

from contenders import machine
from emo_r3 import cli
from emo_r3.embedded.warm_up import build_image_processor, build_model, build_tokenizer
from emo_r3.policy import VLProcessor, add_lora, load_policy, save_policy
from emo_r3.scenes import make_scenes

LONGEST_LINE = 1000  # characters
MARK = "somebody_ran_it"  # the file that code in the input would make
RESULTS = ("policy", "summary.json", "report.html")
RECIPE = dict(policy="./policy", train_size=60, eval_size=2, eval_during=1, min_pixels=None, max_pixels=None, num_generations=2, max_completion_tokens=6, prompts_per_step=2, prompts_per_update=2,
              epochs=1, max_steps=1, eval_every=0, sample_every=1, save_every=0, precision="fp32", trackers=[])
TRAIN = ("train", "tiny.yaml", "--output-dir", "out")
RESUME = (*TRAIN, "--max-steps", "2", "--save-every", "1")
EVALUATE = ("evaluate", "./model", "scenes:style", "--size", "1", "--max-tokens", "4")


# -- what every folder begins with ----------------------------------------------------------------------------------------------------------------------
def prepare(at: Path) -> None:
    "Makes at/base, which every row gets a copy of, at/adapter and at/run, which some do."
    torch.manual_seed(0)
    tokenizer, base = build_tokenizer(), at / "base"
    processor = VLProcessor(build_image_processor(), tokenizer, chat_template=tokenizer.chat_template)
    save_policy(build_model(tokenizer), processor, base / "policy")
    save_policy(add_lora(load_policy(base / "policy"), 2, 4.0), processor, at / "adapter")
    adapter_config = at / "adapter" / "adapter_config.json"
    adapter_config.write_text(json.dumps(json.loads(adapter_config.read_text()) | {"base_model_name_or_path": "./policy"}))
    (base / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    for split, each in (("train", 30), ("test", 4)):
        scenes = iter(make_scenes("in_domain", "train", 2 * each, seed=len(split)))
        for label in ("fear", "awe"):
            (base / "photos" / split / label).mkdir(parents=True)
            for i in range(each): next(scenes).load_image().save(base / "photos" / split / label / f"{i:02}.png")
    with contextlib.chdir(base):
        if cli.main([*RESUME[:3], "../run", *RESUME[4:]]): raise SystemExit("the run that others are compared with did not end well")
    for name in ("summary.json", "report.html"): (at / "run" / name).unlink()
    shutil.rmtree(at / "run" / "policy")


class Bait:
    "Whoever unpickles it makes a file."
    def __reduce__(self): return os.system, (f"touch {MARK}",)


# -- how things are spoiled -----------------------------------------------------------------------------------------------------------------------------
PICTURE = Path("photos/train/fear/00.png")


def bomb(width: int, height: int) -> bytes:
    "Returns a PNG of a few hundred bytes that says it is this large."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(width // 8))) + chunk(b"IEND", b"")


def cut(path: Path) -> None: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_pictures(n: int) -> None:
    for path in sorted(Path("photos/train").rglob("*.png"))[:n]: path.write_text("no picture")


def misspelt_class() -> None:
    Path("photos/train/exitement").mkdir()
    PICTURE.rename("photos/train/exitement/00.png")


def foreign_names() -> None:
    for path in list(Path("photos").rglob("*.png")): os.rename(os.fsencode(path), os.fsencode(path.with_name("caf")) + b"\xe9" + path.name.encode())


def table(**spoiled) -> None:
    "Writes rows.jsonl over all pictures; its third line is spoiled: with these values, or, without any, cut short."
    rows = [{"image": str(p), "label": p.parent.name, "split": p.parent.parent.name} for p in sorted(Path("photos").rglob("*.png"), key=lambda p: ("test" in p.parts, p))]
    lines = [json.dumps(row | (spoiled if i == 2 else {})) for i, row in enumerate(rows)]
    if not spoiled: lines[2] = lines[2][:-9]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n")


def recipe(text: str | bytes) -> None: Path("mine.yaml").write_bytes(text if isinstance(text, bytes) else (Path("tiny.yaml").read_text() + text).encode())


def aliases(deep: int) -> str:
    "Returns a field of a few hundred bytes that would be 9 ** deep words long if anybody wrote it out."
    anchors = ["&a0 [" + ",".join("l" * 9) + "]"] + [f"&a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, deep)]
    return "data: [" + ", ".join(anchors) + "]\n"


def model(source: str = "policy") -> Path: return Path(shutil.copytree(source, "model"))


def change(path: Path, **values) -> None: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def only_a_pickle() -> None:
    (model() / "model.safetensors").unlink()
    Path("model/pytorch_model.bin").write_bytes(pickle.dumps(Bait()))


def shards_that_name_a_pickle() -> None:
    (model() / "model.safetensors").rename("model/other.safetensors")
    Path("model/part.bin").write_bytes(pickle.dumps(Bait()))
    Path("model/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "part.bin"}}))


def remote_code() -> None:
    (model() / "bait.py").write_text(f"open({MARK!r}, 'w')\n")
    change(Path("model/config.json"), auto_map={"AutoConfig": "bait.E", "AutoModelForImageTextToText": "bait.E"})
    change(Path("model/tokenizer_config.json"), auto_map={"AutoTokenizer": ["bait.E", "bait.E"]})
    change(Path("model/preprocessor_config.json"), auto_map={"AutoImageProcessor": "bait.E"})


def other_shapes() -> None:
    path = model() / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 512', '"intermediate_size": 256'))


def stopped_run() -> Path: return Path(shutil.copytree("../run", "out"))


def finished_run() -> None:
    (stopped_run() / "summary.json").write_text("{}")


def damaged_checkpoints() -> None:
    for path in stopped_run().glob("checkpoints/*/optimizer.safetensors"): path.write_bytes(path.read_bytes()[:-1])


def garbled_metrics() -> None:
    path = stopped_run() / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "\x00garbage \x1b[31m", *lines[1:]]) + "\n")


WORDS = "<script>window.hacked=1</script>\"><img src=x onerror=window.hacked=1>"


def samples(edit: Callable[[dict], object]) -> None:
    "Changes every completion of a run's samples."
    for path in stopped_run().glob("samples/*.json"):
        sample = json.loads(path.read_text())
        for group in sample["groups"]:
            for completion in group["completions"]: edit(completion)
        path.write_text(json.dumps(sample))


LOCKED = "/proc/self/out" if os.geteuid() == 0 else "locked/out"  # root may write in any folder, but not there


def locked() -> None:
    if LOCKED.startswith("locked"): Path("locked").mkdir(mode=0o555)


# -- what is expected ---------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Done:
    "What a command did."
    code: int | None  # None: an exception came out of it
    out: str
    err: str
    escaped: str = ""  # the exception

    @property
    def line(self) -> str: # the last one on stderr
        return self.escaped or next((line for line in reversed(re.split(r"[\r\n]", self.err)) if line.strip()), "")


@dataclass(frozen=True)
class Refused:
    names: tuple[str, ...]  # what the line must name

    def __str__(self) -> str: return f"exit 2 and a line naming {', '.join(self.names)}"

    def complaints(self, done: Done, before: dict[str, str]) -> Iterator[str]:
        if done.code != 2: yield f"exit code {done.code}"
        errors = [line for line in re.split(r"[\r\n]", done.err) if "error" in line.lower()]
        if not done.escaped and (errors != [done.line] or not done.line.startswith("emo-r3: error: ")): yield f"{len(errors)} lines with 'error'"
        if missing := [name for name in self.names if name not in done.line]: yield f"the line does not name {', '.join(missing)}"
        if len(done.line) > LONGEST_LINE or not done.line.isprintable(): yield f"the line has {len(done.line):,} characters, {sum(not c.isprintable() for c in done.line)} of them unprintable"
        if done.out: yield "something on stdout"
        if left := [name for name in RESULTS if Path("out", name).exists() and not any(path.startswith(f"out/{name}") for path in before)]: yield f"left {', '.join(left)} behind"


@dataclass(frozen=True)
class SetAside:
    names: tuple[str, ...]  # what the quarantine's only line must name

    def __str__(self) -> str: return f"set aside, naming {', '.join(self.names)}; the run goes on and counts 1"

    def complaints(self, done: Done, before: dict[str, str]) -> Iterator[str]:
        if done.code != 0: yield f"exit code {done.code}"
        if lacking := [name for name in RESULTS if not Path("out", name).exists()]: yield f"no {', '.join(lacking)}"
        if not (listed := Path("out/quarantine.jsonl")).is_file(): return (yield "no quarantine.jsonl")
        lines = listed.read_text().splitlines()
        if len(lines) != 1: yield f"{len(lines)} lines in quarantine.jsonl"
        if missing := [name for name in self.names if name not in " ".join(json.loads(lines[0]).values())]: yield f"quarantine.jsonl does not name {', '.join(missing)}"
        log = Path("out/metrics.jsonl")
        counts = [row["data/quarantined"] for row in map(json.loads, log.read_text().splitlines() if log.is_file() else ()) if "data/quarantined" in row]
        if not counts or set(counts) != {1}: yield f"data/quarantined = {counts or 'nowhere'} in metrics.jsonl"


@dataclass(frozen=True)
class GoesOn:
    how: str  # in words
    holds: Callable[[], bool] = lambda: True  # looked at afterwards

    def __str__(self) -> str: return self.how

    def complaints(self, done: Done, before: dict[str, str]) -> Iterator[str]:
        if done.code != 0: yield f"exit code {done.code}"
        elif not self.holds(): yield "done otherwise"


def shown_as_text() -> bool:
    page = Path("out/report.html").read_text()
    return "<script" not in page and "<img src=x" not in page and "&lt;script&gt;window.hacked=1&lt;/script&gt;" in page


# -- the rows -------------------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    about: str
    what: str
    spoil: Callable[[], object]  # run in the row's folder
    argv: tuple[str, ...]
    expected: Refused | SetAside | GoesOn
    limited: bool = False  # in a process of its own, with bounded time and memory
    moves: bool = False  # files may get other names: what they hold must still be there


def refused(*names: str) -> Refused: return Refused(names)
def aside(*names: str) -> SetAside: return SetAside(names)


PHOTOS, TABLE, MINE, REPORT = (*TRAIN, "--data", "photos"), (*TRAIN, "--data", "rows.jsonl"), ("train", "mine.yaml", "--output-dir", "out"), ("report", "out")
ROWS = (
    Row("data", "a picture cut in half", lambda: cut(PICTURE), PHOTOS, aside("fear/00.png", "damaged picture")),
    Row("data", "an empty file for a picture", lambda: PICTURE.write_bytes(b""), PHOTOS, aside("fear/00.png", "not a picture")),
    Row("data", "a picture of 60,000 x 60,000 pixels in 8 kB", lambda: PICTURE.write_bytes(bomb(60_000, 60_000)), PHOTOS, aside("fear/00.png", "pixels")),
    Row("data", "a text called .jpg", lambda: Path("photos/train/awe/x.jpg").write_text("I am a text"), PHOTOS, aside("awe/x.jpg", "not a picture")),
    Row("data", "a picture of 3,000 x 2 pixels", lambda: Image.new("RGB", (3000, 2)).save(PICTURE), PHOTOS, aside("fear/00.png", "3000 x 2")),
    Row("data", "a class folder with a misspelt name", misspelt_class, PHOTOS, aside("exitement", "did you mean 'excitement'")),
    Row("data", "a label that is in another label set", lambda: table(label="joy"), TABLE, aside("rows.jsonl, line 3", "'joy'", "emoset8")),
    Row("data", "a broken line of JSON", lambda: table(), TABLE, aside("rows.jsonl, line 3", "not a line of JSON")),
    Row("data", "a picture that is not there", lambda: table(image="gone.png"), TABLE, aside("rows.jsonl, line 3", "gone.png", "does not exist")),
    Row("data", "six pictures in sixty that are none", lambda: spoil_pictures(6), PHOTOS, refused("cannot be used", "5.0%", "00.png")),
    Row("data", "no picture that is one", lambda: spoil_pictures(60), PHOTOS, refused("cannot be used", "00.png")),
    Row("data", "a CSV without the columns", lambda: Path("rows.csv").write_text("a,b,split\n1,2,train\n"), (*TRAIN, "--data", "rows.csv"), refused("rows.csv", "no image column", "a, b")),
    Row("data", "file names that are not UTF-8", foreign_names, PHOTOS, GoesOn("trained on as any other")),

    Row("recipe", "an unknown field", lambda: recipe("learning_rat: 1.0e-4\n"), MINE, refused("mine.yaml", "'learning_rat'", "did you mean 'learning_rate'")),
    Row("recipe", "a value of the wrong type", lambda: recipe("num_generations: [8]\n"), MINE, refused("mine.yaml", "num_generations = [8]", "a whole number")),
    Row("recipe", "aliases that would unfold to 9 ** 9 words", lambda: recipe(aliases(9)), MINE, refused("mine.yaml", "alias"), limited=True),
    Row("recipe", "a list in a list, 1,000 deep", lambda: recipe(f"trackers: {'[' * 1000}{']' * 1000}\n"), MINE, refused("mine.yaml")),
    Row("recipe", "a tag that would call os.system", lambda: recipe(f"templates: !!python/object/apply:os.system ['touch {MARK}']\n"), MINE, refused("mine.yaml", "YAML")),
    Row("recipe", "a file that is no text", lambda: recipe(bytes(range(256)) * 8), MINE, refused("mine.yaml", "YAML")),

    Row("policy", "weights in a pickle only", only_a_pickle, EVALUATE, refused("model", "pytorch_model.bin", "safetensors")),
    Row("policy", "a list of shards that names a pickle", shards_that_name_a_pickle, EVALUATE, refused("model", "part.bin", "safetensors")),
    Row("policy", "code of its own beside it (auto_map)", remote_code, EVALUATE, GoesOn("not run; evaluated as what config.json says it is")),
    Row("policy", "a chat template that reaches for os", lambda: (model() / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('touch " + MARK + "') }}"), EVALUATE, refused("model", "chat template")),
    Row("policy", "weights cut in half", lambda: cut(model() / "model.safetensors"), EVALUATE, refused("model", "damaged")),
    Row("policy", "weights of other shapes than config.json's", other_shapes, EVALUATE, refused("model", "do not fit config.json")),
    Row("policy", "an adapter's weights cut in half", lambda: cut(model("../adapter") / "adapter_model.safetensors"), EVALUATE, refused("model", "damaged")),
    Row("policy", "an adapter whose base is itself", lambda: change(model("../adapter") / "adapter_config.json", base_model_name_or_path="./model"), EVALUATE, refused("model", "base_model_name_or_path")),
    Row("policy", "no tokenizer", lambda: (model() / "tokenizer.json").unlink(), EVALUATE, refused("model", "tokenizer.json")),

    Row("run", "the folder of an earlier run", finished_run, TRAIN, refused("'out'", "not empty")),
    Row("run", "a place where nobody may write", locked, (*TRAIN[:3], LOCKED), refused("output_dir", LOCKED, "cannot be written")),
    Row("run", "a file in the folder's place", lambda: Path("out").write_text("mine"), TRAIN, refused("output_dir", "'out'", "a file")),
    Row("run", "a checkpoint of another configuration", stopped_run, (*RESUME, "--learning-rate", "1e-3"), refused("out/checkpoints/step_000002", "learning_rate", "--accept-changes")),
    Row("run", "every checkpoint damaged", damaged_checkpoints, RESUME, refused("out/checkpoints", "none of its 2 checkpoints is whole"), moves=True),
    Row("run", "garbage in metrics.jsonl", garbled_metrics, REPORT, refused("out/metrics.jsonl, line 2")),
    Row("run", "completions that hold a script", lambda: samples(lambda c: c.update(text=WORDS, why=WORDS, well_formed=False)), REPORT, GoesOn("shown as text", shown_as_text)),
    Row("run", "samples without their rewards", lambda: samples(lambda c: c.pop("rewards")), REPORT, refused("out/samples/step_00001.json", "rewards")),

    Row("predict", "a folder in a picture's place", lambda: None, ("predict", "photos", "--policy", "./policy"), refused("photos", "directory")),
)


# -- one row --------------------------------------------------------------------------------------------------------------------------------------------
def tree() -> dict[str, str]: # path -> sha256, of the folder we are in
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path().rglob("*")) if path.is_file()}


@contextlib.contextmanager
def captured() -> Iterator[list[str]]: # filled with stdout and stderr afterwards
    "Catches all that is printed, by whatever prints it."
    said, kept = [], [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        for number, file in ((1, out), (2, err)): os.dup2(file.fileno(), number)
        try: yield said
        finally:
            for stream, number, old in zip((sys.stdout, sys.stderr), (1, 2), kept):
                stream.flush()
                os.dup2(old, number)
                os.close(old)
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode(errors="replace"))


LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2); resource.setrlimit(resource.RLIMIT_CPU, (60, 60)); from emo_r3.cli import main; sys.exit(main())"


def run(argv: tuple[str, ...], limited: bool) -> Done:
    "Runs one command here."
    if limited:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", LIMITED, *argv], capture_output=True, text=True, errors="replace")
        return Done(done.returncode, done.stdout, done.stderr)
    code, escaped = None, ""
    with captured() as said:
        try: code = cli.main(list(argv))
        except Exception as error: escaped = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Done(code, *said, escaped)


def lost(before: dict[str, str], after: dict[str, str], moves: bool) -> list[str]:
    "Returns what was there and is no more, or is changed."
    if not moves: return [path for path, content in before.items() if after.get(path) != content]
    gone = Counter(before.values()) - Counter(after.values())
    return [path for path, content in before.items() if content in gone]


def tried(row: Row) -> dict:
    "Returns what came of a row, in a folder that is its own."
    row.spoil()
    before, began = tree(), time.perf_counter()
    done = run(row.argv, row.limited)
    seconds, after = time.perf_counter() - began, tree()
    complaints = list(row.expected.complaints(done, before))
    if done.escaped or "Traceback" in done.err + done.out: complaints.insert(0, "a traceback")
    if Path(MARK).exists(): complaints.insert(0, "CODE OF THE INPUT WAS RUN")
    if gone := lost(before, after, row.moves): complaints.append(f"lost or changed: {', '.join(gone)}")
    if halves := [path for path in after if "partial" in path]: complaints.append(f"left half written: {', '.join(halves)}")
    return {"about": row.about, "what": row.what, "command": shlex.join(("emo-r3", *row.argv)), "expected": str(row.expected), "as_expected": not complaints, "outcome": "; ".join(complaints) or "as expected",
            "exit_code": done.code, "line": done.line[:400], "seconds": round(seconds, 2)}


def table_of(rows: list[dict]) -> None:
    "Prints what came of every row."
    for row in rows:
        print(f"{'ok  ' if row['as_expected'] else 'FAIL'} {row['about']:8} {row['what']:46} {row['seconds']:5.1f} s   {row['command']}")
        print(f"       expected: {row['expected']}" + ("" if row["as_expected"] else f"\n       outcome:  {row['outcome']}") + f"\n       line:     {''.join(c if c.isprintable() else '?' for c in row['line'])[:220]}")
    print(f"\n{sum(r['as_expected'] for r in rows)} of {len(rows)} as expected")


def main() -> int:
    began, rows = time.time(), []
    with tempfile.TemporaryDirectory(prefix="emo_r3_hostile_") as at, contextlib.chdir(at):
        with captured(): prepare(Path(at))
        for i, row in enumerate(ROWS):
            shutil.copytree("base", f"row_{i}")
            with contextlib.chdir(f"row_{i}"): rows.append(tried(row))
            rows[-1]["line"] = rows[-1]["line"].replace(at, "...")
            shutil.rmtree(f"row_{i}")
    table_of(rows)
    failed = [row["what"] for row in rows if not row["as_expected"]]
    content = {"command": "OMP_NUM_THREADS=1 python tests/campaigns/hostile.py", "machine": machine(), "wall_s": round(time.time() - began), "as_expected": len(rows) - len(failed), "of": len(rows), "failed": failed, "rows": rows}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "hostile.json").write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())

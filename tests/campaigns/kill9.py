"""`emo-r3 train` is killed by SIGKILL at seeded moments, the same command runs again, and what is left is compared bit by bit with a run that nobody touched.

    taskset -c 0 env OMP_NUM_THREADS=1 python tests/campaigns/kill9.py    # 50 kills, about 20 minutes on one core; writes results/kill9.json beside it; --keep FOLDER keeps the runs

A moment is a phase of the run, how often it has been entered, and how far in the kill comes: a share of the seconds that this entry took in the uninterrupted run (a thread of the process waits for so
long and then kills it, at the latest where the phase ends), a share of the text where a line of metrics.jsonl or the summary is written, and before or after where a finished checkpoint gets its name.
After a third of the kills the process that goes on is killed too, then a third one ends the run. Processes are forked from one that has only imported; each fifth one that ends a run starts by itself.
Compared: the final policy, the newest checkpoint (weights or adapter, AdamW's state, random states, scheduler, best, everything else in state.json but the seconds), metrics.jsonl without clocks,
the summary without its seconds, samples with their pictures, and which checkpoints are kept. The lines of metrics.jsonl also say which pictures a step's updates took: trained/<id>, a wrapper's addition.
"""
import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import emo_r3.checkpoint
import emo_r3.evaluate
import emo_r3.explore  # everything that a run imports, once and for all children; nothing is computed here
import emo_r3.train
import peft  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from emo_r3.cli import main as emo_r3_command

SMALL = dict(train_size=16, prompts_per_step=8, prompts_per_update=4, num_generations=4, max_completion_tokens=60, epochs=2, max_steps=4, eval_size=2, eval_during=2, eval_every=2, sample_every=2, save_every=1, keep_last=1)
CONFIGURATIONS = {"several updates a step, the tower learns, written reflection": SMALL | dict(freeze_vision="false", reflection="generate", num_generations=3),
                  "two epochs a step": SMALL | dict(epochs_per_step=2, save_every=2),
                  "an adapter": SMALL | dict(lora_rank=4, lr_schedule="cosine", eval_every=1, keep_last=2)}
PHASES = ("sampling", "reflecting", "updating", "evaluating during", "saving a checkpoint", "naming a checkpoint", "log-probabilities", "writing metrics", "evaluating before", "removing old checkpoints",
          "writing samples", "evaluating after", "writing the final policy", "writing the summary")
SECOND = ("resuming", "sampling", "updating", "saving a checkpoint", "evaluating after", "writing the final policy", "writing the summary")  # where the process that goes on is killed
CLOCKS = re.compile(r"timing_s/.*|step_time|perf/.*")


# -- one process --------------------------------------------------------------------------------------------------------------------------------------
class Watch:
    "Writes down when phases begin and end, and sends its own process a signal in one of them."
    def __init__(self, folder: Path, diary: Path, moment: dict | None): self.folder, self.diary, self.moment, self.entries, self.once = folder, diary, moment or {}, Counter(), threading.Lock()

    def write(self, **line) -> None:
        with self.diary.open("a") as file: file.write(json.dumps(line) + "\n")

    def strike(self) -> None:
        if self.once.acquire(blocking=False): os.kill(os.getpid(), self.moment["signal"])

    def strike_after(self, seconds: float) -> None:
        time.sleep(seconds)
        self.strike()

    def around(self, owner: object, name: str, phase: Callable, inside: Callable | None = None) -> None: # phase(*args): its name, or None; inside(real, *args): what is done instead where the signal shall come
        "Makes a function a phase."
        real = getattr(owner, name)
        def watched(*args, **kwargs):
            if (now := phase(*args, **kwargs)) is None: return real(*args, **kwargs)
            self.entries[now] += 1
            entry, began = self.entries[now], time.perf_counter()
            here = self.moment and (now, entry) == (self.moment["phase"], self.moment["entry"])
            self.write(phase=now, entry=entry)
            if here and inside: return inside(real, *args, **kwargs)
            if here: threading.Thread(target=self.strike_after, args=(self.moment["delay_s"],), daemon=True).start()
            out = real(*args, **kwargs)
            if here: self.strike()  # at the latest
            self.write(phase=now, entry=entry, seconds=time.perf_counter() - began)
            return out
        setattr(owner, name, watched)

    def part_of_a_line(self, real: Callable, folder: Path, step: int, metrics: dict) -> None:
        line = json.dumps({"step": step, **metrics}) + "\n"
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file: file.write(line[: round(self.moment["share"] * len(line))])
        self.strike()

    def part_of_a_file(self, real: Callable, path: Path, text: str) -> None: # as write_whole's staging file would be
        path.with_name(f".{path.name}.partial-{os.getpid()}").write_text(text[: round(self.moment["share"] * len(text))])
        self.strike()

    def before_or_after(self, real: Callable, *args) -> None:
        if self.moment["share"] >= 0.5: real(*args)
        self.strike()

    def listen(self) -> None:
        "Makes every phase of a run one."
        train, folder, always = emo_r3.train, self.folder, lambda name: lambda *_, **__: name
        removes = lambda there, keep_last, best=None: any(p.name != best for p in emo_r3.checkpoint.checkpoints(there)[:-keep_last])
        class Sampler(train.PolicySampler): pass  # the run's own, not the evaluation's
        train.PolicySampler = Sampler
        self.around(Sampler, "sample", always("sampling"))
        for name, phase in {"reflect": "reflecting", "score_rollouts": "log-probabilities", "update": "updating", "save_run": "saving a checkpoint", "write_sample": "writing samples",
                            "find_start": "resuming", "load_run": "resuming"}.items(): self.around(train, name, always(phase))
        self.around(train.Run, "evaluate", lambda run, evaluation, when: f"evaluating {when}")
        self.around(train, "append_metrics", always("writing metrics"), self.part_of_a_line)
        self.around(train, "prune_checkpoints", lambda *a, **k: "removing old checkpoints" if removes(*a, **k) else None)
        self.around(train, "save_policy", lambda model, processor, to, **_: "writing the final policy" if to == folder / "policy" else None)
        self.around(train, "write_whole", lambda path, text: "writing the summary" if path.name == "summary.json" else None, self.part_of_a_file)
        self.around(Path, "rename", lambda path, to: "naming a checkpoint" if to.parent == folder / "checkpoints" and to.name.startswith("step_") else None, self.before_or_after)


def say_who_trained() -> None:
    "Adds trained/<id> to a step's metrics: in how many updates a picture's group was."
    train, update, step_metrics = emo_r3.train, emo_r3.train.update, emo_r3.train.step_metrics
    def marked(trainer, experience, pictures, *args): return update(trainer, experience, pictures, *args) | {"trained": [experience.examples[i].id for i in pictures]}
    def counted(trainer, begun):
        ids = Counter(i for u in begun.updates for i in u.get("trained", ()))
        plain = replace(begun, updates=[{k: v for k, v in u.items() if k != "trained"} for u in begun.updates])
        return step_metrics(trainer, plain) | {f"trained/{i}": n for i, n in ids.items()}
    train.update, train.step_metrics = marked, counted


def child(folder: str, options: dict, diary: str, moment: dict | None = None) -> int:
    "Runs `emo-r3 train`; returns its exit code."
    warnings.simplefilter("ignore")
    signal.alarm(400)
    say_who_trained()
    Watch(Path(folder), Path(diary), moment).listen()
    return emo_r3_command(command(folder, options))


def command(folder: str | Path, options: dict) -> list[str]: return ["train", "scenes_cpu", "--output-dir", str(folder), *(w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", str(value)))]


class Process:
    "A process that has ended, however it did: its exit code, what it said, and its diary."
    def __init__(self, folder: Path, options: dict, moment: dict | None = None, codes: tuple = (0,), by_itself: bool = False): # codes: the exit codes that may come, a signal's negative
        diary, log = (folder.with_name(f"{folder.name}.{kind}") for kind in ("diary", "log"))
        asked = {"folder": str(folder), "options": options, "diary": str(diary), "moment": moment}
        diary.write_text("")
        with log.open("w") as into:
            if by_itself: self.code = subprocess.run([sys.executable, "-W", "ignore", __file__, "--child", json.dumps(asked)], stdout=into, stderr=into).returncode
            else: self.code = self.forked(asked, into.fileno())
        self.diary, self.said = [json.loads(line) for line in diary.read_text().splitlines()], log.read_text()
        if self.code not in codes: print(f"!! {folder.name} ended with {self.code}, expected {codes}, moment {moment}:\n{self.said[-4000:]}", flush=True)
        self.expected = self.code in codes

    def forked(self, asked: dict, into: int) -> int:
        sys.stdout.flush()
        if pid := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        code = 70
        try:
            os.dup2(into, 1), os.dup2(into, 2)
            code = child(**asked)
        except BaseException: traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    @property
    def came_from(self) -> str: # the checkpoint that it went on from
        found = re.search(r"resuming from \S*/(\S+), after step", self.said)
        return found[1] if found else "the beginning"

    @property
    def last_words(self) -> str: # where it was when it ended
        open_phases = []
        for line in self.diary: open_phases = open_phases + [f"{line['phase']} {line['entry']}"] if "seconds" not in line else [p for p in open_phases if p != f"{line['phase']} {line['entry']}"]
        return " > ".join(open_phases)


# -- what is compared ---------------------------------------------------------------------------------------------------------------------------------
def lines_of(file: Path) -> list[dict]:
    "Returns the lines of a metrics.jsonl without clocks."
    return [{k: v for k, v in json.loads(line).items() if not CLOCKS.fullmatch(k)} for line in file.read_text().splitlines()]


def without(file: Path, *names: str) -> dict: return {k: v for k, v in json.loads(file.read_text()).items() if k not in names}


def what_is_left(folder: Path) -> dict[str, str]:
    "Returns for each part of a finished run's folder its sha256."
    newest, digest = emo_r3.checkpoint.checkpoints(folder / "checkpoints")[-1], lambda plain: hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    parts = {"metrics.jsonl": lines_of(folder / "metrics.jsonl"), "summary.json": without(folder / "summary.json", "wall_s"), "newest checkpoint: metrics.jsonl": lines_of(newest / "metrics.jsonl"),
             "kept checkpoints": sorted(p.name for p in (folder / "checkpoints").iterdir()), "left over": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if ".partial" in p.name),
             **{f"newest checkpoint: state.json: {name}": value for name, value in without(newest / "state.json", "wall_s").items()}}
    same = {f"newest checkpoint: {p.relative_to(newest)}": p for p in newest.rglob("*") if p.is_file() and p.name not in ("state.json", "metrics.jsonl", "manifest.json")}
    same |= {str(p.relative_to(folder)): p for place in ("policy", "samples", "config.yaml") for p in ([folder / place] if (folder / place).is_file() else (folder / place).rglob("*"))}
    return {name: digest(value) for name, value in parts.items()} | {name: emo_r3.checkpoint.file_sha256(path) for name, path in same.items()}


def each_picture_once_an_epoch(folder: Path, options: dict) -> bool:
    "Returns whether the steps of every epoch trained on every picture, and on each equally often: once a pass over the step's rollouts."
    seen = [Counter() for _ in range(options["epochs"])]
    for line in lines_of(folder / "metrics.jsonl"):
        epoch = (line["step"] - 1) // (options["train_size"] // options["prompts_per_step"])
        for name, n in line.items():
            if name.startswith("trained/"): seen[epoch][name] += n
    return all(len(epoch) == options["train_size"] and set(epoch.values()) == {options.get("epochs_per_step", 1)} for epoch in seen)


def differs(folder: Path, whole: dict[str, str]) -> list[str]:
    "Returns the parts in which a finished run's folder is not what another one was."
    found = what_is_left(folder)
    return [name for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name)]


class Whole:
    "A configuration's uninterrupted run: what it leaves, and how long each entry of each phase took."
    def __init__(self, folder: Path, name: str, options: dict):
        self.folder, self.options, began = folder, options, time.time()
        run = Process(folder, options)
        if not run.expected: raise RuntimeError(f"{name}: the uninterrupted run failed")
        self.left, self.wall_s, self.seconds, self.once = what_is_left(folder), time.time() - began, {}, each_picture_once_an_epoch(folder, options)
        for line in run.diary:
            if "seconds" in line: self.seconds.setdefault(line["phase"], []).append(line["seconds"])
        print(f"{name}: {self.wall_s:.0f} s; " + ", ".join(f"{phase} {len(took)} x {statistics.median(took):.3f} s" for phase, took in self.seconds.items()), flush=True)

    def moment(self, phase: str, draw: random.Random, entry: int | None = None) -> dict:
        took = self.seconds[phase] if phase != "resuming" else [0.05, 0.3]  # finding the checkpoint, and reading it
        entry, share = entry or draw.randint(1, len(took)), draw.random()
        return {"phase": phase, "entry": entry, "share": round(share, 3), "delay_s": round(share * took[min(entry, len(took)) - 1], 4), "signal": int(signal.SIGKILL)}


# -- the campaign -------------------------------------------------------------------------------------------------------------------------------------
def attempt(folder: Path, whole: Whole, moment: dict, second: dict | None, by_itself: bool) -> dict:
    "Returns what became of a run that was killed."
    killed, again = Process(folder, whole.options, moment, (-signal.SIGKILL,)), None
    row = {"moment": moment, "code": killed.code, "killed_in": killed.last_words, "second": None}
    if second:
        again = Process(folder, whole.options, second, (-signal.SIGKILL, 0))
        row["second"] = {"moment": second, "code": again.code, "came_from": again.came_from, "killed_in": again.last_words if again.code else "no moment, the run was over before"}
    last = again if again and again.code == 0 else Process(folder, whole.options, by_itself=by_itself)
    row |= {"last_process": "forked" if last is again or not by_itself else "by itself", "last_came_from": last.came_from, "last_code": last.code}
    ended = killed.expected and last.expected and (again is None or again.expected)
    row |= {"differs": differs(folder, whole.left), "each_picture_once_an_epoch": each_picture_once_an_epoch(folder, whole.options)} if ended else {"differs": ["it did not end"], "each_picture_once_an_epoch": False}
    return row | {"equal": not row["differs"] and row["each_picture_once_an_epoch"]}


def counted(rows: list[dict]) -> dict[str, list[int]]: # phase -> kills, equal
    "Returns the table, the last line over all."
    of = {phase: [r for r in rows if r["moment"]["phase"] == phase] for phase in PHASES}
    return {phase: [len(found), sum(r["equal"] for r in found)] for phase, found in (of | {"all": rows}).items() if found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="moments, dealt to the phases and configurations in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--configurations", type=int, default=len(CONFIGURATIONS), help="how many of them, the first ones")
    parser.add_argument("--record", type=Path, default=HERE / "results" / "kill9.json", help="the file that is written")
    parser.add_argument("--keep", help="keep the runs' folders under this one, which exists")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child: return child(**json.loads(given.child))
    began, at, draw, rows = time.time(), Path(tempfile.mkdtemp(prefix="emo_r3_kill9_", dir=given.keep)).resolve(), random.Random(given.seed), []
    try:
        wholes = {name: Whole(at / f"whole_{i}", name, options) for i, (name, options) in enumerate(list(CONFIGURATIONS.items())[:given.configurations])}
        if not all(w.once for w in wholes.values()): raise RuntimeError("an uninterrupted run did not train on each picture once an epoch, so an interrupted one shows nothing")
        for k in range(given.kills):
            name, phase = list(wholes)[k % len(wholes)], PHASES[k % len(PHASES)]
            moment, second = wholes[name].moment(phase, draw), wholes[name].moment(where := draw.choice(SECOND), draw, entry=None if where == "resuming" else 1)
            row = attempt(at / f"kill_{k}", wholes[name], moment, second if draw.random() < 1 / 3 else None, by_itself=k % 5 == 4)
            rows.append({"configuration": name} | row)
            print(f"{k + 1:3} {time.time() - began:5.0f} s  {'equal  ' if row['equal'] else 'DIFFERS'}  killed in {row['killed_in']}" + (f", then in {row['second']['killed_in']}" if row["second"] else "")
                  + f"; the last went on from {row['last_came_from']}" + "".join(f"\n      {d}" for d in row["differs"]), flush=True)
            if row["equal"] and not given.keep: shutil.rmtree(at / f"kill_{k}")
    finally:
        if not given.keep: shutil.rmtree(at)
    table = counted(rows)
    print(f"\n{'phase':28} kills  equal", *(f"{phase:28} {n:5}  {equal:5}" for phase, (n, equal) in table.items()), sep="\n")
    from contenders import machine
    wall = {name: {"options": w.options, "uninterrupted_wall_s": round(w.wall_s, 1)} for name, w in wholes.items()}
    said = f"OMP_NUM_THREADS=1 python tests/campaigns/kill9.py --kills {given.kills} --seed {given.seed} --configurations {given.configurations}"
    content = {"command": said, "machine": machine(), "wall_s": round(time.time() - began), "configurations": wall, "by_phase": {p: {"kills": n, "equal": e} for p, (n, e) in table.items()},
               "second_kills": sum(bool(r["second"]) and r["second"]["code"] == -signal.SIGKILL for r in rows), "rows": rows}
    given.record.parent.mkdir(exist_ok=True)
    given.record.write_text(json.dumps(content, indent=1) + "\n")
    return int(table["all"][0] != table["all"][1])


if __name__ == "__main__": sys.exit(main())

"""The newest checkpoint of a stopped run is damaged, the same command runs again, and what is left is compared bit by bit with a run that nobody touched.

    taskset -c 0 env OMP_NUM_THREADS=1 python tests/campaigns/damage.py    # about five minutes on one core; writes results/damage.json beside it; --keep FOLDER keeps the runs

SIGTERM comes in the first of the third step's two updates: the newest checkpoint lies inside a step, with its rollouts, the one before it at the second step's end.
In copies of that run's folder one file of the newest is cut to half, removed, or gets one bit flipped in its middle. The first five files are the scorecard's, the other two are more of the same.
Controls: the folder undamaged, and the newest checkpoint taken away by hand. Last, every checkpoint is damaged: an error that says so, exit code 2, and nothing is deleted, the second time too.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kill9 import CONFIGURATIONS, HERE, Process, Whole, differs
from emo_r3.checkpoint import checkpoints, file_sha256

OPTIONS = next(iter(CONFIGURATIONS.values())) | {"keep_last": 2}
STOP = {"phase": "updating", "entry": 5}  # of two a step
FILES = ("policy/model.safetensors", "optimizer.safetensors", "rank_0.safetensors", "state.json", "manifest.json")
MORE = ("metrics.jsonl", "policy/config.json")
RECOVERED, ERROR, SAME, WRONG = OUTCOMES = ("recovered from the one before, bitwise", "error", "silent, same result", "silent, WRONG numbers")


def half(file: Path) -> None: os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


WAYS = {"cut to half": half, "removed": Path.unlink, "bit flipped": flip}


class Stopped:
    "A run that SIGTERM stopped, to be copied, damaged and gone on with."
    def __init__(self, at: Path):
        self.at, self.whole, self.n = at, Whole(at / "whole", "uninterrupted", OPTIONS), 0
        moment = self.whole.moment(STOP["phase"], random.Random(0), STOP["entry"]) | {"signal": int(signal.SIGTERM)}
        run, self.folder = Process(at / "stopped", OPTIONS, moment, (128 + signal.SIGTERM,)), at / "stopped"
        self.code, self.names = run.code, [p.name for p in checkpoints(self.folder / "checkpoints")]
        if not run.expected or self.names != ["step_000002", "step_000002_update_1"]: raise RuntimeError(f"SIGTERM left exit code {run.code} and checkpoints {self.names}")

    def copy(self) -> Path:
        self.n += 1
        return shutil.copytree(self.folder, self.at / f"copy_{self.n}")

    def go_on(self, file: str, damage: str, change: Callable[[Path], None]) -> dict: # change: is given the newest checkpoint
        "Returns what becomes of a damaged copy."
        folder = self.copy()
        change(folder / "checkpoints" / self.names[-1])
        run = Process(folder, OPTIONS, codes=(0, 1, 2))
        told = next((line for line in run.said.splitlines() if "it was set aside as" in line), "")
        aside = [p.name for p in (folder / "checkpoints").glob("damaged_*")]
        row = {"file": file, "damage": damage, "code": run.code, "came_from": run.came_from, "set_aside": aside, "says": self.tidy(told or ([*run.said.splitlines(), ""][-1] if run.code else ""), folder), "names_the_file": file in told}
        if run.code: return row | {"outcome": ERROR, "differs": []}
        for name in aside: shutil.rmtree(folder / "checkpoints" / name)
        differ = differs(folder, self.whole.left)
        shutil.rmtree(folder)
        fell_back = bool(aside) and run.came_from == self.names[-2]
        return row | {"outcome": WRONG if differ else RECOVERED if fell_back else SAME, "differs": differ}

    def tidy(self, line: str, folder: Path) -> str: return line.replace(str(folder), "RUN")

    def controls(self) -> list[dict]:
        rows = [self.go_on("(control)", "none", lambda newest: None), self.go_on("(control)", "newest checkpoint taken away by hand", shutil.rmtree)]
        for row, name in zip(rows, reversed(self.names)):
            if row["outcome"] != SAME or row["came_from"] != name: raise RuntimeError(f"control {row['damage']!r} differs, so damages show nothing: {row}")
        return rows

    def all_damaged(self) -> dict:
        "Returns what becomes of a copy in which every checkpoint is damaged: what it says, and whether every file is still there."
        folder = self.copy()
        for where in checkpoints(folder / "checkpoints"): flip(where / "optimizer.safetensors")
        held = lambda: sorted(file_sha256(p) for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "config.yaml") and "tracking" not in p.parts)
        before, first = held(), Process(folder, OPTIONS, codes=(2,))
        again = Process(folder, OPTIONS, codes=(2,))
        says = [self.tidy(run.said.splitlines()[-1], folder) for run in (first, again)]
        return {"codes": [first.code, again.code], "says": says, "nothing_deleted": held() == before, "set_aside": sorted(p.name for p in (folder / "checkpoints").iterdir())}


def counted(rows: list[dict]) -> dict[str, int]:
    "Returns how often each outcome came in the scorecard's rows."
    return {outcome: sum(r["outcome"] == outcome for r in rows if r["file"] in FILES) for outcome in OUTCOMES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damages", type=int, help="as many files, each in one way; default: every file in every way")
    parser.add_argument("--record", type=Path, default=HERE / "results" / "damage.json", help="the file that is written")
    parser.add_argument("--keep", help="keep the runs' folders under this one, which exists")
    given = parser.parse_args()
    began, at = time.time(), Path(tempfile.mkdtemp(prefix="emo_r3_damage_", dir=given.keep)).resolve()
    one_each = [(file, tuple(WAYS)[k % len(WAYS)]) for k, file in enumerate((*FILES, *MORE))]
    chosen = [(file, how) for file in (*FILES, *MORE) for how in WAYS] if given.damages is None else one_each[:given.damages]
    try:
        stopped, rows = Stopped(at), []
        rows += stopped.controls()
        for file, how in chosen:
            rows.append(stopped.go_on(file, how, lambda newest: WAYS[how](newest / file)))
            print(f"{time.time() - began:5.0f} s  {how:12} {file:26} {rows[-1]['outcome']}{'' if rows[-1]['names_the_file'] else ', the file NOT NAMED'}: {rows[-1]['says']}", flush=True)
        none_whole = stopped.all_damaged()
    finally:
        if not given.keep: shutil.rmtree(at)
    print("every checkpoint damaged:", json.dumps(none_whole, indent=1), "", *(f"{n:3}  {outcome}" for outcome, n in counted(rows).items()), sep="\n")
    from contenders import machine
    content = {"command": "OMP_NUM_THREADS=1 python tests/campaigns/damage.py" + (f" --damages {given.damages}" if given.damages else ""), "machine": machine(), "wall_s": round(time.time() - began), "options": OPTIONS,
               "sigterm": {"code": stopped.code, "checkpoints": stopped.names}, "counts": counted(rows), "named": sum(r["names_the_file"] for r in rows if r["file"] in FILES), "rows": rows, "all_damaged": none_whole}
    given.record.parent.mkdir(exist_ok=True)
    given.record.write_text(json.dumps(content, indent=1) + "\n")
    fine = all(r["outcome"] == RECOVERED for r in rows if r["file"] != "(control)") and none_whole["codes"] == [2, 2] and none_whole["nothing_deleted"]
    return int(not fine)


if __name__ == "__main__": sys.exit(main())

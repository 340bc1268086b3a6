"""A long run: does memory grow, do files stay open, does it get slower?

    python tests/campaigns/soak.py                 # 1,000 steps of the laptop's recipe with small batches; some ten minutes
    python tests/campaigns/soak.py --steps 60 --output soak_short

The recipe is `scenes_cpu` with 4 pictures a step and 4 completions each; it evaluates, writes samples and saves checkpoints as any run does. After every step the resident set, the open file handles and the CPU seconds since the step before are noted.
Bars: the resident set at the end within 5 % of what it was at step 100 (medians of 20 steps), no handle more, and completion tokens a CPU second within 10 % (medians of 100 steps).
"""
import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from contenders import machine

import emo_r3.train as loop
from emo_r3.cli import run, run_config

RESULTS = Path(__file__).parent / "results"


def soak(steps: int, folder: Path) -> list[dict]:
    "Returns a row a step."
    _, config = run_config("scenes_cpu", {})
    config = replace(config, prompts_per_step=4, prompts_per_update=4, num_generations=4, train_size=400, epochs=-(-steps // 100), max_steps=steps, eval_size=16, eval_during=8, eval_every=100, save_every=25, sample_every=25, keep_last=2)
    process, rows, real = psutil.Process(), [], loop.append_metrics
    def noted(target, step, metrics):
        real(target, step, metrics)
        if "reward" not in metrics: return
        cpu = time.process_time()
        rows.append({"step": step, "rss": process.memory_info().rss, "handles": process.num_fds(), "cpu_s": cpu - noted.cpu, "tokens": metrics["completions/mean_length"] * 16, "evaluated": any(k.startswith("eval/") for k in metrics)})
        noted.cpu = cpu
    noted.cpu, loop.append_metrics = time.process_time(), noted
    try: run(config, folder, "soak")
    finally: loop.append_metrics = real
    return rows


def verdict(rows: list[dict]) -> dict:
    "Returns the figures and whether each bar is met."
    last, begin = len(rows), min(100, len(rows) // 3)
    rss = lambda at: median(r["rss"] for r in rows[at - 10: at + 10])
    speed = lambda part: median(r["tokens"] / r["cpu_s"] for r in part if not r["evaluated"])
    width = min(100, last // 3)
    out = {"steps": last, "rss_begin": rss(begin), "rss_end": rss(last - 10), "handles_begin": rows[begin]["handles"], "handles_end": rows[-1]["handles"],
           "tokens_per_cpu_s_begin": speed(rows[begin: begin + width]), "tokens_per_cpu_s_end": speed(rows[-width:])}
    out["memory_grew"], out["speed_changed"] = out["rss_end"] / out["rss_begin"] - 1, out["tokens_per_cpu_s_end"] / out["tokens_per_cpu_s_begin"] - 1
    out["met"] = {"memory": out["memory_grew"] <= 0.05, "handles": out["handles_end"] <= out["handles_begin"], "speed": out["speed_changed"] >= -0.1}
    return out


def main() -> None:
    "Runs, prints the figures, writes results/soak.json; exit code 1 where a bar is missed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", default="soak", help="name of the file in tests/campaigns/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder: rows = soak(args.steps, Path(folder) / "run")
    found = verdict(rows)
    for name, value in found.items(): print(f"{name:24s} {value}")
    record = {"command": " ".join(["python", "tests/campaigns/soak.py", *sys.argv[1:]]), "machine": machine(), "verdict": found, "rows": rows[:: max(1, len(rows) // 200)]}
    (RESULTS / f"{args.output}.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(0 if all(found["met"].values()) else 1)


if __name__ == "__main__": main()

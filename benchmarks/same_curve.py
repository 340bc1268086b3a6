"""Is the quick path's training run the plain path's, only quicker? Both from the same seed: `emo-r3 train scenes_cpu` with shared prompts and without.

    python benchmarks/same_curve.py              # about a quarter of an hour on two cores
    python benchmarks/same_curve.py --seed 2 --max-steps 20

Two processes side by side, one thread each, so that both meet the same machine. Where both sample the same tokens their rewards are equal, step by step; after some updates rounding has moved a weight in its
last digits far enough to turn one draw, and the runs part as two seeds do. Writes benchmarks/results/same_curve.json, and a plot.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from emo_r3.experiments import machine
from three_methods import HERE, KEEP

PATHS = {"fast": [], "plain": ["--shared-prefix", "false"]}
NAMES = ("reward", "rewards/accuracy/mean", "grounding", "kl", "completions/mean_length", "step_time", "timing_s/rollout", "timing_s/reflect", "timing_s/logps", "timing_s/update")


def run(path: str, folder: Path, options: list[str]) -> dict:
    "Returns one run's curves and evaluations; raises if it fails."
    command = [str(Path(sys.executable).with_name("emo-r3")), "train", "scenes_cpu", "--output-dir", str(folder / path), *options, *PATHS[path]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (folder / path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / path / "summary.json").read_text())
    steps = [r for r in rows if "reward" in r]
    short = lambda report: {d: {k: v.get(k) for k in KEEP} for d, v in report.items()}
    return {"wall_s": summary["wall_s"], "curves": {n: [r[n] for r in steps] for n in NAMES}, "before": short(summary["before"]), "after": short(summary["after"])}


def plot(runs: dict, target: Path) -> None:
    "Draws reward and grounding of both runs."
    fig, axes = plt.subplots(1, 2, figsize=(9, 2.8))
    for ax, name in zip(axes, ("reward", "grounding")):
        for path, colour, width in (("plain", "C3", 3), ("fast", "C0", 1.2)): ax.plot(range(1, len(runs[path]["curves"][name]) + 1), runs[path]["curves"][name], color=colour, lw=width, alpha=0.8, label=path)
        ax.set(xlabel="step", ylabel=name)
    axes[0].legend(); fig.tight_layout(); fig.savefig(target, dpi=80)


def main() -> None:
    "Runs both, compares, writes."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="same_curve", help="name of the files in benchmarks/results")
    args, options = parser.parse_known_args()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        runs = dict(zip(PATHS, pool.map(lambda p: run(p, Path(folder), options), PATHS)))
    rewards = [runs[p]["curves"]["reward"] for p in PATHS]
    equal = next((i for i, (a, b) in enumerate(zip(*rewards)) if abs(a - b) > 1e-6), len(rewards[0]))
    seconds = {p: median(runs[p]["curves"]["step_time"]) for p in PATHS}
    out = {"command": " ".join(["python benchmarks/same_curve.py", *options]), "machine": machine(), "steps": len(rewards[0]), "steps_with_equal_rewards": equal, "mean_absolute_difference_of_reward": mean(abs(a - b) for a, b in zip(*rewards)),
           "median_step_s": seconds, "plain_over_fast": {"median step": seconds["plain"] / seconds["fast"], "whole run": runs["plain"]["wall_s"] / runs["fast"]["wall_s"]}, "runs": runs}
    (HERE / "results" / f"{args.output}.json").write_text(json.dumps(out, indent=1) + "\n")
    plot(runs, HERE / "results" / f"{args.output}.webp")
    print({k: out[k] for k in ("steps", "steps_with_equal_rewards", "median_step_s", "plain_over_fast")})


if __name__ == "__main__": main()

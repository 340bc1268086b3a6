"""Table 3's ablation on the embedded scenes: plain GRPO, SET alone, and EMO-R3 with either judge, over several seeds.

    python benchmarks/three_methods.py            # about forty minutes on two cores; finished runs are not repeated
    python benchmarks/three_methods.py --collect  # only gather what is there

Every run is `emo-r3 train scenes_cpu --method ... --judge ... --seed ...`, one thread each, two at a time; the figures are gathered
into benchmarks/results/three_methods.json, which the page nbs/tutorials/three_methods.ipynb and the README read.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emo_r3.experiments import machine

HERE = Path(__file__).parent
CELLS = {"emo_r3": ["--method", "emo_r3"], "set": ["--method", "set"], "emo_r3, reference judges": ["--method", "emo_r3", "--judge", "reference"], "grpo": ["--method", "grpo"]}
KEEP = ("accuracy", "n", "ci95", "unparsed", "format", "grounding", "coverage", "macro_f1", "consistent", "faithfulness", "judge_accuracy")
CURVES = ("reward", "rewards/accuracy/mean", "rewards/format/mean", "rewards/consistency/mean", "rewards/coherence/mean", "grounding", "judge/consistency_accuracy",
          "frac_reward_zero_std", "entropy", "kl", "completions/mean_length", "step_time", "timing_s/rollout", "timing_s/reflect", "timing_s/logps", "timing_s/update")


def run(folder: Path, options: list[str], seed: int, more: list[str]) -> None:
    "One training run in a process of its own, unless it has finished before; a half-finished folder is an error."
    if (folder / "summary.json").exists():
        said = json.loads((folder / "command.json").read_text())
        if said != [machine()["policy_sha256"], *options, *more]: raise SystemExit(f"{folder.name} was run otherwise ({said}); remove it, or name another --runs folder")
        return
    command = [str(Path(sys.executable).with_name("emo-r3")), "train", "scenes_cpu", "--output-dir", str(folder), "--seed", str(seed), *options, *more]
    with folder.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"{folder.name}: exit code {done.returncode}", flush=True)
    if done.returncode == 0: (folder / "command.json").write_text(json.dumps([machine()["policy_sha256"], *options, *more]))
    if done.returncode or not (folder / "summary.json").exists(): raise SystemExit(f"{folder.name} failed, see {folder.with_suffix('.log')}")


def gather(folder: Path, cell: str, seed: int) -> dict:
    "One run's figures."
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    short = lambda report: {domain: {k: figures.get(k) for k in KEEP} for domain, figures in report.items()}
    steps = [r for r in rows if "reward" in r]
    curves = {name: [round(r[name], 4) for r in steps] for name in CURVES if name in steps[0]}
    return {"cell": cell, "seed": seed, "steps": summary["steps"], "wall_s": summary["wall_s"], "before": short(summary["before"]), "after": short(summary["after"]), "curves": curves}


def options(doc: str, name: str, seeds: int) -> argparse.ArgumentParser:
    "Returns the options of a benchmark that trains cells over seeds, `name` being that of its record; what they do not know goes to every training run."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / name, help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, default=HERE / "results" / f"{name}.json")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    return parser


def run_all(jobs: list[tuple[Path, str, int]], cells: dict[str, list[str]], args: argparse.Namespace, more: list[str]) -> None:
    "Runs what is missing of the jobs (folder, cell, seed), some at a time; nothing where only collecting was asked for."
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.collect: return
    with ThreadPoolExecutor(args.parallel) as pool: list(pool.map(lambda job: run(job[0], cells[job[1]], job[2], more), jobs))


def main() -> None:
    "Runs what is missing, then gathers."
    args, more = options(__doc__, "three_methods", seeds=3).parse_known_args()
    jobs = [(args.runs / f"{cell.split(',')[0]}{'-reference' if ',' in cell else ''}-{seed}", cell, seed) for cell in CELLS for seed in range(1, args.seeds + 1)]
    run_all(jobs, CELLS, args, more)
    found = [gather(*job) for job in jobs if (job[0] / "summary.json").exists()]
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps({"command": "python benchmarks/three_methods.py", "options": more, "machine": machine(), "runs": found}, indent=1) + "\n")
    print(f"{len(found)} of {len(jobs)} runs -> {args.output}")


if __name__ == "__main__": main()

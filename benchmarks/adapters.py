"""LoRA and 4-bit training on the embedded scenes: does an adapter learn what all weights learn, and is it the same policy after saving, loading and merging?

    python benchmarks/adapters.py            # about an hour on two cores; finished runs are not repeated
    python benchmarks/adapters.py --collect  # only gather what is there

Every run is `emo-r3 train scenes_cpu` with the options in CELLS and a seed, in a process of its own with one thread. Then each policy is loaded again, merged both ways by `emo_r3.export`, and measured on the same test
scenes: accuracy, and the log-probabilities of its own greedy completions. Written into benchmarks/results/adapters.json.
"""
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from three_methods import gather, options, run_all

from emo_r3.cli import EVAL_SEED
from emo_r3.evaluate import evaluate
from emo_r3.experiments import machine
from emo_r3.export import MERGES, Difference, Probe, export_policy
from emo_r3.policy import load_policy, load_processor
from emo_r3.sampling import PolicySampler
from emo_r3.scenes import make_scenes

CELLS = {"lora": ["--lora-rank", "16", "--learning-rate", "1e-3"],
         "four_bit": ["--lora-rank", "16", "--learning-rate", "1e-3", "--four-bit", "true", "--optimizer", "paged_adamw_8bit"]}
DOMAINS = ("in_domain", "style")  # that merged policies are measured on


def plain(d: Difference) -> dict: return {"mean": d.mean, "largest": d.largest, "same": d.same, "n": d.n, "tokens": d.tokens}


def accuracy(policy, processor, n: int) -> dict:
    "Returns the accuracy on the run's test scenes, and its interval."
    found = {domain: evaluate(PolicySampler(policy, processor), make_scenes(domain, "test", n, EVAL_SEED), method="emo_r3", max_new_tokens=64) for domain in DOMAINS}
    return {domain: {"accuracy": r.accuracy, "ci95": list(r.ci95), "n": r.n} for domain, r in found.items()}


def forms(folder: Path, cell: str, n: int) -> dict:
    "Returns what a run's policy is like as it is loaded again, and merged: how far from what was trained, and how accurate."
    trained, processor, out = load_policy(folder / "policy"), load_processor(folder / "policy"), {}
    probe = Probe(trained, processor, "emo_r3", n=32)
    out["loaded again"] = {"difference": plain(probe.compare(load_policy(folder / "policy"))), "accuracy": accuracy(load_policy(folder / "policy"), processor, n)}
    for onto in MERGES if cell == "four_bit" else ("full",):
        with TemporaryDirectory() as place:
            exported = load_policy(export_policy(folder, Path(place) / "out", merge=onto).folder)
            out[f"merged, {onto}"] = {"difference": plain(probe.compare(exported)), "accuracy": accuracy(exported, processor, n)}
    return out


def main() -> None:
    "Runs what is missing, then measures and gathers."
    parser = options(__doc__, "adapters", seeds=2)
    parser.add_argument("--test", type=int, default=192, help="test scenes a domain for loaded and merged policies")
    args, more = parser.parse_known_args()
    jobs = [(args.runs / f"{cell}-{seed}", cell, seed) for seed in range(1, args.seeds + 1) for cell in CELLS]
    run_all(jobs, CELLS, args, more)
    found = [gather(*job) | {"forms": forms(job[0], job[1], args.test)} for job in jobs if (job[0] / "summary.json").exists()]
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps({"command": "python benchmarks/adapters.py", "options": more, "cells": CELLS, "machine": machine(), "runs": found}, indent=1) + "\n")
    print(f"{len(found)} of {len(jobs)} runs -> {args.output}")


if __name__ == "__main__": main()

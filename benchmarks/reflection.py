"""Reflection's share of a step, asked by `score` and by `generate`, and how often the two agree.

    python benchmarks/reflection.py                   # the share, then 512 completions judged both ways
    python benchmarks/reflection.py --pictures 128 --domain style

The share: whole steps of ours in turn (score, generate, score ...), after one round to warm up; what reflection adds is its seconds over those of the rest of the step.
The agreement: the same completions of the same policy are judged by `score` and by `generate` - greedily, and at the temperature at which the released code asks - and of the answers to
each question the share is given that are equal, among the completions that were asked about. Where `generate` wrote something unreadable, that counts as unequal and is named.
"""
import argparse
import sys
import time
import warnings
from dataclasses import replace

import torch

from contenders import RESULTS, Case, Ours, policy_of, processor_of, write
from step import interleaved_runs, spread

import emo_r3.train as ours
from emo_r3.reflection import reflect
from emo_r3.rewards import RewardWeights
from emo_r3.sampling import PolicyJudge
from emo_r3.scenes import DOMAINS, make_scenes

warnings.filterwarnings("ignore")
WAYS = ("score", "generate")


def shares(case: Case, repeats: int, shared_prefix: bool = True) -> dict[str, dict]:
    "Returns, for either way of asking, the step's and reflection's seconds and what reflection adds to the rest."
    runners = {way: Ours(case, shared_prefix, reflect=True, reflection=way, steps=repeats + 1) for way in WAYS}
    steps, out = interleaved_runs({way: r.step for way, r in runners.items()}, repeats), {}
    for way, rows in steps.items():
        adds = [r["timing_s/reflect"] / (r["wall_s"] - r["timing_s/reflect"]) for r in rows]
        out[way] = {"wall_s": spread([r["wall_s"] for r in rows]), "cpu_s": spread([r["cpu_s"] for r in rows]), "reflect_s": spread([r["timing_s/reflect"] for r in rows]), "adds": spread(adds),
                    "asked": spread([r["asked"] for r in rows]), "steps": rows}
    return out


def agreement(case: Case, pictures: int, domain: str, seed: int) -> dict:
    "Returns how often written answers equal scored ones on the policy's own completions."
    policy, processor = policy_of(case), processor_of(case)
    trainer = ours.Trainer(replace(case.config(True, "set"), prompts_per_step=pictures, prompts_per_update=pictures, train_size=pictures), policy, processor)
    examples = make_scenes(domain, "test", pictures, seed=seed)
    experience = ours.collect(trainer, examples, seed, {})
    repeated, weights = [x for x in examples for _ in range(case.num_generations)], RewardWeights()
    scored = reflect(experience.completions, repeated, PolicyJudge(policy, processor), weights, "score")
    asked = [i for i, v in enumerate(scored) if v.asked]
    out = {"domain": domain, "completions": len(scored), "asked": len(asked)}
    for name, temperature, top_p in (("greedy", 0.0, 1.0), (f"temperature {weights.judge_temperature}", weights.judge_temperature, weights.judge_top_p)):
        torch.manual_seed(seed)
        written = reflect(experience.completions, repeated, PolicyJudge(policy, processor, temperature=temperature, top_p=top_p), weights, "generate")
        row = {}
        for kind in ("consistency", "coherence"):
            pairs = [(getattr(scored[i], f"{kind}_answer"), getattr(written[i], f"{kind}_answer")) for i in asked]
            row[kind] = {"equal": sum(a == b for a, b in pairs) / len(pairs), "unreadable": sum(b is None for _, b in pairs) / len(pairs),
                         "same reward": sum(getattr(scored[i], kind) == getattr(written[i], kind) for i in asked) / len(pairs)}
        out[name] = row
    return out


def draw(share: dict, target) -> None:
    "Draws a step's seconds, reflection's set apart."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(4.2, 1.9), layout="constrained")
    for y, way in enumerate(WAYS):
        whole, part = share[way]["wall_s"]["median"], share[way]["reflect_s"]["median"]
        axis.barh(y, whole - part, color="C0", label="rest of the step" if not y else None)
        axis.barh(y, part, left=whole - part, color="C1", label="reflection" if not y else None)
        axis.text(whole, y, f" +{share[way]['adds']['median']:.0%}", va="center", fontsize=8)
    axis.set_yticks(range(len(WAYS)), WAYS)
    axis.set_xlabel("seconds a step")
    axis.margins(x=0.15)
    figure.legend(fontsize=7, loc="outside upper center", ncols=2)
    figure.savefig(target, dpi=110)


def main() -> None:
    "Measures, writes results/reflection.json and reflection.webp."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="pictures a step")
    parser.add_argument("--num-generations", type=int, default=8, help="G")
    parser.add_argument("--freeze-vision", action="store_true")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, after one to warm up")
    parser.add_argument("--pictures", type=int, default=64, help="for the agreement, each with G completions")
    parser.add_argument("--domain", default="in_domain", choices=DOMAINS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default="reflection", help="name of the files in benchmarks/results")
    args = parser.parse_args()
    case = Case(prompts=args.prompts, num_generations=args.num_generations, freeze_vision=args.freeze_vision)
    share = shares(case, args.repeats)
    for way, found in share.items():
        print(f"{way:8s}  step {found['wall_s']['median']:.3f} s, reflection {found['reflect_s']['median']:.3f} s: it adds {found['adds']['median']:.1%} ({found['adds']['low_quartile']:.1%} to {found['adds']['high_quartile']:.1%})", flush=True)
    clock = time.perf_counter()
    agree = agreement(case, args.pictures, args.domain, args.seed)
    print(f"agreement over {agree['asked']} of {agree['completions']} completions ({time.perf_counter() - clock:.0f} s)")
    for name in list(agree)[3:]: print(f"  {name}: " + ", ".join(f"{kind} {row['equal']:.1%} equal ({row['unreadable']:.1%} unreadable)" for kind, row in agree[name].items()))
    print(write(args.output, " ".join(["python", "benchmarks/reflection.py", *sys.argv[1:]]), share=share, agreement=agree))
    draw(share, RESULTS / f"{args.output}.webp")


if __name__ == "__main__": main()

"""Time and memory of one whole step - pictures, sampling, reflection, reference, update, log - ours against TRL's GRPOTrainer with the paper's rewards as reward functions.

    python benchmarks/step.py                         # G = 8, four pictures a step, with and without reflection
    python benchmarks/step.py --groups 4,8,16 --prompts 8 --repeats 11
    python benchmarks/step.py --no-peak               # times alone

Wall time and CPU time (of the process, all threads) are taken in turn, TRL, ours fast, ours plain, TRL ..., after one round to warm up; the ratio is taken within a round, and its median and
quartiles are given. Completions have their natural lengths under one limit: all sample from the same weights. Reflection: ours compares the answers' probabilities (`score`); TRL's reward
function asks the model by `generate`, one batch for each of the two questions, which is what `--reflection generate` makes ours do too. Peak memory is that of a process of its own.
"""
import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median, quantiles

from contenders import RESULTS, Case, Ours, Trl, forget_peak, in_a_process, peak_bytes, write

warnings.filterwarnings("ignore")
SHARED = {"fast": True, "plain": False}


def timed(run) -> dict:
    "Returns a step's wall and CPU seconds beside what it says of itself."
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = run()
    took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return took | {k: v for k, v in metrics.items() if k.startswith(("timing_s/", "completions/mean", "asked"))}


def interleaved_runs(runs: dict[str, Callable[[], dict]], repeats: int, peer: Trl | None = None) -> dict[str, list[dict]]:
    "Returns every contender's steps, round by round, the first round left out; TRL, if it takes part, goes first in each."
    rows = {name: [] for name in runs}
    def in_turn():
        for name, run in runs.items(): rows[name].append(timed(run))
    if peer is not None: rows["trl"] = peer.run(repeats + 1, between=in_turn)
    else:
        for _ in range(repeats + 1): in_turn()
    return {name: steps[1:] for name, steps in rows.items()}


def interleaved(case: Case, reflect: bool, repeats: int, contenders: list[str], reflection: str = "score") -> dict[str, list[dict]]:
    "Returns the steps of ours and TRL."
    mine = {name: Ours(case, SHARED[name], reflect, reflection, steps=repeats + 1).step for name in contenders if name in SHARED}
    return interleaved_runs(mine, repeats, Trl(case, reflect, steps=repeats + 1) if "trl" in contenders else None)


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "low_quartile": low, "high_quartile": high, "least": min(values), "most": max(values)}


def summary(steps: dict[str, list[dict]]) -> dict:
    "Returns medians with their spread, and how many times ours each takes, round by round."
    out = {name: {key: spread([s[key] for s in rows]) for key in ("wall_s", "cpu_s", "completions/mean_length")} for name, rows in steps.items()}
    for name, rows in steps.items():
        if name != "fast" and "fast" in steps:
            for key in ("wall_s", "cpu_s"): out[name][f"{key} / fast"] = spread([a[key] / b[key] for a, b in zip(rows, steps["fast"])])
        phases = [k for k in rows[0] if k.startswith("timing_s/")]
        if phases: out[name]["phases_s"] = {k.removeprefix("timing_s/"): median(s[k] for s in rows) for k in phases}
    return out


def peak_of(case: Case, contender: str, reflect: bool, reflection: str, steps: int = 2) -> dict[str, int]:
    "Returns what this process held when a contender was built, and the most that it held over some steps."
    runner = Trl(case, reflect, steps=steps) if contender == "trl" else Ours(case, SHARED[contender], reflect, reflection, steps=steps)
    forget_peak()
    built = peak_bytes()
    if contender == "trl": runner.run(steps)
    else: [runner.step() for _ in range(steps)]
    return {"built_bytes": built, "peak_bytes": peak_bytes(), "step_bytes": peak_bytes() - built}


def peak_in_a_process(options: list[str], contender: str, G: int, reflect: bool) -> dict[str, int]:
    "Returns `peak_of` from a process of its own."
    return in_a_process(__file__, [*options, "--groups", str(G), "--peak-of", contender, *([] if reflect else ["--without"])])


def draw(rows: list[dict], target) -> None:
    "Draws the seconds of a step, a bar for each contender."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
    names = list(rows[0]["summary"])
    for axis, (key, unit) in zip(axes, (("cpu_s", "CPU seconds a step"), ("peak", "MB that a step adds"))):
        for j, name in enumerate(names):
            at = [i + 0.27 * (j - 1) for i in range(len(rows))]
            if key == "peak":
                if "peak" in rows[0]: axis.bar(at, [r["peak"][name]["step_bytes"] / 1e6 for r in rows], 0.25, label=name)
                continue
            found = [r["summary"][name][key] for r in rows]
            errors = [[f["median"] - f["low_quartile"] for f in found], [f["high_quartile"] - f["median"] for f in found]]
            axis.bar(at, [f["median"] for f in found], 0.25, yerr=errors, label=name, error_kw={"lw": 0.8})
        axis.set_ylabel(unit)
        axis.set_xticks(range(len(rows)), [f"G = {r['G']}\n{'with' if r['reflect'] else 'without'}\nreflection" for r in rows], fontsize=7)
    axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=110)


def main() -> None:
    "Measures, writes results/step.json and step.webp."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default="8", help="G, several with commas")
    parser.add_argument("--prompts", type=int, default=4, help="pictures a step; none comes twice")
    parser.add_argument("--prompt-tokens", type=int, default=None, help="exact length of a prompt; otherwise as it comes (124)")
    parser.add_argument("--side", type=int, default=4, help="a picture's edge in image tokens")
    parser.add_argument("--completion-tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--tokens-per-forward", type=int, default=16_384)
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--freeze-vision", action="store_true")
    parser.add_argument("--reflection", default="score", choices=("score", "generate"), help="how ours asks; TRL's reward function always generates")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, after one to warm up")
    parser.add_argument("--contenders", type=lambda t: t.split(","), default=["fast", "plain", "trl"])
    parser.add_argument("--without", action="store_true", help="only without reflection")
    parser.add_argument("--no-peak", action="store_true")
    parser.add_argument("--peak-of", choices=("fast", "plain", "trl"), help="measure one contender's memory in this process, print it, write nothing")
    parser.add_argument("--output", default="step", help="name of the files in benchmarks/results")
    args = parser.parse_args()
    of = lambda G: Case(args.prompts, G, args.prompt_tokens, args.completion_tokens, args.side, args.freeze_vision, args.beta, args.tokens_per_forward)
    if args.peak_of: return print(json.dumps(peak_of(of(int(args.groups)), args.peak_of, not args.without, args.reflection)))
    options = [o for k in ("prompts", "prompt_tokens", "side", "completion_tokens", "tokens_per_forward", "beta", "reflection") if (v := getattr(args, k)) is not None for o in (f"--{k.replace('_', '-')}", str(v))]
    options += ["--freeze-vision"] if args.freeze_vision else []
    rows = []
    for G in map(int, args.groups.split(",")):
        for reflect in ([False] if args.without else [True, False]):
            steps = interleaved(of(G), reflect, args.repeats, args.contenders, args.reflection)
            row = {"G": G, "reflect": reflect, "case": vars(of(G)), "summary": summary(steps), "steps": steps}
            if not args.no_peak: row["peak"] = {name: peak_in_a_process(options, name, G, reflect) for name in args.contenders}
            rows.append(row)
            print(f"G {G}, {'with' if reflect else 'without'} reflection")
            for name, found in row["summary"].items():
                ratio = "".join(f"  {key.split('_')[0]} {found[f'{key} / fast']['median']:.2f} ({found[f'{key} / fast']['low_quartile']:.2f} to {found[f'{key} / fast']['high_quartile']:.2f}) times ours fast"
                                for key in ("cpu_s", "wall_s") if f"{key} / fast" in found)
                memory = f"  peak {row['peak'][name]['peak_bytes'] / 1e6:.0f} MB, a step adds {row['peak'][name]['step_bytes'] / 1e6:.0f}" if "peak" in row else ""
                print(f"  {name:6s} CPU {found['cpu_s']['median']:.3f} s, wall {found['wall_s']['median']:.3f} s, mean length {found['completions/mean_length']['median']:.1f}{ratio}{memory}  {found.get('phases_s', '')}", flush=True)
    print(write(args.output, " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]), rows=rows))
    if set(args.contenders) <= {"fast", "plain", "trl"}: draw(rows, RESULTS / f"{args.output}.webp")


if __name__ == "__main__": main()

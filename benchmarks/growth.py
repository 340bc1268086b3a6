"""How an update and a step grow: time, operations and memory against G, prompt tokens, completion tokens and picture size, one at a time from one case in the middle.

    python benchmarks/growth.py                       # ours fast and plain; some forty minutes
    python benchmarks/growth.py --contenders fast,plain,trl --repeats 5
    python benchmarks/growth.py --axes G --values 2,4,8

The middle: one picture of 16 image tokens, a prompt of 148 tokens, G = 8, completions of 64. Prompt tokens grow by words, pictures by their edge with the words as they are.
Every point is measured in a process of its own, so that its peak memory is its own; lengths are forced (an end token that is never drawn, random ids for the update), so reflection,
which needs readable completions, is left out; the step has sampling, reference and update.
"""
import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict, replace
from statistics import median

from contenders import RESULTS, Case, Meter, Ours, Trl, forget_peak, in_a_process, peak_bytes, write
from flops import prompt_length, shape_of, step_cost, update_cost

warnings.filterwarnings("ignore")
MIDDLE = Case(prompts=1, num_generations=8, prompt_tokens=148, completion_tokens=64)
AXES = {"G": ("num_generations", [2, 4, 8, 16, 32]), "prompt tokens": ("prompt_tokens", [130, 250, 500, 1000, 2000]),
        "completion tokens": ("completion_tokens", [16, 32, 64, 128, 256]), "image tokens": ("side", [4, 8, 16, 32])}


def at(axis: str, value: int) -> Case:
    "Returns the middle case with one size changed; a picture's growth lengthens its prompt."
    case = replace(MIDDLE, **{AXES[axis][0]: value})
    return replace(case, prompt_tokens=MIDDLE.prompt_tokens + value**2 - MIDDLE.side**2) if axis == "image tokens" else case


def repeat(run, repeats: int) -> dict:
    "Returns the median time of a call after one to warm up, its peak memory, and its operations."
    forget_peak()
    before, wall, cpu = peak_bytes(), [], []
    for _ in range(repeats + 1):
        at_wall, at_cpu = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - at_wall)
        cpu.append(time.process_time() - at_cpu)
    peak = peak_bytes()
    with Meter() as meter: run()
    return {"wall_s": median(wall[1:]), "cpu_s": median(cpu[1:]), "peak_bytes": peak, "added_bytes": peak - before, "flop": meter.counter.get_total_flops(), **meter.kinds}


def repeat_trl(peer: Trl, repeats: int) -> dict:
    "Returns the same for TRL, whose steps run inside its own loop."
    forget_peak()
    before = peak_bytes()
    steps = peer.run(repeats + 1)[1:]
    peak = peak_bytes()
    with Meter() as meter: peer.run(1)
    return {"wall_s": median(s["wall_s"] for s in steps), "cpu_s": median(s["cpu_s"] for s in steps), "peak_bytes": peak, "added_bytes": peak - before, "flop": meter.counter.get_total_flops(), **meter.kinds}


def point(case: Case, contender: str, what: str, repeats: int) -> dict:
    "Measures one contender's update or step in this process."
    alone = replace(case, beta=0.0) if what == "update" else case
    if contender == "trl": return repeat_trl(Trl(alone, reflect=False, forced=what == "step", made_up=what == "update", steps=repeats + 2), repeats)
    mine = Ours(alone, contender == "fast", reflect=False, forced=what == "step", steps=repeats + 2)
    if what == "step": return repeat(mine.step, repeats)
    experience = mine.forced_experience()
    return repeat(lambda: mine.update(experience), repeats)


def draw(rows: list[dict], target) -> None:
    "Draws a column for each axis; rows: CPU seconds, operations beside the formula, memory."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    axes_here = list(dict.fromkeys(r["axis"] for r in rows))
    figure, grid = plt.subplots(3, len(axes_here), figsize=(2.7 * len(axes_here) + 1, 6.6), sharey="row", squeeze=False, layout="constrained")
    kinds = (("cpu_s", 1, "CPU seconds"), ("flop", 1e9, "GFLOP"), ("added_bytes", 1e6, "MB added"))
    for column, axis in enumerate(axes_here):
        here = [r for r in rows if r["axis"] == axis]
        for line, (key, unit, label) in enumerate(kinds):
            plot = grid[line][column]
            for name, colour in (("fast", "C0"), ("plain", "C1"), ("trl", "C2")):
                for what, style in (("update", "-o"), ("step", "--s")):
                    points = sorted((r["x"], r[key] / unit) for r in here if r["contender"] == name and r["what"] == what)
                    if points: plot.plot(*zip(*points), style, color=colour, ms=3, lw=1.1, label=f"{name}, {what}" if not (line or column) else None)
            if key == "flop":
                for what, style in (("update", "-"), ("step", "--")):
                    points = sorted({(r["x"], r["floor"] / unit) for r in here if r["what"] == what})
                    plot.plot(*zip(*points), style, color="0.6", lw=3, zorder=0, label=f"floor, {what}" if not column else None)
            plot.set(xscale="log", yscale="log")
            plot.set_xticks(sorted({r["x"] for r in here}), sorted({r["x"] for r in here}), fontsize=7)
            plot.minorticks_off()
            if not column: plot.set_ylabel(label)
            if line == 2: plot.set_xlabel(axis)
    figure.legend(loc="outside right", fontsize=7)
    figure.savefig(target, dpi=100)


def main() -> None:
    "Measures, writes results/growth.json and growth.webp."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", type=lambda t: t.split(","), default=list(AXES), help=", ".join(AXES))
    parser.add_argument("--values", type=lambda t: [int(n) for n in t.split(",")], help="in place of an axis' own; for image tokens, a picture's edge")
    parser.add_argument("--contenders", type=lambda t: t.split(","), default=["fast", "plain"])
    parser.add_argument("--what", type=lambda t: t.split(","), default=["update", "step"])
    parser.add_argument("--repeats", type=int, default=3, help="after one to warm up")
    parser.add_argument("--output", default="growth", help="name of the files in benchmarks/results")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        case, *rest = json.loads(args.point)
        return print(json.dumps(point(Case(**case), *rest)))
    if unknown := [a for a in args.axes if a not in AXES]: parser.error(f"--axes: {unknown[0]!r}; allowed: {', '.join(AXES)}")
    shape, rows = shape_of(MIDDLE), []
    for axis in args.axes:
        for value in args.values or AXES[axis][1]:
            case = at(axis, value)
            for what, cost in (("update", update_cost), ("step", step_cost)):
                if what not in args.what: continue
                floor = cost(shape, case, prompt_length(case), "shared", True)
                for contender in args.contenders:
                    found = in_a_process(__file__, ["--point", json.dumps([asdict(case), contender, what, args.repeats])])
                    rows.append({"axis": axis, "x": value**2 if axis == "image tokens" else value, "contender": contender, "what": what, "case": asdict(case), "floor": floor.total, **found})
                    print(f"{axis} {rows[-1]['x']:5d}  {what:6s} {contender:5s}  CPU {found['cpu_s']:7.3f} s  {found['flop'] / 1e9:8.2f} GFLOP ({found['flop'] / floor.total:.2f} times the floor, attention {found['attention'] / found['flop']:.0%})"
                          f"  {found['flop'] / 1e9 / found['cpu_s']:6.1f} GFLOP/s  +{found['added_bytes'] / 1e6:.0f} MB", flush=True)
    print(write(args.output, " ".join(["python", "benchmarks/growth.py", *sys.argv[1:]]), rows=rows))
    draw(rows, RESULTS / f"{args.output}.webp")


if __name__ == "__main__": main()
